"""Using a model: loading it and generating text."""
