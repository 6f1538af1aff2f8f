"""The Python API: what `import twingpt` gives, training and converting from Python."""

import dataclasses
import json
from pathlib import Path

import pytest

import twingpt
from tests.conftest import BOTH, ONE

both, one = pytest.mark.parametrize("backend", BOTH), pytest.mark.parametrize("backend", ONE)

MODEL = {"vocab_size": 257, "n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 16}
RUN = twingpt.TrainConfig(
    tokenizer="byte", batch_size=4, max_iters=6, warmup_iters=1, eval_iters=1, eval_interval=3, sample_interval=0
)


def test_every_public_name_is_there():
    for name in twingpt.__all__:
        assert getattr(twingpt, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        twingpt.lode  # noqa: B018


@both
def test_train_calls_back_keeps_a_run_and_goes_on(prose, tmp_path, backend):
    events = []
    config = twingpt.GPTConfig(**MODEL)
    summary = twingpt.train(
        config, RUN, data=prose, out=tmp_path / "run", backend=backend, device="cpu", callbacks=[events.append]
    )
    assert summary["step"] == 6 and summary["reason"] == "finished"
    names = [type(event).__name__ for event in events]
    assert names[0] == "RunStarted" and names[-1] == "RunEnded" and names.count("Evaluated") == 3
    assert [event.step for event in events if type(event).__name__ == "Evaluated"] == [0, 3, 6]
    kept = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert kept["config"] == config.to_dict()
    assert kept["train"] == dataclasses.replace(RUN, data=str(prose)).to_dict()
    longer = dataclasses.replace(RUN, data=str(prose), max_iters=8)
    assert twingpt.train(train_config=longer, resume=tmp_path / "run", backend=backend, device="cpu")["step"] == 8
    assert twingpt.load(tmp_path / "run", backend, "cpu").config == config


@one
def test_a_callback_that_fails_is_told_of_and_stops_nothing(prose, tmp_path, backend):
    heard = []

    def broken(event):
        heard.append(event)
        raise ValueError("no more")

    with pytest.warns(UserWarning, match=r"A callback failed and hears no more of the run: ValueError\('no more'\)"):
        summary = twingpt.train(
            twingpt.GPTConfig(**MODEL), RUN, data=prose, out=tmp_path / "run", backend=backend, callbacks=[broken]
        )
    assert summary["step"] == 6 and len(heard) == 1


@one
def test_fine_tuning_and_mistakes_of_train(prose, tmp_path, backend):
    place = {"data": prose, "backend": backend, "device": "cpu"}
    twingpt.train(twingpt.GPTConfig(**MODEL), RUN, out=tmp_path / "first", **place)
    tuned = twingpt.train(
        train_config=dataclasses.replace(RUN, tokenizer="bpe", max_iters=2),
        init_from=tmp_path / "first",
        out=tmp_path / "tuned",
        **place,
    )
    assert tuned["step"] == 2
    for arguments, message in [
        ({"config": twingpt.GPTConfig(**{**MODEL, "vocab_size": 300})}, "vocab_size is 300, and the tokenizer has 257"),
        ({"config": "enormous"}, "Unknown preset 'enormous'"),
        ({"resume": tmp_path / "first", "init_from": tmp_path / "first"}, "leave out out and init_from"),
        ({"resume": tmp_path / "none"}, "There is no run"),
        ({"config": twingpt.GPTConfig(**MODEL), "resume": tmp_path / "first", "data": "shakespeer"}, "shakespeer"),
    ]:
        with pytest.raises(twingpt.UserError, match=message):
            twingpt.train(**{"train_config": RUN, **place, **arguments})


@one
def test_convert_by_paths(prose, tmp_path, backend):
    run = tmp_path / "run"
    twingpt.train(twingpt.GPTConfig(**MODEL), RUN, data=prose, out=run, backend=backend, device="cpu")
    told = twingpt.convert(run, tmp_path / "hf", "hf")
    assert told["target_format"] == "hf" and twingpt.convert(str(tmp_path / "hf"), tmp_path / "back")["bytes"] > 0
    small = twingpt.convert(run, str(tmp_path / "small"), "mlx", twingpt.Quantization(4, 32))
    assert small["quantization"]["bits"] == 4
    texts = [
        twingpt.load(tmp_path / name, backend, "cpu").generate("The", 20, temp=0) for name in ("run", "hf", "back")
    ]
    assert texts[0] == texts[1] == texts[2]
    with pytest.raises(twingpt.UserError, match="exists already"):
        twingpt.convert(run, tmp_path / "hf")


def test_prepare(prose):
    data = twingpt.prepare(prose, "byte")
    assert data.tokenizer.vocab_size == 257 and twingpt.prepare(str(prose), "byte").folder == data.folder


@one
def test_what_the_readme_shows(tmp_path, monkeypatch, backend, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    code = readme.split("## From Python\n\n```python\n")[1].split("```")[0]
    assert all(f"twingpt.{name}(" in code for name in ("load", "prepare", "train", "convert"))
    monkeypatch.chdir(tmp_path)
    data = "the quick brown fox jumps over the lazy dog\n" * 2000
    (tmp_path / "fox.txt").write_text(data)
    tiny = dataclasses.replace(RUN, tokenizer="bpe", vocab_size=270)
    config = twingpt.GPTConfig(**{**MODEL, "vocab_size": 270})
    twingpt.train(config, tiny, data="fox.txt", out="runs/first", backend=backend, device="cpu")
    exec(code.replace("python-docs", "fox.txt").replace("vocab_size=512", "vocab_size=270"), names := {})
    assert names["logits"].shape == (1, 3, 270) and names["found"].top.shape == (1, 2, 5)
    assert names["summary"]["step"] == 20 and len(names["texts"]) == 5
    assert "RunEnded(" in capsys.readouterr().out and (tmp_path / "second-4bit" / "config.json").is_file()
