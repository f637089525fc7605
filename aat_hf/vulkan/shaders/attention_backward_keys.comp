#version 450
#extension GL_GOOGLE_include_directive : require
// Gradients of keys and values, one workgroup a block of key rows that visits the query tiles which kept its key tile,
// of all heads that share the keys, in a fixed order: no atomics, the same bits every time.
// Workgroups: (key tiles x blocks of a tile, heads of k, batch). `tiles` holds the map by columns (lowering.py).

#define VALUES
#define GRADIENTS
#define SKIPPED_AT 8
#define OWN_TILE key_tile
#include "numeric.glsl"
#include "tiles.glsl"
#include "backward.glsl"

layout(set = 0, binding = 6) restrict writeonly buffer KeyResults { vec4 d_k[]; };
layout(set = 0, binding = 7) restrict writeonly buffer ValueResults { vec4 d_v[]; };

void main() {
    uint blocks = (key_tile + OWN - 1) / OWN;
    uint tile = gl_WorkGroupID.x / blocks;
    uint in_tile = gl_WorkGroupID.x % blocks * OWN;
    uint head = gl_WorkGroupID.z * kv_heads + gl_WorkGroupID.y;
    uint row_first = tile * key_tile + in_tile;
    if (row_first >= keys) return;
    uint count = min(min(key_tile - in_tile, keys - row_first), OWN);
    Block own_k = Block(head * keys + row_first, count, HEAD_DIM);
    Block own_v = Block(own_k.first, count, VALUE_DIM);

    vec4 k_sums[HEAD_CHUNKS * PIECE * ROWS], v_sums[VALUE_CHUNKS * PIECE * ROWS];
    vec4 scores[ROWS], d_weights[ROWS];
    [[unroll]] for (uint i = 0; i < HEAD_CHUNKS * PIECE * ROWS; ++i) k_sums[i] = vec4(0);
    [[unroll]] for (uint i = 0; i < VALUE_CHUNKS * PIECE * ROWS; ++i) v_sums[i] = vec4(0);

    uint map_column = head * key_tiles + tile;
    for (uint visit = tiles[map_column]; visit < tiles[map_column + 1]; ++visit) {
        uint map_row = tiles[columns_at + visit], cut = tiles[cuts_at + visit], entry = tiles[entries_at + visit];
        uint query_first = map_row % query_tiles * query_tile, tile_queries = min(query_tile, queries - query_first);
        for (uint word = 0; word * OTHER < tile_queries; ++word) {
            uint seen_here = min(tile_queries - word * OTHER, OTHER);
            uint first = map_row / query_tiles * queries + query_first + word * OTHER;
            Block other_q = Block(first, seen_here, HEAD_DIM), other_d = Block(first, seen_here, VALUE_DIM);
            multiply(KEY, own_k, QUERY, other_q, false, scores);
            multiply(VALUE, own_v, GRADIENT, other_d, false, d_weights);
            vec4 log_sums, deltas;
            for (uint j = 0; j < 4; ++j) {
                vec2 saved = 4 * lane + j < seen_here ? rows[first + 4 * lane + j] : vec2(0);
                log_sums[j] = saved.x;
                deltas[j] = saved.y;
            }
            [[unroll]] for (uint i = 0; i < ROWS; ++i) {
                uint row = i * TEAMS + team;
                uint bits = row < count ? seen_bits(cut, in_tile + row, word) & first_bits(seen_here) : 0;
                if (SKIPS != 0 && row < count)
                    for (uint j = 4 * lane; j < min(4 * lane + 4, seen_here); ++j)
                        if (was_skipped(entry, word * OTHER + j, in_tile + row)) bits &= ~(1u << j);
                vec4 slope;
                scores[i] = weights_again(soften(scores[i], slope), log_sums, bits_of_lane(bits));
                d_weights[i] = scores[i] * (d_weights[i] - deltas) * slope * slope_factor();
            }
            share(scores);
            MIX(GRADIENT, other_d, VALUE_CHUNKS, v_sums)
            barrier(); // everyone has read the weights
            share(d_weights);
            MIX(QUERY, other_q, HEAD_CHUNKS, k_sums)
        }
    }
    FOR_EACH_SUM(HEAD_CHUNKS, HEAD_DIM, k_sums,
        if (row < count) d_k[(own_k.first + row) * HEAD_DIM + column] = value;)
    FOR_EACH_SUM(VALUE_CHUNKS, VALUE_DIM, v_sums,
        if (row < count) d_v[(own_k.first + row) * VALUE_DIM + column] = value;)
}
