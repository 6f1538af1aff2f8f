"""Checkpoints: whole or not there, and refused with one clear sentence when damaged."""

import errno
import json
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import open_checkpoint, training_state
from twingpt.core import paths
from twingpt.core.checkpoint import schema as checkpoint
from twingpt.core.checkpoint.config_json import model_type
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.tokenizer import ByteTokenizer
from twingpt.runs import folder as runs


def refusal(folder) -> str:
    with pytest.raises(UserError) as error:
        opened = open_checkpoint(folder)
        dict(opened.parameters()), dict(opened.optimizer_state())
    assert "\n" not in str(error.value)
    return str(error.value)


def trust_again(folder) -> None:
    """Rewrite the manifest for the files as they are, so that deeper checks are reached."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    for name, entry in manifest["files"].items():
        entry["size"], entry["sha256"] = (folder / name).stat().st_size, checkpoint._sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_round_trip(saved):
    opened = open_checkpoint(saved)
    first = dict(initialise(opened.config, 0))
    read = dict(opened.parameters())
    assert list(read) == list(first) and all(np.array_equal(read[name], first[name]) for name in first)
    assert opened.training()["step"] == 3
    assert len(dict(opened.optimizer_state())) == 2 * len(first)
    assert opened.tokenizer().kind == "byte"


def test_files_are_what_the_ecosystem_expects(saved):
    tensors = load_file(saved / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.weight" in tensors
    config = json.loads((saved / "config.json").read_text("utf-8"))
    assert config["model_type"] == "qwen3" and config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    header = (saved / "model.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert size % 8 == 0 and json.loads(header[8 : 8 + size])["__metadata__"] == {"format": "pt"}
    assert {path.name for path in saved.glob("model*")} == {"model.safetensors"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("model.safetensors", "model.safetensors is missing"), ("optimizer.safetensors", "optimizer.safetensors is miss"),
     ("config.json", "config.json is missing"), ("tokenizer.json", "tokenizer.json is missing"),
     ("manifest.json", "manifest.json is missing")],
)  # fmt: skip
def test_missing_file(saved, name, message):
    (saved / name).unlink()
    assert message in refusal(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json", "training_state.json"])
def test_truncated_file(saved, name):
    (saved / name).write_bytes((saved / name).read_bytes()[:-5])
    assert f"{name} has" in refusal(saved) and "cut or altered" in refusal(saved)


def test_a_flipped_bit_names_the_tensor(saved):
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    assert "the tensor model.norm.weight in" in refusal(saved)


@pytest.mark.parametrize("position", [3, 40])
def test_a_flipped_bit_in_the_header(saved, position):
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    assert "the file is damaged" in refusal(saved)


def test_a_flipped_bit_elsewhere(saved):
    path = saved / "config.json"
    path.write_text(path.read_text("utf-8").replace("32", "33", 1))
    assert "config.json do not match the manifest" in refusal(saved)


@pytest.mark.parametrize("name", ["model-extra.safetensors", "weights.pkl", "notes.txt", "sub"])
def test_extra_file(saved, name):
    (saved / name).mkdir() if name == "sub" else (saved / name).write_bytes(b"x")
    assert f"a file {name} that its manifest does not list: remove it" in refusal(saved)
    (saved / name).rmdir() if name == "sub" else (saved / name).unlink()
    (saved / ".DS_Store").write_bytes(b"macOS leaves these")
    open_checkpoint(saved)


@pytest.mark.parametrize(
    "change",
    [{"step": None}, {"step": 2.5}, {"step": -1}, {"step": "3"}, {"train": None}, {"train": {}}, {"data": 5},
     {"val_loss": "x"}, {"best_val_loss": []}, {"schema": 99}, {"evaluated_at": 2.5}, {"sampled_at": None}],
)  # fmt: skip
def test_a_training_state_that_is_none(saved, change):
    path = saved / "training_state.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change))
    trust_again(saved)
    with pytest.raises(UserError, match=r"training_state\.json is not what this version of twingpt writes"):
        open_checkpoint(saved).training()


def alter(saved, change) -> str:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    trust_again(saved)
    return refusal(saved)


def test_missing_tensor(saved):
    message = alter(saved, lambda tensors: tensors.pop("model.norm.weight"))
    assert "The tensor model.norm.weight is missing from model.safetensors" in message


def test_extra_tensor(saved):
    message = alter(saved, lambda tensors: tensors.update(extra=np.zeros(3, np.float32)))
    assert "has a tensor extra, which this model has not" in message


def test_misshapen_tensor(saved):
    message = alter(saved, lambda tensors: tensors.update({"model.norm.weight": np.zeros(31, np.float32)}))
    assert "The tensor model.norm.weight in" in message and "has shape (31,), and the model needs (32,)" in message


def test_tensor_of_another_type(saved):
    message = alter(saved, lambda tensors: tensors.update({"model.norm.weight": np.zeros(32, np.float64)}))
    assert "is F64, and must be F32" in message


def test_not_safetensors_at_all(saved):
    (saved / "model.safetensors").write_bytes(b"\xff" * 64)
    trust_again(saved)
    assert "is not a readable safetensors file" in refusal(saved)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1, "files": {"config.json": 3}}'])
def test_a_manifest_that_is_none(saved, content):
    (saved / "manifest.json").write_text(content)
    assert "manifest.json" in refusal(saved)


def test_a_manifest_that_points_outside(saved):
    manifest = json.loads((saved / "manifest.json").read_text("utf-8"))
    manifest["files"]["../secret"] = {"size": 1, "sha256": "0"}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert "names a file '../secret', which is not in it: it is not opened" in refusal(saved)


def test_another_schema(saved):
    path = saved / "manifest.json"
    path.write_text(path.read_text("utf-8").replace('"schema": 1', '"schema": 99'))
    assert "checkpoint schema 99, and this version reads 1" in refusal(saved)


def test_an_unknown_key_in_the_config(saved):
    path = saved / "config.json"
    path.write_text(path.read_text("utf-8").replace('"n_layer"', '"n_layers"'))
    trust_again(saved)
    assert "did you mean 'n_layer'" in refusal(saved)


def test_a_model_without_training_state(saved):
    tensors = dict(open_checkpoint(saved).parameters())
    checkpoint.save(saved.parent / "model", open_checkpoint(saved).config, ByteTokenizer(), tensors)
    opened = open_checkpoint(saved.parent / "model")
    assert len(dict(opened.parameters())) == len(tensors)
    with pytest.raises(UserError, match="can't be resumed"):
        opened.training()


@pytest.mark.parametrize("calls", range(1, 9))
def test_a_disk_that_fills_up_while_saving(saved, monkeypatch, calls):
    """Whichever write fails, the old checkpoint stays as it was and no half one is left."""
    opened = open_checkpoint(saved)
    tensors = dict(opened.parameters()) | dict(opened.optimizer_state())
    before = {path: path.read_bytes() for path in saved.iterdir()}
    real, count = paths.os.fsync, [0]

    def fsync(descriptor):
        count[0] += 1
        if count[0] == calls:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(paths.os, "fsync", fsync)
    with pytest.raises(UserError, match=r"can't be saved .*No space left on device.*free some space"):
        checkpoint.save(saved, opened.config, ByteTokenizer(), tensors, training_state(4))
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_disk_that_is_really_full(saved, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        opened = open_checkpoint(saved)
        tensors = dict(opened.parameters()) | dict(opened.optimizer_state())
        with pytest.raises(UserError, match="No space left on device"):
            checkpoint.save(
                mount / "step-00000004",
                opened.config,
                ByteTokenizer(),
                tensors,
                training_state(4),
            )
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def test_saving_over_a_checkpoint_replaces_it(saved):
    opened = open_checkpoint(saved)
    tensors = {name: array + 1 for name, array in opened.parameters()}
    checkpoint.save(saved, opened.config, ByteTokenizer(), tensors)
    again = dict(open_checkpoint(saved).parameters())
    assert np.array_equal(again["model.norm.weight"], tensors["model.norm.weight"])
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_large_models_are_sharded_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    config = GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=4, n_embd=32)
    tensors = dict(initialise(config, 0))
    checkpoint.save(tmp_path / "big", config, ByteTokenizer(), tensors)
    index = json.loads((tmp_path / "big" / "model.safetensors.index.json").read_text("utf-8"))
    assert set(index["weight_map"]) == set(tensors) and len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    read = dict(open_checkpoint(tmp_path / "big").parameters())
    assert all(np.array_equal(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("switches", "family"),
    [({}, "qwen3"), ({"qk_norm": False}, "llama"), ({"qk_norm": False, "mlp_bias": True}, "llama"),
     ({"mlp_bias": True}, "twingpt"), ({"qkv_bias": True}, "twingpt"), ({"mlp": "relu2"}, "twingpt"),
     ({"qkv_bias": True, "attn_out_bias": True}, "qwen3"), ({"sliding_window": 8}, "twingpt"),
     ({"logit_softcap": 15.0}, "twingpt"),
     ({"embed_norm": True}, "twingpt"), ({"smear": True}, "twingpt"),
     ({"position": "none"}, "twingpt"), ({"rope_fraction": 0.5}, "twingpt")],
)  # fmt: skip
def test_only_a_model_that_transformers_computes_claims_its_family(switches, family):
    assert model_type(GPTConfig.from_dict({"vocab_size": 8, "n_embd": 64, **switches})) == family


def test_resolve(saved):
    run = saved.parent.parent
    (run / "run.json").write_text("{}")
    assert runs.resolve(run) == saved  # killed between its first checkpoint and `latest`
    runs.point(run, "latest", saved)
    for name in (saved, run, f"{run}@3", f"{run}@latest"):
        assert runs.resolve(name) == saved
    for name, message in (("@best", "best, as it has not been evaluated: it has those of the steps 3, as .*@STEP"),
                          ("@4", "those of the steps 3"), ("@x", "latest, best or a"),
                          ("@²", "latest, best or a")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            runs.resolve(f"{run}{name}")
    with pytest.raises(UserError, match="There is no run"):
        runs.resolve(run / "nothing")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"../../../etc", b"", b"step-x" * 1000])
def test_a_pointer_that_points_nowhere(saved, content):
    run = saved.parent.parent
    (run / "run.json").write_text("{}")
    (saved.parent / "step-00000003 (copy)").mkdir()
    (run / "latest").write_bytes(content)
    with pytest.raises(UserError, match="has no checkpoint latest: it has those of the steps 3"):
        runs.resolve(run)


def test_a_run_with_an_at_in_its_name(saved):
    run = saved.parent.parent.rename(saved.parent.parent.with_name("a@b"))
    (run / "run.json").write_text("{}")
    runs.point(run, "latest", runs.checkpoint_folder(run, 3))
    assert runs.resolve(run) == runs.resolve(f"{run}@3") == runs.checkpoint_folder(run, 3)


def test_a_run_is_found_by_its_name(saved, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    saved.parent.parent.rename(tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "mine" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    runs.point(runs.find_run("mine"), "latest", saved)
    assert runs.resolve("mine").name == saved.name


def test_prune_keeps_the_latest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        runs.checkpoint_folder(tmp_path, step).mkdir(parents=True)
    runs.point(tmp_path, "latest", runs.checkpoint_folder(tmp_path, 5))
    runs.point(tmp_path, "best", runs.checkpoint_folder(tmp_path, 2))
    for leftover in (".step-00000006.x1y2.tmp", ".step-00000001.old"):  # of a save and a removal that were killed
        (tmp_path / "checkpoints" / leftover / "deep").mkdir(parents=True)
    for leftover in (".latest.77.tmp", ".run.json.77.tmp"):
        (tmp_path / leftover).write_text("half")
    (tmp_path / ".notes.tmp").write_text("somebody's own")
    runs.prune(tmp_path, 2)
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert [path.name for path in tmp_path.glob(".*")] == [".notes.tmp"]
    assert [path.name[-1] for path in runs.checkpoints(tmp_path)] == ["2", "4", "5"]


def test_prune_counts_up_to_where_a_run_is_that_was_taken_back(tmp_path):
    for step in (3, 4, 5, 8, 9):
        runs.checkpoint_folder(tmp_path, step).mkdir(parents=True)
    runs.point(tmp_path, "latest", runs.checkpoint_folder(tmp_path, 5))
    runs.prune(tmp_path, 2)
    assert [path.name[-1] for path in runs.checkpoints(tmp_path)] == ["4", "5", "8", "9"]
    runs.point(tmp_path, "latest", runs.checkpoint_folder(tmp_path, 9))
    runs.prune(tmp_path, 2)
    assert [path.name[-1] for path in runs.checkpoints(tmp_path)] == ["8", "9"]
