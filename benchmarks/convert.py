"""Converting a large model: the peak resident memory and the time of `gpt convert`.

    python benchmarks/convert.py [--gigabytes 4] [--dtype float16] [--folder DIR] [--json]

A Hugging Face directory of that size is written, a Llama of random numbers with Llama 3.2 1B's width, heads and
vocabulary of 128,256, and as many layers as it takes. It is converted to a model of ours, that one back, and to 4 bits,
each by a process of its own, whose peak the system reports. Needs four times the room on disk (eight times from
float16, as ours are float32), in a temporary folder within DIR.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.config import GPTConfig
from twingpt.core.parameters import parameter_count, parameter_table
from twingpt.weights.families import FAMILIES

CONFIG = {
    "vocab_size": 128_256, "block_size": 2048, "n_head": 32, "n_kv_head": 8, "n_embd": 2048, "n_inner": 8192,
    "qk_norm": False,
}  # fmt: skip
DTYPES = {"float32": ("F32", np.float32), "float16": ("F16", np.float16)}
PIECE = 2**22  # numbers


def config_of(size: int, itemsize: int) -> GPTConfig:
    """The model whose numbers, of `itemsize` bytes, take at least `size` bytes."""
    one, two = (parameter_count(GPTConfig.from_dict({**CONFIG, "n_layer": n})) for n in (1, 2))
    layers = 1 + max(0, math.ceil((size / itemsize - one) / (two - one)))
    return GPTConfig.from_dict({**CONFIG, "n_layer": layers})


def write_random(folder: Path, config: GPTConfig, dtype: str) -> int:
    """Write the Hugging Face directory, a piece at a time, and return the bytes of its tensors.

    This process has to stay small: the peak that the system reports of another begins with that of its parent.
    """
    name, numpy_type = DTYPES[dtype]
    piece = np.random.default_rng(0).normal(0, 0.02, PIECE).astype(numpy_type)
    header, end = {}, 0
    for tensor, row in parameter_table(config).items():  # a Llama has our names
        begin, end = end, end + row.size * piece.itemsize
        header[tensor] = {"dtype": name, "shape": list(row.shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FAMILIES["llama"].content(config)))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in range(end // piece.itemsize, 0, -PIECE):
            file.write(piece[:left].data)
    return end


def measure(source: Path, target: Path, *options: str) -> dict[str, Any]:
    """Run `gpt convert` in a process of its own: its bytes, seconds and peak resident bytes."""
    command = [sys.executable, "-m", "twingpt", "convert", str(source), str(target), *options, "--json"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    seconds, result = time.perf_counter() - start, json.loads(output)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "from": result["source_format"],
        "to": result["target_format"] + (f" {options[-1]}-bit" if "--q-bits" in options else ""),
        "bytes": result["bytes"],
        "seconds": seconds,
        "peak_rss_bytes": peak,
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        config = config_of(int(options.gigabytes * 1e9), np.dtype(DTYPES[options.dtype][1]).itemsize)
        size = write_random(folder / "source", config, options.dtype)
        rows = [measure(folder / "source", folder / "ours", "--to", "twingpt")]
        rows.append(measure(folder / "ours", folder / "hf", "--to", "hf"))
        rows.append(measure(folder / "ours", folder / "four", "--to", "twingpt", "--q-bits", "4"))
        rows.append(measure(folder / "four", folder / "hf", "--to", "hf", "--force"))
    if options.json:
        described = {"source_bytes": size, "dtype": options.dtype, "parameters": parameter_count(config)}
        print(json.dumps({**described, "rows": rows}))
        return
    print(f"A Llama of {parameter_count(config):,} parameters in {options.dtype}, {size / 1e9:.2f} GB:")
    for row in rows:
        print(
            f"{row['from']:>12} -> {row['to']:<14} {row['bytes'] / 1e9:6.2f} GB written in {row['seconds']:6.1f} s, "
            f"{row['peak_rss_bytes'] / 1e9:.2f} GB resident at most"
        )


if __name__ == "__main__":
    main()
