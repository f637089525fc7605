#version 450
#extension GL_GOOGLE_include_directive : require
#include "row_masses.glsl" // reductions through shared memory, for devices without subgroup shuffles
