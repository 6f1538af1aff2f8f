"""From sources to batches: reading, preparation, token shards, mixtures, finding and learning tokenizers."""
