"""Training: recipes, launching, resuming, the loop, saving, memory and FLOP estimates, settings."""
