#version 450
#extension GL_GOOGLE_include_directive : require
// c = a + b, a * b or max(a, 0), four elements an invocation.

#define ADD 0u
#define MUL 1u

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint OPERATION = ADD;

layout(push_constant) uniform Call { uint vectors; };

layout(set = 0, binding = 0) restrict readonly buffer A { vec4 a[]; };
layout(set = 0, binding = 1) restrict readonly buffer B { vec4 b[]; };
layout(set = 0, binding = 2) restrict writeonly buffer C { vec4 c[]; };

void main() {
    uint i = gl_GlobalInvocationID.x + gl_GlobalInvocationID.y * gl_NumWorkGroups.x * gl_WorkGroupSize.x;
    if (i >= vectors) return;
    vec4 x = a[i];
    c[i] = OPERATION == ADD ? x + b[i] : OPERATION == MUL ? x * b[i] : max(x, vec4(0));
}
