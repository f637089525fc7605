#version 450
#extension GL_GOOGLE_include_directive : require
#define SUBGROUPS
#include "attention_forward.glsl"
