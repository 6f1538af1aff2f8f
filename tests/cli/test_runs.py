"""gpt runs: listing, showing and removing runs; and the word latest."""

import io
import json
import os
from pathlib import Path

import pytest

from tests.cli.test_commands import mistake
from tests.cli.test_train import SMALL, train
from tests.conftest import links, needs, story, training_state, write_run
from twingpt.core.config import GPTConfig
from twingpt.runs import folder as runs


def add_checkpoint(run: Path, step: int, val_loss: float | None, size: int = 1000) -> Path:
    folder = runs.checkpoint_folder(run, step)
    folder.mkdir(parents=True)
    state = training_state(step) | {"schema": 1, "val_loss": val_loss, "val_bpb": val_loss, "backend": "mlx"}
    (folder / "training_state.json").write_text(json.dumps(state))
    (folder / "model.safetensors").write_bytes(bytes(size))
    (folder / "manifest.json").write_text("{}")
    return folder


def aged(run: Path, seconds: float) -> None:
    for path in run.iterdir():
        os.utime(path, (seconds, seconds))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """runs/ with an older run of three checkpoints, a newer, larger one of one, and things that are no runs."""
    monkeypatch.chdir(tmp_path)
    old = write_run(Path("runs/old"), story(20))
    for step, loss in ((1000, 3.0), (1500, 2.0), (2000, 2.5)):
        add_checkpoint(old, step, loss)
    runs.point(old, "latest", Path("step-00002000"))
    runs.point(old, "best", Path("step-00001500"))
    new = write_run(Path("runs/new [x]"))
    add_checkpoint(new, 10, None, size=50_000)
    runs.point(new, "latest", Path("step-00000010"))
    aged(old, 1_700_000_000)
    aged(new, 1_800_000_000)
    Path("runs/notes").mkdir()
    Path("runs/notes/todo.txt").write_text("x", encoding="utf-8")
    Path("runs/file.txt").write_text("x", encoding="utf-8")
    return tmp_path


def listed(gpt, *arguments) -> dict[str, list[int]]:
    """The steps of the checkpoints listed, by run, in order."""
    code, out, err = gpt("runs", "--json", *arguments)
    assert code == 0, err
    return {run["name"]: [one["step"] for one in run["checkpoints"]] for run in json.loads(out)["runs"]}


def test_the_list_has_each_runs_figures(gpt, place):
    found = json.loads(gpt("runs", "--json")[1])
    assert found["folder"] == "runs" and [run["name"] for run in found["runs"]] == ["new [x]", "old"]
    new, old = found["runs"]
    assert old["state"] == "finished" and old["step"] == 2000 and old["max_iters"] == 2000
    assert new["state"] == "stopped" and new["step"] == 10 and new["val_loss"] is None
    assert old["val_loss"] == old["val_bpb"] == 2.0 and old["backend"] == "mlx" and old["data"] == "python-library"
    assert old["error"] is None and old["size_bytes"] > 3000 and old["date"].startswith("2023-11-1")
    best = old["checkpoints"][1]
    assert best["step"] == 1500 and best["best"] and not best["latest"] and best["val_loss"] == 2.0
    assert best["path"] == "runs/old/checkpoints/step-00001500" and 1000 < best["size_bytes"] < 5000
    code, out, err = gpt("runs")
    assert code == 0 and err == ""
    for text in (
        "new [x]  stopped at 10/2,000",
        "old  finished at 2,000/2,000  val 2.0000  2.000 bpb  mlx",
        "2023-11-1",
    ):
        assert text in out, text
    assert "@1500  val 2.0000" in out and out.count("latest") == 2 and out.count("best") == 1 and "notes" not in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--best"], {"old": [1500]}),
        (["--latest"], {"new [x]": [10], "old": [2000]}),
        (["--best", "--latest"], {"new [x]": [10], "old": [1500, 2000]}),
        (["--max-loss", 2.5], {"old": [1500, 2000]}),
        (["--min-step", 1200], {"old": [1500, 2000]}),
        (["--min-step", 5000], {}),
        (["--search", "OLD"], {"old": [1000, 1500, 2000]}),
        (["--search", "[x]"], {"new [x]": [10]}),
        (["--search", "nothing"], {}),
    ],
)
def test_the_list_is_filtered(gpt, place, arguments, expected):
    assert listed(gpt, *arguments) == expected


@pytest.mark.parametrize(
    ("sort", "first"), [("loss", "old"), ("step", "old"), ("date", "new [x]"), ("size", "new [x]"), ("name", "new [x]")]
)
def test_the_list_is_sorted(gpt, place, sort, first):
    names = list(listed(gpt, "--sort", sort))
    assert names[0] == first and len(names) == 2


def test_a_list_with_nothing_in_it(gpt, place, monkeypatch):
    assert "No run in runs matches." in gpt("runs", "--search", "nothing")[1]
    assert "There are no runs in runs/notes: gpt train begins one." in gpt("runs", "--dir", "runs/notes")[1]
    monkeypatch.chdir(place / "runs")
    assert gpt("runs")[1] == "There are no runs in runs: gpt train begins one.\n"
    assert json.loads(gpt("runs", "--json")[1]) == {"folder": "runs", "runs": []}
    assert list(listed(gpt, "--dir", place / "runs")) == ["new [x]", "old"]


def test_what_is_damaged_is_listed_with_what_is_wrong(gpt, place):
    for name, content in (("cut", b"{"), ("list", b"[]"), ("latin", b'{"a": "\xff"}')):
        add_checkpoint(Path("runs") / name, 5, 9.0)
        (Path("runs") / name / "run.json").write_bytes(content)
    add_checkpoint(Path("runs/headless"), 5, 9.0)
    (runs.checkpoint_folder(Path("runs/old"), 1500) / "training_state.json").write_text("x")
    (runs.checkpoint_folder(Path("runs/old"), 1000) / "manifest.json").unlink()
    (Path("runs/new [x]") / "latest").write_text("step-00000099\n")
    odd = write_run(Path("runs/odd"))
    (odd / "run.json").write_text('{"train": [], "config": 1, "starts": 3}')
    (odd / "best").write_text("/etc\n")
    code, out, err = gpt("runs", "--json")
    assert code == 0 and err == ""
    assert {run["name"]: run["error"] for run in json.loads(out)["runs"]} == {
        "cut": "run.json is damaged",
        "list": "run.json is damaged",
        "latin": "run.json is damaged",
        "headless": "run.json is missing",
        "old": "step-00001000: manifest.json is missing",
        "new [x]": "latest names step-00000099, which is gone",
        "odd": "best names no checkpoint",
    }
    code, out, err = gpt("runs")
    assert code == 0 and "run.json is damaged" in out and out.count("  damaged") == 2
    code, out, err = gpt("runs", "show", "odd")
    assert code == 0 and "best names no checkpoint" in out
    assert "run.json is damaged, so the run can't be shown" in mistake(gpt, "runs", "show", "cut")


def test_a_run_that_was_taken_back_is_where_it_goes_on_from(gpt, place):
    runs.point(Path("runs/old"), "latest", Path("step-00001500"))  # as gpt train --resume old@1500 leaves it
    [run] = json.loads(gpt("runs", "--json", "--search", "old")[1])["runs"]
    assert (run["step"], run["state"]) == (1500, "stopped")
    assert [one["latest"] for one in run["checkpoints"]] == [False, True, False]
    assert gpt("runs", "rm", "old@1500", "--yes")[0] == 0
    assert runs.latest(Path("runs/old")).name == "step-00001000"


def test_a_run_in_training_is_marked_and_not_removed(gpt, place):
    with runs.training(Path("runs/old")):
        assert "old  running at 2,000/2,000" in gpt("runs")[1]
        for name in ("old", "old@1000"):
            assert "is being trained by another process" in mistake(gpt, "runs", "rm", name, "--yes")
    assert len(runs.checkpoints(Path("runs/old"))) == 3


def test_show_has_configuration_starts_and_checkpoints(gpt, place):
    shown = json.loads(gpt("runs", "show", "old", "--json")[1])
    assert shown["config"] == GPTConfig(vocab_size=512).to_dict() and shown["train"]["max_iters"] == 2000
    assert shown["starts"][0]["backend"] == "torch" and shown["data"]["fingerprint"] == "00"
    assert [one["step"] for one in shown["checkpoints"]] == [1000, 1500, 2000]
    code, out, _ = gpt("runs", "show", "runs/old@best")
    assert code == 0 and "@1500  val 2.0000" in out
    assert "start 2026-01-02 03:04:05 UTC at step 0: torch on cpu, a <chip>" in out
    words = " ".join(out.split())
    assert "vocab_size 512" in words and 'lr_schedule "cosine"' in words


def test_options_of_the_list_do_not_go_before_a_command(gpt, place):
    assert "An option before show is for the list" in mistake(gpt, "runs", "--dir", "runs", "show", "old")
    assert "An option before rm is for the list" in mistake(gpt, "runs", "--best", "rm", "old", "--yes")
    assert Path("runs/old").is_dir()


def test_mistakes(gpt, place):
    assert "Unknown --sort 'los': did you mean 'loss'?" in mistake(gpt, "runs", "--sort", "los")
    assert "There is no folder nowhere" in mistake(gpt, "runs", "--dir", "nowhere")
    assert "There is no run nothing" in mistake(gpt, "runs", "show", "nothing")
    assert gpt("runs", "nothing")[0] == 2


# Removing ---------------------------------------------------------------------------------------------------


def test_a_run_is_removed_only_when_it_is_meant(gpt, place, stdin):
    for answer, code in (("n", 1), ("", 1), ("y", 0)):
        assert Path("runs/old").is_dir()
        stdin(f"{answer}\n".encode())
        done, out, err = gpt("runs", "rm", "old")
        assert done == code and "Remove runs/old, " in err and " kB? [y/N]:" in err
    assert out.strip() == "Removed runs/old." and not Path("runs/old").exists()
    assert sorted(path.name for path in Path("runs").iterdir()) == ["file.txt", "new [x]", "notes"]


def test_nobody_to_ask_removes_nothing(gpt, place, stdin):
    stdin(b"")
    code, out, _ = gpt("runs", "rm", "old", "--json")
    assert code == 1 and out.strip() == "" and Path("runs/old/run.json").is_file()


@links
def test_what_training_did_not_write_stays(gpt, place):
    Path("runs/old/thesis.txt").write_text("years of work", encoding="utf-8")
    Path("outside").mkdir()
    Path("outside/precious").write_text("x", encoding="utf-8")
    Path("runs/old/tensorboard").symlink_to(place / "outside")
    Path("runs/old/wandb").mkdir()
    (Path("runs/old") / ".run.json.77.tmp").write_text("half")
    code, out, _ = gpt("runs", "rm", "old", "--yes", "--json")
    assert code == 0 and json.loads(out) == {"removed": "runs/old", "kept": ["thesis.txt"]}
    assert [path.name for path in Path("runs/old").iterdir()] == ["thesis.txt"]
    assert Path("outside/precious").read_text("utf-8") == "x"
    assert "There is no run old" in mistake(gpt, "runs", "rm", "old", "--yes")


def test_what_is_no_run_is_not_removed(gpt, place, saved):
    for name in ("notes", "runs/notes", "runs", ".", "/", "..", "runs/notes@5", "runs/old@5", "nothing"):
        err = mistake(gpt, "runs", "rm", name, "--yes")
        assert "There is no run" in err or "has no checkpoint 5" in err, err
    assert "is neither a run nor a checkpoint of one" in mistake(gpt, "runs", "rm", saved, "--yes")
    assert saved.is_dir() and Path("runs/notes/todo.txt").is_file() and len(runs.checkpoints(Path("runs/old"))) == 3


@pytest.mark.parametrize(
    ("name", "left", "latest", "best"),
    [
        ("old@1000", [1500, 2000], 2000, 1500),
        ("old@latest", [1000, 1500], 1500, 1500),
        ("runs/old@best", [1000, 2000], 2000, 2000),
        ("runs/old/checkpoints/step-00001500", [1000, 2000], 2000, 2000),
    ],
)
def test_removing_a_checkpoint_leaves_pointers_that_hold(gpt, place, name, left, latest, best):
    doomed = "step-00001500" if "best" in name or "1500" in name else None
    code, out, err = gpt("runs", "rm", name, "--yes")
    assert code == 0 and (doomed or "Removed runs/old/checkpoints/step-") in out, err
    run = Path("runs/old")
    assert [path.name for path in runs.checkpoints(run)] == [f"step-{step:08d}" for step in left]
    assert runs.pointed(run, "latest") == runs.checkpoint_folder(run, latest)
    assert runs.pointed(run, "best") == runs.checkpoint_folder(run, best)
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


def test_removing_the_last_checkpoint_removes_the_pointers(gpt, place):
    for step in (1000, 1500, 2000):
        assert gpt("runs", "rm", f"old@{step}", "-y")[0] == 0
    assert not Path("runs/old/latest").exists() and not Path("runs/old/best").exists()
    run = next(run for run in json.loads(gpt("runs", "--json")[1])["runs"] if run["name"] == "old")
    assert run["error"] is None and run["checkpoints"] == [] and run["step"] is None
    assert "old  stopped, no checkpoint" in gpt("runs")[1]


def test_a_checkpoint_is_removed_from_within(gpt, place, monkeypatch):
    folder = runs.checkpoint_folder(Path("runs/old"), 1000).resolve()
    monkeypatch.chdir(folder)
    assert gpt("runs", "rm", ".", "--yes")[0] == 0
    monkeypatch.chdir(place)
    assert not folder.exists() and len(runs.checkpoints(Path("runs/old"))) == 2


@links
def test_a_link_to_elsewhere_is_not_followed(gpt, place):
    away = add_checkpoint(place / "away", 7, 1.0)
    (Path("runs/old/checkpoints") / "step-00000007").symlink_to(away)
    assert "is a link to another place" in mistake(gpt, "runs", "rm", "old@7", "--yes")
    assert (away / "manifest.json").is_file()
    Path("moved").mkdir()
    Path("runs/old/checkpoints").rename("moved/checkpoints")
    Path("runs/old/checkpoints").symlink_to(place / "moved/checkpoints")
    assert "is a link to another place" in mistake(gpt, "runs", "rm", "old@1000", "--yes")
    assert gpt("runs", "rm", "old", "--yes")[0] == 0
    assert not Path("runs/old").exists() and Path("moved/checkpoints/step-00001000").is_dir()


# latest -----------------------------------------------------------------------------------------------------


def test_latest_is_the_run_last_written_to(place):
    assert runs.find_run("latest") == Path("runs/new [x]")
    os.utime("runs/old/metrics.jsonl", (1_900_000_000, 1_900_000_000))
    assert runs.find_run("latest") == Path("runs/old")
    assert runs.resolve("latest") == Path("runs/old/checkpoints/step-00002000")
    assert runs.resolve("latest@best") == Path("runs/old/checkpoints/step-00001500")
    assert runs.resolve("latest@1000") == Path("runs/old/checkpoints/step-00001000")
    assert runs.owner("latest@best") == Path("runs/old")


def test_latest_may_be_a_folder_or_nothing(place, monkeypatch):
    write_run(Path("runs/latest"))
    aged(Path("runs/latest"), 1_600_000_000)
    assert runs.find_run("latest") == Path("runs/latest")
    Path("runs/latest/run.json").unlink()
    with pytest.raises(runs.UserError, match="There is no run latest"):
        runs.find_run("latest")
    monkeypatch.chdir(place / "runs" / "notes")
    with pytest.raises(runs.UserError, match="There is no run latest"):
        runs.resolve("latest")


def test_commands_take_latest(gpt, place, saved):
    os.utime("runs/old/run.json", (1_900_000_000, 1_900_000_000))
    assert json.loads(gpt("runs", "show", "latest", "--json")[1])["name"] == "old"
    assert json.loads(gpt("plot", "latest@best", "--json")[1])["runs"][0]["label"] == "old"
    run = write_run(Path("runs/real"))
    saved.parent.rename(run / "checkpoints")
    runs.point(run, "latest", saved)
    os.utime(run / "latest", (2_000_000_000, 2_000_000_000))
    code, out, err = gpt("convert", "latest", "hf", "--json")
    assert code == 0 and json.loads(out)["source"] == "runs/real/checkpoints/step-00000003", err
    code, out, err = gpt("parity", "latest", "--json")
    assert code == 0, err


@needs("torch")
def test_resume_and_generate_take_latest(gpt, prose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(gpt, "--data", prose, "--backend", "torch", *SMALL, "--stop-after", 4)
    result = train(gpt, "--resume", "latest", "--backend", "torch")
    assert result["step"] == 12 and result["run"].startswith("runs/prose-")
    assert train(gpt, "--resume", "latest@best", "--backend", "torch")["step"] == 12
    code, out, err = gpt("generate", "latest", "--backend", "torch", "-p", "The", "-m", 3, "--json")
    assert code == 0 and len(json.loads(out)["tokens"]) == 3, err


# In a pipe, and at 80 columns -------------------------------------------------------------------------------


def test_names_are_whole_in_a_pipe_and_on_a_terminal(gpt, tmp_path, monkeypatch, prose):
    from rich.console import Console

    from twingpt.commands.output import make_console
    from twingpt.commands.show_data import print_list
    from twingpt.data import library

    monkeypatch.chdir(tmp_path)
    name = "a-long-name-of-a-data-set-" * 2 + "end"
    run = write_run(Path("runs") / name)
    assert make_console().width > 10_000 and name in gpt("runs")[1]
    assert gpt("data", "prepare", prose, "--name", name, "--tokenizer", "byte")[0] == 0
    out = gpt("data", "list")[1]
    assert name in out and "byte 257" in out and "…" not in out
    narrow = io.StringIO()
    print_list(Console(file=narrow, force_terminal=True, width=80, color_system=None), library.list_datasets())
    assert name in narrow.getvalue()
    shown = gpt("runs", "show", name)[1]
    assert '"eval_interval": ' not in shown and len(shown.splitlines()) < 12 and str(run) not in shown
