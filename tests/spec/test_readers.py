"""Files to documents: formats, bad input, and long documents in pieces."""

import gzip
import json
import random

import numpy as np
import pytest

from twingpt.core.errors import UserError
from twingpt.core.tokenizer import ByteTokenizer
from twingpt.data import compression, documents, readers, workers
from twingpt.data.documents import pieces, split_at
from twingpt.data.readers import DocumentFile


def documents_of(path, **how):
    found = []
    for item in DocumentFile(path, **how).items():
        if getattr(item, "begins", True):
            found += item.documents()
        else:
            found[-1] += item.text
    return found


def lines(*texts, field="text"):
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


@pytest.fixture
def small(monkeypatch):
    """Pieces and blocks of some bytes, as if a gigabyte were a kilobyte."""
    monkeypatch.setattr(documents, "PIECE", 64)
    monkeypatch.setattr(compression, "BLOCK", 50)


def zstd(content):
    return pytest.importorskip("zstandard").compress(content)


# Formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_and_text_plain_and_compressed(tmp_path, suffix):
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[suffix]
    path = tmp_path / f"dump.jsonl{suffix}"
    path.write_bytes(compress(lines("one\ntwo", "", "drei €") + b"\n" + lines("four").rstrip()))
    assert documents_of(path) == ["one\ntwo", "", "drei €", "four"]
    path = tmp_path / f"novel.txt{suffix}"
    path.write_bytes(compress("It was. €\n".encode()) * 2)  # two members, as cat makes them
    assert documents_of(path) == ["It was. €\n" * 2]


def test_blocks_cut_anywhere_change_nothing(tmp_path, small):
    path, texts = tmp_path / "dump.jsonl", [f"text {'é' * i}" for i in range(60)]
    path.write_bytes(b"\xef\xbb\xbf" + lines(*texts))
    assert documents_of(path) == texts
    (tmp_path / "novel.txt").write_text("".join(texts), "utf-8")
    assert documents_of(tmp_path / "novel.txt") == ["".join(texts)]


@pytest.mark.parametrize("block", [1, 50])
def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch, block):
    monkeypatch.setattr(compression, "BLOCK", block)
    path = tmp_path / "novel.txt"
    path.write_bytes(b"\xef\xbb\xbfIt was. \xef\xbb\xbf")
    assert documents_of(path) == ["It was. \ufeff"]  # elsewhere it is a character like others
    path.write_bytes(b"\xef\xbb\xbfcaf\xe9 and more")
    with pytest.raises(UserError, match="byte 6 is 0xe9"):
        documents_of(path)


def test_another_field_and_no_text_in_it(tmp_path):
    path = tmp_path / "dump.jsonl"
    path.write_bytes(lines("a", None, field="body"))
    assert documents_of(path, field="body") == ["a", ""]


def test_parquet_and_arrow(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    texts = [f"row {i}" for i in range(200)] + [None, "última"]
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary()):
        table = pyarrow.table({"id": range(len(texts)), "body": pyarrow.array(texts).cast(kind)})
        pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=70)
        with pyarrow.OSFile(str(tmp_path / "t.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
            out.write_table(table, 130)
        for path in (tmp_path / "t.parquet", tmp_path / "t.arrow"):
            read = []
            items = list(DocumentFile(path, "body").items(read.append))
            assert [item.text for item in items] == [text or "" for text in texts]
            assert 0.9 < sum(read) / path.stat().st_size <= 1
            with pytest.raises(UserError, match=r"no field 'text', its fields are id, body: choose one .* --field"):
                documents_of(path)
            with pytest.raises(UserError, match="has no text there, but int64"):
                documents_of(path, field="id")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"t\.arrow is damaged, or no arrow file"):
        documents_of(path, field="body")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"t\.parquet is damaged, or no parquet file"):
        documents_of(tmp_path / "t.parquet")


def test_rows_that_are_not_utf8(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [b"fine", b"caf\xe9"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="row 1, is not UTF-8 text: byte 3 is 0xe9"):
        documents_of(tmp_path / "t.parquet")
    assert documents_of(tmp_path / "t.parquet", errors="replace") == ["fine", "caf\ufffd"]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_documents_between_separators_do_not_depend_on_the_blocks(size):
    story = "Once there was a fox.\nIt ran."
    text = f"{story}\n<|endoftext|>\n\nTwo <|endoftext|> in a line.\n<|endoftext|>\r\n<|endoftext|>\nThe last"
    blocks = [text[start : start + size] for start in range(0, len(text), size)]
    documents = [story, "Two <|endoftext|> in a line.", "The last"]
    assert list(split_at(blocks, "<|endoftext|>")) == [(document, True) for document in documents]
    assert list(split_at([], "<|endoftext|>")) == []


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("text", "separator", "documents", "found"),
    [
        ("one\ntwo\n", "--", ["one\ntwo"], False),
        ("one\n--", "--", ["one"], True),
        ("--\none", "--", ["one"], True),
        ("one\ntwo\n", "", ["one\ntwo"], False),
        ("one\n \ntwo\n", "", ["one", "two"], True),
    ],
)
def test_whether_a_separator_is_found(size, text, separator, documents, found):
    blocks = [text[start : start + size] for start in range(0, len(text), size)]
    assert list(split_at(blocks, separator)) == [(document, found) for document in documents]


# Bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text".encode("utf-16"), r"byte 0 is 0xff. Convert it \(iconv -f utf-16 -t utf-8\)"),
        ("a.txt", b"x" * 70 + b"\xc3(", "a.txt is not UTF-8 text: byte 70 is 0xc3"),
        ("a.txt", b"x" * 70 + b"\xc3", "a.txt is not UTF-8 text: byte 70 is 0xc3"),
        ("a.txt", "é".encode() * 40 + b"a\0", "a.txt is not text: byte 81 is NUL"),
        ("a.jsonl", lines("a", "b") + b'{"text": "\xff"}', r"a.jsonl is not UTF-8 text: byte 56 is 0xff"),
        ("a.jsonl", lines("a") * 9 + b'{"text": "a', "a.jsonl, line 10, is not JSON: Unterminated"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1, is not JSON"),
        ("a.jsonl", b'\n"text"\n', "a.jsonl, line 2, has no field 'text', no fields"),
        ("a.jsonl", lines("a", field="body"), r"line 1, has no field 'text', its fields are id, body: choose one"),
        ("a.jsonl", b'{"text": [1, 2]}', r"line 1, has no text in 'text', but \[1, 2\]"),
        ("a.jsonl", b'{"text": "\\ud83d"}', r"line 1, has half a character \(a lone surrogate\) at position 0"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "a.txt.gz is damaged or cut short"),
        ("a.txt.gz", b"no gzip", "a.txt.gz can't be read: Not a gzipped file"),
    ],
)
def test_what_is_wrong_and_where(tmp_path, small, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        documents_of(tmp_path / name)


def test_damaged_zstd(tmp_path):
    path, content = tmp_path / "a.txt.zst", zstd(bytes(range(65, 91)) * 99)
    for damaged in (content[:-3], b"no zstd", content + content[:5]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.txt\.zst is damaged or cut short"):
            documents_of(path)


def test_errors_replaced(tmp_path, small):
    (tmp_path / "a.txt").write_bytes(b"x" * 70 + b"\xc3(\0")
    assert documents_of(tmp_path / "a.txt", errors="replace") == ["x" * 70 + "\ufffd(\ufffd"]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff\\ud83d \\ud83d\\ude00"}')
    assert documents_of(tmp_path / "a.jsonl", errors="replace") == ["\ufffd\ufffd 😀"]


def test_a_line_of_json_that_does_not_end(tmp_path, small, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_RECORD", 2**20)
    (tmp_path / "a.jsonl").write_bytes(lines("a") + b'{"text": "' + b"x" * 2**20)
    with pytest.raises(UserError, match="line 2, is longer than 1 MB"):
        documents_of(tmp_path / "a.jsonl")


# Long documents ---------------------------------------------------------------------------------------------


def test_a_bomb_is_read_by_the_piece(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zstd(b"x" * 2**28))
    items = DocumentFile(tmp_path / "a.txt.zst").items()
    assert all(len(next(items).text) == documents.PIECE for _ in range(3))


SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD, SPACES = r"[^\r\n\p{L}\p{N}]?", r"\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": rf"'(?i:[sdmt]|ll|ve|re)|{WORD}+\p{{L}}++|\p{{N}}{{1,3}}+| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": rf"{WORD}{UPPER}*{LOWER}+{SUFFIX}?|{WORD}{UPPER}+{LOWER}*{SUFFIX}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",
    "llama3": rf"{SUFFIX}|{WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}",
    "qwen2": rf"{SUFFIX}|{WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pieces_split_as_the_whole(small, pattern):
    regex = pytest.importorskip("regex")  # tiktoken's
    alphabet = [*"aBé語1² .!/😀'", " ", "\n", "\n", "\r", "\t", "'s", "\u0301"]
    draw, cuts = random.Random(pattern), 0
    for _ in range(400):
        text = "".join(draw.choices(alphabet, k=150))
        parts = [part for part, _ in pieces([text])]
        assert "".join(parts) == text and all(len(part) <= 64 for part in parts)
        if all(len(part) < 64 for part in parts):  # one of 64 may have had no point to cut at
            cuts += len(parts) - 1
            words = [word for part in parts for word in regex.findall(PATTERNS[pattern], part)]
            assert words == regex.findall(PATTERNS[pattern], text)
    assert cuts > 200


def test_pieces_do_not_depend_on_the_blocks(small):
    draw = random.Random(1)
    text = "".join(draw.choices("ab \n語.", k=2000))
    blocks = [text[i : i + 7] for i in range(0, 2000, 7)]
    assert list(pieces(blocks)) == list(pieces([text]))
    assert [last for _, last in pieces([text])][-2:] == [False, True]
    assert [part for part, _ in pieces(["x" * 150])] == ["x" * 64, "x" * 64, "x" * 22]  # no point to cut at


def test_results_do_not_depend_on_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "SMALL", 2)
    monkeypatch.setattr(workers, "PROCESSES", 2)
    texts = [f"{i} " + "word and " * 40_000 for i in range(12)]
    (tmp_path / "dump.jsonl").write_bytes(lines(*texts))
    encode = workers.ChunkEncoder(ByteTokenizer(), "<u2")
    one, many = (list(workers.run(encode, DocumentFile(tmp_path / "dump.jsonl").items(), cores)) for cores in (1, 3))
    assert one == many and len(one) > 2
    assert sum(result.n_tokens for result in one) == sum(map(len, texts)) + len(texts)
    ids = np.frombuffer(one[0].tokens["train"], "<u2")
    assert ids[-1] == ByteTokenizer().end_of_text


def test_an_error_in_a_worker_is_the_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "SMALL", 1)
    (tmp_path / "dump.jsonl").write_bytes(lines("a" * 2**20) * 3 + b"no")
    encode = workers.ChunkEncoder(None, "")
    with pytest.raises(UserError, match="line 4, is not JSON"):
        list(workers.run(encode, DocumentFile(tmp_path / "dump.jsonl").items(), 2))
