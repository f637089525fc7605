#version 450
#extension GL_GOOGLE_include_directive : require
#include "attention_forward.glsl" // reductions through shared memory, for devices without subgroup shuffles
