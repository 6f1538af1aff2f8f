"""How fast `gpt data prepare` is, against tiktoken's encode_ordinary on one thread, and how much memory it takes.

    python benchmarks/prepare.py --gigabytes 0.2

The text is JSON lines made from the Python documentation: each document is some of its paragraphs, drawn with a fixed
seed. One thread encodes a part of the same documents before and after the preparation, which runs as a command of its
own; `ratio` is the preparation's speed over that of as many single threads as there are cores, at their mean.
`peak_rss_bytes` is the highest sum of the resident memory of the command and its worker processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from twingpt.data import sources, workers

PARAGRAPHS = 24  # of a document: some 3 kB
SINGLE = 8_000_000  # bytes that one thread encodes each time


def documents() -> Iterator[str]:
    """Documents without end, always the same."""
    draw = random.Random(1)
    paragraphs = [part for topic in sources.load("python-docs").documents for part in topic.split("\n\n") if part]
    while True:
        yield "\n\n".join(draw.choices(paragraphs, k=PARAGRAPHS))


def write(path: Path, size: float) -> int:
    """Write `size` bytes of text and a little more as JSON lines; how many bytes of text they are."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for document in documents():
            file.write(json.dumps({"text": document}) + "\n")
            written += len(document.encode())
            if written >= size:
                return written
    raise AssertionError


def single_thread(name: str) -> float:
    """Bytes of text a second of tiktoken's encode_ordinary."""
    import tiktoken

    encoding = tiktoken.get_encoding(name)
    texts, size = [], 0
    for document in documents():
        texts.append(document)
        size += len(document.encode())
        if size >= SINGLE:
            break
    start = time.perf_counter()
    for text in texts:
        encoding.encode_ordinary(text)
    return size / (time.perf_counter() - start)


def measure(gigabytes: float, tokenizer: str) -> dict[str, float | int | str]:
    """The preparation's figures beside the single thread's."""
    with tempfile.TemporaryDirectory(prefix="twingpt-prepare-") as folder:
        source = Path(folder) / "synthetic.jsonl"
        size = write(source, gigabytes * 1e9)
        command = [sys.executable, "-m", "twingpt", "data", "prepare", str(source)]
        command += ["--tokenizer", tokenizer, "--name", "synthetic", "--json"]
        singles = [single_thread(tokenizer)]
        ended = subprocess.run(command, env={**os.environ, "TWINGPT_HOME": folder}, capture_output=True, check=True)
        singles.append(single_thread(tokenizer))
    result = json.loads(ended.stdout)
    cores, single = workers.cores(), statistics.mean(singles)
    speed = result["bytes"] / result["seconds"]
    return {
        "tokenizer": tokenizer,
        "cores": cores,
        "text_bytes": size,
        "documents": result["documents"],
        "tokens": result["tokens"] + result["val_tokens"],
        "seconds": result["seconds"],
        "bytes_per_second": speed,
        "single_thread_bytes_per_second": single,
        "ratio": speed / (cores * single),
        "peak_rss_bytes": result["peak_rss_bytes"],
    }


def main() -> None:
    """Parse the command line and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.2, help="of text")
    parser.add_argument("--tokenizer", default="gpt2", help="one of tiktoken's")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.gigabytes, arguments.tokenizer)
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"{result['text_bytes'] / 1e9:.2f} GB, {result['documents']:,} documents in {result['seconds']:.1f} s on "
        f"{result['cores']} cores: {result['bytes_per_second'] / 1e6:.1f} MB/s, {result['ratio']:.2f} of "
        f"{result['cores']} x {result['single_thread_bytes_per_second'] / 1e6:.1f} MB/s (encode_ordinary, one thread); "
        f"at most {result['peak_rss_bytes'] / 1e6:.0f} MB resident"
    )


if __name__ == "__main__":
    main()
