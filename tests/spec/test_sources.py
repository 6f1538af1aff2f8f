"""What a source is, by what it holds; what a folder leaves out; encodings, compressed files and names."""

import bz2
import gzip
import json
import lzma
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import links, names_in_unicode
from twingpt.core.errors import UserError
from twingpt.data import compression, readers, sources
from twingpt.data.builder import TokenizerChoice
from twingpt.data.documents import guess_encoding
from twingpt.data.prepare import prepare, prepare_named
from twingpt.data.readers import JsonScanner
from twingpt.data.shards import TokenDataset
from twingpt.data.sources import ReadOptions, load
from twingpt.runs.shell import quote

TEXTS = ["one", "zwei ü", "three"]
RECORDS = [{"text": text, "meta": {"body": f"in {text}", "a.b": text}, "n": 10**30} for text in TEXTS]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


@pytest.fixture(autouse=True)
def fresh_home(monkeypatch, tmp_path):
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path / "home"))


def written(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def documents_of(path, **how):
    return load(str(path), ReadOptions(**how)).documents


# By what it holds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.json", LINES),
        ("lines.json.gz", gzip.compress(LINES, mtime=0)),
        ("lines.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")),
        ("lines.jsonl", LINES.replace(b"\n", b"\r")),
        ("dump", LINES),
        ("dump.2024-01", bz2.compress(LINES)),
        ("array.json", json.dumps(RECORDS).encode()),
        ("array.jsonl", json.dumps(RECORDS).encode()),
        ("array", json.dumps(RECORDS, indent=2).encode()),
        ("texts.json", b"\xef\xbb\xbf" + json.dumps(TEXTS).encode()),
        ("texts", b" " + json.dumps(TEXTS, indent=1).encode()),
        ("pretty.json", "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode()),
        ("pretty", "".join(json.dumps(record, indent=2) for record in RECORDS).encode()),
    ],
)
def test_json_of_any_name_and_layout(tmp_path, name, content):
    assert documents_of(written(tmp_path / name, content)) == TEXTS


@pytest.mark.parametrize(
    "content",
    [
        b"{ is a brace\n",
        b"[1] It was a night.\n",
        b'["Hello," she said] no\n',
        b"{}x",
        b"{}\nint main() { return 0; }\n",
        b"{ }\n{}\n",
        b"{}\n{\n  color: red\n}\n",
        b"{{ x }}\n",
        b"[1, 2]\n",
        b"[]\n",
    ],
)
def test_text_that_only_begins_like_json(tmp_path, content):
    assert documents_of(written(tmp_path / "page", content)) == [content.decode()]


def test_json_as_plain_text(tmp_path):
    other = {"package.json": b'{"name": "x"}', "n.ipynb": b'{"cells": [],\n"n": 4}', "lines.jsonl": LINES}
    for name, content in other.items():
        written(tmp_path / "code" / name, content)
        options = ReadOptions(as_text=True)
        assert load(str(tmp_path / "code" / name), options).documents == [content.decode()]
        assert load(str(tmp_path / "code" / name)).digest != load(str(tmp_path / "code" / name), options).digest
    assert len(load(str(tmp_path / "code"), ReadOptions(as_text=True)).documents) == 2
    message = r"its fields are name: choose one with .* --field, or take the file as plain text with .* --as-text"
    with pytest.raises(UserError, match=message):
        documents_of(tmp_path / "code" / "package.json")
    with pytest.raises(UserError, match=r"no field 'text', no fields: take the file as plain text with .*--as-text"):
        documents_of(written(tmp_path / "e", b'{}\n{"text": "a"}\n'))
    with pytest.raises(UserError, match=r"line 2, is not JSON: .* \(or take the file as plain text with .*--as-text\)"):
        documents_of(written(tmp_path / "e", b'{"text": "a"}\nmore\n'))
    for content in (b'[\n{"text": "a"},\nmore]\n', b'{"text":\n"a"}\n{\n'):
        message = r"e, line [34], is not JSON: .* \(or take the file as plain text with .*--as-text\)"
        with pytest.raises(UserError, match=message):
            documents_of(written(tmp_path / "e", content))
        with pytest.raises(UserError, match=r"is not JSON: [^(]*$"):
            documents_of(written(tmp_path / "e.json", content))
    with pytest.raises(UserError, match="--field body has no use with --as-text: leave one out"):
        ReadOptions(field="body", as_text=True)


def test_line_ends_of_unicode_are_within_a_record(tmp_path):
    content = "\n".join(
        json.dumps({"text": f"a\u2028b\u2029c\x85d {i}"}, ensure_ascii=False) for i in range(2)
    ).encode()
    for name in ("dump", "dump.json", "dump.jsonl"):
        assert load(str(written(tmp_path / name, content))).inputs[0].kind == "jsonl"
        assert documents_of(tmp_path / name) == ["a\u2028b\u2029c\x85d 0", "a\u2028b\u2029c\x85d 1"]


def test_a_line_ends_a_document_where_it_is_said(tmp_path):
    path = str(written(tmp_path / "stories.txt", b"one\n<|endoftext|>\r\ntwo\n <|endoftext|>\nthree"))
    [note] = prepare(path, "byte", 0).manifest["notes"]
    assert note.startswith("<|endoftext|> in the text (2 times) is text like any other; where such a line ends a")
    options = ReadOptions(separator="<|endoftext|>")
    assert load(path, options).documents == ["one", "two", "three"]
    data = prepare_named([path], "stories", TokenizerChoice("byte", 0), options)
    assert data.manifest["documents"]["train"] == 3 and data.manifest["notes"] == []
    with pytest.raises(UserError, match="stories is prepared already, from something else"):
        prepare_named([path], "stories", TokenizerChoice("byte", 0), ReadOptions())
    lines = written(tmp_path / "dump.jsonl", LINES)
    with pytest.raises(UserError, match="--separator -- has no use: no files of text are given, and each record"):
        ReadOptions(separator="--").load([str(lines)], tmp_path)
    assert ReadOptions(separator="--").load([str(lines), path], tmp_path)
    with pytest.raises(UserError, match=r"--separator -- has no use: no files of text .*, and documents are apart alr"):
        ReadOptions(separator="--").load(["python-docs"], tmp_path)
    with pytest.raises(UserError, match=r"--separator '-\\n-' is more than a line"):
        ReadOptions(separator="-\n-")


def test_a_separator_is_told_that_no_line_is(tmp_path):
    path = str(written(tmp_path / "stories.txt", b"one <|endoftext|>\n--\ntwo"))
    for number, (separator, n_documents, notes) in enumerate((
        ("--", 2, ["<|endoftext|> in the text (1 time)"]),
        ("<|endoftext|>", 1, ["no line of '<|endoftext|>' was found"]),
        ("---", 1, ["no line of '---' was found", "<|endoftext|> in the text (1 time)"]),
    )):  # fmt: skip
        options = ReadOptions(separator=separator)
        data = prepare_named([path], f"stories{number}", TokenizerChoice("byte", 0), options, val="0")
        assert data.manifest["documents"]["train"] == n_documents
        assert [note for note in data.manifest["notes"] if not any(map(note.startswith, notes))] == []
        assert len(data.manifest["notes"]) == len(notes)


def test_files_that_are_called_as_splits_are_told(tmp_path):
    for name in ("train", "valid", "test"):
        written(tmp_path / "data" / f"{name}.jsonl", LINES)
    [note] = prepare(str(tmp_path / "data"), "byte", 0).manifest["notes"]
    train, valid = (tmp_path / "data" / f"{name}.jsonl" for name in ("train", "valid"))
    instead = f"gpt data prepare {quote(train)} --val {quote(valid)}"
    assert note == f"trained on as train.jsonl is: valid.jsonl, test.jsonl; to hold one out: {instead}"
    data = prepare_named([str(train)], "split", TokenizerChoice("byte", 0), ReadOptions(), val=str(valid))
    assert data.manifest["notes"] == [] and data.manifest["documents"] == {"train": 3, "val": 3}


@links
def test_held_out_files_of_a_folder_are_not_trained_on(tmp_path):
    notes = tmp_path / "notes"
    for name in ("train.txt", "val.txt", "deep/val.txt", "deep/test.txt"):
        written(notes / name, f"The text of {name}.".encode())
    (tmp_path / "other").symlink_to(notes / "val.txt")
    byte = TokenizerChoice("byte", 0)
    for number, (spec, val, kept) in enumerate((
        (notes, notes / "val.txt", {"train.txt", "deep/val.txt", "deep/test.txt"}),
        (notes, tmp_path / "other", {"train.txt", "deep/val.txt", "deep/test.txt"}),
        (notes / "**" / "*", notes / "deep", {"train.txt", "val.txt"}),
        (notes / "*.txt", notes / "deep" / ".." / "val.txt", {"train.txt"}),
    )):  # fmt: skip
        named = prepare_named([str(spec)], f"named{number}", byte, ReadOptions(), val=str(val))
        for data in (named, prepare(spec, "byte", val=str(val))):
            text = data.tokenizer.decode(data.splits["train"])
            assert {name for name in ("train.txt", "val.txt", "deep/val.txt", "deep/test.txt")
                    if f"of {name}." in text} == kept  # fmt: skip
            assert ("val.txt" in str(data.manifest["notes"])) == ("val.txt" in kept)
    for spec, val in ((notes / "val.txt", tmp_path / "other"), (notes / "deep", notes)):
        with pytest.raises(UserError, match="is also what is trained on"):
            prepare_named([str(notes), str(spec)], "both", byte, ReadOptions(), val=str(val))


def test_the_readme_names_what_is_always_text():
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8").replace("\n", " ")
    *others, last = (f"`{suffix}`" for suffix in readers.TEXT_SUFFIXES)
    assert f"only {', '.join(others)} and {last} are text in any case" in readme


def test_a_text_file_may_hold_json(tmp_path):
    path = written(tmp_path / "json.txt", LINES)
    assert documents_of(path) == [LINES.decode()]
    with pytest.raises(UserError, match="--field body has no use: no JSON and no tables are given"):
        ReadOptions(field="body").load([str(path)], tmp_path)
    other = written(tmp_path / "other.jsonl", b'{"body": "a"}')
    assert len(ReadOptions(field="body").load([str(path), str(other)], tmp_path)) == 2


def test_fields_within_others(tmp_path):
    path = written(tmp_path / "dump.jsonl", LINES)
    assert documents_of(path, field="meta.body") == [f"in {text}" for text in TEXTS]
    assert documents_of(path, field="meta.a.b") == TEXTS  # a key that has a dot itself
    with pytest.raises(UserError, match=r"line 1, has no field 'meta.x', its fields are text, meta.body, meta.a.b, n:"):
        documents_of(path, field="meta.x")
    path = written(tmp_path / "null.jsonl", b'{"meta": null}\n{"meta": {"body": "a"}}')
    assert documents_of(path, field="meta.body") == ["", "a"]


def test_fields_within_structs(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.feather
    import pyarrow.parquet

    rows = [{"meta": {"body": text, "n": 1}, "text": text} for text in TEXTS] + [{"meta": None, "text": None}]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "t.feather")
    written(tmp_path / "t", (tmp_path / "t.parquet").read_bytes())
    for name in ("t.parquet", "t.feather", "t"):
        assert documents_of(tmp_path / name) == documents_of(tmp_path / name, field="meta.body") == [*TEXTS, ""]
        with pytest.raises(UserError, match=r"no field 'body', its fields are meta, meta.body, meta.n, text"):
            documents_of(tmp_path / name, field="body")
    written(tmp_path / "t.parquet.gz", gzip.compress((tmp_path / "t.parquet").read_bytes()))
    with pytest.raises(UserError, match="is a compressed table"):
        documents_of(tmp_path / "t.parquet.gz")


def test_integers_of_any_length(tmp_path):
    content = b'{"n": %s, "text": "a"}\n' % (b"1" * 5000)
    assert documents_of(written(tmp_path / "dump.jsonl", content)) == ["a"]
    assert documents_of(written(tmp_path / "array.json", b"[" + content + b"]")) == ["a"]
    with pytest.raises(UserError, match="has no text in 'n', but"):
        documents_of(tmp_path / "dump.jsonl", field="n")


@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_values_do_not_depend_on_the_blocks(size):
    text = json.dumps([{"text": "a\n" * 9}, "b", {"text": "[]"}], indent=1) + '\n{"text": "c"} "d"\n'
    scanner = JsonScanner("x")
    blocks = [*(text[start : start + size] for start in range(0, len(text), size)), ""]
    found = [pair for block in blocks for pair in scanner.feed(block)]
    assert found == [({"text": "a\n" * 9}, 2), ("b", 5), ({"text": "[]"}, 6), ({"text": "c"}, 10), ("d", 10)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"},\n{"text": nope}]', r"line 2, is not JSON: Expecting value"),
        (b'[{"text": "a"},\n', r"line 2, is within an array that does not end: the file is damaged or cut short"),
        (b'[{"text": "a"},\n[1]]', r"line 2, has no field 'text', no fields"),
        (b'[{"text": "a"},\n{"body": "b"}]', r"line 2, has no field 'text', its fields are body"),
        (b'{"version": 3}', r"line 1, has no field 'text', its fields are version"),
        (b"[" * 100_000, "line 1, is not JSON"),
        (b"no JSON", "line 1, is not JSON"),
    ],
)
def test_json_that_is_wrong(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        documents_of(written(tmp_path / "a.json", content))


def test_a_long_value_that_does_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_RECORD", 2**12)
    with pytest.raises(UserError, match="line 1, is longer than"):
        list(JsonScanner("x").feed('["' + "x" * 2**13))


def test_bad_records_are_left_out_up_to_a_count(tmp_path):
    bad = b'{nope\n{"body": 1}\n{"text": 7}\n"text"\n'
    path = str(written(tmp_path / "dump.jsonl", LINES + bad + LINES))
    choice = TokenizerChoice("byte", 0)
    with pytest.raises(UserError, match=r"More than 3 records are bad, the next: .*line 7, has no field 'text'"):
        prepare_named([path], "few", choice, ReadOptions(skip_bad_lines=3))
    data = prepare_named([path], "docs", choice, ReadOptions(skip_bad_lines=4))
    assert data.manifest["documents"]["train"] == 6
    [note] = data.manifest["notes"]
    assert note.startswith(f"4 bad records left out, the first: {path}, line 4, is not JSON: Expecting property name")
    with pytest.raises(UserError, match=r"line 4, is not JSON"):
        documents_of(path)
    array = written(tmp_path / "array.json", b'["a", 7, {"text": null}, {"body": 1}]')
    assert documents_of(array, skip_bad_lines=1) == ["a", ""]  # counted where they are prepared
    with pytest.raises(UserError, match="--skip-bad-lines must be at least 0"):
        ReadOptions(skip_bad_lines=-1)


# What is left out -------------------------------------------------------------------------------------------


def test_a_folder_says_what_it_leaves_out(tmp_path):
    folder, linked = tmp_path / "folder", tmp_path / "linked"
    for name in ("a.txt", "b.JSON", "x.py", "y.py", "Makefile", "package.json", ".git/c.txt", ".hidden.md"):
        written(folder / name, LINES if name == "b.JSON" else b'{"name": "x"}')
    written(folder / "run" / "run.json", b"{}").with_name("README.md").write_text("a model")
    written(folder / "set" / "manifest.json", b"{}").with_name("train.bin").write_bytes(b"")
    written(folder / "model" / "config.json", b"{}").with_name("model.safetensors").write_bytes(b"")
    written(linked / "deep" / "d.md", b"linked")
    for link, target in {
        "link": linked,
        "again": linked,
        "sub/up": folder,
        "top": tmp_path,
        "broken.txt": "no",
    }.items():
        (folder / link).parent.mkdir(exist_ok=True)
        (folder / link).symlink_to(target)
    found = load(str(folder))
    assert [one.path.relative_to(folder).as_posix() for one in found.inputs] == ["a.txt", "again/deep/d.md", "b.JSON"]
    assert found.left_out == {
        ".py": 2, "without suffix": 1, ".json without 'text'": 1, "hidden file": 1, "hidden folder": 1, "run": 1,
        "prepared data set": 1, "model": 1, "broken link": 1,
    }  # fmt: skip
    [note] = prepare(str(folder), "byte", 0).manifest["notes"]
    assert note.startswith("left out: 2 .py, ") and "1 hidden folder" in note and "1 without suffix" in note
    with pytest.raises(UserError, match=r"has no text files .*; left out: 1 .tmp"):
        load(str(written(tmp_path / "other" / "a.txt.tmp", b"").parent / ".." / "other"))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.py", ["x.py"]),
        ("**/*.py", ["x.py", "link/y.py"]),
        ("**", ["link/z.md", "sub/a.txt", "x.py", "link/y.py"]),
        ("*", ["link/z.md", "sub/a.txt", "x.py"]),
        ("[s]ub/*.txt", ["sub/a.txt"]),
        ("sub/up/*.py", ["sub/up/x.py"]),
        (".git/*", [".git/b.txt"]),
    ],
)
def test_globs_take_any_name_and_end_on_loops(tmp_path, pattern, names):
    folder = tmp_path / "folder"
    for name in ("x.py", "sub/a.txt", ".git/b.txt", "../linked/y.py", "../linked/z.md", "run/run.json", "run/r.txt"):
        written(folder / name, b"text")
    (folder / "link").symlink_to(tmp_path / "linked")
    (folder / "sub" / "up").symlink_to(folder)
    found = load(str(folder / pattern))
    paths = [one.path.relative_to(folder).as_posix() for one in found.inputs]
    assert paths == names


def test_what_a_glob_takes_is_not_left_out(tmp_path):
    folder = tmp_path / "folder"
    for name in ("x.py", "sub/y.py", "sub/a.txt", ".git/c.txt", "sub/.git/c.txt"):
        written(folder / name, b"text")
    assert load(str(folder / "**")).left_out == {"hidden folder": 2}
    assert load(str(folder / "*")).left_out == {".py": 1, "hidden folder": 1}
    both = [str(folder), str(folder / "**" / "*.py")]
    [note] = prepare_named(both, "both", TokenizerChoice("byte", 0), ReadOptions()).manifest["notes"]
    assert note == "left out: 2 hidden folders"


def test_a_folder_that_may_not_be_read(tmp_path):
    folder = written(tmp_path / "folder" / "sub" / "a.txt", b"a").parent
    folder.chmod(0)
    try:
        if os.access(folder, os.R_OK):
            pytest.skip("root reads everything")
        with pytest.raises(UserError, match=r"sub can't be read: Permission denied"):
            load(str(folder.parent))
    finally:
        folder.chmod(0o700)


# Encodings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        ("“quoted” café and more of it", "cp1252", "cp1252"),
        ("hello wörld\n", "utf-16-le", "utf-16le"),
        ("hello wörld\n", "utf-16-be", "utf-16be"),
        ("Привет, мир\n", "utf-16-le", "utf-16le"),
        ("hello\n", "utf-16", "utf-16"),
        ("hello\n", "utf-32", "utf-32"),
        ("Привет, мир\n", "utf-32-be", "utf-32be"),
        ("Привет, мир\n", "koi8-r", None),
        ("こんにちは世界", "shift_jis", None),
    ],
)
def test_encodings_are_named(tmp_path, text, encoding, named):
    assert guess_encoding(text.encode(encoding), 0) == named
    for name in ("a.txt", "a.json"):
        with pytest.raises(UserError, match=f"iconv -f {named} -t utf-8" if named else "file -i"):
            documents_of(written(tmp_path / name, text.encode(encoding)))


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"PK\x03\x04\x14\0", "a zip archive"), (b"%PDF-1.7\n\xff", "a PDF"), (b"\0" * 257 + b"ustar", "a tar archive")],
)
def test_what_is_no_text_is_named(tmp_path, content, what):
    with pytest.raises(UserError, match=f"is {what}.*, and not text"):
        documents_of(written(tmp_path / "a.txt", content))


# Compressed files -------------------------------------------------------------------------------------------

TEXT = b"It was a dark night.\n" * 500
RARE = [{"id": lzma.FILTER_LZMA1, "lc": 1, "lp": 2, "pb": 0, "dict_size": 3 * 2**18}]
FRAME = struct.pack("<II", 0x184D2A53, 5) + b"12345"  # that zstd skips


def zstd(content, **options):
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(**options)
    return zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown size, as from a pipe


@pytest.mark.parametrize(
    ("name", "content", "times"),
    [
        ("a.txt.bz2", bz2.compress(TEXT) * 2, 2),
        ("a.txt.xz", lzma.compress(TEXT) * 2, 2),
        ("a.txt.lzma", lzma.compress(TEXT, lzma.FORMAT_ALONE), 1),
        ("a.txt.lzma", lzma.compress(TEXT, lzma.FORMAT_ALONE) * 3, 3),
        ("a.txt.lzma", lzma.compress(TEXT, lzma.FORMAT_ALONE) + lzma.compress(TEXT), 2),
        ("a.txt.xz", lzma.compress(TEXT) + lzma.compress(TEXT, lzma.FORMAT_ALONE, filters=RARE) + b"garbage", 2),
        ("a.txt.xz", lzma.compress(TEXT) + b"garbage of more than thirteen bytes", 1),
        ("a.txt.gz", gzip.compress(TEXT, mtime=0) * 3, 3),
        ("a.txt.gz", gzip.compress(TEXT, mtime=0) + b"\0" * 2**11, 1),  # as tapes pad
        (
            "a.txt.gz",
            gzip.compress(TEXT, mtime=0) + b"\0\0" + gzip.compress(TEXT, mtime=0) + b"garbage",
            2,
        ),  # gzip ignores it
        ("a.txt.gz", lzma.compress(TEXT), 1),  # another format than its name says
        ("a.txt", gzip.compress(TEXT, mtime=0), 1),
    ],
)
def test_streams_that_a_formats_tool_opens(tmp_path, name, content, times):
    assert documents_of(written(tmp_path / name, content)) == [TEXT.decode() * times]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_all_that_follows_garbage_is_garbage(tmp_path, monkeypatch, compress):
    monkeypatch.setattr(compression, "BLOCK", 2**9)
    suffix = compress.__module__.strip("_").replace("gzip", "gz").replace("lzma", "xz")
    whole = compress(TEXT)
    for padding in range(0, 2**9, 7):  # so that a block begins anywhere, with what begins as a stream does
        content = whole + b"\0" * padding + b"garbage " + whole[:8] * 2**7
        assert documents_of(written(tmp_path / f"a.txt.{suffix}", content)) == [TEXT.decode()]
    assert documents_of(written(tmp_path / f"a.txt.{suffix}", whole + b"\0" * 2**12 + whole)) == [TEXT.decode() * 2]


def test_zstd_with_a_long_window_and_frames_to_skip(tmp_path):
    frame = zstd(TEXT, window_log=31, enable_ldm=True)
    content = frame.compress(TEXT) + frame.flush()
    assert documents_of(written(tmp_path / "a.txt.zst", FRAME + content + FRAME + content)) == [TEXT.decode() * 2]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_many_tiny_streams_and_damage_after_the_first(tmp_path, compress):
    small, suffix = 700, compress.__module__.strip("_").replace("gzip", "gz").replace("lzma", "xz")
    path = tmp_path / f"a.txt.{suffix}"
    content = compress(TEXT) + compress(b"") * small + compress(b"a") * small
    assert documents_of(written(path, content)) == [TEXT.decode() + "a" * small]
    with pytest.raises(UserError, match=r"can't be read|is damaged or cut short"):
        documents_of(written(path, content[:-3]))
    with pytest.raises(UserError, match=r"can't be read|is damaged or cut short"):  # and not taken for what follows
        documents_of(written(path, compress(TEXT) + compress(TEXT)[:6] + b"\xff" * 40))


def test_a_window_that_takes_more_memory_than_there_is(tmp_path, monkeypatch):
    alone = bytearray(lzma.compress(TEXT, lzma.FORMAT_ALONE))
    alone[1:5] = struct.pack("<I", 2**32 - 1)  # the dictionary
    message = r"can't be read: decompressing it takes more than 2.1 GB of memory; compress it anew with a smaller"
    monkeypatch.setattr(compression, "most_memory", lambda: 2**31)
    with pytest.raises(UserError, match=message):
        documents_of(written(tmp_path / "a.txt.lzma", bytes(alone)))
    frame = zstd(TEXT, window_log=27)
    content = frame.compress(TEXT) + frame.flush()
    assert documents_of(written(tmp_path / "a.txt.zst", content)) == [TEXT.decode()]
    monkeypatch.setattr(compression, "most_memory", lambda: 2**26)
    with pytest.raises(UserError, match=r"takes more than 67 MB of memory"):
        documents_of(tmp_path / "a.txt.zst")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt.bz2", bz2.compress(TEXT)[:-9], "is damaged or cut short"),
        ("a.txt.xz", lzma.compress(TEXT)[:-9], "is damaged or cut short"),
        ("a.txt.xz", lzma.compress(TEXT)[:40] + b"\xff" * 40, "is damaged or cut short: Corrupt input"),
        ("a.txt.gz", gzip.compress(TEXT, mtime=0)[:-5] + b"12345", "is damaged or cut short: .*incorrect"),
        ("a.txt.gz", gzip.compress(gzip.compress(TEXT, mtime=0), mtime=0), "is compressed twice"),
        ("a.txt", b"\x04\x22\x4d\x18\x64\xff", "is compressed by lz4"),
    ],
)
def test_streams_that_do_not_open_say_why(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        documents_of(written(tmp_path / name, content))


def test_zstd_with_a_dictionary(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    samples = [f"It was night number {i * i} of {i}.".encode() for i in range(2000)]
    dictionary = zstandard.train_dictionary(4096, samples)
    content = zstandard.ZstdCompressor(dict_data=dictionary).compress(b"".join(samples[:9]))
    with pytest.raises(UserError, match="needs the dictionary that it was compressed with"):
        documents_of(written(tmp_path / "a.txt.zst", content))


# Names ------------------------------------------------------------------------------------------------------

ODD = ["a b.txt", "a[1].txt", "*.txt", "-dash.txt", "new\nline.txt", "col:on.txt", "at@3.txt", "é😀.txt", "[bold]x.txt",
       "x" * 251 + ".txt", "语" * 80 + ".txt", "~t.txt", "..txt", "\\b.txt"]  # fmt: skip


@names_in_unicode
@pytest.mark.parametrize("name", ODD)
def test_any_name_of_a_file(tmp_path, name):
    data = prepare(str(written(tmp_path / "files" / name, TEXT)), "byte", 0)
    assert data.manifest["documents"]["train"] == 1 and not data.folder.name.startswith(".")
    assert TokenDataset(data.folder).fingerprint == data.fingerprint


@pytest.mark.skipif(sys.platform != "linux", reason="this file system has no names that are not UTF-8")
def test_a_name_that_is_not_utf8(tmp_path):
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"l\xe9.txt"))
    with open(path, "wb") as file:
        file.write(TEXT)
    data = prepare(path, "byte", 0)
    assert data.manifest["name"] == "l\ufffd"
    data = prepare_named([path], "docs", TokenizerChoice("byte", 0), ReadOptions())
    assert data.manifest["sources"][0]["source"] == str(tmp_path / "l\ufffd.txt")


# Rules ------------------------------------------------------------------------------------------------------


def test_what_older_rules_prepared_is_found_and_opened(tmp_path, monkeypatch):
    path = str(written(tmp_path / "a.txt", TEXT))
    choice = TokenizerChoice("byte", 0)
    now, unnamed = prepare_named([path], "docs", choice, ReadOptions()), prepare(path, "byte", 0)
    manifest = json.loads((now.folder / "manifest.json").read_text("utf-8"))
    for key in ("rules", "left_out", "notes"):
        del manifest[key]
    manifest["sources"][0]["sha256"] = load(path).digest_under(1)
    (now.folder / "manifest.json").write_text(json.dumps(manifest))
    again = prepare_named([path], "docs", choice, ReadOptions())
    assert "rules" not in again.manifest and again.fingerprint == now.fingerprint == unnamed.fingerprint
    assert again.text_bytes("val", np.asarray(again.splits["val"])) == again.manifest["splits"]["val"]["bytes"]
    with monkeypatch.context() as patch:
        patch.setattr(sources, "RULES", 3)
        assert prepare(path, "byte", 0).folder != unnamed.folder


@links
@pytest.mark.parametrize(
    ("spec", "fingerprint"),
    [
        ("", "7616c6c9144bf191c1bcbf69314bbe94efbac07034a532466b44608c49adf4f8"),
        ("dump", "6af988825a062540b32f774da575344595bf9bbb040255b64bb358d82d1a6553"),
        ("*", "b34904e323cac4b059f198fd1b66bbf764cd884424471ef1450b573da478ca89"),
        ("**/*.txt", "4511b73bbac042ea08bdda5f7d11878cb57bc7e20189c0b09864c6d9cae54844"),
    ],
)
def test_the_first_rules_read_as_version_0_1_0_did(tmp_path, spec, fingerprint):
    names = ["dump", "b.txt", ".hidden/c.txt", "run/run.json", "run/d.md", "e.json", "x.py"]
    for i, name in enumerate(names):
        lines = (json.dumps({"text": f"{i} and {j}"}) + "\n" for j in range(20))
        written(tmp_path / "source" / name, "".join(lines).encode())
    (tmp_path / "source" / "link").symlink_to(tmp_path / "source" / ".hidden")
    data = prepare(str(tmp_path / "source" / spec), "byte", 0, rules=1)
    assert data.fingerprint == fingerprint and data.manifest["rules"] == 1
    now = prepare(str(tmp_path / "source" / spec), "byte", 0)
    assert (now.fingerprint == fingerprint) == (spec == "**/*.txt") and now.manifest["rules"] == sources.RULES
