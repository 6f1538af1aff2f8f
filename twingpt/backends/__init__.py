"""The twins: two implementations of `core/backend.py`, file for file, and what they share about the host."""
