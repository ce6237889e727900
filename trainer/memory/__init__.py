"""Trade time for GPU memory: recomputation, offload, float8 weights, allocator settings."""
