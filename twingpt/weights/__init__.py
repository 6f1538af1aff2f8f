"""Other people's formats to ours and back. Checkpoints of the qwen3 and llama shapes need no conversion."""
