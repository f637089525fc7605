#version 450
#extension GL_GOOGLE_include_directive : require
// c = a b for row-major matrices whose rows are whole vectors of four. A workgroup makes a tile of (ROWS * TEAMS) rows
// and 2 * LANES vectors, an invocation ROWS rows of the vectors lane and lane + LANES. Rounding errors grow with the
// length of a chain of sums: each chain is RUN products long, and the chains are added up in c, which costs no registers.
// Workgroups: (column tiles, row tiles, batch).

#extension GL_EXT_control_flow_attributes : require

#define LANES 16
#define DEPTH 8 // of a piece of a and b in shared memory
#define RUN 256 // products of a chain, a multiple of DEPTH

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint ROWS = 8;

const uint TEAMS = gl_WorkGroupSize.x / LANES;
const uint TILE = TEAMS * ROWS;
const uint STRIDE = TILE + 4; // whole vectors, and the columns of a start at different banks

layout(push_constant) uniform Call { uint rows, depth, vectors; }; // of c; depth a multiple of 4

layout(set = 0, binding = 0) restrict readonly buffer A { vec4 a[]; };
layout(set = 0, binding = 1) restrict readonly buffer B { vec4 b[]; };
layout(set = 0, binding = 2) restrict buffer C { vec4 c[]; };

shared float a_piece[DEPTH * STRIDE];
shared vec4 b_piece[DEPTH * 2 * LANES];

// c[index] = sum, or c[index] += sum.
void store(uint index, vec4 sum, bool more) { c[index] = more ? c[index] + sum : sum; }

void main() {
    uint local = gl_LocalInvocationID.x, lane = local % LANES, team = local / LANES;
    uint first_row = gl_WorkGroupID.y * TILE, first_vector = gl_WorkGroupID.x * 2 * LANES, batch = gl_WorkGroupID.z;
    for (uint run = 0; run < depth; run += RUN) {
        vec4 sums[2 * ROWS];
        [[unroll]] for (uint i = 0; i < 2 * ROWS; ++i) sums[i] = vec4(0);
        for (uint begin = run; begin < min(run + RUN, depth); begin += DEPTH) {
            for (uint i = local; i < TILE * DEPTH / 4; i += gl_WorkGroupSize.x) {
                uint row = i / (DEPTH / 4), four = i % (DEPTH / 4);
                bool inside = first_row + row < rows && begin + 4 * four < depth;
                vec4 x = inside ? a[((batch * rows + first_row + row) * depth + begin) / 4 + four] : vec4(0);
                for (uint j = 0; j < 4; ++j) a_piece[(4 * four + j) * STRIDE + row] = x[j];
            }
            for (uint i = local; i < DEPTH * 2 * LANES; i += gl_WorkGroupSize.x) {
                uint row = begin + i / (2 * LANES), vector = first_vector + i % (2 * LANES);
                b_piece[i] = row < depth && vector < vectors ? b[(batch * depth + row) * vectors + vector] : vec4(0);
            }
            barrier();
            [[unroll]] for (uint d = 0; d < DEPTH; ++d) {
                vec4 y0 = b_piece[d * 2 * LANES + lane], y1 = b_piece[d * 2 * LANES + LANES + lane];
                [[unroll]] for (uint i = 0; i < ROWS; ++i) {
                    vec4 x = vec4(a_piece[d * STRIDE + team * ROWS + i]);
                    sums[2 * i] = fma(x, y0, sums[2 * i]);
                    sums[2 * i + 1] = fma(x, y1, sums[2 * i + 1]);
                }
            }
            barrier();
        }
        [[unroll]] for (uint i = 0; i < ROWS; ++i) {
            uint row = first_row + team * ROWS + i, at = (batch * rows + row) * vectors + first_vector;
            if (row >= rows) continue;
            if (first_vector + lane < vectors) store(at + lane, sums[2 * i], run > 0);
            if (first_vector + LANES + lane < vectors) store(at + LANES + lane, sums[2 * i + 1], run > 0);
        }
    }
}
