"""The spec: pure Python and NumPy, importing neither torch nor mlx."""
