"""Safetensors files: whatever is in one, it is read rightly or refused in one sentence."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.conftest import dose, training_state
from tests.mutate import Judge, header_at, mutations, overwrite
from twingpt.core.checkpoint import safetensors_file as module
from twingpt.core.checkpoint import schema
from twingpt.core.checkpoint.safetensors_file import DTYPES, TensorFile, write_safetensors
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.paths import new_folder
from twingpt.core.tokenizer import ByteTokenizer

SOME = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.array(7, np.uint32),
    "c": np.zeros((0, 5), np.float32),
    "d.half": np.linspace(-1, 1, 6, dtype=np.float16).reshape(2, 3),
}


def written(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_round_trip(tmp_path):
    dtypes = {"b": "U32", "d.half": "F16"}
    shapes = {name: array.shape for name, array in SOME.items()}
    entry = write_safetensors(tmp_path / "x", shapes, SOME.items(), dtypes)
    assert entry["size"] == (tmp_path / "x").stat().st_size
    file = TensorFile(tmp_path / "x")
    with safe_open(tmp_path / "x", "np") as theirs:
        for name, array in SOME.items():
            for read in (file.read(name), theirs.get_tensor(name)):
                assert read.dtype == array.dtype and np.array_equal(read, array) and read.shape == array.shape


def test_it_reads_what_the_library_writes(tmp_path):
    save_file(SOME, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    assert all(np.array_equal(file.read(name), array) for name, array in SOME.items())


def test_bfloat16_and_float16_are_read_exactly(tmp_path):
    bits = np.array([0x3F80, 0xC049, 0x7F80, 0x0001], np.uint16)
    write_safetensors(tmp_path / "x", {"a": (4,)}, [("a", bits)], {"a": "BF16"})
    wanted = np.array([1, -3.140625, np.inf, 2.0**-133], np.float32)
    assert np.array_equal(TensorFile(tmp_path / "x").read_float("a"), wanted)
    halves = np.array([1, -2.5, 6e-8], np.float16)
    write_safetensors(tmp_path / "x", {"a": (3,)}, [("a", halves)], {"a": "F16"})
    assert np.array_equal(TensorFile(tmp_path / "x").read_float("a"), halves.astype(np.float32))


def test_whole_numbers_are_no_weights(tmp_path):
    write_safetensors(tmp_path / "x", {"a": (1,)}, [("a", np.ones(1, np.int64))], {"a": "I64"})
    with pytest.raises(UserError, match="is I64, and must be of floating point"):
        TensorFile(tmp_path / "x").read_float("a")


def test_tensors_in_another_order_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"b .* came, where a"):
        write_safetensors(tmp_path / "x", {"a": (1,)}, [("b", np.ones(1, np.float32))])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_file_that_safetensors_refuses_is_not_published(tmp_path, name):
    """`__metadata__` is what the format has for other things than a tensor."""
    config = GPTConfig(vocab_size=257, block_size=8, n_layer=1, n_head=1, n_embd=8)
    tensors = dict(initialise(config, 0)) | {"__metadata__": np.zeros(2, np.float32)}
    with pytest.raises(RuntimeError, match=f"{name} was written so that safetensors does not open it"):
        if name == "optimizer.safetensors":
            schema.save(tmp_path / "new", config, ByteTokenizer(), tensors, training_state(1))
        else:
            with new_folder(tmp_path / "new") as folder:
                schema.write_model(folder, {name: array.shape for name, array in tensors.items()}, tensors.items())
    assert list(tmp_path.iterdir()) == []


def test_safetensors_is_imported_when_something_is_written():
    code = "import sys, twingpt.weights.convert; assert not {'safetensors', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_that_safetensors_reads_otherwise_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr("safetensors.safe_open", lambda path, framework: safe_open(tmp_path / "other", framework))
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "other")
    with pytest.raises(RuntimeError, match="x was written so that safetensors finds other tensors in it"):
        write_safetensors(tmp_path / "x", {"a": (2,)}, [("a", np.ones(2, np.int32))], {"a": "I32"})


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": {**ONE, "shape": [2**63]}}, b"1234", "other bytes than its shape"),
        ({"a": {**ONE, "shape": [2**62, 4, 0]}}, b"1234", "other bytes than its shape"),
        ({"a": {**ONE, "shape": [2**63, 0], "data_offsets": [0, 0]}}, b"", "a shape that can't be"),
        ({"__metadata__": {"a": 1}}, b"", "its metadata are not texts"),
        ({"a": {**ONE, "shape": [float("nan")]}}, b"1234", "not whole numbers"),
        ({"a": {**ONE, "shape": [-1]}}, b"1234", "not whole numbers"),
        ({"a": {**ONE, "shape": [True]}}, b"1234", "not whole numbers"),
        ({"a": {**ONE, "shape": [1] * 9}}, b"1234", "a shape that can't be"),
        ({"a": {**ONE, "data_offsets": [4, 8]}}, b"1234", "begins at byte"),
        ({"a": {**ONE, "data_offsets": [0]}}, b"1234", "other bytes"),
        ({"a": {**ONE, "dtype": "F8"}}, b"1234", "which is not one of"),
        ({"a": {**ONE, "dtype": ["F32"]}}, b"1234", "which is not one of"),
        ({"a": ONE, "b": ONE}, b"1234", "begins at byte"),
        ({"a": ONE}, b"12345", "its tensors end at byte"),
        ({"a": ONE}, b"123", "its tensors end at byte"),
        ({"a": None}, b"", "is not described"),
        ([], b"", "is not an object"),
        (b'{"a": 1, "a": 2}', b"", "a name twice"),
        (b'{"a":' * 10_000, b"", "nested too deeply"),
        (b"\xff\xfe", b"", "can't decode"),
        (b"{", b"", "not a readable safetensors file"),
        (b'{"a":' + b"9" * 6000 + b"}", b"", "not a readable safetensors file"),
    ],
)
def test_a_bad_header_is_refused(tmp_path, header, data, message):
    with pytest.raises(UserError, match=message) as refused:
        TensorFile(written(tmp_path / "x", header, data))
    assert "\n" not in str(refused.value)


def test_a_header_beyond_the_file_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "x").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match=r"its header ends at byte \d+, and the file at 10"):
        TensorFile(tmp_path / "x")


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.write((2**33).to_bytes(8, "little"))
        file.truncate(2**34)  # sparse
    with pytest.raises(UserError, match="at most 16777216 are read"):
        TensorFile(tmp_path / "x")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        TensorFile(tmp_path / "x")
    with pytest.raises(UserError, match=r"Is a directory|Permission denied"):
        TensorFile(tmp_path)
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(UserError, match="its header ends at byte 8"):
        TensorFile(tmp_path / "x")


def test_a_file_cut_while_it_is_open(tmp_path):
    save_file(SOME, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    last = max(file.entries, key=lambda name: file.entries[name].offset)
    with pytest.raises(UserError, match="was cut while it was read"):
        file.read(last)


def test_null_metadata_as_mlx_writes_it(tmp_path):
    assert list(TensorFile(written(tmp_path / "x", {"__metadata__": None, "a": ONE}, b"1234")).entries) == ["a"]


@pytest.mark.parametrize("n", dose(500, 10_000))
def test_mutated_files(tmp_path, n, soak):
    """Each is refused in one sentence, or read as the safetensors library reads it, and never more."""
    save_file(SOME, tmp_path / "good", {"format": "pt"})
    content, path, judge = (tmp_path / "good").read_bytes(), tmp_path / "x", Judge(1, soak=soak)
    for mutated in mutations(content, 1, n, header_at):
        overwrite(path, mutated)
        if not judge(lambda: every_tensor(path), len(mutated)):
            continue
        read = every_tensor(path)
        assert sum(array.nbytes for array in read.values()) <= len(mutated)
        with safe_open(path, "np") as theirs:
            assert len(theirs.keys()) == len(read)
            for name, entry in TensorFile(path).entries.items():
                assert entry.dtype == "BF16" or read[name].tobytes() == theirs.get_tensor(name).tobytes()
    assert 0.01 * n < judge.read < 0.5 * n  # some mutations change nothing that matters


def every_tensor(path):
    file = TensorFile(path)
    return {name: file.read(name) for name in file.entries}


@pytest.mark.parametrize(("dtype", "times"), [("F32", 1), ("F64", 1.5), ("F16", 5), ("BF16", 5)])
def test_a_tensor_takes_its_own_bytes_and_no_more(tmp_path, dtype, times):
    """Its numbers, of another dtype than float32 beside a converted piece of them; none that only the header claims."""
    bits = np.zeros(10**5, DTYPES[dtype])
    write_safetensors(tmp_path / "x", {"a": (10**5,)}, [("a", bits)], {"a": dtype})
    content = (tmp_path / "x").read_bytes()
    assert Judge(0, 2**14, times)(lambda: TensorFile(tmp_path / "x").read_float("a"), len(content))
    (tmp_path / "x").write_bytes(content[:-1])
    assert not Judge(0, 2**14, 0)(lambda: TensorFile(tmp_path / "x").read_float("a"), 0)


@pytest.mark.soak
def test_the_largest_header_is_read(tmp_path):
    """The limit on the header's length is what bounds the time of reading it."""
    n = module.MAX_HEADER // 100
    header = {f"{i:06}": {**ONE, "data_offsets": [4 * i, 4 * i + 4]} for i in range(n)}
    path = written(tmp_path / "x", header, bytes(4 * n))
    assert len(TensorFile(path).entries) == n > 150_000
