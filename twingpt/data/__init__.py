"""Data: from what --data names to batches by number.

`sources` (`named` and downloaded, files, a hub's) are read by `readers` to `documents`, whose `split` holds out a
tenth. `builder` counts them, learns the tokenizer and encodes them with `workers` to `shards`; `prepare` runs it once
and finds the data set again, which `library` lists and verifies. A `mixture` weighs several. `prefetch` gathers their
batches ahead of the step. `tokenizers` finds, learns and compares tokenizers.
"""
