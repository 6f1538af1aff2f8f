"""The golden record: what a user relies on, as commit 8422d67 did it, compared with the present code.

    python tests/golden/record.py          compare; exits 1 and prints each difference
    python tests/golden/record.py --write  write record.json anew (for a deliberate change; say which in the commit)

It holds every --help, the keys and types of every --json, exit codes, float32 losses of short runs on both backends,
and the SHA-256 of what `gpt convert` writes from the runs in this folder, which 8422d67 trained.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORD = HERE / "record.json"
PROSE = HERE / "prose.txt"
LOSS_TOLERANCE = 1e-5  # relative: float32 rounds otherwise on another processor

HELP = [
    "", "train", "generate", "convert", "plot", "baseline", "parity", "doctor", "runs", "runs show",
    "runs rm", "data", "data prepare", "data list", "data info", "data verify", "data rm", "data sources", "bench",
    "bench train", "bench forward", "bench memory", "tokenize", "tokenize train", "tokenize show", "tokenize compare",
]  # fmt: skip

TINY = "--n-layer 2 --n-head 2 --n-kv-head 1 --n-embd 16 --block-size 32 --batch-size 4 --dtype float32 --device cpu"
TRAIN = f"train --data prose.txt --tokenizer byte {TINY} --max-iters 30 --eval-interval 10 --eval-iters 2 --log-interval 1 --sample-interval 0"
BENCH = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 2 --device cpu --json"

# In order, since later ones use what earlier ones leave. Each ends with its JSON on stdout.
JSON = {
    "train torch": f"{TRAIN} --out runs/t --backend torch --json",
    "train mlx": f"{TRAIN} --out runs/m --backend mlx --json",
    "train nano": f"{TRAIN} --shape nano --optimizer muon --out runs/n --backend torch --json",
    "train nano mlx": f"{TRAIN} --shape nano --optimizer muon --out runs/nm --backend mlx --json",
    "train gpt2 accumulated": f"{TRAIN} --shape gpt2 --gradient-accumulation-steps 2 --out runs/g --backend torch --json",
    "resume": "train --resume runs/t --max-iters 34 --backend mlx --json",
    "finetune": "train --init-from qwen3 --data prose.txt --max-iters 6 --block-size 16 --device cpu --dtype float32 --out runs/f --json",
    "generate": "generate qwen3 -p The -m 20 --temp 0 --backend torch --json",
    "generate mlx": "generate qwen3 -p The -m 20 --seed 3 --backend mlx --json",
    "convert hf": "convert qwen3 c-hf --json",
    "convert hf back": "convert c-hf c-back --json",
    "convert mlx": "convert qwen3 c-mlx --to mlx --json",
    "convert 4 bits": "convert qwen3 c-4bit --q-bits 4 --q-group-size 32 --json",
    "convert 4 bits mlx": "convert qwen3 c-4bit-mlx --to mlx --q-bits 4 --q-group-size 32 --data prose.txt --json",
    "convert torch": "convert qwen3 c-torch --to torch --json",
    "convert torch back": "convert c-torch c-torch-back --json",
    "convert gguf": "convert qwen3 c.gguf --json",
    "inspect": "convert qwen3 --inspect --json",
    "inspect hf": "convert c-hf --inspect --json",
    "inspect 4 bits": "convert c-4bit --inspect --json",
    "plot": "plot runs/t runs/m --json",
    "baseline": "baseline prose.txt --tokenizer byte --json",
    "baseline run": "baseline qwen3 --json",
    "parity": "parity qwen3 --json",
    "doctor": "doctor --json",
    "runs": "runs --json",
    "runs show": "runs show runs/t --json",
    "runs rm": "runs rm runs/m --yes --json",
    "data prepare": "data prepare prose.txt --name prose --tokenizer byte --json",
    "data list": "data list --json",
    "data info": "data info prose --json",
    "data verify": "data verify prose --json",
    "data rm": "data rm prose --yes --json",
    "data sources": "data sources --json",
    "bench train": f"bench train {BENCH}",
    "bench forward": f"bench forward {BENCH}",
    "bench memory": "bench memory --tokens 64 --vocab-size 100 --n-embd 16 --device cpu --json",
    "tokenize train": "tokenize train prose.txt --vocab-size 300 --out tok --json",
    "tokenize show": "tokenize show --tokenizer byte Hello --json",
    "tokenize compare": "tokenize compare prose.txt --tokenizer byte --tokenizer tok --json",
}  # fmt: skip

MISTAKES = [
    "nonsense", "train --nonsense", "train --n-layer x", "train --preset giant", "train --data nowhere.txt",
    "train --set foo=1", "train --resume nowhere", "train --depth 99", "train --config nowhere.toml", "generate nowhere",
    "generate qwen3 --temp -1", "generate qwen3 --backend jax", "generate qwen3 --device tpu", "convert", "convert qwen3",
    "convert nowhere out", "convert qwen3 out --to onnx", "convert qwen3 out --q-bits 3", "convert qwen3 qwen3",
    "plot nowhere", "baseline nowhere", "parity nowhere", "runs show nowhere", "runs rm nowhere --yes", "data info nowhere",
    "data prepare nowhere", "bench train --preset giant", "tokenize show --tokenizer nowhere Hello", "runs --sort nothing",
]  # fmt: skip

DIGESTED = ["c-hf", "c-back", "c-mlx", "c-4bit", "c-4bit-mlx", "c-torch-back", "c.gguf", "tok"]
VOLATILE = {"README.md"}  # names versions


def environment(home: Path) -> dict[str, str]:
    """That of a plain terminal of 80 columns."""
    shared = HERE.parents[2] / "shared" / "tiktoken"
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")}
    return kept | {
        "PYTHONPATH": str(HERE.parents[1]),
        "TWINGPT_HOME": str(home),
        "COLUMNS": "80",
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TIKTOKEN_CACHE_DIR": str(shared),
    }


def keys(value: Any) -> Any:
    """The keys and types of a JSON value: of a list its first entry's, of a table of names one entry's."""
    if isinstance(value, dict):
        return {key: keys(item) for key, item in sorted(value.items())}
    if isinstance(value, list):
        return [keys(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def digests(place: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder, or of a file."""
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    return {
        file.relative_to(place.parent).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.name not in VOLATILE and file.name != "manifest.json"  # which has that of README.md
    }


def losses(run: Path) -> list[list[float]]:
    """(step, training loss, held-out loss or none) of each event of a run that has one."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    names = ("loss", "val_loss")
    return [[event["step"], event[name]] for event in events for name in names if event.get(name) is not None]


def observe(folder: Path) -> dict[str, Any]:
    """All of the record, from commands that run in `folder`."""
    env = environment(folder / "home")
    shutil.copy(PROSE, folder)
    for run in (HERE / "runs").iterdir():
        shutil.copytree(run, folder / run.name)

    def gpt(command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "twingpt", *command.split()]
        return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, input=stdin, check=False)

    def shape(command: str) -> dict[str, Any]:
        done = gpt(command)
        if done.returncode:
            raise SystemExit(f"gpt {command}\n{done.stderr}")
        return {"code": done.returncode, "keys": keys(json.loads(done.stdout))}

    found: dict[str, Any] = {"json": {name: shape(command) for name, command in JSON.items()}}
    with ThreadPoolExecutor(2) as pool:
        found["help"] = dict(zip(HELP, pool.map(lambda name: gpt(f"{name} --help").stdout, HELP), strict=True))
        found["exit"] = dict(zip(MISTAKES, pool.map(lambda name: gpt(name).returncode, MISTAKES), strict=True))
    found["text"] = gpt("generate qwen3 -p The -m 40 --temp 0 --backend torch").stdout
    found["losses"] = {run: losses(folder / "runs" / run) for run in ("t", "n", "nm", "g", "f")}
    found["digests"] = {name: digest for place in DIGESTED for name, digest in digests(folder / place).items()}
    return found


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Each place where two records differ; numbers may by LOSS_TOLERANCE."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted({*old, *new}, key=str)
        missing = [
            f"{where}/{name}: only {'then' if name in old else 'now'}"
            for name in names
            if (name in old) != (name in new)
        ]
        both = [name for name in names if name in old and name in new]
        return missing + [line for name in both for line in differences(old[name], new[name], f"{where}/{name}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}/{i}")]
    if isinstance(old, float) and isinstance(new, float) and abs(old - new) <= LOSS_TOLERANCE * abs(old):
        return []
    return [] if old == new else [f"{where}:\n  then {old!r}\n  now  {new!r}"]


def main() -> None:
    """Compare, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        found = observe(Path(folder))
    if write:
        RECORD.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
        return
    lines = differences(json.loads(RECORD.read_text("utf-8")), json.loads(json.dumps(found)))
    print("\n".join(lines) or "The golden record holds.")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
