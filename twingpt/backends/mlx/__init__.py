"""The MLX backend: Metal on Apple silicon, CUDA and CPU on Linux. `prepare` comes first, then `backend`."""
