#version 450
#extension GL_GOOGLE_include_directive : require
// Softmax of every row, one workgroup a row.

#include "numeric.glsl"

layout(local_size_x_id = 0) in;

layout(push_constant) uniform Call { uint rows, columns; };

layout(set = 0, binding = 0) restrict readonly buffer A { float a[]; };
layout(set = 0, binding = 1) restrict writeonly buffer C { float c[]; };

shared vec2 parts[gl_WorkGroupSize.x]; // maximum and sum that an invocation saw

void main() {
    uint row = gl_WorkGroupID.x + gl_WorkGroupID.y * gl_NumWorkGroups.x, local = gl_LocalInvocationID.x;
    if (row >= rows) return;
    float top = LOWEST, total = 0;
    for (uint i = local; i < columns; i += gl_WorkGroupSize.x) {
        float x = max(a[row * columns + i] * LOG2E, LOWEST);
        float next = max(top, x);
        total = total * power2(top - next) + power2(x - next);
        top = next;
    }
    parts[local] = vec2(top, total);
    barrier();
    float highest = LOWEST, sum = 0;
    for (uint i = 0; i < gl_WorkGroupSize.x; ++i) highest = max(highest, parts[i].x);
    for (uint i = 0; i < gl_WorkGroupSize.x; ++i) sum += parts[i].y * power2(parts[i].x - highest);
    for (uint i = local; i < columns; i += gl_WorkGroupSize.x)
        c[row * columns + i] = power2(max(a[row * columns + i] * LOG2E, LOWEST) - highest) / sum;
}
