"""What a quantized KV cache costs in held-out loss, and what it saves, by a model that is trained here in a minute.

    python benchmarks/kv_bits.py [--backend torch] [--steps 400] [--windows 16] [--json]

Trains 2 layers x 128 with heads of 64 on the embedded corpus, then takes the loss on held-out windows, token by token
as decoding does, from a KV cache in the dtype of the computation and from 8 and 4 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.backends import registry
from twingpt.core.backend import LogProbs
from twingpt.core.checkpoint.schema import open_checkpoint
from twingpt.evaluation.held_out import evaluate
from twingpt.runs.folder import resolve
from twingpt.training.launch import new_run
from twingpt.training.trainer import Trainer

BITS = (None, 8, 4)


@dataclasses.dataclass
class Decoding:
    """An inference engine whose log-probabilities are those of decoding, from a cache of `kv_bits`."""

    engine: Any
    kv_bits: int | None

    def log_probs(self, tokens: np.ndarray, targets: np.ndarray) -> LogProbs:
        """Log-probabilities of (B, T) targets; waits for each token."""
        found = np.zeros(targets.shape)
        for row, (ids, wanted) in enumerate(zip(tokens, targets, strict=True)):
            cache = self.engine.new_cache(1, len(ids), kv_bits=self.kv_bits)
            for t in np.flatnonzero(wanted >= 0):
                logits = self.engine.logits(self.engine.prefill(cache, 0, ids[t : t + 1]))[0].astype(np.float64)
                found[row, t] = logits[wanted[t]] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        self.bytes_per_position = sum(array.nbytes for array in cache.read_row(0)[1:]) / int(cache.lengths[0])
        return LogProbs(found, None, None)

    def read(self, handle: LogProbs) -> LogProbs:
        """The log-probabilities, which are there."""
        return handle


def rows(folder: Path, backend: str, steps: int, windows: int) -> list[dict[str, Any]]:
    """A row for each dtype and number of bits."""
    options = {
        "data": "python-docs", "vocab_size": 512, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 128,
        "block_size": 64, "batch_size": 16, "max_iters": steps, "eval_interval": 0, "sample_interval": 0,
        "checkpoint_interval": 0,
    }  # fmt: skip
    trainer = Trainer(new_run(options, folder / "run", backend, None))
    trainer.fit()
    model, found = open_checkpoint(resolve(folder / "run")), []
    engines = registry.get(backend)
    device = registry.find_device(engines, None)
    for dtype in ("float32", "bfloat16"):
        engine = engines.InferenceEngine(model.config, model.stored(), device, dtype=dtype)
        exact = 0.0
        for bits in BITS:
            decoding = Decoding(engine, bits)
            loss = evaluate(decoding, trainer.state.data, 1, model.config.block_size, windows).mean.nats  # type: ignore[arg-type]
            exact = exact or loss
            row = {"dtype": dtype, "kv_bits": bits, "loss": loss, "more_percent": 100 * (loss / exact - 1)}
            found.append(row | {"bytes_per_position": decoding.bytes_per_position})
    return found


def main() -> None:
    """Train, measure, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--windows", type=int, default=16, help="of the held-out text; 0: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = rows(Path(folder), args.backend, args.steps, args.windows)
    if args.json:
        print(json.dumps({"backend": args.backend, "steps": args.steps, "rows": found}))
        return
    for row in found:
        row["bits"] = f"{row['kv_bits']} bits" if row["kv_bits"] else "full"
        print("{dtype:9} {bits:6} {loss:.5f} nats {more_percent:+.4f} % {bytes_per_position:6.0f} bytes".format(**row))


if __name__ == "__main__":
    main()
