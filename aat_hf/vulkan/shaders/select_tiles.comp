#version 450
#extension GL_GOOGLE_include_directive : require
// Selection: drop the smallest tiles of each row as long as what is dropped stays within the row's budget.
//
// A tile stays when the masses of all tiles that are no larger exceed the budget: of equal tiles all stay or none, no
// sort, no atomic, one order of summation, so the same bits every time. A mass below 0: the tile is not visible.
// One workgroup a row of the map.

layout(local_size_x_id = 0) in;

layout(push_constant) uniform Call { uint rows, tiles; float max_kept; };

layout(set = 0, binding = 0) restrict readonly buffer Masses { float mass[]; };   // (rows, tiles)
layout(set = 0, binding = 1) restrict readonly buffer Forced { uint forced[]; };  // (rows, tiles)
layout(set = 0, binding = 2) restrict readonly buffer Budgets { vec2 budget[]; }; // (rows), a number and its rounding
layout(set = 0, binding = 3) restrict buffer Kept { uint kept[]; };               // (rows, tiles)

shared uvec2 counts[gl_WorkGroupSize.x]; // kept and visible tiles that an invocation saw

// What dropping a tile would cost; forced tiles are not for sale.
float spare(uint index) { return forced[index] != 0 ? 0.0 : max(mass[index], 0.0); }

// Sum of two floats and its rounding error (Knuth 1969).
void add_exactly(inout vec2 sum, float x) {
    precise float total = sum.x + x;
    precise float part = total - sum.x;
    precise float error = (sum.x - (total - part)) + (x - part);
    sum = vec2(total, sum.y + error);
}

void main() {
    uint row = gl_WorkGroupID.x + gl_WorkGroupID.y * gl_NumWorkGroups.x, local = gl_LocalInvocationID.x;
    if (row >= rows) return;
    uint first = row * tiles;
    uvec2 count = uvec2(0);
    for (uint tile = local; tile < tiles; tile += gl_WorkGroupSize.x) {
        float own = spare(first + tile);
        vec2 up_to = vec2(0);
        for (uint other = 0; other < tiles; ++other) {
            float cost = spare(first + other);
            if (cost <= own) add_exactly(up_to, cost);
        }
        precise float excess = (up_to.x - budget[row].x) + (up_to.y - budget[row].y);
        bool visible = mass[first + tile] >= 0;
        bool keep = visible && (excess > 0.0 || forced[first + tile] != 0);
        kept[first + tile] = uint(keep);
        count += uvec2(keep, visible);
    }
    counts[local] = count;
    barrier();
    uvec2 total = uvec2(0);
    for (uint i = 0; i < gl_WorkGroupSize.x; ++i) total += counts[i];
    if (float(total.x) <= max_kept * float(total.y)) return;
    for (uint tile = local; tile < tiles; tile += gl_WorkGroupSize.x)
        kept[first + tile] = uint(mass[first + tile] >= 0);
}
