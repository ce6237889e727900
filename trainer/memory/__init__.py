"""What trades time for GPU memory: recomputation, offload, float8, optimizer states."""
