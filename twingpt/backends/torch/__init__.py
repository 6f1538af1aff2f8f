"""The PyTorch backend: CUDA, XPU, MPS and CPU."""
