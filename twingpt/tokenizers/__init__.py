"""Files of tokenizers other than tokenizer.json, which core reads: as one of those."""
