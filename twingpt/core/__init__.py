"""The spec: Python and NumPy, no torch or mlx, and nothing of the other packages. Read it in this order.

1. `config`, `presets`: what a model is and how a run trains it. `parameters`: its tensors, their initialisation and
   optimizer groups, from `rng`'s keyed streams.
2. `reference`, `rope`: the forward pass and the loss in float64. `sampler`: from logits to a token.
3. `order`: which window of the data is trained on when. `schedule`: the hyperparameters of each step.
4. `backend`: the protocols that `twingpt/backends/mlx` and `torch` implement, tested against `reference`.
5. `tokenizer/`: text to ids and back. `checkpoint/`: the files of a model on disk.

`errors`, `locks`, `paths` and `reading` are what every package uses: errors for users, locks between processes,
where files go, and untrusted files.
"""
