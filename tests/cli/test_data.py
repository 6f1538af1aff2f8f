"""The data commands."""

import json
from pathlib import Path

import pytest

from twingpt.data.named import NAMES


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path))
    return tmp_path / "downloads"


def test_sources_as_lines(gpt, home):
    code, out, _ = gpt("data", "sources")
    lines, width = out.splitlines(), max(map(len, NAMES))
    assert code == 0 and [line[:width].strip() for line in lines[::2]] == list(NAMES)
    assert lines[6] == f"{'tinystories':{width}}   2.2 GB  CDLA-Sharing-1.0"
    assert {line[:width] + line[width + 2] for line in lines[1::2]} == {" " * width + "h"}  # as in https
    assert {line[width : width + 2] + line[width + 9 : width + 11] for line in lines[::2]} == {"    "}
    assert "1 of 14 shards, unless fineweb-edu@SHARDS" in out and "downloaded" not in out
    for name in ("tinyshakespeare.txt", "openwebtext/train-00003-of-00080.parquet"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    lines = gpt("data", "sources")[1].splitlines()
    assert "downloaded" in lines[4] and "1 of 80 files here" in lines[8]


def test_sources_as_json(gpt, home):
    rows = json.loads(gpt("data", "sources", "--json")[1])["sources"]
    assert [row["name"] for row in rows] == list(NAMES) and all(row["size"] for row in rows)
    assert [len(row["files"]) for row in rows] == [0, 0, 1, 1, 80, 14]
    file = rows[3]["files"][0]
    assert Path(file["path"]) == home / "tinystories" / "TinyStoriesV2-GPT4-train.txt" and not file["downloaded"]


def test_training_without_the_file_and_the_network_says_what_to_do(gpt, home, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing answers
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    code, out, err = gpt("train", "--data", "tinystories")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"put it at {home}/tinystories/TinyStoriesV2-GPT4-train.txt" in err and "can't be reached" in err
