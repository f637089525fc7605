// Measured rows: log sum of exp(score) of chosen query rows over the keys of every tile, and of nothing else.
// Workgroups: (key tiles x blocks of rows, heads, batch). `tiles` holds one mask, a row's keys tile by tile, each tile
// in whole words; `queries` counts the chosen rows.

#include "numeric.glsl"
#include "tiles.glsl"
#include "reduce.glsl"

layout(set = 0, binding = 3) restrict writeonly buffer Masses { uint log_mass[]; };

void main() {
    uint column = gl_WorkGroupID.x % key_tiles, row_first = gl_WorkGroupID.x / key_tiles * OWN;
    uint head = gl_WorkGroupID.z * heads + gl_WorkGroupID.y;
    uint kv_first = (gl_WorkGroupID.z * kv_heads + gl_WorkGroupID.y / (heads / kv_heads)) * keys;
    uint mask_head = gl_WorkGroupID.z * cuts_at + gl_WorkGroupID.y * entries_at; // strides, 0 where the mask is shared
    uint count = min(queries - row_first, OWN);
    Block own = Block(head * queries + row_first, count, HEAD_DIM);

    vec4 scores[ROWS];
    float top[ROWS], total[ROWS];
    [[unroll]] for (uint i = 0; i < ROWS; ++i) { top[i] = LOWEST; total[i] = 0; }
    const bool held = HEAD_CHUNKS == 1;
    if (held) stage_own(QUERY, own, 0);

    uint key_first = column * key_tile, tile_keys = min(key_tile, keys - key_first);
    for (uint word = 0; word * OTHER < tile_keys; ++word) {
        uint seen_here = min(tile_keys - word * OTHER, OTHER);
        multiply(QUERY, own, KEY, Block(kv_first + key_first + word * OTHER, seen_here, HEAD_DIM), held, scores);
        [[unroll]] for (uint i = 0; i < ROWS; ++i) {
            uint row = i * TEAMS + team;
            uint at = ((mask_head * queries + row_first + row) * key_tiles + column) * mask_words + word;
            uint bits = row < count ? tiles[at] & first_bits(seen_here) : 0;
            vec4 slope;
            vec4 score = mix(vec4(LOWEST), soften(scores[i], slope), bits_of_lane(bits));
            float next = max(top[i], max(max(score.x, score.y), max(score.z, score.w)));
            vec4 weight = mix(vec4(0), power2(score - next), greaterThan(score, vec4(LOWEST)));
            total[i] = total[i] * power2(top[i] - next) + (weight.x + weight.y + (weight.z + weight.w));
            top[i] = next;
        }
    }
    [[unroll]] for (uint i = 0; i < ROWS; ++i) {
        float highest = team_max(top[i]);
        float sum = team_sum(total[i] * power2(top[i] - highest));
        uint row = i * TEAMS + team;
        if (lane == 0 && row < count)
            log_mass[(own.first + row) * key_tiles + column] =
                sum > 0 ? floatBitsToUint(fma(highest, LN2, logarithm(max(sum, 1.0)))) : MINUS_INFINITY;
    }
}
