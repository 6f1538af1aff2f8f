"""What a run reports: TensorBoard, W&B and MLflow, report.html, gpt plot, and reporters that fail."""

import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.cli.test_commands import mistake
from tests.cli.test_train import SMALL, logged, train
from tests.conftest import STARTED, names_in_unicode, needs, story, write_run
from twingpt.runs import folder as runs
from twingpt.runs import plot, report, trackers
from twingpt.runs.events import Baseline, JSONLReporter, RunEnded, RunStarted, Sampled, Trained, points, read_events


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "runs" / "x")


def tell(name: str, run: Path, events) -> None:
    (reporter,) = trackers.make([name], run)
    for event in events:
        reporter.report(event)


# TensorBoard ------------------------------------------------------------------------------------------------


def tensorboard_events(run: Path) -> list:
    """What the event files hold, read as records of length, checksum, content, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted((run / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return events


def tensorboard_scalars(run: Path, tag: str) -> dict[str, list[float]]:
    values = [(event.step, value) for event in tensorboard_events(run) for value in event.summary.value]
    found = [(step, value.simple_value) for step, value in values if value.tag == tag]
    return {"step": [step for step, _ in found], "value": [value for _, value in found]}


def test_tensorboard_goes_on_in_its_folder_and_drops_what_comes_again(run):
    pytest.importorskip("tensorboardX")
    tell("tensorboard", run, story(40))
    loss, held_out = tensorboard_scalars(run, "train/loss"), tensorboard_scalars(run, "val/loss")
    assert loss["step"] == [10, 20, 30, 40] and loss["value"] == pytest.approx([1 / step for step in loss["step"]])
    assert held_out["step"] == [20, 40] and held_out["value"] == pytest.approx([0.1, 0.05])
    tell("tensorboard", run, story(60, first=20))
    assert tensorboard_scalars(run, "train/loss")["step"] == [10, 20, 30, 40, 30, 40, 50, 60]
    starts = [event.step for event in tensorboard_events(run) if event.session_log.status == 1]
    assert starts == [1, 21]  # a reader drops what it has of these steps and later ones
    texts = [
        (value.tag, value.tensor.string_val[0].decode())
        for event in tensorboard_events(run)
        for value in event.summary.value
        if value.tensor.string_val
    ]
    assert ("sample/text_summary", "    a <b>\n    sample") in texts
    assert any(tag.startswith("configuration") and '"n_embd"' in text for tag, text in texts)


# W&B --------------------------------------------------------------------------------------------------------


def test_wandb_offline_keeps_the_runs_id(run, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "200")
    (tmp_path / "elsewhere").mkdir()
    tell("wandb", run, story(40))
    id = json.loads((run / trackers.IDS).read_text("utf-8"))["wandb"]
    wandb.teardown()  # a run goes on in another process: in this one's service, one id twice lost the second's file
    tell("wandb", run, story(60, first=40))
    wandb.teardown()
    folders = sorted((tmp_path / "elsewhere" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2  # in one second, W&B adds -1 to the second's name
    assert all(re.fullmatch(rf"offline-run-\d+_\d+-{id}(-1)?", folder.name) for folder in folders)
    first, second = ((folder / f"run-{id}.wandb").read_bytes() for folder in folders)
    assert b"val/bits_per_byte" in first and repr(1 / 30).encode() in first and repr(2 / 40).encode() in first
    assert repr(1 / 50).encode() in second and repr(2 / 60).encode() in second
    assert b"n_embd" in first and b"twingpt" in first
    assert (next(folders[0].rglob("sample*.html"))).read_text("utf-8") == "<pre>a &lt;b&gt;\nsample</pre>"
    assert not (run / "wandb").exists()


# MLflow -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mlflow_client(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)  # its artifacts go to ./mlruns
    from mlflow import MlflowClient

    return MlflowClient()


def mlflow_runs(client) -> list:
    return client.search_runs([client.get_experiment_by_name("twingpt").experiment_id])


def test_mlflow_goes_on_with_the_run(run, mlflow_client):
    tell("mlflow", run, story(40))
    tell("mlflow", run, story(60, first=40))
    (tracked,) = mlflow_runs(mlflow_client)
    assert tracked.info.status == "FINISHED" and tracked.info.run_name == "x"
    assert json.loads((run / trackers.IDS).read_text("utf-8")) == {"mlflow": tracked.info.run_id}
    history = mlflow_client.get_metric_history(tracked.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 1 / step) for step in range(10, 70, 10)]
    history = mlflow_client.get_metric_history(tracked.info.run_id, "val/bits_per_byte")
    assert [(metric.step, metric.value) for metric in history] == [(20, 3 / 20), (40, 3 / 40), (60, 3 / 60)]
    assert tracked.data.params["batch_size"] == "12" and tracked.data.params["n_head"]
    sample = Path(mlflow_client.download_artifacts(tracked.info.run_id, "samples/step-00000060.txt"))
    assert sample.read_text("utf-8") == "a <b>\nsample"


def test_mlflow_begins_again_in_another_store_and_marks_a_failed_run(run, mlflow_client):
    (run / trackers.IDS).write_text(json.dumps({"mlflow": "0" * 32, "wandb": "abc"}))
    tell("mlflow", run, [*story(20)[:-1], RunEnded(20, "failed", 1.0)])
    (tracked,) = mlflow_runs(mlflow_client)
    assert tracked.info.status == "FAILED"
    assert json.loads((run / trackers.IDS).read_text("utf-8")) == {"mlflow": tracked.info.run_id, "wandb": "abc"}


# Choosing and failing ---------------------------------------------------------------------------------------


@needs("torch")
def test_training_reports_to_tensorboard_before_and_after_resuming(gpt, prose, tmp_path):
    pytest.importorskip("tensorboardX")
    run = tmp_path / "run"
    to = ["--backend", "torch", "--report-to", "tensorboard, tensorboard"]
    train(gpt, "--data", prose, "--out", run, *SMALL, *to, "--stop-after", 4)
    train(gpt, "--resume", run, *to)
    for tag, event, field in (("train/loss", "trained", "loss"), ("val/loss", "evaluated", "val_loss")):
        known, found = logged(run, event), tensorboard_scalars(run, tag)
        assert found["step"] == [entry["step"] for entry in known]
        assert found["value"] == pytest.approx([entry[field] for entry in known], rel=1e-6)
    times = [entry["seconds"] for entry in read_events(run / "metrics.jsonl") if "seconds" in entry]
    assert times == sorted(times) and len(times) > 8 and times[0] > 0


def test_a_tracker_whose_library_is_missing_is_refused_before_anything_is_written(gpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "not_a_library").mkdir()  # as ./wandb and ./mlruns are left in folders where one trains
    monkeypatch.syspath_prepend(str(tmp_path))
    for library in ("not_a_library", "not_there_at_all"):
        monkeypatch.setitem(trackers.LIBRARIES, "wandb", library)
        for rest in ([], ["--resume", "latest"]):
            err = mistake(gpt, "train", "--report-to", "wandb", *rest)
            assert f'needs {library}, which is not installed: pip install "twingpt[wandb]"' in err
    assert [path.name for path in tmp_path.iterdir()] == ["not_a_library"]


def test_an_unknown_tracker_names_the_nearest(gpt):
    assert "Unknown --report-to 'tensorbord': did you mean 'tensorboard'?" in mistake(
        gpt, "train", "--report-to", "tensorbord"
    )


class Fails:
    """A reporter that raises at the first event of training."""

    def __init__(self, run):
        self.heard = 0

    def report(self, event):
        self.heard += 1
        if isinstance(event, Trained):
            raise RuntimeError("the server\nis gone")


@needs("torch")
def test_a_reporter_that_fails_is_told_once_and_training_goes_on(gpt, prose, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(trackers, "make", lambda names, run: made.append(Fails(run)) or made)
    code, out, err = gpt("train", "--data", prose, "--out", tmp_path / "run", "--backend", "torch", *SMALL)
    assert code == 0 and err == ""
    assert out.count("Fails failed and reports no more of this run, which goes on: RuntimeError: the server") == 1
    assert logged(tmp_path / "run")[-1]["step"] == 12
    assert [entry["reporter"] for entry in logged(tmp_path / "run", "reporter_failed")] == ["Fails"]
    assert made[0].heard == 3  # the start, the first evaluation, and what it fell over


def test_a_tracker_that_cannot_reach_its_server_is_not_asked_again(run, monkeypatch):
    def refuse(self):
        raise ConnectionError("refused")  # which is an OSError, as a full disk is

    monkeypatch.setattr(trackers.MLflowReporter, "_start", refuse)
    with pytest.raises(RuntimeError, match="ConnectionError: refused"):
        tell("mlflow", run, story(20))


@needs("torch")
def test_a_store_that_cannot_be_opened_does_not_stop_training(gpt, prose, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    run = tmp_path / "run"
    code, out, _ = gpt("train", "--data", prose, "--out", run, "--backend", "torch", *SMALL, "--report-to", "mlflow")
    assert code == 0 and out.count("MLflowReporter failed") == 1 and "finished after 12 steps" in out


@needs("torch")
def test_a_run_that_fails_says_so_in_its_metrics(gpt, prose, tmp_path):
    run = tmp_path / "run"
    common = ["--data", prose, "--out", run, "--backend", "torch", *SMALL, "--grad-clip", 0, "--warmup-iters", 0]
    code, out, err = gpt("train", *common, "--learning-rate", 1e30, "--eval-interval", 0)
    assert code == 2 and err.count("\n") == 1 and "failed after" in out
    assert logged(run, "run_ended")[-1]["reason"] == "failed"
    assert ">failed</span>" in (run / "report.html").read_text("utf-8")


def test_a_run_that_is_being_trained_is_not_trained_twice(gpt, run):
    assert not runs.is_trained(run)
    with runs.training(run):
        assert runs.is_trained(run)
        assert "is being trained by another process" in mistake(gpt, "train", "--out", run)
        with pytest.raises(runs.UserError, match="being trained"), runs.training(run):
            pass
    assert not runs.is_trained(run) and not runs.is_trained(run / "nothing")


# report.html ------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The tags, attributes and text of a page; fails where a tag is closed that is not the last opened."""

    VOID = ("meta",)

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(path.read_text("utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_has_the_runs_figures_and_needs_nothing_else(tmp_path):
    run = write_run(tmp_path / "r", [*story(40)[:-3], Sampled(20, "an older sample"), *story(40)[-3:]])
    report.write_report(run)
    page = Page(run / "report.html")
    for figure in ("0.0500", "0.075", "40", "of 100", "81.9k", "6.4k", "600 MB", "20s", "finished", "2.0M parameters"):
        assert any(figure in text for text in page.text), figure
    for text in ("After 40 steps", "After 20 steps", "an older sample", "n_embd", "learning_rate", "fingerprint"):
        assert text in page.text, text
    assert {"2026-01-02 03:04:05", "Plan 9 & Co", "cpu, a <chip>", "numpy 2.9, Python 3.14.1"} <= set(page.text)
    assert page.tags.count("svg") == 4 and page.tags.count("polyline") == 5
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href", "onload", "style"} & {name for name, _ in page.attributes}
    style = (run / "report.html").read_text("utf-8")
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert "prefers-color-scheme: dark" in style
    assert "max-width: 40rem" in style and ("data-name", "Versions") in page.attributes  # a telephone has no table


def test_everything_in_the_report_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    run = write_run(tmp_path / "<b>&", [RunStarted(**{**vars(STARTED), "data": evil, "device": evil, "backend": evil})])
    described = json.loads((run / "run.json").read_text("utf-8"))
    described["config"] = {evil: evil, "list": [evil]}
    described["starts"] = [dict.fromkeys(("time", "step", "backend", "platform", "python"), evil)]
    described["starts"][0] |= {"versions": {evil: evil}, "device": {"name": evil, "description": evil}}
    (run / "run.json").write_text(json.dumps(described))
    for event in (Sampled(1, evil), RunEnded(1, evil, 1.0)):
        JSONLReporter(run / "metrics.jsonl").report(event)
    report.write_report(run)
    page = Page(run / "report.html")
    assert "script" not in page.tags and "b" not in page.tags
    assert sum(evil in text for text in page.text) >= 6


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ['{"event": "trained", "step": 1}', '{"event": "evaluated", "step": 3, "val_loss": "low", "val_bpb": null}'],
        ['{"event": "trained", "step": 5, "loss": 2.0}'],
        ['{"event": "trained", "step": 0, "loss": 0.0, "learning_rate": 0.0, "grad_norm": -3}'],
        ['{"event": "evaluated", "step": 9, "val_loss": NaN}', '{"event": "trained", "step": 1, "loss": Infinity}'],
        ['{"event": "sampled", "step": 9}', '{"event": "sampled", "step": 9, "text": "\\ud800\\u0000"}', '{"event": 3'],
        ['{"event": "run_started", "step": 0, "parameters": "many", "max_iters": null, "tokens_per_step": "?"}'],
        ['{"event": "trained", "step": 1e9}', '{"event": "trained", "step": 1000000000, "loss": 1e300}'],
    ],
)
@pytest.mark.parametrize("described", ["", "[]", "{}", '{"config": 1, "train": [], "starts": [3, {"device": []}]}'])
def test_a_report_of_odd_files_is_still_a_page(tmp_path, lines, described):
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "run.json").write_text(described)
    report.write_report(tmp_path)
    assert "h1" in Page(tmp_path / "report.html").tags


def test_a_long_run_has_a_small_report(tmp_path):
    run = write_run(tmp_path / "r", [Trained(s, 1 / s, 1.0, 1e-3, s, 1.0, 1, 1, 0, 1.0) for s in range(1, 5001)])
    report.write_report(run)
    assert (run / "report.html").stat().st_size < 100_000


@needs("torch")
def test_training_writes_the_report_at_each_checkpoint(gpt, prose, tmp_path, monkeypatch):
    written, real = [], report.write_report
    monkeypatch.setattr(report, "write_report", lambda run: written.append(run) or real(run))
    run = tmp_path / "run"
    train(gpt, "--data", prose, "--out", run, "--backend", "torch", *SMALL)
    assert len(written) == 4  # steps 4, 8 and 12, and the end
    best = min(entry["val_loss"] for entry in logged(run, "evaluated"))
    assert f"{best:.4f}" in (run / "report.html").read_text("utf-8")


# gpt plot ---------------------------------------------------------------------------------------------------


@pytest.fixture
def several(tmp_path, monkeypatch) -> Path:
    """Runs of different lengths under runs/, two of one name elsewhere, and one without events."""
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/short"), story(20))
    write_run(Path("runs/_long $x"), story(100))
    write_run(Path("runs/empty"))
    write_run(Path("a/same"), story(40))
    write_run(Path("b/same"), story(40))
    return tmp_path


def test_plot_draws_runs_over_one_another(gpt, several):
    code, out, err = gpt("plot", "short", "runs/_long $x", "empty")
    assert code == 0 and out == "runs-plot.svg\n"
    assert err == "gpt: runs/empty has no losses over step, and is left out.\n"
    content = (several / "runs-plot.svg").read_text("utf-8")
    assert "<svg" in content and "0.1000  short" in content and "0.0200  _long $x" in content
    code, out, err = gpt("plot", "a/same", "b/same", "-o", "same.png")
    assert code == 0 and (several / "same.png").read_bytes().startswith(b"\x89PNG")


@names_in_unicode
@pytest.mark.filterwarnings("error")  # one would be printed on the terminal
def test_a_single_point_is_seen_and_steps_are_whole(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(plot, "_write", lambda figure, path: figures.append(figure))
    point = {"x": [1], "y": [2.0]}
    run = {"label": "a", "run": "a", "train": point, "val": {"x": [], "y": []}, "baseline": None}
    plot.plot_curves(plot.Curves("step", "loss", False, [run]), tmp_path / "a.svg")
    JSONLReporter(tmp_path / "metrics.jsonl").report(story(10)[1])
    plot.plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.svg", "a")
    for figure in figures:
        assert isinstance(figure, Figure)
        [axes] = figure.axes
        assert axes.lines[0].get_marker() == "o" and len(axes.lines[0].get_xdata()) == 1
        axes.set_xlim(0, 3)
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_plot_of_a_run_whose_name_the_font_lacks(gpt, several):
    write_run(Path("runs/東京"), story(40))
    assert gpt("plot", "東京", "-o", "x.png") == (0, "x.png\n", "")


@pytest.mark.parametrize(("x", "scale"), [("step", 1), ("tokens", 2048), ("time", 0.5)])
def test_plot_prints_its_series(gpt, several, x, scale):
    code, out, err = gpt("plot", "short", "runs/short", "a/same", "b/same", "--x", x, "--json")
    assert code == 0 and err == ""
    result = json.loads(out)
    assert result["x"] == x and [run["label"] for run in result["runs"]] == ["short", "a/same", "b/same"]
    assert result["runs"][0]["train"] == {"x": [10 * scale, 20 * scale], "y": [0.1, 0.05]}
    assert result["runs"][0]["val"] == {"x": [20 * scale], "y": [0.1]}
    assert not (several / "runs-plot.svg").exists()


def retokenized(run: Path, **data) -> None:
    described = json.loads((run / "run.json").read_text("utf-8"))
    described["data"] |= data
    (run / "run.json").write_text(json.dumps(described))


def test_plot_is_in_bits_per_byte_where_tokenizers_differ(gpt, several):
    def y(*arguments):
        return json.loads(gpt("plot", "short", "a/same", "--json", *arguments)[1])

    assert y()["y"] == "loss"
    for i, place in enumerate(("runs/short", "a/same")):
        retokenized(several / place, tokenizer=f"digest {i}")
    found = y()
    assert found["y"] == "bpb" and found["runs"][0]["val"] == {"x": [20], "y": [3 / 20]}
    assert found["runs"][0]["train"] == {"x": [], "y": []}
    assert y("--y", "loss")["runs"][0]["val"]["y"] == [2 / 20] and y("--y", "bpb") == found
    code, out, err = gpt("plot", "short", "a/same")
    assert code == 0 and err.startswith("gpt: The tokenizers differ, so the losses are in bits per byte")
    assert "bits per byte" in (several / out.strip()).read_text("utf-8")
    assert "Unknown --y 'bits'" in mistake(gpt, "plot", "short", "--y", "bits")


def test_plot_finds_the_tokenizers_of_older_runs_in_their_data(gpt, several):
    for i, place in enumerate(("runs/short", "a/same")):
        (several / f"data-{i}").mkdir()
        (several / f"data-{i}" / "manifest.json").write_text(json.dumps({"tokenizer": f"digest {i}"}))
        retokenized(several / place, folder=str(several / f"data-{i}"))
    assert json.loads(gpt("plot", "short", "a/same", "--json")[1])["y"] == "bpb"
    retokenized(several / "runs/short", folder=str(several / "data-1"))
    assert json.loads(gpt("plot", "short", "a/same", "--json")[1])["y"] == "loss"


def test_plot_tells_baselines_apart(gpt, several):
    for place, loss in (("runs/short", 2.5), ("a/same", 2.0), ("b/same", 2.0)):
        JSONLReporter(several / place / "metrics.jsonl").report(Baseline(20, 3, loss, loss / 2, 640))
    gpt("plot", "short", "a/same", "b/same")
    drawn = (several / "runs-plot.svg").read_text("utf-8")
    assert "2.5000  3-gram of short" in drawn and "2.0000  3-gram of a/same, b/same" in drawn
    gpt("plot", "a/same", "b/same", "--y", "bpb")
    drawn = (several / "runs-plot.svg").read_text("utf-8")
    assert "1.0000  3-gram" in drawn and "3-gram of" not in drawn


def test_plot_mistakes(gpt, several):
    assert "There is no run nothing" in mistake(gpt, "plot", "nothing")
    assert "Unknown --x 'steps': did you mean 'step'?" in mistake(gpt, "plot", "short", "--x", "steps")
    assert "must end in .svg, .png or .pdf" in mistake(gpt, "plot", "short", "--out", "plot.jpeg")
    assert "No such file or directory: no/plot.svg" in mistake(gpt, "plot", "short", "--out", "no/plot.svg")
    assert "runs/empty has no losses to plot yet." in mistake(gpt, "plot", "empty")
    old = several / "runs/old"
    write_run(old)
    (old / "metrics.jsonl").write_text('{"event": "trained", "step": 1, "loss": 2.0}\n')
    assert "runs/old has no losses to plot yet over time: try --x step." in mistake(gpt, "plot", "old", "--x", "time")


def test_points_leave_out_what_is_no_number(tmp_path):
    events = [{"event": "trained", "step": step, "loss": loss} for step, loss in enumerate((1.5, None, "x", True, 2))]
    assert points(events, "trained", "loss") == [(0, 1.5), (4, 2)]
    assert points(events, "trained", "loss", "tokens") == [] == points(events, "trained", "loss", "time")


def test_plot_and_runs_load_no_framework(several):
    code = (
        "import sys; sys.argv = ['gpt', *ARGUMENTS]\nfrom twingpt.cli import main\n"
        "try: main()\nexcept SystemExit as stop: assert stop.code in (0, None), stop.code\n"
        "bad = {'torch', 'mlx', 'mlx.core', 'tokenizers'} & set(sys.modules); assert not bad, bad"
    )
    from tests.cli.test_commands import run_python

    path = str(Path(__file__).parents[2])
    for arguments in (["plot", "short", "--json"], ["runs", "--json"], ["runs"], ["runs", "show", "short"]):
        done = run_python(code.replace("ARGUMENTS", str(arguments)), PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
    light = (
        code.replace("ARGUMENTS", "['runs']")
        + "; assert not {'numpy', 'matplotlib', 'jinja2', 'filelock'} & set(sys.modules)"
    )
    done = run_python(light, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
