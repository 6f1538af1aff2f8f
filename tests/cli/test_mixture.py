"""gpt train on several sources: from --data to each one's loss, resumed, repeated and moved."""

import json

import numpy as np
import pytest

from tests.cli.test_commands import mistake
from tests.cli.test_reports import tensorboard_scalars
from tests.cli.test_train import SMALL, equal, logged, tensors, train
from tests.conftest import ONE, needs
from twingpt.runs.report import write_report
from twingpt.training.settings import read


@pytest.fixture
def digits(tmp_path):
    path = tmp_path / "digits.txt"
    path.write_text(" ".join(str(i * i) for i in range(1500)))
    return path


@pytest.mark.parametrize("backend", ONE)
def test_a_mixture_is_resumed_bit_for_bit(gpt, prose, digits, tmp_path, backend):
    common = ["--data", f"{prose}:0.7", "--data", f"{digits}:0.3", "--backend", backend, *SMALL]
    common += ["--dropout", 0.1, "--gradient-accumulation-steps", 2]
    whole = train(gpt, *common, "--out", tmp_path / "whole")
    train(gpt, *common, "--out", tmp_path / "parts", "--stop-after", 5)
    parts = train(gpt, "--resume", tmp_path / "parts", "--backend", backend)
    assert parts["step"] == 12 and equal(tensors(tmp_path / "whole"), tensors(tmp_path / "parts"))
    assert whole["sources"] == parts["sources"] and whole["epoch"] == parts["epoch"]
    metrics = [logged(tmp_path / name, "evaluated")[-1] for name in ("whole", "parts")]
    assert metrics[0]["sources"] == metrics[1]["sources"]


@needs("torch")
def test_each_sources_loss_is_reported(gpt, prose, digits, tmp_path):
    run = tmp_path / "run"
    result = train(gpt, "--data", f"{prose}:3", "--data", digits, "--out", run, "--backend", "torch", *SMALL)
    evaluated, trained = logged(run, "evaluated"), logged(run)
    assert all(set(entry["sources"]) == {"prose", "digits"} for entry in evaluated)
    last = evaluated[-1]["sources"]
    mean = 0.75 * last["prose"]["val_loss"] + 0.25 * last["digits"]["val_loss"]
    assert result["val_loss"] == evaluated[-1]["val_loss"] == pytest.approx(mean)
    bits = [value["val_bpb"] for value in last.values()]
    assert min(bits) < result["val_bpb"] < max(bits)
    for name, share in (("prose", 0.75), ("digits", 0.25)):
        assert result["sources"][name] == {"share": share, "epoch": trained[-1]["epochs"][name], **last[name]}
    assert [entry["epoch"] for entry in trained] == pytest.approx(result["epoch"] * np.arange(1, 7) / 6)
    assert logged(run, "run_started")[0]["sources"]["digits"]["share"] == 0.25
    again = train(gpt, "--resume", run, "--backend", "torch")  # finished, and not evaluated again
    assert again["sources"] == result["sources"]


@needs("torch")
def test_what_a_mixture_looks_like(gpt, prose, digits, tmp_path):
    run = tmp_path / "run"
    code, out, err = gpt("train", "--data", prose, "--data", digits, "--out", run, "--backend", "torch", *SMALL)
    assert code == 0, err
    assert "prose 0.5 + digits 0.5: " in out and "digits: 50% of the windows" in out and ", epoch 0." in out
    assert len([line for line in out.splitlines() if line.startswith("  digits: ") and "bits per byte" in line]) == 4
    page = (run / "report.html").read_text("utf-8")
    assert "<h2>Sources</h2>" in page and "<th>digits</th><td>50%</td>" in page and 'class="source1"' in page
    assert f"128 a step, {logged(run)[-1]['epoch']:.2f} epochs" in page
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    for line in lines:  # an event that lacks what this version writes leaves its cell empty
        for key in ("epochs", *(["sources"] if line["event"] == "evaluated" else [])):
            line.pop(key, None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(run)
    assert "<td>–</td><td>–</td><td>–</td></tr>" in (run / "report.html").read_text("utf-8")
    code, out, _ = gpt("runs", "--json", "--search", "digits.txt", "--dir", tmp_path)
    assert code == 0 and json.loads(out)["runs"][0]["data"] == f"{prose}, {digits}"


@needs("torch")
def test_trackers_get_each_sources_curve(gpt, prose, digits, tmp_path):
    pytest.importorskip("tensorboardX")
    run = tmp_path / "run"
    odd = digits.rename(tmp_path / "di gi:ts é.txt")
    data = ["--data", prose, "--data", f"{odd}:2", "--report-to", "tensorboard"]
    train(gpt, *data, "--out", run, "--backend", "torch", *SMALL)
    for tag, event, value in (
        ("val/loss_prose", "evaluated", lambda entry: entry["sources"]["prose"]["val_loss"]),
        ("val/bits_per_byte_di_gi_ts_é", "evaluated", lambda entry: entry["sources"]["di gi:ts é"]["val_bpb"]),
        ("train/epoch_prose", "trained", lambda entry: entry["epochs"]["prose"]),
        ("train/epoch", "trained", lambda entry: entry["epoch"]),
    ):
        known = [value(entry) for entry in logged(run, event)]
        assert tensorboard_scalars(run, tag)["value"] == pytest.approx(known, rel=1e-6)


@needs("torch")
def test_a_mixture_is_repeated_from_its_config(gpt, prose, digits, tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    pair = f'data=["{prose}:0.7", "{digits}:0.3"]'
    code, out, err = gpt("train", "--set", pair, "--out", first, "--backend", "torch", *SMALL, "--max-iters", 2)
    assert code == 0 and f'["{prose}:0.7", "{digits}:0.3"]' in out.replace("\n", ""), err
    assert read(first / "config.toml")["data"] == [f"{prose}:0.7", f"{digits}:0.3"]
    train(gpt, "--config", first / "config.toml", "--out", second)
    assert equal(tensors(first), tensors(second))
    train(gpt, "--config", first / "config.toml", "--data", prose, "--out", third)
    assert json.loads((third / "run.json").read_text("utf-8"))["train"]["data"] == str(prose)


@needs("torch")
def test_a_mixture_that_moved(gpt, prose, digits, tmp_path, monkeypatch):
    run = tmp_path / "run"
    common = [*SMALL, "--tokenizer", "bpe", "--vocab-size", 300, "--backend", "torch"]
    train(gpt, "--data", f"{prose}:0.7", "--data", f"{digits}:0.3", *common, "--out", run, "--stop-after", 4)
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path / "another"))
    moved = digits.rename(tmp_path / "moved.txt")
    resume = ["--resume", run, "--backend", "torch", "--data"]
    message = mistake(gpt, "train", *resume, f"{prose}:0.7", "--data", f"{moved}:0.4")
    assert f"The data {prose}:0.7, {moved}:0.4 is not what" in message and "fingerprint differs" in message
    assert train(gpt, *resume, f"{prose}:0.7", "--data", f"{moved}:0.3")["step"] == 12
    described = json.loads((run / "run.json").read_text("utf-8"))
    assert [name.rsplit("/", 1)[1].split("-")[0] for name in described["data"]["folder"]] == ["prose", "moved"]
    described["data"]["folder"] = [5, 6]
    (run / "run.json").write_text(json.dumps(described))
    assert "is not what twingpt wrote" in mistake(gpt, "train", "--resume", run)


@needs("torch")
def test_data_sets_prepared_by_name_in_a_mixture(gpt, prose, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path / "home"))
    text = tmp_path / "some.txt"
    text.write_text(prose.read_text("utf-8")[:5000] + digits.read_text("utf-8")[:5000])
    for name, kind in (("chars", "char"), ("bytes", "byte")):
        code, _, err = gpt("data", "prepare", text, "--tokenizer", kind, "--name", name)
        assert code == 0, err
    small = [*SMALL[2:], "--backend", "torch", "--max-iters", 2]
    result = train(gpt, "--data", digits, "--data", "chars:2", *small, "--out", tmp_path / "run")
    assert set(result["sources"]) == {"digits", "chars"} and result["settings"]["tokenizer"] == "char"
    train(gpt, "--resume", tmp_path / "run", "--backend", "torch", "--max-iters", 4)
    message = mistake(gpt, "train", "--data", "chars", "--data", "bytes:0.5", *small, "--out", tmp_path / "other")
    assert "chars and bytes have different tokenizers, char of " in message and "byte of 257 ids" in message
    message = mistake(gpt, "train", "--data", digits, "--data", "chars", *small, "--tokenizer", "byte")
    assert "is prepared with --tokenizer char: leave out --tokenizer byte" in message


@needs("torch")
@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("digits.txt:0", "a weight must be a positive number, and is 0"),
        ("digits.txt:nan", "a weight must be a positive number, and is nan"),
        ("prose.txt:2", "--data prose.txt is given 2 times"),
        ("gone.txt:2", "There is no file or folder gone.txt"),
        (":2", "--data is empty"),
    ],
)
def test_mistakes(gpt, prose, digits, tmp_path, monkeypatch, second, message):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(gpt, "train", "--data", "prose.txt", "--data", second, "--out", "run", *SMALL)
    assert not (tmp_path / "run").exists()
