"""The two implementations of the spec. Neither imports the other."""
