"""The table of named sources, and what they become on the disk."""

import hashlib
import json
import os
import re
from dataclasses import replace

import pytest

from twingpt.core.errors import UserError
from twingpt.data import download, named, sources
from twingpt.data.named import SOURCES, TABLE, NamedSource, RemoteFile

STORY = "Once there was a fox.\nIt ran."
TEXT = f"{STORY}\n<|endoftext|>\n\nTwo <|endoftext|> in a line.\n<|endoftext|>\r\n<|endoftext|>\nThe last"


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path))
    return tmp_path / "downloads"


@pytest.fixture
def served(monkeypatch):
    """What can be fetched, by the last part of its address; each fetch is noted."""
    texts, fetched = {}, []

    def fake(url, path, size, expected, progress):
        fetched.append(path.name)
        if path.name not in texts:
            raise download.DownloadError("huggingface.co can't be reached (Network is unreachable)")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[path.name])
        return sha256(texts[path.name])

    monkeypatch.setattr(download, "download", fake)
    texts["fetched"] = fetched
    return texts


@pytest.fixture
def tiny(monkeypatch):
    """Sources like those of the table, and small."""
    files = tuple(
        RemoteFile(f"web/{i}.txt", f"https://example.org/{i}.txt", 4, sha256(text))
        for i, text in enumerate(("aaaa", "bbbb"))
    )
    rows = (
        NamedSource("web", "CC0-1.0", "https://example.org", 8, "0" * 40, files, default=1),
        NamedSource(
            "stated", "CC0-1.0", "https://example.org", 4, "0" * 40, (RemoteFile("s.txt", "https://example.org/s.txt"),)
        ),
    )
    for row in rows:
        monkeypatch.setitem(SOURCES, row.name, row)
    return rows[0]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_each_row_says_all_that_a_user_must_know(row):
    assert row.licence and row.address.startswith("https://")
    if row.name in named.EMBEDDED:
        assert row.files == () and row.revision.startswith("Python 3.")
        return
    assert row.size > 0 and row.files
    for file in row.files:
        commit = re.match(r"https://huggingface\.co/datasets/[\w-]+/[\w-]+/resolve/([0-9a-f]{40})/", file.url)
        assert file.url.startswith("https://") and (commit[1] == row.revision if commit else file.sha256)
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.url.endswith(file.path.rpartition("/")[2]) or row.name == "shakespeare"
        assert ".." not in file.path and not os.path.isabs(file.path)
    known = [file.size for file in row.files]
    assert None in known or sum(known) == row.size
    assert len({file.path for file in row.files}) == len({file.url for file in row.files}) == len(row.files)


def test_the_names_are_those_that_people_know():
    assert named.NAMES == ("python-library", "python-docs", "shakespeare", "tinystories", "openwebtext", "fineweb-edu")
    assert len(SOURCES["openwebtext"].files) == 80 and len(SOURCES["fineweb-edu"].files) == 14


def test_the_checksum_is_tiny_shakespeares(shakespeare):
    content = shakespeare.read_bytes()
    file = SOURCES["shakespeare"].files[0]
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (file.sha256, file.size)


@pytest.mark.parametrize(
    ("spec", "meaning"),
    [("fineweb-edu", ("fineweb-edu", None)), ("fineweb-edu@8", ("fineweb-edu", 8)), ("notes@8", None), ("a.txt", None)],
)
def test_names_with_a_number_of_shards(spec, meaning):
    assert named.parse(spec) == meaning


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fineweb-edu@", "after the @ stands the number of shards"),
        ("fineweb-edu@-1", "after the @ stands the number of shards"),
        ("fineweb-edu@0", "has 1 to 14 shards, and 0 are asked for"),
        ("fineweb-edu@15", "has 1 to 14 shards, and 15 are asked for"),
        ("shakespeare@2", "shakespeare has no shards: leave out @2"),
        ("python-docs@1", "python-docs has no shards"),
        ("tinystory", "did you mean 'tinystories'"),
    ],
)
def test_numbers_of_shards_and_names_that_are_not_there(spec, message):
    with pytest.raises(UserError, match=message):
        sources.load(spec)


def test_as_many_shards_as_asked_for_are_fetched_once(served, tiny, home):
    served |= {"0.txt": "aaaa", "1.txt": "bbbb"}
    assert named.fetch("web") == [home / "web" / "0.txt"]
    assert named.fetch("web", 2) == [home / "web" / "0.txt", home / "web" / "1.txt"]
    assert sources.load("web@2").documents == ["aaaa", "bbbb"]
    assert served["fetched"] == ["0.txt", "1.txt"]


def test_without_a_network_it_says_what_to_put_where(served, tiny, home):
    with pytest.raises(UserError) as error:
        named.fetch("web", 2)
    assert str(error.value) == (
        f"web needs 0.txt and 1 more of {home / 'web'}, but huggingface.co can't be reached (Network is unreachable): "
        f"download it from https://example.org/0.txt and put it at {home / 'web' / '0.txt'}."
    )
    (home / "web").mkdir(parents=True)
    (home / "web" / "0.txt").write_text("aaaa")
    (home / "web" / "1.txt").write_text("bbbb")
    assert sources.load("web@2").documents == ["aaaa", "bbbb"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("aaa", "has 3 bytes, and web's file has 4: delete it"), ("abab", "is not web's file, its SHA-256 differs")],
)
def test_a_file_put_there_is_checked(tiny, home, content, message):
    (home / "web").mkdir(parents=True)
    (home / "web" / "0.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        named.fetch("web")


def test_a_file_is_read_for_its_digest_only_when_it_has_changed(served, tiny, home, monkeypatch):
    served["s.txt"] = "as the server states"
    path = named.fetch("stated")[0]
    assert json.loads((home / "s.txt.json").read_text("utf-8"))["sha256"] == sha256("as the server states")
    read, real = [], download.digest
    monkeypatch.setattr(download, "digest", lambda path, progress: read.append(path) or real(path, progress))
    named.fetch("stated")
    assert read == []
    os.utime(path, (1, 1))
    named.fetch("stated")
    named.fetch("stated")
    assert read == [path]
    path.write_text("something else")
    with pytest.raises(UserError, match="is not stated's file, its SHA-256 differs"):
        named.fetch("stated")


@pytest.mark.parametrize("broken", ["{", "[1]", '"x"', "{}", '{"sha256": 7}'])
def test_a_broken_record_is_made_again_for_a_file_of_the_table(served, tiny, home, broken):
    served["0.txt"] = "aaaa"
    named.fetch("web")
    record = home / "web" / "0.txt.json"
    record.write_text(broken)
    assert named.fetch("web") and json.loads(record.read_text("utf-8"))["sha256"] == sha256("aaaa")


def test_stories_are_documents(served, monkeypatch):
    row = SOURCES["tinystories"]
    file = replace(row.files[0], size=None, sha256=None)
    monkeypatch.setitem(SOURCES, "tinystories", replace(row, files=(file,)))
    served["TinyStoriesV2-GPT4-train.txt"] = TEXT
    assert sources.load("tinystories").documents == [STORY, "Two <|endoftext|> in a line.", "The last"]


def test_named_files_are_read_as_it_is_said(served, monkeypatch):
    row = SOURCES["tinystories"]
    file = replace(row.files[0], size=None, sha256=None)
    monkeypatch.setitem(SOURCES, "tinystories", replace(row, files=(file,)))
    served["TinyStoriesV2-GPT4-train.txt"] = "one\n--\n<|endoftext|>\n--\nthree\0"
    with pytest.raises(UserError, match="is NUL"):
        _ = sources.load("tinystories").documents
    options = sources.ReadOptions(separator="--", errors="replace", as_text=True)
    assert sources.load("tinystories", options).documents == ["one", "<|endoftext|>", "three\ufffd"]
    [read] = sources.load("tinystories", options).inputs
    assert (read.separator, read.errors, read.as_text) == ("--", "replace", True)
    [read] = sources.load("tinystories", sources.ReadOptions(rules=1)).inputs
    assert (read.separator, read.by_name) == ("<|endoftext|>", False)
