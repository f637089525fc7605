// Flash attention over the exact tiles of a map (Dao et al. 2022): output and log-sum-exp, one workgroup a block of
// query rows. Workgroups: (query tiles x blocks of a tile, heads, batch), the last query tile first.

#define VALUES
#include "numeric.glsl"
#include "tiles.glsl"
#include "reduce.glsl"

layout(set = 0, binding = 4) restrict writeonly buffer Output { vec4 result[]; };
layout(set = 0, binding = 5) restrict writeonly buffer Rows { uint row_results[]; }; // log-sum-exp, bound of the loss
layout(set = 0, binding = 6) restrict writeonly buffer Skipped { uint skipped[]; };

shared uint relevant;

const float SLACK = 1.0001; // the bound of what was left out covers rounding

void main() {
    uint blocks = (query_tile + OWN - 1) / OWN;
    uint tile = query_tiles - 1 - gl_WorkGroupID.x / blocks;
    uint in_tile = gl_WorkGroupID.x % blocks * OWN; // first owned row within its tile
    uint head = gl_WorkGroupID.z * heads + gl_WorkGroupID.y;
    uint kv_first = (gl_WorkGroupID.z * kv_heads + gl_WorkGroupID.y / (heads / kv_heads)) * keys;
    uint row_first = tile * query_tile + in_tile;
    if (row_first >= queries) return;
    uint count = min(min(query_tile - in_tile, queries - row_first), OWN);
    Block own = Block(head * queries + row_first, count, HEAD_DIM);

    vec4 sums[VALUE_CHUNKS * PIECE * ROWS];
    vec4 scores[ROWS];
    float top[ROWS], total[ROWS], lost[ROWS];
    [[unroll]] for (uint i = 0; i < VALUE_CHUNKS * PIECE * ROWS; ++i) sums[i] = vec4(0);
    [[unroll]] for (uint i = 0; i < ROWS; ++i) { top[i] = LOWEST; total[i] = 0; lost[i] = 0; }
    const bool held = HEAD_CHUNKS == 1;
    if (held) stage_own(QUERY, own, 0);

    uint map_row = head * query_tiles + tile;
    uint begin = tiles[map_row], end = tiles[map_row + 1];
    for (uint visit = begin; visit < end; ++visit) {
        uint entry = visit == begin ? begin : end - (visit - begin); // the sink, the diagonal, then backwards
        uint column = tiles[columns_at + entry], cut = tiles[cuts_at + entry];
        uint key_first = column * key_tile, tile_keys = min(key_tile, keys - key_first);
        for (uint word = 0; word * OTHER < tile_keys; ++word) {
            uint seen_here = min(tile_keys - word * OTHER, OTHER);
            Block other = Block(kv_first + key_first + word * OTHER, seen_here, HEAD_DIM);
            multiply(QUERY, own, KEY, other, held, scores);
            float highest[ROWS];
            [[unroll]] for (uint i = 0; i < ROWS; ++i) {
                uint row = i * TEAMS + team;
                uint bits = row < count ? seen_bits(cut, in_tile + row, word) & first_bits(seen_here) : 0;
                vec4 slope;
                vec4 score = soften(scores[i], slope);
                scores[i] = mix(vec4(LOWEST), score, bits_of_lane(bits));
                highest[i] = max(max(scores[i].x, scores[i].y), max(scores[i].z, scores[i].w));
            }
            [[unroll]] for (uint i = 0; i < ROWS; ++i) highest[i] = team_max(highest[i]);
            if (SKIPS != 0) {
                barrier();
                if (local == 0) relevant = 0;
                barrier();
                [[unroll]] for (uint i = 0; i < ROWS; ++i)
                    if (highest[i] > LOWEST && highest[i] - top[i] > skip) relevant = 1;
                barrier();
                if (relevant == 0) {
                    [[unroll]] for (uint i = 0; i < ROWS; ++i)
                        if (highest[i] > LOWEST) lost[i] += float(seen_here) * power2(highest[i] - top[i]);
                    if (local == 0) skipped[piece_at(entry, in_tile, word * OTHER)] = 1;
                    continue;
                }
            }
            [[unroll]] for (uint i = 0; i < ROWS; ++i) {
                float next = max(top[i], highest[i]);
                float shrink = power2(top[i] - next);
                vec4 weight = mix(vec4(0), power2(scores[i] - next), greaterThan(scores[i], vec4(LOWEST)));
                top[i] = next;
                total[i] = total[i] * shrink + (weight.x + weight.y + (weight.z + weight.w));
                lost[i] *= shrink;
                scores[i] = weight;
                [[unroll]] for (uint p = 0; p < VALUE_CHUNKS * PIECE; ++p) sums[p * ROWS + i] *= shrink;
            }
            share(scores);
            Block values = Block(other.first, seen_here, VALUE_DIM);
            MIX(VALUE, values, VALUE_CHUNKS, sums)
        }
    }
    [[unroll]] for (uint i = 0; i < ROWS; ++i) total[i] = team_sum(total[i]);
    FOR_EACH_SUM(VALUE_CHUNKS, VALUE_DIM, sums,
        if (row < count) result[(own.first + row) * VALUE_DIM + column] = total[i] > 0 ? value / total[i] : vec4(0);)
    [[unroll]] for (uint i = 0; i < ROWS; ++i) {
        uint row = i * TEAMS + team;
        if (lane != 0 || row >= count) continue;
        float log_sum = fma(top[i], LN2, logarithm(max(total[i], 1.0)));
        float share = total[i] > 0 ? lost[i] / total[i] * SLACK : 0;
        row_results[2 * (own.first + row)] = total[i] > 0 ? floatBitsToUint(log_sum) : MINUS_INFINITY;
        row_results[2 * (own.first + row) + 1] = floatBitsToUint(share / (1 + share));
    }
}
