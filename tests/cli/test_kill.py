"""A run can't be lost: killed at any instant it goes on to the same bits, and a signal lets it end well."""

import random
import signal
import statistics

import pytest

from tests.cli.lives import FORKS, Lives
from tests.cli.test_train import equal, tensors
from tests.conftest import BOTH, ONE, dose, kills, open_checkpoint, write_prose
from twingpt.runs import folder as runs
from twingpt.runs.events import read_events

pytestmark = kills

TINY = [
    "--tokenizer", "byte", "--n-layer", 1, "--n-head", 2, "--n-kv-head", 1, "--n-embd", 16, "--block-size", 16,
    "--batch-size", 2, "--dropout", 0.1, "--optimizer", "muon", "--warmup-iters", 2, "--eval-interval", 8,
    "--eval-iters", 1, "--checkpoint-interval", 3, "--sample-interval", 40, "--log-interval", 2,
]  # fmt: skip
LASTING = {"trained": ("loss", "grad_norm", "learning_rate", "tokens"), "evaluated": ("val_loss", "val_bpb", "best"),
           "sampled": ("text",), "saved": ("checkpoint",)}  # fmt: skip


@pytest.fixture(scope="module", params=BOTH)
def lives(request):
    lives = Lives(request.param)
    yield lives
    lives.close()


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> list:
    """The command that starts a run called `run`, without its length."""
    return ["--data", write_prose(tmp_path_factory.mktemp("text")), "--out", "run", *TINY]


def log(run) -> list[tuple]:
    """What a run reported, without each start and end, and without what a clock has a part in."""
    return [
        (event["event"], event["step"], *(event[key] for key in LASTING[event["event"]]))
        for event in read_events(run / "metrics.jsonl")
        if event["event"] in LASTING
    ]


def content(run) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}


def same_run(run, other) -> None:
    """Assert the same weights, optimizer state, events, pointers and files, each whole."""
    assert equal(tensors(run), tensors(other))
    assert log(run) == log(other)
    for pointer in ("latest", "best"):
        assert (run / pointer).read_text("utf-8") == (other / pointer).read_text("utf-8")
        open_checkpoint(f"{run}@{pointer}")
    assert content(run) == content(other)


def go_on(run, start) -> list:
    """The command after a kill: the same again before there is a run, --resume from then on."""
    return ["--resume", "run"] if (run / "run.json").exists() else start


def saving(run) -> bool:
    """Whether a process that was killed was just writing something."""
    return bool([*run.glob("checkpoints/.step-*"), *run.glob(".*.tmp")])


def steps_of(run) -> int:
    """The steps of the newest checkpoint."""
    folders = runs.checkpoints(run)
    return int(folders[-1].name.removeprefix("step-")) if folders else 0


def folders(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir()
        yield tmp_path / name


def pace(lives, folder, run, start) -> tuple[float, float]:
    """Seconds that starting takes, and a step of this run; medians, for the machine may be busy for a while."""
    first = statistics.median(lives.train(folder, *start, change=1).seconds for _ in range(3))
    told = [event["seconds"] for event in read_events(run / "metrics.jsonl") if event["event"] == "trained"]
    return first, statistics.median(b - a for a, b in zip(told, told[6:], strict=False)) / 12  # with 4 saves


@pytest.mark.parametrize("lives", ONE, indirect=True)
@pytest.mark.parametrize("kills", dose(4, 100 if FORKS else 10))
def test_a_run_killed_many_times_ends_in_the_same_bits(lives, start, tmp_path, kills):
    """A kill comes before a random change to the file system; of many, every other one after a random time."""
    many = kills > 4
    start = [*start, "--max-iters", 3 * kills]
    calm, wild = folders(tmp_path, "calm", "wild")
    whole = lives.train(calm, *start)
    assert whole.code == 0, whole.output
    first, a_step = pace(lives, wild, calm / "run", start) if many else (0, 0)
    chance, killed, saves, seen = random.Random(1), 0, 0, set()
    for i in range(3 * kills):
        if killed == kills:
            break
        fate = {"change": chance.randint(1, 120)}
        if many and i % 2 == 0:
            fate = {"seconds": chance.uniform(0, first + 8 * a_step)}
        before = steps_of(wild / "run")
        life = lives.train(wild, *go_on(wild / "run", start), **fate)
        assert life.code in (-signal.SIGKILL, 0), life.output
        if steps_of(wild / "run") > before + 16:  # the machine is faster now
            first, a_step = first / 2, a_step / 2
        killed += life.code != 0
        saves += life.code != 0 and saving(wild / "run")
        for checkpoint in runs.checkpoints(wild / "run"):
            open_checkpoint(checkpoint)
        if runs.checkpoints(wild / "run"):
            seen.add(runs.resolve(wild / "run").name)
    assert killed == kills and saves >= kills / 5 and len(seen) > kills / 4, (killed, saves, len(seen))
    last = lives.train(wild, *go_on(wild / "run", start))
    assert last.code == 0, last.output
    same_run(wild / "run", calm / "run")


@pytest.mark.parametrize("lives", ONE, indirect=True)
@pytest.mark.parametrize("apart", dose(20, 8 if FORKS else 20))
def test_a_run_killed_before_its_first_checkpoint_starts_again(lives, start, tmp_path, apart):
    start = [*start, "--max-iters", 4]
    (calm,) = folders(tmp_path, "calm")
    assert lives.train(calm, *start).code == 0
    begun = 0
    for change in range(1, 60, apart):
        (wild,) = folders(tmp_path, f"wild-{change}")
        assert lives.train(wild, *start, change=change).code == -signal.SIGKILL
        begun += (wild / "run" / "run.json").exists() and not runs.checkpoints(wild / "run")
        life = lives.train(wild, *go_on(wild / "run", start))
        assert life.code == 0, life.output
        same_run(wild / "run", calm / "run")
    assert begun


MOMENTS = {  # with the step at which the run then stops
    "start": ("twingpt.training.trainer:Trainer._train", 1, 0),
    "step": ("twingpt.training.trainer:Trainer._step", 5, 5),
    "evaluation": ("twingpt.data.shards:TokenDataset.validation", 2, 8),
    "save": ("twingpt.core.checkpoint.schema:write_safetensors", 4, 6),  # of the optimizer, in the second checkpoint
    "pointer": ("twingpt.runs.folder:point", 2, 6),
}


@pytest.fixture(scope="module")
def calm(lives, start, tmp_path_factory):
    """A run of 12 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("calm")
    assert lives.train(folder, *start, "--max-iters", 12).code == 0
    return folder / "run"


@pytest.mark.parametrize("lives", ONE, indirect=True)
@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "start"), (signal.SIGTERM, "step"), (signal.SIGINT, "evaluation"), (signal.SIGTERM, "save"),
     (signal.SIGINT, "pointer"), *(pytest.param(number, moment, marks=pytest.mark.soak) for number, moment in
                                   [(signal.SIGTERM, "evaluation"), (signal.SIGINT, "save")])],
)  # fmt: skip
def test_a_signal_saves_and_says_how_to_go_on(lives, start, calm, tmp_path, number, moment):
    where, call, step = MOMENTS[moment]
    run = tmp_path / "run"
    life = lives.train(tmp_path, *start, "--max-iters", 12, moment=where, call=call, signals=[number])
    assert life.code == 128 + number, life.output
    assert f"interrupted after {step} steps" in life.output and "gpt train --resume run" in life.output
    assert "Traceback" not in life.output
    assert runs.resolve(run) == runs.checkpoint_folder(run, step) and not saving(run)
    assert open_checkpoint(run).training()["step"] == step
    assert lives.train(tmp_path, "--resume", "run").code == 0
    assert equal(tensors(run), tensors(calm))
    evaluated = [[event for event in log(which) if event[0] == "evaluated"] for which in (run, calm)]
    assert evaluated[0] == evaluated[1]  # each once, with the same losses
    if moment not in ("start", "step"):  # which saved at a step that has no checkpoint otherwise
        same_run(run, calm)


@pytest.mark.parametrize("lives", ONE, indirect=True)
@pytest.mark.parametrize(
    ("signals", "code"),
    [((signal.SIGTERM, signal.SIGTERM), -signal.SIGTERM), ((signal.SIGINT, signal.SIGINT), 130),
     pytest.param((signal.SIGTERM, signal.SIGINT), 130, marks=pytest.mark.soak)],
)  # fmt: skip
def test_a_second_signal_ends_it_at_once_with_nothing_half_written(lives, start, calm, tmp_path, signals, code):
    run, (moment, call, _) = tmp_path / "run", MOMENTS["save"]
    life = lives.train(tmp_path, *start, "--max-iters", 12, moment=moment, call=call, signals=signals)
    assert life.code == code and "Traceback" not in life.output
    assert [open_checkpoint(path).training()["step"] for path in runs.checkpoints(run)] == [3]
    assert saving(run) == (code < 0)  # there was no time to tidy up
    assert lives.train(tmp_path, "--resume", "run").code == 0
    same_run(run, calm)


def test_a_signal_at_the_very_end_changes_nothing(lives, start, calm, tmp_path):
    life = lives.train(
        tmp_path, *start, "--max-iters", 12, moment="twingpt.runs.plot:plot_loss", call=1, signals=[signal.SIGTERM]
    )
    assert life.code == 0 and "finished after 12 steps" in life.output
    same_run(tmp_path / "run", calm)
