"""Sources, preparation and token data sets."""

import json
import sys

import numpy as np
import pytest

from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.locks import locked
from twingpt.core.paths import new_folder, write_atomically
from twingpt.data import shards
from twingpt.data.prepare import prepare
from twingpt.data.shards import TokenDataset, token_dtype
from twingpt.data.sources import load


@pytest.fixture(autouse=True)
def fresh_home(monkeypatch, tmp_path):
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path / "home"))


def test_python_docs_are_there_without_a_network():
    source = load("python-docs")
    assert len(source.documents) > 50
    assert any('The "assert" statement' in document for document in source.documents)


def test_folder_of_notes(tmp_path):
    notes = tmp_path / "notes"
    (notes / "more").mkdir(parents=True)
    (notes / "b.md").write_text("two")
    (notes / "a.txt").write_text("one")
    (notes / "more" / "c.txt").write_text("three")
    (notes / ".hidden.txt").write_text("no")
    (notes / "picture.png").write_bytes(b"\x89PNG")
    assert load(str(notes)).documents == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("blank.txt", b" \n\n", "blank.txt is empty"),
        ("latin.txt", b"caf\xe9!", "latin.txt is not UTF-8 text: byte 3 is 0xe9"),
    ],
)
def test_unreadable_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(str(tmp_path / name), "byte", 0)
    assert not any((tmp_path / "home" / "data").iterdir())


def test_missing_file_empty_folder_and_unknown_name(tmp_path):
    with pytest.raises(UserError, match="There is no file or folder"):
        load(str(tmp_path / "nothing.txt"))
    with pytest.raises(UserError, match="has no text files"):
        load(str(tmp_path))
    with pytest.raises(UserError, match="did you mean 'shakespeare'"):
        load("shakespear")


def documents_of(data, split):
    text = data.tokenizer.decode
    ends = np.flatnonzero(data.splits[split] == data.tokenizer.end_of_text)
    return [text(data.splits[split][start:end]) for start, end in zip([0, *ends + 1], ends, strict=False)]


def test_split_of_many_documents_is_by_hash_and_stable(tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    for i in range(500):
        (notes / f"{i}.txt").write_text(f"document number {i} " * 5)
    data = prepare(str(notes), "byte", 0)
    train, val = documents_of(data, "train"), documents_of(data, "val")
    assert 30 < len(val) < 70 and len(train) + len(val) == 500 and not set(train) & set(val)
    (notes / "000.txt").write_text("one more")
    more = prepare(str(notes), "byte", 0)
    assert set(train) < set(documents_of(more, "train")) or set(val) < set(documents_of(more, "val"))
    assert set(train) <= set(documents_of(more, "train")) and set(val) <= set(documents_of(more, "val"))


def test_split_of_one_document_holds_out_its_end(tmp_path):
    (tmp_path / "digits.txt").write_text("0123456789" * 10)
    data = prepare(str(tmp_path / "digits.txt"), "byte", 0)
    assert documents_of(data, "train") == ["0123456789" * 9] and documents_of(data, "val") == ["0123456789"]


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_prepared_once_and_found_again(prose, kind):
    data = prepare(str(prose), kind, 300)
    tokens = np.concatenate([data.splits["train"][:-1], data.splits["val"][:-1]])
    assert data.tokenizer.decode(tokens) == prose.read_text("utf-8")
    assert data.splits["train"][-1] == data.tokenizer.end_of_text
    stamp = (data.folder / "manifest.json").stat().st_mtime_ns
    again = prepare(str(prose), kind, 300)
    assert again.folder == data.folder and (again.folder / "manifest.json").stat().st_mtime_ns == stamp
    assert again.fingerprint == data.fingerprint
    prose.write_text(prose.read_text("utf-8") + " More.")
    assert prepare(str(prose), kind, 300).folder != data.folder


def test_manifest_counts(prose):
    data = prepare(str(prose), "byte", 0)
    facts = data.manifest["splits"]
    assert facts["train"]["bytes"] + facts["val"]["bytes"] == len(prose.read_bytes())
    assert facts["train"]["tokens"] == facts["train"]["bytes"] + 1  # the end of the document


def test_token_width():
    assert token_dtype(2**16) == np.dtype("<u2") and token_dtype(2**16 + 1) == np.dtype("<u4")


def test_batches_are_windows_of_the_tokens(prose):
    data = prepare(str(prose), "byte", 0)
    tokens, targets = data.batch(0, 6, 32, seed=1)
    assert tokens.shape == targets.shape == (6, 32) and tokens.dtype == np.int32
    assert np.array_equal(tokens[:, 1:], targets[:, :-1])
    text = bytes(data.splits["train"][:-1].astype(np.uint8))
    assert all(bytes(row.astype(np.uint8)) in text for row in tokens)
    again = np.concatenate([data.batch(i, 2, 32, seed=1)[0] for i in (0, 2, 4)])
    assert np.array_equal(tokens, again)


def test_validation_covers_every_token_once(prose):
    data = prepare(str(prose), "byte", 0)
    val = data.splits["val"]
    batches = list(data.validation(4, 32, 0))
    targets = np.concatenate([y[y >= 0] for _, y in batches])
    assert np.array_equal(targets, val[1:])
    assert all(x.shape == (4, 32) for x, _ in batches)
    assert len(list(data.validation(4, 32, 2))) == 2


def test_data_shorter_than_a_block(tmp_path):
    (tmp_path / "short.txt").write_text("Only a few words here.")
    data = prepare(str(tmp_path / "short.txt"), "byte", 0)
    with pytest.raises(UserError, match="fewer than one block of 64"):
        data.check(GPTConfig(vocab_size=257, block_size=64))


def test_data_outside_the_models_vocabulary(prose):
    with pytest.raises(UserError, match="outside the model's vocabulary of 100"):
        prepare(str(prose), "byte", 0).check(GPTConfig(vocab_size=100, block_size=16))


def test_a_shard_cut_short(prose):
    data = prepare(str(prose), "byte", 0)
    path = data.folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="delete the folder to prepare again"):
        TokenDataset(data.folder)


def test_a_damaged_token_id_is_never_trained_on(prose):
    data = prepare(str(prose), "byte", 0)
    for name in ("train", "val"):
        path = data.folder / f"{name}.bin"
        path.write_bytes(b"\xff" * path.stat().st_size)
    damaged = TokenDataset(data.folder)
    with pytest.raises(UserError, match="token id 65535, outside its vocabulary of 257"):
        damaged.batch(0, 2, 16, 1)
    with pytest.raises(UserError, match="token id 65535"):
        next(damaged.validation(2, 16, 0))


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_broken_manifest(prose, content):
    data = prepare(str(prose), "byte", 0)
    (data.folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="is broken"):
        TokenDataset(data.folder)


@pytest.mark.parametrize("where", ["append", "finish_dataset"])
def test_a_full_disk_leaves_nothing(prose, tmp_path, monkeypatch, where):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr({"append": shards.ShardWriter, "finish_dataset": shards}[where], where, full)
    with pytest.raises(UserError, match=r"can.t be written to .*No space left on device"):
        prepare(str(prose), "byte", 0)
    assert list((tmp_path / "home" / "data").iterdir()) == []


def test_a_preparation_removes_what_a_killed_one_left_and_nothing_else(prose, tmp_path):
    dead, alive = (tmp_path / "home" / "data" / name for name in (".prose-1.x1y2.tmp", ".prose-2.x1y2.tmp"))
    for leftover in (dead, alive):
        leftover.mkdir(parents=True)
        (leftover / "train.bin").write_bytes(b"half")
    with locked(alive):
        prepare(str(prose), "byte", 0)
    assert alive.exists() and not dead.exists()


def test_python_without_its_topics(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match=r"no pydoc_data\.topics"):
        load("python-docs")


def test_manifest_is_json(prose):
    manifest = json.loads((prepare(str(prose), "char", 0).folder / "manifest.json").read_text("utf-8"))
    assert manifest["name"] == "prose" and manifest["documents"] == {"train": 1, "val": 1}


@pytest.mark.parametrize("name", ["x" * 255, "语" * 85])
def test_names_as_long_as_a_file_system_has(tmp_path, name):
    for content in (b"one", b"two"):
        with new_folder(tmp_path / name) as temporary:
            write_atomically(temporary / name, content)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name / name).read_bytes() == content


def test_what_was_to_be_replaced_stays_where_nothing_replaced_it(tmp_path):
    old = tmp_path / ".set.x1y2.old"
    old.mkdir()
    with new_folder(tmp_path / "set"):
        assert old.exists()  # a process was killed between two renames: this is all that there is
    with new_folder(tmp_path / "set"):
        assert not old.exists()
