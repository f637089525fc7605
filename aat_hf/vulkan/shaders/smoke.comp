#version 450
// y = factor * x + OFFSET, through shared memory and a barrier: what guard.py tries first on a device.

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint OFFSET = 0u;

layout(push_constant) uniform Call { uint count; float factor; };

layout(set = 0, binding = 0) restrict readonly buffer X { float x[]; };
layout(set = 0, binding = 1) restrict writeonly buffer Y { float y[]; };

shared float passed[gl_WorkGroupSize.x];

void main() {
    uint i = gl_GlobalInvocationID.x, lane = gl_LocalInvocationID.x;
    passed[lane] = i < count ? x[i] : 0.0;
    barrier();
    if (i < count) y[i] = factor * passed[lane] + float(OFFSET);
}
