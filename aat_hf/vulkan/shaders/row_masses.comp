#version 450
#extension GL_GOOGLE_include_directive : require
#define SUBGROUPS
#include "row_masses.glsl"
