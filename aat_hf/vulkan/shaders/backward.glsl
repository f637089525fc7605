// What both backward shaders share: the weights are computed again from the saved log-sum-exp.

layout(set = 0, binding = 5) restrict readonly buffer Rows { vec2 rows[]; }; // base-2 log-sum-exp, d_out . out - d_lse
layout(set = 0, binding = SKIPPED_AT) restrict readonly buffer Skipped { uint skipped[]; };

bool was_skipped(uint entry, uint query_in_tile, uint key_in_tile) {
    return skipped[piece_at(entry, query_in_tile, key_in_tile)] != 0;
}

vec4 weights_again(vec4 scores, vec4 log_sums, bvec4 seen) {
    return mix(vec4(0), power2(scores - log_sums), seen);
}

// Natural score per product at slope 1.
float slope_factor() { return (CAPPED == 0 ? scale : outer * inner) * LN2; }
