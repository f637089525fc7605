#version 450
#extension GL_GOOGLE_include_directive : require
// Gradient of the queries, one workgroup a block of query rows that visits the tiles of its row of the map.
// Workgroups: (query tiles x blocks of a tile, heads, batch), the last query tile first.

#define VALUES
#define GRADIENTS
#define SKIPPED_AT 7
#include "numeric.glsl"
#include "tiles.glsl"
#include "backward.glsl"

layout(set = 0, binding = 6) restrict writeonly buffer Results { vec4 d_q[]; };

void main() {
    uint blocks = (query_tile + OWN - 1) / OWN;
    uint tile = query_tiles - 1 - gl_WorkGroupID.x / blocks;
    uint in_tile = gl_WorkGroupID.x % blocks * OWN;
    uint head = gl_WorkGroupID.z * heads + gl_WorkGroupID.y;
    uint kv_first = (gl_WorkGroupID.z * kv_heads + gl_WorkGroupID.y / (heads / kv_heads)) * keys;
    uint row_first = tile * query_tile + in_tile;
    if (row_first >= queries) return;
    uint count = min(min(query_tile - in_tile, queries - row_first), OWN);
    Block own_q = Block(head * queries + row_first, count, HEAD_DIM);
    Block own_d = Block(own_q.first, count, VALUE_DIM);

    vec4 sums[HEAD_CHUNKS * PIECE * ROWS];
    vec4 scores[ROWS], d_weights[ROWS];
    [[unroll]] for (uint i = 0; i < HEAD_CHUNKS * PIECE * ROWS; ++i) sums[i] = vec4(0);

    uint map_row = head * query_tiles + tile;
    for (uint entry = tiles[map_row]; entry < tiles[map_row + 1]; ++entry) {
        uint cut = tiles[cuts_at + entry], key_first = tiles[columns_at + entry] * key_tile;
        uint tile_keys = min(key_tile, keys - key_first);
        for (uint word = 0; word * OTHER < tile_keys; ++word) {
            uint seen_here = min(tile_keys - word * OTHER, OTHER);
            Block other_k = Block(kv_first + key_first + word * OTHER, seen_here, HEAD_DIM);
            Block other_v = Block(other_k.first, seen_here, VALUE_DIM);
            multiply(QUERY, own_q, KEY, other_k, false, scores);
            multiply(GRADIENT, own_d, VALUE, other_v, false, d_weights);
            [[unroll]] for (uint i = 0; i < ROWS; ++i) {
                uint row = i * TEAMS + team;
                uint bits = row < count ? seen_bits(cut, in_tile + row, word) & first_bits(seen_here) : 0;
                if (SKIPS != 0 && row < count && was_skipped(entry, in_tile + row, word * OTHER)) bits = 0;
                vec2 saved = row < count ? rows[own_q.first + row] : vec2(0);
                vec4 slope;
                vec4 weight = weights_again(soften(scores[i], slope), vec4(saved.x), bits_of_lane(bits));
                scores[i] = weight * (d_weights[i] - saved.y) * slope * slope_factor();
            }
            share(scores);
            MIX(KEY, other_k, HEAD_CHUNKS, sums)
        }
    }
    FOR_EACH_SUM(HEAD_CHUNKS, HEAD_DIM, sums, if (row < count) d_q[(own_q.first + row) * HEAD_DIM + column] = value;)
}
