// What the attention shaders share: blocks of rows in shared memory, their products, the tile map and its masks.
//
// A workgroup owns OWN rows (queries, or keys in the backward pass) and visits blocks of OTHER rows of the other kind.
// LANES neighbouring invocations form a team; a team has ROWS of the owned rows, each lane four of the others:
//   scores[i][j] = row (i * TEAMS + team) against row (4 * lane + j).
// A product goes through shared memory in pieces of CHUNK vectors of four, so that any head dimension fits.
//
// Before the #include: VALUES and GRADIENTS where v and d_output are bound; OWN_TILE, the length of an owned tile.

#extension GL_EXT_control_flow_attributes : require

#define LANES 8
#define OTHER 32
#define QUERY 0
#define KEY 1
#define VALUE 2
#define GRADIENT 3

#ifndef OWN_TILE
#define OWN_TILE query_tile
#endif

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint ROWS = 4;       // owned rows of a team
layout(constant_id = 2) const uint CHUNK = 16;     // vectors of a row held in shared memory at a time
layout(constant_id = 3) const uint HEAD_DIM = 16;  // vectors of a row of q and k
layout(constant_id = 4) const uint VALUE_DIM = 16; // vectors of a row of v
layout(constant_id = 5) const uint KIND = 0;       // element type of q, k, v
layout(constant_id = 6) const uint CAPPED = 0;     // whether there is a softcap
layout(constant_id = 7) const uint SKIPS = 0;      // whether blocks far below the running maximum are left out

const uint TEAMS = gl_WorkGroupSize.x / LANES;
const uint OWN = TEAMS * ROWS;
const uint STRIDE = CHUNK | 1u; // odd: rows start at different banks
const uint PIECE = (CHUNK + LANES - 1) / LANES; // vectors of a chunk that one lane sums
const uint HEAD_CHUNKS = (HEAD_DIM + CHUNK - 1) / CHUNK;
const uint VALUE_CHUNKS = (VALUE_DIM + CHUNK - 1) / CHUNK;
const uint WEIGHT_STRIDE = OTHER / 4 + 1;

layout(push_constant) uniform Call {
    uint heads, kv_heads, queries, keys, query_tile, key_tile, query_tiles, key_tiles;
    uint columns_at, cuts_at, entries_at, masks_at; // where the parts of `tiles` begin (entries: backward pass only)
    uint mask_words;                                // words of a mask's row
    uint piece_rows, piece_keys;                    // rows of a piece of the skip rule; pieces of a key tile
    float scale, inner, outer, skip;                // base-2 score: outer * tanh(inner * product), or scale * product
};

layout(set = 0, binding = 0) restrict readonly buffer Queries { vec4 q_full[]; };
layout(set = 0, binding = 0) restrict readonly buffer HalfQueries { uvec2 q_half[]; };
layout(set = 0, binding = 1) restrict readonly buffer Keys { vec4 k_full[]; };
layout(set = 0, binding = 1) restrict readonly buffer HalfKeys { uvec2 k_half[]; };
layout(set = 0, binding = 2) restrict readonly buffer Tiles { uint tiles[]; };
#ifdef VALUES
layout(set = 0, binding = 3) restrict readonly buffer Values { vec4 v_full[]; };
layout(set = 0, binding = 3) restrict readonly buffer HalfValues { uvec2 v_half[]; };
#endif
#ifdef GRADIENTS
layout(set = 0, binding = 4) restrict readonly buffer Gradients { vec4 d_output[]; };
#endif

shared vec4 own_rows[OWN * STRIDE];
shared vec4 other_rows[OTHER * STRIDE];
shared vec4 weights[OWN * WEIGHT_STRIDE];

uint local = gl_LocalInvocationID.x;
uint lane = local % LANES;
uint team = local / LANES;

// A run of rows of one tensor: the first row, how many there are, and the vectors of a row.
struct Block { uint first, count, width; };

vec4 load(const uint tensor, uint index) {
#ifdef GRADIENTS
    if (tensor == GRADIENT) return d_output[index];
#endif
#ifdef VALUES
    if (tensor == VALUE) return KIND == FLOAT32 ? v_full[index] : unpack_halves(KIND, v_half[index]);
#endif
    if (tensor == KEY) return KIND == FLOAT32 ? k_full[index] : unpack_halves(KIND, k_half[index]);
    return KIND == FLOAT32 ? q_full[index] : unpack_halves(KIND, q_half[index]);
}

vec4 load_or_zero(const uint tensor, Block block, uint row, uint column) {
    if (row >= block.count || column >= block.width) return vec4(0);
    return load(tensor, (block.first + row) * block.width + column);
}

// Vectors [begin, begin + CHUNK) of the owned rows into shared memory.
void stage_own(const uint tensor, Block block, uint begin) {
    for (uint i = local; i < OWN * CHUNK; i += gl_WorkGroupSize.x)
        own_rows[i / CHUNK * STRIDE + i % CHUNK] = load_or_zero(tensor, block, i / CHUNK, begin + i % CHUNK);
}

// The same of the other rows. Dealt out, row 4 l + j lies at place j * LANES + l: lanes read neighbouring places.
void stage_other(const uint tensor, Block block, uint begin, const bool dealt) {
    for (uint i = local; i < OTHER * CHUNK; i += gl_WorkGroupSize.x) {
        uint place = i / CHUNK;
        uint row = dealt ? place % LANES * 4 + place / LANES : place;
        other_rows[place * STRIDE + i % CHUNK] = load_or_zero(tensor, block, row, begin + i % CHUNK);
    }
}

// All products of owned and other rows. `held`: the owned rows are in shared memory already.
void multiply(const uint own, Block own_block, const uint other, Block other_block, bool held,
              out vec4 products[ROWS]) {
    for (uint i = 0; i < ROWS; ++i) products[i] = vec4(0);
    for (uint begin = 0; begin < own_block.width; begin += CHUNK) {
        barrier(); // everyone has read what lies there
        if (!held) stage_own(own, own_block, begin);
        stage_other(other, other_block, begin, true);
        barrier();
        for (uint c = 0; c < CHUNK; ++c) {
            mat4 y = transpose(mat4(other_rows[lane * STRIDE + c], other_rows[(LANES + lane) * STRIDE + c],
                                    other_rows[(2 * LANES + lane) * STRIDE + c],
                                    other_rows[(3 * LANES + lane) * STRIDE + c]));
            [[unroll]] for (uint i = 0; i < ROWS; ++i) {
                vec4 x = own_rows[(i * TEAMS + team) * STRIDE + c];
                vec4 sum = fma(vec4(x.x), y[0], products[i]);
                sum = fma(vec4(x.y), y[1], sum);
                sum = fma(vec4(x.z), y[2], sum);
                products[i] = fma(vec4(x.w), y[3], sum);
            }
        }
    }
}

// Share the scores of all lanes: `weights` (owned rows, OTHER / 4).
void share(vec4 scores[ROWS]) {
    [[unroll]] for (uint i = 0; i < ROWS; ++i) weights[(i * TEAMS + team) * WEIGHT_STRIDE + lane] = scores[i];
}

// Chunk `chunk` of sum += weights x other rows. Every lane sums the vectors lane, lane + LANES, ... of the chunk.
#define MIX(TENSOR, BLOCK, CHUNKS, SUM)                                                                              \
    [[unroll]] for (uint chunk = 0; chunk < CHUNKS; ++chunk) {                                                       \
        barrier();                                                                                                   \
        stage_other(TENSOR, BLOCK, chunk * CHUNK, false);                                                            \
        barrier();                                                                                                   \
        for (uint four = 0; four < OTHER / 4; ++four) {                                                              \
            [[unroll]] for (uint p = 0; p < PIECE; ++p) {                                                            \
                uint column = min(p * LANES + lane, CHUNK - 1);                                                      \
                vec4 y0 = other_rows[(4 * four) * STRIDE + column];                                                  \
                vec4 y1 = other_rows[(4 * four + 1) * STRIDE + column];                                              \
                vec4 y2 = other_rows[(4 * four + 2) * STRIDE + column];                                              \
                vec4 y3 = other_rows[(4 * four + 3) * STRIDE + column];                                              \
                [[unroll]] for (uint i = 0; i < ROWS; ++i) {                                                         \
                    vec4 w = weights[(i * TEAMS + team) * WEIGHT_STRIDE + four];                                     \
                    uint at = (chunk * PIECE + p) * ROWS + i;                                                        \
                    SUM[at] = fma(vec4(w.z), y2, fma(vec4(w.w), y3, SUM[at]));                                       \
                    SUM[at] = fma(vec4(w.x), y0, fma(vec4(w.y), y1, SUM[at]));                                       \
                }                                                                                                    \
            }                                                                                                        \
        }                                                                                                            \
    }

// For every vector of SUM that exists: its `row`, its `column` and its `value`, as BODY sees them.
#define FOR_EACH_SUM(CHUNKS, WIDTH, SUM, BODY)                                                                       \
    [[unroll]] for (uint piece = 0; piece < CHUNKS * PIECE; ++piece) {                                               \
        uint within = piece % PIECE * LANES + lane, column = piece / PIECE * CHUNK + within;                         \
        [[unroll]] for (uint i = 0; i < ROWS; ++i) {                                                                 \
            uint row = i * TEAMS + team;                                                                             \
            vec4 value = SUM[piece * ROWS + i];                                                                      \
            if (within < CHUNK && column < WIDTH) { BODY }                                                           \
        }                                                                                                            \
    }

// The mask of one owned row against the others [32 * word, 32 * word + 32) of a tile, bit by bit.
uint seen_bits(uint cut, uint row_in_tile, uint word) {
    return cut == 0xffffffffu ? cut : tiles[masks_at + (cut * OWN_TILE + row_in_tile) * mask_words + word];
}

uint first_bits(uint count) { return count < 32 ? (1u << count) - 1 : 0xffffffffu; }

// Place of the word that says whether the skip rule left out a piece: `piece_rows` queries against OTHER keys.
uint piece_at(uint entry, uint query_in_tile, uint key_in_tile) {
    uint pieces = (query_tile + piece_rows - 1) / piece_rows;
    return (entry * pieces + query_in_tile / piece_rows) * piece_keys + key_in_tile / OTHER;
}

// Four bits of a lane as a condition.
bvec4 bits_of_lane(uint bits) { return notEqual(uvec4(bits >> (4 * lane)) & uvec4(1, 2, 4, 8), uvec4(0)); }

// Scores in base 2, and the softcap's derivative there.
vec4 soften(vec4 product, out vec4 slope) {
    slope = vec4(1);
    if (CAPPED == 0) return product * scale;
    vec4 capped = rational_tanh(product * inner);
    slope = 1 - capped * capped;
    return outer * capped;
}
