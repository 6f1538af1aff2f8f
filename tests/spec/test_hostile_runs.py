"""What a run's folder holds beside its tensors, settings and data, as an enemy or a bad disk would leave them."""

import dataclasses
import io
import json
import platform
import random

import numpy as np
import pytest
from rich.console import Console

from tests.conftest import dose, story, training_state, write_run
from tests.mutate import Judge, bytes_changed, mutations, overwrite, whole
from twingpt.commands.show_runs import print_run
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.tokenizer import ByteTokenizer
from twingpt.data import named, sources
from twingpt.data.prepare import prepare
from twingpt.data.shards import ShardWriter, TokenDataset, finish_dataset
from twingpt.runs import inventory, plot, report
from twingpt.runs.events import Saved, read_events, rewind, seconds_so_far
from twingpt.training import settings
from twingpt.training.state import Setup
from twingpt.training.stored import StoredRun, read_run_json


@pytest.fixture
def run(tmp_path):
    """A run of a few kilobytes, with a checkpoint that has no tensors."""
    folder = write_run(tmp_path / "run", story(40))
    step = folder / "checkpoints" / "step-00000040"
    step.mkdir(parents=True)
    (step / "training_state.json").write_text(json.dumps(training_state(40)))
    (step / "manifest.json").write_text("{}")
    (folder / "latest").write_text(step.name)
    return folder


def show(run):
    """What `gpt runs`, `gpt runs show` and a resumed run read."""
    row, described = inventory.describe(str(run))
    json.dumps([dataclasses.asdict(row), described])
    inventory.select([row], max_loss=2.0)
    inventory.starts(described)
    return row, described


def show_and_print(run):
    print_run(Console(file=io.StringIO(), highlight=False), *show(run))
    report.render("x", inventory._read(run / "run.json"), [])


def resume(run):
    described = read_run_json(run)
    GPTConfig.from_dict(described["config"])
    TrainConfig.from_dict(described["train"])


@pytest.mark.parametrize("n", dose(500, 10_000))
def test_mutated_descriptions(run, n, soak):
    judge, path = Judge(11, soak=soak), run / "run.json"
    for mutated in mutations(path.read_bytes(), 11, n, whole):
        overwrite(path, mutated)
        read = show_and_print if judge.judged % 50 == 0 else show if judge.judged % 2 else resume
        judge(lambda read=read: read(run), len(mutated))
    assert judge.judged == n and 0.1 * n < judge.read < 0.8 * n


def test_mutated_training_states_and_pointers(run):
    judge = Judge(12)
    state, latest = run / "checkpoints" / "step-00000040" / "training_state.json", run / "latest"
    for path in (state, latest):
        good = path.read_bytes()
        for mutated in mutations(good, 12, 200, whole) if path == state else changes(good, 12, 100):
            overwrite(path, mutated)
            read = show if judge.judged % 10 else show_and_print
            judge(lambda read=read: read(run), len(mutated))
        overwrite(path, good)
    assert judge.judged == judge.read == 300  # what is wrong is told beside the rest


@pytest.mark.parametrize("content", ["[" * 100_000, '{"train":' * 100_000, "{}".ljust(2**23), "\xff"])
def test_a_description_that_is_deep_or_huge_is_damage(run, content):
    (run / "run.json").write_text(content, "latin-1")
    assert inventory.inspect(run).error == "run.json is damaged"
    with pytest.raises(UserError, match=r"run.json is damaged, so the run can't be shown"):
        inventory.describe(str(run))
    with pytest.raises(UserError, match="is not what twingpt wrote"):
        read_run_json(run)


def test_numbers_that_no_curve_can_show(run):
    events = [{"event": "trained", "step": 10**400, "loss": 1}, {"event": "trained", "step": 5, "loss": 10**400}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, events)) + "\n" + "[" * 100_000 + "\n")
    assert [event["step"] for event in read_events(run / "metrics.jsonl")] == [5]
    assert "No step" not in report.render("x", {}, list(read_events(run / "metrics.jsonl")))
    with pytest.raises(UserError, match="has no losses to plot yet"):
        plot.read_curves([str(run)])


def changes(content, seed, n):
    chance = random.Random(seed)
    return (bytes_changed(content, chance) for _ in range(n))


def test_mutated_events(run):
    """An event that is none is left out of the page, the curves and what a resumed run keeps."""
    judge, path = Judge(13, room=2**19), run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)

    def read():
        events = list(read_events(path))
        report.render("x", {}, events)
        for x in plot.AXES:
            plot.read_curves([str(run)], x)
        assert seconds_so_far(path) >= 0
        json.dumps(events)

    for i, line in enumerate(lines):
        for mutated in mutations(line.strip(), 100 + i, 60, whole):
            content = b"".join([*lines[:i], mutated, b"\n", *lines[i + 1 :]])
            overwrite(path, content)
            judge(read, len(content))
    assert judge.judged == 60 * len(lines) and judge.read > 0.9 * judge.judged
    rewind(path, Saved(10, "x"), ())
    assert {event["step"] for event in read_events(path)} <= set(range(11))


def test_mutated_settings(tmp_path):
    """A TOML file: its values replaced, or its bytes; tomllib calls itself for a table in a table."""
    judge, path, chance = Judge(14, room=2**20), tmp_path / "config.toml", random.Random(14)
    text = settings.to_toml(settings.spelled_out(GPTConfig(vocab_size=300), TrainConfig(max_iters=9)), "x")
    lines = text.splitlines()
    for i in range(1000):
        changed = list(lines)
        at = chance.randrange(len(changed))
        key = changed[at].partition("=")[0]
        changed[at] = f"{key}= {chance.choice(VALUES)}"
        mutated = "\n".join(changed).encode() if i % 2 else bytes_changed(text.encode(), chance)
        overwrite(path, mutated)
        judge(lambda: settings.read(path), len(mutated))
    assert judge.judged == 1000 and 50 < judge.read < 800


VALUES = [
    "nan", "inf", "-1", "0", "1.5", "1e999", str(2**63), "9" * 400, "9" * 5000, "true", '""', "[]", "{}", "[" * 30_000,
    "[" * 900 + "]" * 900, "{a=" * 900, '"\\u0000"', "1979-05-27", '"' + "x" * 9999 + '"', "[[1]]", "",
]  # fmt: skip


def test_mutated_manifests_of_data(tmp_path):
    judge, tokenizer = Judge(15), ByteTokenizer()
    writers = {}
    for split in ("train", "val"):
        with ShardWriter(tmp_path / f"{split}.bin", np.dtype("<u2")) as writer:
            writer.append(np.arange(100, dtype=np.uint16).tobytes(), 100, 100)
        writers[split] = writer
    finish_dataset(tmp_path, tokenizer, {"name": "x", "documents": {"train": 1, "val": 1}}, writers)
    path = tmp_path / "manifest.json"

    def read():
        data = TokenDataset(tmp_path)
        data.check(GPTConfig(vocab_size=257, block_size=8))
        data.batch(0, 2, 8, 0)
        list(data.validation(1, 8, 2))
        assert len(data.fingerprint) == 64

    for mutated in mutations(path.read_bytes(), 15, 1000, whole):
        overwrite(path, mutated)
        judge(read, len(mutated))
    assert judge.judged == 1000 and 50 < judge.read < 950


def test_data_of_a_newer_version_and_of_another_python(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path))
    monkeypatch.setattr(named, "EMBEDDED", {**named.EMBEDDED, "python-docs": lambda: [f"text {i} " for i in range(99)]})
    data, train = prepare("python-docs", "byte"), TrainConfig(data="python-docs", tokenizer="byte")

    def stored(python, rules=sources.RULES):
        starts = [{"python": python}, {"python": platform.python_version()}]
        where = (str(data.folder), data.fingerprint, rules)
        return StoredRun(tmp_path / "run", {}, train.to_dict(), *where, 1, Setup(), None, starts, None)

    newer = "The data of .*run are read as a newer version of twingpt does: install that"
    for rules in (sources.RULES, sources.RULES + 1, None):
        assert stored("3.1.0", rules).open_data(train, data.fingerprint).fingerprint == data.fingerprint
    with pytest.raises(UserError, match=newer):
        stored("3.1.0", sources.RULES + 1).open_data(train, "another")
    with pytest.raises(
        UserError, match=r"run was trained on that of Python 3\.1\.0, while this is 3.*: resume it with"
    ):
        stored("3.1.0").open_data(train, "another")
    with pytest.raises(UserError, match="give --data a copy of the original"):
        stored(platform.python_version()).open_data(train, "another")
    manifest = data.folder / "manifest.json"  # prepared again, by a newer version
    manifest.write_text(json.dumps(json.loads(manifest.read_text("utf-8")) | {"rules": sources.RULES + 1}))
    with pytest.raises(UserError, match=newer):
        stored("3.1.0").open_data(train, "another")
