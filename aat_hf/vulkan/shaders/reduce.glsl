// Maximum and sum over the lanes of a team, in all of its lanes. Every invocation of the workgroup must call.

#ifdef SUBGROUPS
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require
// A team is LANES neighbouring invocations of one subgroup: the host asks for this variant where that holds.
float team_max(float x) {
    [[unroll]] for (uint step = LANES / 2; step > 0; step /= 2) x = max(x, subgroupShuffleXor(x, step));
    return x;
}

float team_sum(float x) {
    [[unroll]] for (uint step = LANES / 2; step > 0; step /= 2) x += subgroupShuffleXor(x, step);
    return x;
}
#else
shared float exchanged[gl_WorkGroupSize.x];

float team_max(float x) {
    exchanged[local] = x;
    barrier();
    [[unroll]] for (uint i = 0; i < LANES; ++i) x = max(x, exchanged[team * LANES + i]);
    barrier();
    return x;
}

// In the order of the butterfly above, so that both variants give the same bits.
float team_sum(float x) {
    [[unroll]] for (uint step = LANES / 2; step > 0; step /= 2) {
        exchanged[local] = x;
        barrier();
        x += exchanged[local ^ step];
        barrier();
    }
    return x;
}
#endif
