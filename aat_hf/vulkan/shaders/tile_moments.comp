#version 450
#extension GL_GOOGLE_include_directive : require
// Mean and population variance of every coordinate over runs of keys. One invocation a run and a vector of four.
// Workgroups along x cover runs x vectors.

#include "numeric.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint KIND = 0;

layout(push_constant) uniform Call {
    uint runs, run_length; // runs of a head, keys of a run
    uint keys, width;      // keys of a head, vectors of a row
    uint heads;            // batch x heads of k
};

layout(set = 0, binding = 0) restrict readonly buffer Keys { vec4 k_full[]; };
layout(set = 0, binding = 0) restrict readonly buffer HalfKeys { uvec2 k_half[]; };
layout(set = 0, binding = 1) restrict writeonly buffer Means { vec4 mean_of[]; };
layout(set = 0, binding = 2) restrict writeonly buffer Variances { vec4 variance_of[]; };

vec4 load(uint index) { return KIND == FLOAT32 ? k_full[index] : unpack_halves(KIND, k_half[index]); }

void main() {
    uint index = gl_GlobalInvocationID.x + gl_GlobalInvocationID.y * gl_NumWorkGroups.x * gl_WorkGroupSize.x;
    if (index >= heads * runs * width) return;
    uint column = index % width, run = index / width % runs, head = index / width / runs;
    uint first = min(run * run_length, keys), end = min(first + run_length, keys);
    float count = float(max(end - first, 1));
    vec4 mean = vec4(0), variance = vec4(0);
    for (uint key = first; key < end; ++key) mean += load((head * keys + key) * width + column);
    mean /= count;
    for (uint key = first; key < end; ++key) {
        vec4 centred = load((head * keys + key) * width + column) - mean;
        variance = fma(centred, centred, variance);
    }
    mean_of[index] = mean;
    variance_of[index] = variance / count;
}
