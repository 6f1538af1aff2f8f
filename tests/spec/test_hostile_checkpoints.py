"""Our own checkpoints as an enemy or a bad disk would leave them: read rightly, or refused in one sentence."""

import hashlib
import json
import os

import numpy as np
import pytest

from tests.conftest import dose, links, open_checkpoint, pipes, training_state
from tests.mutate import DENSE, HASHING, ROOM, Judge, header_at, mutations, overwrite, whole
from twingpt.core.checkpoint import schema as checkpoint
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.reading import read_json
from twingpt.core.tokenizer import CharTokenizer, load

SCALING = {"type": "llama3", "factor": 8.0, "original_block_size": 4}
TINY = {"vocab_size": 4, "block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 4, "n_inner": 4}


@pytest.fixture
def tiny(tmp_path):
    """A checkpoint of a few kilobytes."""
    config = GPTConfig.from_dict({**TINY, "rope_scaling": SCALING})
    tensors = dict(initialise(config, 0))
    tensors |= {f"adamw.{slot}.{name}": np.abs(array) for name, array in tensors.items() for slot in "mv"}
    checkpoint.save(tmp_path / "tiny", config, CharTokenizer("abc"), tensors, training_state(3))
    return tmp_path / "tiny"


def put(folder, name, content, manifest=None):
    """Write a file, and a manifest that trusts it."""
    manifest = manifest or json.loads((folder / "manifest.json").read_text("utf-8"))
    overwrite(folder / name, content)
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    overwrite(folder / "manifest.json", json.dumps(manifest).encode())


# Each file, how many of a hundred mutations are of it, and who reads it.
READERS = {
    "config.json": (30, lambda opened: list(opened.parameters())),
    "tokenizer.json": (20, lambda opened: opened.tokenizer()),
    "tokenizer_config.json": (5, lambda opened: opened.tokenizer()),
    "training_state.json": (20, lambda opened: opened.training()),
    "model.safetensors": (5, lambda opened: list(opened.parameters())),
    "optimizer.safetensors": (5, lambda opened: list(opened.optimizer_state())),
}


@pytest.mark.parametrize("n", dose(500, 10_000))
def test_mutated_files(tiny, tmp_path, n, soak):
    """Those of the model alone in a checkpoint without the others, as each file is hashed each time."""
    judge, lean = Judge(1, ROOM + HASHING, soak=soak), tmp_path / "lean"
    opened = open_checkpoint(tiny)
    checkpoint.save_model(lean, opened.config, None, opened.parameters())
    for name, (share, read) in READERS.items():
        folder = lean if (lean / name).exists() else tiny
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        for entry in manifest["files"].values():
            entry.pop("crc32", None)
        content = (folder / name).read_bytes()
        for mutated in mutations(content, 1, n * share // 100, header_at if name.endswith("safetensors") else whole):
            put(folder, name, mutated, manifest)
            judge(lambda read=read, folder=folder: read(open_checkpoint(folder)), len(mutated))
        put(folder, name, content, manifest)
    for mutated in mutations((lean / "manifest.json").read_bytes(), 1, n * 15 // 100, whole):
        overwrite(lean / "manifest.json", mutated)
        judge(lambda: list(open_checkpoint(lean).parameters()), len(mutated))
    assert judge.judged == n and 0.1 * n < judge.read < 0.6 * n


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "training_state.json", "tokenizer.json"])
@pytest.mark.parametrize("depth", [500, 990, 100_000])
def test_deep_json(tiny, name, depth):
    if name == "manifest.json":
        (tiny / name).write_text("[" * depth + "]" * depth)
    else:
        put(tiny, name, b'{"twingpt":' + b"[" * depth + b"]" * depth + b"}")
    with pytest.raises(UserError) as refused:
        opened = open_checkpoint(tiny)
        opened.training(), opened.tokenizer()
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize("densest", ['{"":1}', "{}", "[[]]", "[0]", "1.5", '"😀"'])
def test_dense_json_takes_what_pythons_objects_take(tmp_path, densest):
    text = f"[{','.join([densest] * 20_000)}]".encode()
    (tmp_path / "x").write_bytes(text)
    assert Judge(0, times=DENSE)(lambda: read_json(tmp_path / "x"), len(text))


@pytest.mark.parametrize(("name", "most"), [("config.json", "4,194,304"), ("tokenizer.json", "67,108,864")])
def test_a_huge_json_file_is_refused_before_it_is_read(tiny, name, most):
    with (tiny / name).open("r+b") as file:
        file.truncate(2**34)  # sparse
    judge = Judge()

    def read():
        load(tiny) if name == "tokenizer.json" else read_json(tiny / name)

    with pytest.raises(UserError, match=f"has 17,179,869,184 bytes, and at most {most} are read"):
        read()
    assert not judge(read, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 10**6}, "n_layer must be at most 4096, and is 1000000"),
        ({"n_layer": 4000}, "says that the model has 4000 layers, and has 13 tensors"),
        ({"vocab_size": 2**40}, r"embed_tokens.weight in .* has shape \(4, 4\), and the model needs \(1099511627776, "),
        ({"vocab_size": 2**63}, "vocab_size is 9223372036854775808, which is too large"),
        ({"n_inner": 10**400}, r"n_inner is 1000+\.\.\.0+, which is too large"),
        ({"rope_theta": 10**400}, "which is too large"),
        ({"norm_eps": float("nan")}, "norm_eps must be a finite number, and is nan"),
        ({"norm": "x" * 10**5}, "Unknown norm 'xxx"),
        ({"x" * 10**5: 1}, "Unknown model configuration key 'xxx"),
        ({"no_rope_layers": [0] * 10**5 + [7]}, "no_rope_layers must be"),
    ],
)
def test_numbers_and_names_that_are_too_large(tiny, change, message):
    content = json.loads((tiny / "config.json").read_text("utf-8"))
    content["twingpt"] |= change
    put(tiny, "config.json", json.dumps(content).encode())
    judge = Judge(0, ROOM + HASHING, DENSE)
    with pytest.raises(UserError, match=message):
        list(open_checkpoint(tiny).parameters())
    assert not judge(lambda: list(open_checkpoint(tiny).parameters()), (tiny / "config.json").stat().st_size)


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"])
@links
def test_links_out_are_not_followed(tiny, tmp_path, name):
    (tiny / name).rename(tmp_path / "outside")
    (tiny / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=f"{name} is a link to .*outside, out of its directory"):
        open_checkpoint(tiny)


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "model.safetensors", "tokenizer_config.json"])
@pipes
def test_what_never_ends_is_not_read(tiny, name):
    (tiny / name).unlink()
    os.mkfifo(tiny / name)
    with pytest.raises(UserError, match=f"{name} is missing"):
        open_checkpoint(tiny)
    (tiny / name).unlink()
    (tiny / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name} is missing"):
        open_checkpoint(tiny)
