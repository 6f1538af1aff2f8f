"""gpt data prepare, list, info, verify and rm; trouble on the way, and training on what was prepared."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from tests.cli.test_commands import mistake
from tests.cli.test_train import SMALL, train
from tests.conftest import kills, needs
from twingpt.core.errors import UserError
from twingpt.data import builder, compression, documents, prepare, readers
from twingpt.data.builder import TokenizerChoice
from twingpt.data.prepare import prepare_named
from twingpt.data.shards import ShardWriter, TokenDataset
from twingpt.data.sources import ReadOptions


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "data"


@pytest.fixture
def dump(tmp_path):
    """200 documents as JSON lines."""
    path = tmp_path / "dump.jsonl"
    texts = [f"document {i}: {'it has some words, ' * (1 + i % 9)}and an end." for i in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepared(gpt, *arguments) -> dict:
    code, out, err = gpt("data", "prepare", *arguments, "--json")
    assert (code, err) == (0, ""), err
    return json.loads(out)


def texts_of(data, split) -> list[str]:
    tokens, end = np.asarray(data.splits[split]), data.tokenizer.end_of_text
    return [data.tokenizer.decode(part[part != end]) for part in np.split(tokens, np.flatnonzero(tokens == end) + 1)][
        :-1
    ]


# Sources ----------------------------------------------------------------------------------------------------


def test_prepare_says_what_it_made(gpt, dump, home):
    result = prepared(gpt, dump, "--tokenizer", "byte", "--name", "docs")
    lines = [json.loads(line)["text"] for line in dump.read_text("utf-8").splitlines()]
    assert set(result) == {
        "name", "path", "documents", "bytes", "tokens", "val_tokens", "seconds", "peak_rss_bytes", "left_out", "notes",
    }  # fmt: skip
    assert result["path"] == str(home / "docs") and result["documents"] == 200
    assert result["bytes"] == sum(map(len, lines)) == result["tokens"] + result["val_tokens"] - 200
    assert result["peak_rss_bytes"] > 0
    data = TokenDataset(home / "docs")
    assert sorted(texts_of(data, "train") + texts_of(data, "val")) == sorted(lines)
    assert texts_of(data, "train") == [line for line in lines if line in texts_of(data, "train")]  # in order
    [source] = data.manifest["sources"]
    assert source["source"] == str(dump) and source["bytes"] == dump.stat().st_size and source["licence"] is None
    again = prepared(gpt, dump, "--tokenizer", "byte", "--name", "docs")
    assert again | {"seconds": 0, "peak_rss_bytes": 0} == result | {"seconds": 0, "peak_rss_bytes": 0}
    dump.write_text(dump.read_text("utf-8") * 2)
    error = mistake(gpt, "data", "prepare", dump, "--tokenizer", "byte", "--name", "docs")
    assert "docs is prepared already, from something else: gpt data rm docs" in error


def test_several_sources_in_their_order(gpt, tmp_path, dump, home, stdin):
    (tmp_path / "notes").mkdir()
    for name in ("b.txt", "a.md", "empty.txt"):
        (tmp_path / "notes" / name).write_text(name * (name != "empty.txt"))
    stdin(b"from stdin")
    specs = ["-", tmp_path / "notes", tmp_path / "note*" / "*.md", dump]
    result = prepared(gpt, *specs, "--tokenizer", "char", "--name", "all", "--licence", "MIT")
    manifest = TokenDataset(home / "all").manifest
    assert result["documents"] == 204 and manifest["empty_documents"] == 1
    assert [row["files"] for row in manifest["sources"]] == [1, 3, 1, 1]
    assert {row["licence"] for row in manifest["sources"]} == {"MIT"}
    assert {path.name for path in (home / "all").iterdir()} == {
        "train.bin", "val.bin", "manifest.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_folders_without_text_beside_what_a_glob_matches(gpt, tmp_path):
    (tmp_path / "pictures.txt").mkdir()
    assert "No file matches" in mistake(gpt, "data", "prepare", tmp_path / "*.txt", "--name", "x")
    (tmp_path / "a.txt").write_text("some text")
    assert prepared(gpt, tmp_path / "*.txt", "--tokenizer", "byte", "--name", "x")["documents"] == 1


def test_stdin_is_called_so_and_read_once(gpt, home, stdin):
    stdin(b"")
    assert "gpt: stdin is empty" in mistake(gpt, "data", "prepare", "-", "--name", "x")
    stdin(b"a\xe9")
    assert "gpt: stdin is not UTF-8 text: byte 1" in mistake(gpt, "data", "prepare", "-", "--name", "x")
    stdin(b"from stdin")
    assert prepared(gpt, "-", "-", "--tokenizer", "byte", "--name", "x")["documents"] == 1


def test_a_source_given_twice_counts_once(gpt, dump):
    once = prepared(gpt, dump, "--tokenizer", "byte", "--name", "x")
    twice = prepared(gpt, dump, dump, "--tokenizer", "byte", "--name", "x")  # and the same again is found
    assert (once["tokens"], once["path"]) == (twice["tokens"], twice["path"])


def test_a_local_copy_of_a_hubs_data_set(gpt, tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"body": [f"text {i}" for i in range(50)]})
    table.save_to_disk(tmp_path / "copy")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "both")
    for name in ("copy", "both"):
        assert (
            prepared(gpt, tmp_path / name, "--field", "body", "--tokenizer", "byte", "--name", name)["documents"] == 50
        )
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    error = mistake(gpt, "data", "prepare", tmp_path / "both", "--name", "x")
    assert "no split called train: give the folder of one of test" in error
    (tmp_path / "copy" / "state.json").write_text("{}")
    assert "is a damaged copy" in mistake(gpt, "data", "prepare", tmp_path / "copy", "--name", "x")


def test_a_hubs_data_set_without_a_network_or_without_datasets(gpt, monkeypatch):
    pytest.importorskip("datasets")  # the suite runs with HF_HUB_OFFLINE
    error = mistake(gpt, "data", "prepare", "nobody/nothing", "--name", "x")
    assert "no file or folder nobody/nothing, and it can't be fetched as a Hugging Face data set: " in error
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "twingpt[hf]"' in mistake(gpt, "data", "prepare", "nobody/nothing", "--name", "x")


def test_a_hub_that_cannot_be_reached_is_not_waited_for(gpt, monkeypatch):
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")

    def unreachable(self, name, timeout):
        raise ConnectionError("Name or service not known")

    def load_dataset(name, config, split):
        assert datasets.config.HF_HUB_OFFLINE and hub.constants.HF_HUB_OFFLINE  # so it looks in its cache alone
        raise ConnectionError(f"Couldn't reach {name}")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "Couldn't reach nobody/nothing" in mistake(gpt, "data", "prepare", "nobody/nothing", "--name", "x")


@pytest.mark.parametrize(("suffix", "library"), [("parquet", "pyarrow.parquet"), ("txt.zst", "zstandard")])
def test_formats_without_their_library(gpt, tmp_path, monkeypatch, suffix, library):
    (tmp_path / f"a.{suffix}").write_bytes(b"something")
    monkeypatch.setitem(sys.modules, library, None)
    error = mistake(gpt, "data", "prepare", tmp_path / f"a.{suffix}", "--name", "x")
    assert 'pip install "twingpt[data]"' in error


def test_a_tokenizer_that_is_there_already(gpt, dump, home):
    prepared(gpt, dump, "--tokenizer", "bpe", "--vocab-size", 300, "--name", "first")
    prepared(gpt, dump, "--tokenizer", home / "first", "--name", "second")
    first, second = (TokenDataset(home / name) for name in ("first", "second"))
    assert first.fingerprint == second.fingerprint
    prepared(gpt, dump, "--tokenizer", "byte", "--name", "bytes")
    error = mistake(gpt, "data", "prepare", dump, "--tokenizer", home / "bytes", "--name", "second")
    assert "second is prepared already, from something else" in error


# Splits -----------------------------------------------------------------------------------------------------


def test_held_out_documents_stay_held_out(gpt, dump, home):
    prepared(gpt, dump, "--tokenizer", "byte", "--name", "some")
    lines = dump.read_text("utf-8").splitlines(keepends=True)
    dump.write_text("".join([*lines[100:], *lines[:100], '{"text": "more"}\n']))
    prepared(gpt, dump, "--tokenizer", "byte", "--name", "more")
    some, more = (TokenDataset(home / name) for name in ("some", "more"))
    assert set(texts_of(some, "val")) <= set(texts_of(more, "val")) and len(texts_of(some, "val")) > 10
    assert set(texts_of(some, "train")) <= set(texts_of(more, "train"))


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_a_long_document_in_pieces_is_the_same_as_in_one(gpt, prose, home, monkeypatch, kind):
    text = prose.read_text("utf-8") + "é " + "1" * 40
    prose.write_text(text, "utf-8")
    prepared(gpt, prose, "--tokenizer", kind, "--vocab-size", 300, "--name", "whole")
    monkeypatch.setattr(documents, "PIECE", 500)
    monkeypatch.setattr(compression, "BLOCK", 300)
    prepared(gpt, prose, "--tokenizer", kind, "--vocab-size", 300, "--name", "pieces")
    whole, pieces = (TokenDataset(home / name) for name in ("whole", "pieces"))
    assert whole.fingerprint == pieces.fingerprint
    assert texts_of(pieces, "train") + texts_of(pieces, "val") == [
        text[: int(len(text) * 0.9)],
        text[int(len(text) * 0.9) :],
    ]


def test_held_out_text_of_its_own(gpt, dump, tmp_path, home, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 100)
    val = tmp_path / "val.txt"
    val.write_text("held out and longer than a piece é " * 20, "utf-8")
    for kind in ("byte", "char", "bpe"):  # the alphabet is that of both, what is learned is from what is trained on
        how = ["--tokenizer", kind, "--vocab-size", 300, "--name", kind]
        prepared(gpt, dump, "--val", val, *how)
        data = TokenDataset(home / kind)
        assert texts_of(data, "val") == [val.read_text("utf-8")] and len(texts_of(data, "train")) == 200
        prepared(gpt, dump, "--val", val, *how)  # and is found again
    assert [row["source"] for row in data.manifest["sources"]] == [str(dump), str(val)]
    assert data.manifest["learned_from"]["of"] == sum(map(len, texts_of(data, "train")))
    assert json.loads(gpt("data", "verify", "bpe", "--json")[1])["ok"]
    assert sum(row["documents"] for row in json.loads(gpt("data", "info", "bpe", "--json")[1])["histogram"]) == 201
    assert "is prepared already" in mistake(gpt, "data", "prepare", dump, *how)
    assert "is also what is trained on" in mistake(gpt, "data", "prepare", dump, "--val", dump, "--name", "x")
    (tmp_path / "empty.txt").touch()
    assert "empty.txt is empty" in mistake(gpt, "data", "prepare", dump, "--val", tmp_path / "empty.txt", "--name", "x")


def test_another_share_is_held_out(gpt, dump, prose, home):
    for name, share in (("none", "0"), ("fifth", "0.2"), ("half", "0.5")):
        prepared(gpt, dump, "--val", share, "--tokenizer", "byte", "--name", name)
        held_out = len(texts_of(TokenDataset(home / name), "val"))
        assert abs(held_out - 200 * float(share)) < 25 and (held_out > 0) == (name != "none")
        prepared(gpt, dump, "--val", share, "--tokenizer", "byte", "--name", name)
        assert "is prepared already" in mistake(
            gpt, "data", "prepare", dump, "--val", "0.3", "--tokenizer", "byte", "--name", name
        )
    prepared(gpt, prose, "--val", "0.25", "--tokenizer", "byte", "--name", "tail")
    text, data = prose.read_text("utf-8"), TokenDataset(home / "tail")
    assert texts_of(data, "val") == [text[int(len(text) * 0.75) :]]
    assert data.manifest["split"] == "the last 25% of each document" and data.manifest["val"] == 0.25
    for share in ("1", "-0.1", "nan", "0.00001"):
        assert "a share must be 0, or from 0.0001" in mistake(
            gpt, "data", "prepare", dump, "--val", share, "--name", "x"
        )


def save_table(folder, texts) -> Path:
    """A table as save_to_disk of `datasets` writes it; its file."""
    import pyarrow

    folder.mkdir(parents=True)
    table = pyarrow.table({"text": texts})
    with pyarrow.OSFile(str(folder / "data.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    return folder / "data.arrow"


def test_the_validation_split_of_a_data_set_is_held_out(gpt, dump, tmp_path, home):
    pytest.importorskip("pyarrow")
    train, val = ([f"{name} {i}" for i in range(30)] for name in ("train", "val"))
    for name, texts in (("train", train), ("validation", val), ("test", ["test"])):
        save_table(tmp_path / "saved" / name, texts)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    prepared(gpt, tmp_path / "saved", "--tokenizer", "byte", "--name", "saved")
    data = TokenDataset(home / "saved")
    assert texts_of(data, "train") == train and texts_of(data, "val") == val
    prepared(gpt, tmp_path / "saved", dump, "--tokenizer", "byte", "--name", "both")
    both = TokenDataset(home / "both")
    assert set(texts_of(both, "val")) > set(val) and set(texts_of(both, "train")) > set(train)
    assert 5 < len(texts_of(both, "val")) - 30 < 40  # of the others a share, as ever
    prepared(gpt, tmp_path / "saved", "--val", "0.5", "--tokenizer", "byte", "--name", "share")
    share = TokenDataset(home / "share")
    assert set(texts_of(share, "train") + texts_of(share, "val")) == set(train)


def test_a_hubs_validation_split_is_held_out(gpt, tmp_path, home, monkeypatch):
    pytest.importorskip("pyarrow")
    pytest.importorskip("huggingface_hub")
    tables = {}
    for name in ("train", "validation"):
        file = save_table(tmp_path / name, [f"{name} {i}" for i in range(9)])
        info = SimpleNamespace(splits={"train": 1, "validation": 2, "test": 3})
        tables[name] = SimpleNamespace(cache_files=[{"filename": str(file)}], info=info)
    hub = SimpleNamespace(config=SimpleNamespace(), load_dataset=lambda name, config, split: tables[split])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    prepared(gpt, "org/name", "--tokenizer", "byte", "--name", "hub")
    data = TokenDataset(home / "hub")
    assert texts_of(data, "val") == [f"validation {i}" for i in range(9)] and len(texts_of(data, "train")) == 9


def test_one_long_document_among_others_by_hash(gpt, dump, tmp_path, home, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 100)
    (tmp_path / "long.txt").write_text("a word " * 100)
    prepared(gpt, dump, tmp_path / "long.txt", "--tokenizer", "byte", "--name", "all")
    data = TokenDataset(home / "all")
    assert ["a word " * 100] in (texts_of(data, "train")[-1:], texts_of(data, "val")[-1:])
    assert data.manifest["split"] == "documents by hash"


def test_bpe_learns_from_a_part_of_much_text(gpt, dump, home, monkeypatch):
    monkeypatch.setattr(builder, "SAMPLE", 2000)
    prepared(gpt, dump, "--vocab-size", 300, "--name", "docs")
    learned = TokenDataset(home / "docs").manifest["learned_from"]
    assert 1800 < learned["characters"] <= 2000 < learned["of"]
    first = TokenDataset(home / "docs").fingerprint
    assert gpt("data", "rm", "docs", "--yes")[0] == 0
    prepared(gpt, dump, "--vocab-size", 300, "--name", "docs")
    assert TokenDataset(home / "docs").fingerprint == first


# Trouble ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", [], "bad.txt is empty"),
        (b"caf\xe9", [], "bad.txt is not UTF-8 text: byte 3 is 0xe9"),
        (b"a\0b", [], "bad.txt is not text: byte 1 is NUL"),
        (b"text", ["--errors", "ignore"], "Unknown way with errors 'ignore'"),
        (b"text", ["--name", "a/b"], "A data set can't be called 'a/b'"),
        (b"text", ["--name", "shakespeare"], "shakespeare is the name of a source"),
        (b"text", ["--tokenizer", "bte"], "bte"),
    ],
)
def test_bad_input_leaves_nothing(gpt, tmp_path, home, content, options, message):
    (tmp_path / "bad.txt").write_bytes(content)
    assert message in mistake(gpt, "data", "prepare", tmp_path / "bad.txt", "--name", "bad", *options)
    assert not home.exists() or not list(home.iterdir())


def test_replaced_errors(gpt, tmp_path, home):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 and \0 and more of it")
    prepared(gpt, tmp_path / "bad.txt", "--errors", "replace", "--tokenizer", "byte", "--name", "bad")
    data = TokenDataset(home / "bad")
    assert "".join(texts_of(data, "train") + texts_of(data, "val")) == "caf\ufffd and \ufffd and more of it"


def test_a_full_disk(gpt, dump, home, monkeypatch):
    real, written = ShardWriter.append, []

    def append(self, content, n_bytes, token_bytes):
        written.append(content)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        real(self, content, n_bytes, token_bytes)

    monkeypatch.setattr(ShardWriter, "append", append)
    error = mistake(gpt, "data", "prepare", dump, "--tokenizer", "byte", "--name", "docs")
    assert "can't be written to" in error and "No space left on device" in error
    assert not list(home.iterdir())


def test_a_file_that_changes_meanwhile(gpt, dump, home, monkeypatch):
    real = readers.DocumentFile.items

    def items(self, advance):
        yield from real(self, advance)
        dump.write_text(dump.read_text("utf-8") + '{"text": "more"}\n')

    monkeypatch.setattr(readers.DocumentFile, "items", items)
    error = mistake(gpt, "data", "prepare", dump, "--tokenizer", "byte", "--name", "docs")
    assert "A file of docs changed while it was read" in error and not list(home.iterdir())


KILLED = """
import os, signal, sys
from twingpt.core import paths
from twingpt.data import builder, prepare, shards, workers

module, name, count = {where!r}
owner = {{"ShardWriter": shards.ShardWriter, "shards": shards, "paths": paths, "workers": workers}}[module]
real, calls = getattr(owner, name), 0

def deadly(*arguments, **named):
    global calls
    calls += 1
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)

setattr(owner, name, deadly)
prepare.prepare_named([sys.argv[1]], "docs", builder.TokenizerChoice("byte", 0), prepare.ReadOptions())
"""


@pytest.mark.parametrize(
    "where",
    [("ShardWriter", "append", 1), ("ShardWriter", "facts", 2), ("shards", "finish_dataset", 1),
     ("shards", "write_synced", 3), ("paths", "sync_folder", 1)],
)  # fmt: skip
@kills
def test_killed_anywhere_it_starts_again(dump, home, where):
    script = KILLED.format(where=where)
    killed = subprocess.run([sys.executable, "-c", script, str(dump)], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {path.name[0] for path in home.iterdir()} == {"."} and not prepare.find("docs")
    data = prepare_named([str(dump)], "docs", TokenizerChoice("byte", 0), ReadOptions())
    assert len(texts_of(data, "train")) + len(texts_of(data, "val")) == 200
    assert [path.name for path in home.iterdir()] == ["docs"]


ENDLESS = """
import time
from twingpt.cli import main
from twingpt.data import shards, workers

real = shards.ShardWriter.append

def append(*arguments):
    real(*arguments)
    time.sleep(1000)

workers.cores, workers.SMALL, shards.ShardWriter.append = lambda: 2, 2, append
if __name__ == "__main__":
    main()
"""


def test_killed_with_workers_none_is_left(tmp_path, home):
    line = json.dumps({"text": "some words " * 1000}) + "\n"
    (tmp_path / "large.jsonl").write_text(line * 1000)
    (tmp_path / "main.py").write_text(ENDLESS)
    command = [sys.executable, tmp_path / "main.py", "data", "prepare", tmp_path / "large.jsonl", "--tokenizer", "char"]
    running = subprocess.Popen([*command, "--name", "large"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while running.poll() is None and time.monotonic() < deadline:
        if [path for path in home.glob(".*/train.bin") if path.stat().st_size]:
            break
        time.sleep(0.02)
    children = psutil.Process(running.pid).children()
    running.kill()
    running.wait()
    gone, alive = psutil.wait_procs(children, timeout=200)
    assert len(gone) >= 2 and not alive
    assert not prepare.find("large")


def test_two_at_once_under_one_name(dump, home):
    with pytest.raises(KeyboardInterrupt), prepare._new_folder(home / "docs", alone=True):
        with pytest.raises(UserError, match="docs is being prepared by another process"):
            prepare_named([str(dump)], "docs", TokenizerChoice("byte", 0), ReadOptions())
        raise KeyboardInterrupt
    assert len(texts_of(prepare_named([str(dump)], "docs", TokenizerChoice("byte", 0), ReadOptions()), "train")) > 100


# What is there ----------------------------------------------------------------------------------------------


def test_list_info_verify_and_rm(gpt, dump, home, stdin):
    assert "No data set is prepared yet" in gpt("data", "list")[1]
    prepared(gpt, dump, "--tokenizer", "byte", "--name", "docs")
    [row] = json.loads(gpt("data", "list", "--json")[1])["data_sets"]
    assert (
        row["name"] == "docs" and row["documents"] == 200 and row["error"] is None and row["size_bytes"] > row["bytes"]
    )
    info = json.loads(gpt("data", "info", "docs", "--json")[1])
    lengths = [len(json.loads(line)["text"]) + 1 for line in dump.read_text("utf-8").splitlines()]
    for bin_ in info["histogram"]:
        assert bin_["documents"] == sum(bin_["least"] <= length <= bin_["most"] for length in lengths)
    assert sum(bin_["documents"] for bin_ in info["histogram"]) == 200
    assert len(info["samples"]) == 3 and all(text.startswith("document ") for text in info["samples"])
    out = gpt("data", "info", "docs")[1]
    assert "200 documents" in out and "bytes per token" in out and "█" in out and "dump.jsonl: 1 file" in out
    assert "docs is as it was prepared" in gpt("data", "verify", "docs")[1]
    assert json.loads(gpt("data", "verify", "docs", "--json")[1])["ok"]
    stdin(b"n\n")
    assert gpt("data", "rm", "docs")[0] == 1 and (home / "docs").exists()
    assert json.loads(gpt("data", "rm", "docs", "--yes", "--json")[1]) == {"removed": str(home / "docs")}
    assert not list(home.iterdir())
    for command in ("info", "verify", "rm"):
        assert "no prepared data set docs: gpt data list" in mistake(gpt, "data", command, "docs")


def test_the_ends_of_documents_belong_to_them(gpt, tmp_path):
    (tmp_path / "a.txt").write_text("It was a dark night. " * 100)
    prepared(gpt, tmp_path / "a.txt", "--tokenizer", "byte", "--name", "novel")
    info = json.loads(gpt("data", "info", "novel", "--json")[1])
    assert info["histogram"] == [{"least": 2048, "most": 4095, "documents": 1}]
    assert "1 document," in gpt("data", "info", "novel")[1]


def change(path, **facts):
    manifest = json.loads(path.read_text("utf-8"))
    for key, value in facts.items():
        target, (*parents, last) = manifest, key.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    path.write_text(json.dumps(manifest))


def flip(path: Path, content: bytes) -> None:
    path.write_bytes(content + path.read_bytes()[len(content) :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train.bin").write_bytes(b"ab"), "train.bin has 2 bytes where its manifest says"),
        (lambda folder: flip(folder / "val.bin", b"a\0"), "val.bin is not what was written"),
        (lambda folder: flip(folder / "val.bin", b"\xff\xff"), "holds the token id 65535, outside its vocabulary"),
        (lambda folder: change(folder / "manifest.json", documents__val=1), "documents where its manifest says 1"),
        (lambda folder: change(folder / "manifest.json", splits__train__bytes=7), "where its manifest says 7"),
        (lambda folder: change(folder / "manifest.json", vocab_size=99), "tokenizer is another than its manifest"),
        (lambda folder: change(folder / "manifest.json", splits__train__tokens="many"), "manifest of .* is broken"),
        (lambda folder: change(folder / "manifest.json", dtype="<f8"), "manifest of .* is broken"),
        (lambda folder: change(folder / "manifest.json", documents="x"), "manifest of .* is broken"),
        (lambda folder: change(folder / "manifest.json", documents__train=-1), r"is broken \(documents is -1\)"),
        (lambda folder: change(folder / "manifest.json", splits__val__sha256=5), r"is broken \(sha256 is 5\)"),
        (lambda folder: change(folder / "manifest.json", sources=[1]), "manifest of .* is broken"),
        (lambda folder: change(folder / "manifest.json", asked=[1]), r"is broken \(asked is \[1\]\)"),
        (lambda folder: change(folder / "manifest.json", notes=[1]), r"is broken \(notes is \[1\]\)"),
        (lambda folder: change(folder / "manifest.json", rules="x"), r"is broken \(rules is 'x'\)"),
        (lambda folder: change(folder / "manifest.json", schema=99), "prepared by a newer version of twingpt"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest of .* is broken"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    ],
)
def test_verify_finds_what_is_damaged(gpt, dump, home, damage, message):
    prepared(gpt, dump, "--tokenizer", "byte", "--name", "docs")
    damage(home / "docs")
    error = mistake(gpt, "data", "verify", "docs")
    assert re.search(message, error), error
    assert gpt("data", "list")[0] == 0
    assert gpt("data", "rm", "docs", "--yes")[0] == 0 and not list(home.iterdir())


# Training ---------------------------------------------------------------------------------------------------


@needs("torch")
def test_train_finds_a_data_set_by_its_name(gpt, dump, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepared(gpt, dump, "--tokenizer", "byte", "--name", "docs")
    (tmp_path / "docs").mkdir()  # a folder of that name, without text
    small = [part for part in SMALL if part not in ("--tokenizer", "byte", "--vocab-size")]
    small = [*small, "--max-iters", 2, "--eval-interval", 0]
    train(gpt, "--data", "docs", "--out", "run", "--backend", "torch", *small)
    described = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert described["data"]["folder"] == str(home / "docs") and described["train"]["tokenizer"] == "byte"
    train(gpt, "--config", "run/config.toml", "--out", "again", "--backend", "torch")
    error = mistake(gpt, "train", "--data", "docs", "--tokenizer", "char", "--out", "other")
    assert "docs is prepared with --tokenizer byte: leave out --tokenizer char" in error
    assert "no text files" in mistake(gpt, "train", "--data", "./docs", "--out", "other")


@needs("torch")
def test_train_on_held_out_text_of_its_own(gpt, dump, home, tmp_path, monkeypatch):
    val = tmp_path / "val.txt"
    val.write_text("held out text. " * 20)
    where = ["--backend", "torch", *SMALL, "--eval-interval", 0]
    train(gpt, "--data", dump, "--val-data", val, "--out", tmp_path / "run", *where, "--stop-after", 3)
    described = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    data = TokenDataset(Path(described["data"]["folder"]))
    assert described["train"]["val_data"] == str(val) and texts_of(data, "val") == [val.read_text("utf-8")]
    shutil.rmtree(home)
    moved = val.rename(tmp_path / "moved.txt")
    train(gpt, "--resume", tmp_path / "run", "--val-data", moved, "--data", dump)
    prepared(gpt, dump, "--tokenizer", "byte", "--name", "docs")
    other = [*where, "--out", tmp_path / "x"]
    error = mistake(gpt, "train", "--data", "docs", "--val-data", moved, *other)
    assert "docs is prepared with what it holds out: leave out --val-data, or prepare its text again with gpt" in error
    error = mistake(gpt, "train", "--resume", tmp_path / "run", "--val-data", dump)
    assert f"--val-data {dump} is also what is trained on" in error
    error = mistake(gpt, "train", "--resume", tmp_path / "run", "--val-data", "0.3")
    assert "The held-out text 0.3 is not what" in error and "give --val-data the original" in error
    assert "--val-data 2: a share must be 0, or" in mistake(gpt, "train", "--data", dump, "--val-data", 2, *other)
    monkeypatch.chdir(tmp_path)
    error = mistake(gpt, "train", "--data", moved, "--val-data", "docs", *other)
    assert f"--val-data docs is a prepared data set, and no text: give what it was prepared from, {dump}." in error
    error = mistake(gpt, "data", "prepare", moved, "--val", home / "docs", "--name", "more")
    assert f"--val {home / 'docs'} is a prepared data set, and no text" in error
    assert "docs is a prepared data set, and no" in mistake(gpt, "data", "prepare", "docs", "--name", "more")
    (tmp_path / "docs").mkdir()
    assert "docs has no text files" in mistake(gpt, "data", "prepare", "docs", "--name", "more")
    assert "; ./docs is the file or" in mistake(gpt, "train", "--data", moved, "--val-data", "docs", *other)


@needs("torch")
def test_nothing_is_held_out_where_nothing_is_evaluated(gpt, prose, home, tmp_path):
    code, out, _ = gpt("data", "prepare", prose, "--val", 0, "--tokenizer", "byte", "--name", "all")
    assert code == 0 and "to train on, nothing held out;" in out and "gpt train --data all --eval-interval 0" in out
    assert "tokens to train on, nothing held out\n" in gpt("data", "info", "all")[1]
    small = ["--backend", "torch", *SMALL, "--max-iters", 3]
    never = [*small, "--eval-interval", 0]
    error = mistake(gpt, "train", "--data", prose, "--val-data", "0.0", *small)
    assert "--val-data 0.0 holds out nothing to evaluate on, and --eval-interval is" in error
    assert [*home.iterdir()] == [home / "all"]  # it was refused before anything was prepared
    error = mistake(gpt, "train", "--data", "all", *small, "--out", tmp_path / "x")
    assert "all holds out nothing to evaluate on: give --eval-interval 0, or prepare the text again and hold" in error
    for data in (["all"], [prose, "--val-data", 0], ["all", "--data", prose]):
        run = tmp_path / f"run{len(data)}-{data[0] == 'all'}"
        result = train(gpt, "--data", *data, *never, "--out", run)
        assert result["reason"] == "finished" and result["val_loss"] is None
        assert train(gpt, "--resume", run, "--max-iters", 4)["step"] == 4
        assert not (run / "best").exists() and (run / "report.html").exists()
    error = mistake(gpt, "train", "--resume", run, "--max-iters", 6, "--eval-interval", 2)
    assert "holds out nothing to evaluate on: give --eval-interval 0" in error
    assert "has 0 tokens, and a loss needs two: hold out more text" in mistake(gpt, "baseline", "all")
    error = mistake(gpt, "convert", run, tmp_path / "q", "--q-bits", 4, "--q-group-size", 32, "--data", "all")
    assert "all holds out nothing to measure the loss on: give other text" in error


@needs("torch")
def test_a_run_without_evaluations_needs_no_held_out_block(gpt, prose, tmp_path):
    val = tmp_path / "val.txt"
    val.write_text("short")
    where = ["--data", prose, "--val-data", val, "--backend", "torch", *SMALL]
    assert "The val split of prose has 6 tokens, fewer than one block" in mistake(gpt, "train", *where)
    assert train(gpt, *where, "--eval-interval", 0, "--out", tmp_path / "run")["val_loss"] > 0
