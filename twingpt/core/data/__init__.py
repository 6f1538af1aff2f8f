"""From text to batches: sources, preparation into token shards, and the order of windows."""
