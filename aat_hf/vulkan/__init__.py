"""Vulkan: GPUs that are no CUDA device. `get_provider` gives one; shaders are in `shaders/`, as GLSL and SPIR-V."""
