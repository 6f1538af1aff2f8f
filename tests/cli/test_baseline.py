"""gpt baseline, and what gpt train makes of it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.cli.test_commands import mistake
from tests.cli.test_train import SMALL, logged, train
from tests.conftest import needs
from twingpt.core.tokenizer import ByteTokenizer
from twingpt.data import shards
from twingpt.data.prepare import prepare
from twingpt.data.shards import TokenDataset
from twingpt.evaluation import baseline
from twingpt.evaluation.baseline import FILE, parse_orders
from twingpt.runs import console
from twingpt.runs.events import Baseline, last_baseline, read_events


@pytest.fixture(autouse=True)
def fresh_home(monkeypatch, tmp_path):
    """What is kept beside the data of another test must not be found."""
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path / "home"))


def measured(gpt, *arguments) -> list[dict]:
    code, out, err = gpt("baseline", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)["rows"]


def write_data(folder, train: bytes, val: bytes) -> TokenDataset:
    folder.mkdir()
    writers = {}
    for name, text in (("train", train), ("val", val)):
        with shards.ShardWriter(folder / f"{name}.bin", np.dtype("<u2")) as writers[name]:
            writers[name].append(np.frombuffer(text, np.uint8).astype("<u2").tobytes(), len(text), len(text))
    shards.finish_dataset(folder, ByteTokenizer(), {"name": folder.name, "documents": {"train": 1, "val": 1}}, writers)
    return TokenDataset(folder)


def test_losses_are_counted_as_a_models_are(gpt, prose):
    rows = measured(gpt, prose, "--tokenizer", "byte", "--n", "1..3", "--sample", 0)
    data = prepare(str(prose), "byte", 2048)
    val = data.splits["val"]
    targets = np.concatenate([targets[targets >= 0] for _, targets in data.validation(4, 32, 0)])
    assert [row["n"] for row in rows] == [1, 2, 3] and np.array_equal(targets, val[1:])
    for row in rows:
        assert row["targets"] == len(targets) and row["tokens"] == len(data.splits["train"])
        assert row["perplexity"] == pytest.approx(math.exp(row["val_loss"])) and row["seconds"] > 0
        size = data.tokenizer.byte_lengths[targets].sum()  # one less than tokens: the end of text has no bytes
        assert row["bits_per_byte"] == pytest.approx(row["val_loss"] * len(targets) / math.log(2) / size)
        assert row["sample"] is None
    counts = np.bincount(data.splits["train"], minlength=257)
    plain = -np.log(np.maximum(counts, 0.5) / counts.sum())[targets].mean()
    assert rows[0]["val_loss"] == pytest.approx(plain, abs=0.01)
    assert rows[0]["val_loss"] > rows[1]["val_loss"] > rows[2]["val_loss"]


def test_table_and_sample(gpt, prose):
    code, out, err = gpt("baseline", prose, "--vocab-size", 300, "--n", "1,4", "--sample", 30)
    assert code == 0 and err == ""
    text = " ".join(out.split())  # lines break where the terminal ends
    assert "vocabulary 300" in text and "nats per token" in text and "bits per byte" in text
    assert "what the 4-gram writes" in out and "training tokens counted" in out
    rows = measured(gpt, prose, "--vocab-size", 300, "--n", "1,4", "--sample", 30)
    again = measured(gpt, prose, "--vocab-size", 300, "--n", "1,4", "--sample", 30)
    assert [row["sample"] for row in rows] == [row["sample"] for row in again] and all(row["sample"] for row in rows)
    other = measured(gpt, prose, "--vocab-size", 300, "--n", "4", "--sample", 30, "--seed", 2)
    assert other[0]["sample"] != rows[1]["sample"] and other[0]["val_loss"] == rows[1]["val_loss"]
    assert rows[1]["sample"].splitlines()[0].split()[0] in out


def test_only_the_first_tokens_of_large_data_are_counted(gpt, prose, monkeypatch):
    monkeypatch.setattr(baseline, "MOST_TOKENS", 1000)
    code, out, _ = gpt("baseline", prose, "--tokenizer", "byte", "--sample", 0)
    assert code == 0 and "the first 1,000 of" in out and "999 held-out tokens" in out


def test_help_has_examples(gpt):
    code, out, _ = gpt("baseline", "--help")
    assert code == 0 and "Examples" in out and "gpt baseline python-docs" in out


@pytest.mark.parametrize(
    ("text", "orders"), [("3", [3]), ("1..5", [1, 2, 3, 4, 5]), ("3, 1", [1, 3]), ("1..2,2,5", [1, 2, 5])]
)
def test_choices_of_n(text, orders):
    assert parse_orders(text) == orders


@pytest.mark.parametrize("text", ["0", "6", "5..1", "1..9", "-1", "three", "", "1..", "1;2", "99999999999"])
def test_wrong_choices_of_n(gpt, text):
    err = mistake(gpt, "baseline", "python-docs", f"--n={text}")
    assert f"--n {text!r} is no choice of 1 to 5: give one as 3, some as 1,3, a range as 1..5." in err


def test_mistakes(gpt, prose, tmp_path):
    assert "There is no file or folder no.txt" in mistake(gpt, "baseline", "no.txt")
    assert "--sample must be at least 0" in mistake(gpt, "baseline", prose, "--sample", -1)
    (tmp_path / "tiny.txt").write_text("ab")
    err = mistake(gpt, "baseline", tmp_path / "tiny.txt", "--tokenizer", "byte")
    assert "The train split of tiny has 2 tokens, too few for 5-grams: use --n 1." in err
    assert len(measured(gpt, tmp_path / "tiny.txt", "--tokenizer", "byte", "--n", 1)) == 1


def test_data_without_held_out_tokens_or_with_damaged_ones(tmp_path):
    with pytest.raises(baseline.UserError, match="The val split of empty has 0 tokens, and a loss needs two"):
        baseline.measure(write_data(tmp_path / "empty", b"some text", b""), [1])
    data = write_data(tmp_path / "bad", b"some text", b"more")
    np.array([300, 1, 2, 3], "<u2").tofile(tmp_path / "bad" / "val.bin")
    with pytest.raises(baseline.UserError, match="holds the token id 300, outside its vocabulary of 257"):
        baseline.measure(data, [1])


# Beside the data --------------------------------------------------------------------------------------------


def test_what_was_measured_is_kept_and_found(tmp_path):
    data = write_data(tmp_path / "data", b"abcabcabdabc" * 20, b"abcabd" * 5)
    row = baseline.for_run([(data, 1.0, 29, 1.0)])
    rows = json.loads((data.folder / FILE).read_text("utf-8"))["rows"]
    assert [kept["n"] for kept in rows] == [1, 2, 3, 4, 5] and row.val_loss == min(kept["val_loss"] for kept in rows)
    kept = json.loads((data.folder / FILE).read_text("utf-8"))
    for entry in kept["rows"]:
        entry["seconds"] = 1234.0  # of a row that is found, not counted again
    (data.folder / FILE).write_text(json.dumps(kept))
    assert baseline.for_run([(data, 1.0, 29, 1.0)]) == replace(row, seconds=1234.0)
    assert baseline.for_run([(data, 1.0, 10, 1.0)]).seconds != 1234.0  # other tokens are to be predicted
    for content in (json.dumps(kept | {"fingerprint": "other"}), "{", "[]", '{"fingerprint": 1}'):
        (data.folder / FILE).write_text(content)
        again = baseline.for_run([(data, 1.0, 29, 1.0)])
        assert again.seconds != 1234.0 and again.val_loss == row.val_loss


def test_large_data_are_not_counted_in_training(tmp_path):
    data = write_data(tmp_path / "data", b"abcabcabdabc" * 170_000, b"abcabd" * 5)
    assert baseline.for_run([(data, 1.0, 29, 1.0)]) is None
    rows, _ = baseline.measure(data, [2])
    assert baseline.for_run([(data, 1.0, 29, 1.0)]) == rows[0]


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path):
    data = write_data(tmp_path / "data", b"abcabcabdabc" * 20, b"abcabd" * 5)
    (data.folder / FILE).mkdir()  # where the file should be
    assert baseline.for_run([(data, 1.0, 29, 1.0)]) and not list((data.folder / FILE).iterdir())


# In training ------------------------------------------------------------------------------------------------


@needs("torch")
def test_a_run_says_it_once_and_a_resumed_one_again(gpt, prose, tmp_path):
    run = tmp_path / "run"
    code, out, err = gpt(
        "train", "--data", prose, "--out", run, "--backend", "torch", *SMALL, "--stop-after", 6,
    )  # fmt: skip
    assert code == 0, err
    (event,) = logged(run, "baseline")
    rows = measured(gpt, run, "--sample", 0)
    best = min(rows, key=lambda row: row["val_loss"])
    assert event["step"] == 4 and event["targets"] == 4 * 4 * 32 == best["targets"]
    assert (event["n"], event["val_loss"], event["bits_per_byte"]) == (
        best["n"], best["val_loss"], best["bits_per_byte"],
    )  # fmt: skip
    order = [entry["event"] for entry in read_events(run / "metrics.jsonl")]
    assert order.index("baseline") == [i for i, name in enumerate(order) if name == "evaluated"][1] - 1
    figures = f"{best['n']}-gram {best['bits_per_byte']:.3f}"
    assert out.count(f"({figures})") == 2 and f"baseline: val loss {best['val_loss']:.4f}" in out
    assert f"Baseline:   {best['n']}-gram, {best['bits_per_byte']:.3f} bits per byte; the model" in out
    assert [row["val_loss"] for row in measured(gpt, f"{run}@best")] == [row["val_loss"] for row in rows]
    last = train(gpt, "--resume", run, "--backend", "torch")
    assert last["baseline"] == {key: best[key] for key in ("n", "val_loss", "bits_per_byte")}
    (again,) = logged(run, "baseline")
    assert again == {**event, "step": 6}
    name = f"{best['n']}-gram"
    page = (run / "report.html").read_text("utf-8")
    assert f"{name} baseline, {best['val_loss']:.3f}" in page and 'class="base"' in page
    assert f"best; a {name} {best['bits_per_byte']:.3f}" in page
    assert f"{name}, {best['val_loss']:.3f} ({best['bits_per_byte']:.3f} bits per byte)" in (
        run / "loss.svg"
    ).read_text("utf-8")
    out = gpt("plot", run, "--json")[1]
    assert json.loads(out)["runs"][0]["baseline"] == {"n": best["n"], "val_loss": best["val_loss"]}
    assert gpt("plot", run, "-o", tmp_path / "plot.svg")[0] == 0
    assert f"{best['val_loss']:.4f}  {name}" in (tmp_path / "plot.svg").read_text("utf-8")
    train(gpt, "--resume", f"{run}@8", "--backend", "torch", "--eval-iters", 2)  # other tokens, another loss
    assert logged(run, "baseline")[-1]["targets"] == 2 * 4 * 32


@needs("torch")
def test_a_run_goes_on_without_one(gpt, prose, tmp_path):
    prose.write_text(prose.read_text("utf-8") * 150)  # more than are counted in a second
    run = tmp_path / "run"
    code, out, err = gpt("train", "--data", prose, "--out", run, "--backend", "torch", *SMALL, "--max-iters", 4)
    assert code == 0 and "gram" not in out and not logged(run, "baseline"), err
    assert train(gpt, "--resume", run, "--max-iters", 4)["baseline"] is None


def test_a_run_has_a_tokenizer_of_its_own(gpt, prose, tmp_path):
    from tests.conftest import write_run

    run = write_run(tmp_path / "run")
    assert "leave out --tokenizer and --vocab-size" in mistake(gpt, "baseline", run, "--tokenizer", "char")


@pytest.mark.parametrize("event", [{}, {"n": 3}, {"n": 3, "val_loss": None, "bits_per_byte": 1.0, "targets": 9}])
def test_an_event_that_is_not_whole_is_none(event):
    whole = {"event": "baseline", "step": 1, "n": 2, "val_loss": 1.0, "bits_per_byte": 2.0, "targets": 3}
    assert last_baseline([{"event": "baseline", "step": 1, **event}]) is None
    assert last_baseline([whole, {"event": "baseline", "step": 1, **event}]) == Baseline(1, 2, 1.0, 2.0, 3)


def test_the_terminal_shows_it(capsys):
    from rich.console import Console

    reporter = console.ConsoleReporter(Console(width=120, color_system=None))
    reporter.report(Baseline(10, 3, 4.5, 2.25, 100))
    assert "val loss 4.5000, 2.250 bits per byte by the best n-gram, n = 3" in capsys.readouterr().out


@needs("torch")
def test_a_mixture_has_its_sources_weighed_as_it_is_evaluated(gpt, prose, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(prose.read_text("utf-8").replace("the", "one"))
    run = tmp_path / "run"
    result = train(gpt, "--data", f"{prose}:3", "--data", other, "--out", run, *SMALL, "--max-iters", 4)
    (event,) = logged(run, "baseline")
    data = [
        TokenDataset(Path(folder)) for folder in json.loads((run / "run.json").read_text("utf-8"))["data"]["folder"]
    ]
    each = [baseline.measure(one, range(1, 6), 4 * 4 * 32)[0] for one in data]
    means = [0.75 * a.val_loss + 0.25 * b.val_loss for a, b in zip(*each, strict=True)]
    assert event["val_loss"] == pytest.approx(min(means)) and means[event["n"] - 1] == min(means)
    bits = sorted(rows[event["n"] - 1].bits_per_byte for rows in each)
    assert bits[0] <= event["bits_per_byte"] <= bits[1] and event["targets"] == 2 * 4 * 4 * 32
    assert result["baseline"]["val_loss"] == event["val_loss"]
    assert f"{event['n']}-gram baseline" in (run / "report.html").read_text("utf-8")
    resumed = train(gpt, "--resume", run, "--max-iters", 4)
    assert resumed["baseline"] == result["baseline"] and len(logged(run, "baseline")) == 1
    # And gpt baseline of the run measures the same, over all and for each source.
    code, out, err = gpt("baseline", run, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [row["val_loss"] for row in found["rows"]] == pytest.approx(means)
    assert found["rows"][event["n"] - 1]["bits_per_byte"] == pytest.approx(event["bits_per_byte"])
    assert [source["share"] for source in found["sources"]] == [0.75, 0.25]
    for source, rows in zip(found["sources"], each, strict=True):
        assert [row["val_loss"] for row in source["rows"]] == pytest.approx([row.val_loss for row in rows])
        assert all(row["sample"] for row in source["rows"])
    code, out, err = gpt("baseline", f"{prose}:3", other, "--n", "1,2", "--sample", 20)
    assert code == 0 and "75% of the windows:" in out and "2-gram of other writes" in out
