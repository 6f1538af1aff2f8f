"""parity, doctor, convert, --help, start-up, and what every mistake looks like."""

import json
import os
import subprocess
import sys

import pytest

import twingpt
from tests.cli.test_train import SMALL, train
from tests.conftest import BOTH, names_in_unicode, needs
from twingpt.backends import registry
from twingpt.checks import kernels
from twingpt.runs import folder as runs
from twingpt.runs.events import read_events


def test_parity_of_random_models(gpt, twins):
    code, out, err = gpt("parity", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["ok"] is True and result["tolerance"] == 1e-5
    kinds = {(pair["a"], pair["b"]) for pair in result["pairs"]}
    assert kinds >= {("reference", "mlx"), ("reference", "torch"), ("mlx", "torch")}
    fields = {"a", "b", "device_a", "device_b", "dtype", "max_abs_diff", "max_rel_diff", "top1_agreement", "kl"}
    for pair in result["pairs"]:
        assert fields <= set(pair)
        assert 0 < pair["max_rel_diff"] <= 1e-5 and pair["top1_agreement"] == 1 and abs(pair["kl"]) < 1e-9


FAULT = kernels.Check("torch", "gpu", "float32", 64, 257, 544, "step", 0.25, 1e-5)


def test_a_fault_is_named_by_what_failed(gpt, monkeypatch):
    monkeypatch.setattr(kernels, "check_all", lambda *_: [FAULT])
    said = "Failed: step with head width 64, T 544 and a vocabulary of 257, by torch (gpu) in float32: off by 2.5e-01"
    for command in ("parity", "doctor"):
        code, out, _ = gpt(command)
        assert code == 1 and said in " ".join(out.split()), out
    code, out, _ = gpt("parity", "--json")
    result = json.loads(out)
    assert code == 1 and result["ok"] is False and result["kernels"][0]["part"] == "step" and len(result["failed"]) == 1
    report = json.loads(gpt("doctor", "--json")[1])["self_test"]
    assert report["ok"] is False and report["failed"] == result["failed"]


def test_a_device_that_fails_is_left_out_with_the_reason(gpt, twins, monkeypatch):
    monkeypatch.setattr(registry, "device_failure", lambda engines, _: "no memory" if engines.NAME == "mlx" else None)
    for command in ("parity", "doctor"):
        code, out, err = gpt(command)
        assert code == 0 and "Left out: mlx (cpu): no memory" in out, err
    assert "No device can compute here: no memory" in mistake(gpt, "parity", "--backend", "mlx")


def test_parity_on_one_device(gpt):
    code, out, err = gpt("parity", "--device", "cpu", "--json")
    assert code == 0 and {pair["device_b"] for pair in json.loads(out)["pairs"]} == {"cpu"}, err
    assert "Unknown device 'gpus'" in mistake(gpt, "parity", "--device", "gpus")


def test_parity_of_a_checkpoint_and_its_exit_code(gpt, saved):
    assert gpt("parity", saved, "--json")[0] == 0
    code, out, _ = gpt("parity", saved, "--json", "--tolerance", 1e-12)
    assert code == 1 and json.loads(out)["ok"] is False
    code, out, _ = gpt("parity", saved, "--tolerance", 1e-12)
    assert code == 1 and "They differ" in out


def test_parity_table(gpt, saved):
    code, out, _ = gpt("parity", saved)
    assert code == 0 and "They agree" in out and "reference" in out


@pytest.mark.parametrize("backend", BOTH)
def test_parity_of_one_backend_in_bfloat16(gpt, saved, backend):
    code, out, err = gpt("parity", saved, "--backend", backend, "--dtype", "bfloat16", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert {pair["b"] for pair in result["pairs"]} == {backend}
    assert all(1e-5 < pair["max_rel_diff"] <= result["tolerance"] for pair in result["pairs"])


def test_doctor(gpt):
    code, out, err = gpt("doctor", "--json")
    assert code == 0, err
    report = json.loads(out)
    chosen, why = registry.choose()
    assert report["choice"]["backend"] == chosen and report["choice"]["why"] == why
    assert report["self_test"]["ok"] is True and 0 < report["self_test"]["max_rel_diff"] <= 1e-5
    assert report["libraries"]["numpy"] and report["backends"][chosen]["version"]
    assert any({"backend": chosen, "name": "cpu"}.items() <= device.items() for device in report["devices"])
    for device in report["devices"]:
        assert "float32" in device["fast_dtypes"] and set(device["fast_dtypes"]) <= set(device["dtypes"])
        assert 0 < device["free_memory_bytes"] <= device["memory_bytes"]
        assert set(device["measured_flops"]) == set(device["documented_flops"]) == set(device["dtypes"])
        assert all(speed > 1e7 for speed in device["measured_flops"].values())
    code, out, _ = gpt("doctor")
    assert code == 0 and "Choice:" in out and "Self-test: passed" in out
    assert "float32   fast  matrix products:" in out and " free" in out and "FLOP/s measured" in out


@needs("mlx")
def test_doctor_says_which_blas_mlx_got(gpt):
    blas = json.loads(gpt("doctor", "--json")[1])["backends"]["mlx"]["blas"]
    assert blas.startswith(("OpenBLAS", "torch", "Accelerate"))


@needs("torch")
def test_doctor_without_mlx(gpt, monkeypatch):
    monkeypatch.setitem(sys.modules, registry.REQUIRED_MODULE["mlx"], None)
    code, out, _ = gpt("doctor")
    assert code == 0 and "mlx: not installed: pip install" in out


def run_python(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


LIGHT = (
    "import sys; bad = {'torch', 'mlx', 'mlx.core', 'matplotlib', 'tokenizers'} & set(sys.modules); assert not bad, bad"
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["generate", "--help"],
        ["parity", "-h"],
        ["plot", "-h"],
        ["baseline", "-h"],
        ["runs", "rm", "-h"],
        ["bench", "train", "-h"],
    ],
)
def test_help_loads_no_framework(arguments):
    done = run_python(
        f"import sys; sys.argv = ['gpt', *{arguments}]\n"
        "from twingpt.cli import main\n"
        "try: main()\nexcept SystemExit as stop: assert stop.code in (0, None)\n"
        f"{LIGHT}; assert 'numpy' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr
    assert ("twingpt 0." if "--version" in arguments else "Usage") in done.stdout


def test_importing_the_package_loads_no_framework():
    assert run_python(f"import twingpt, sys; twingpt.GPTConfig; twingpt.load\n{LIGHT}").returncode == 0


def test_the_version_is_said_from_one_place(gpt):
    assert gpt("--version") == (0, f"twingpt {twingpt.__version__}\n", "")
    assert json.loads(gpt("doctor", "--json")[1])["libraries"]["twingpt"] == twingpt.__version__


def test_help_has_examples(gpt):
    for command in ("train", "generate", "parity", "doctor", "convert", "plot", "runs", "bench", "bench train"):
        code, out, _ = gpt(*command.split(), "--help")
        assert code == 0 and "Examples" in out and f"gpt {command}" in out


def test_convert_refuses_to_overwrite_and_what_has_no_family(gpt, saved, tmp_path):
    code, out, err = gpt("convert", saved, tmp_path / "hf", "--json")
    assert code == 0 and json.loads(out)["family"] == "qwen3", err
    code, _, err = gpt("convert", saved, tmp_path / "hf")
    assert code == 2 and "exists already" in err


# Mistakes ---------------------------------------------------------------------------------------------------


def mistake(gpt, *arguments) -> str:
    code, out, err = gpt(*arguments)
    assert code == 2 and out == "", (code, out)
    assert err.startswith("gpt: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--max-iters", "ten"], "Invalid value for '--max-iters'"),
        (["train", "--optimiser", "muon"], "No such option: --optimiser"),
        (["trian"], "No such command 'trian'"),
        (["data", "rm"], "Missing argument 'NAME'"),
        (["data", "prepare", "novel.txt"], "Missing option '--name'"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(gpt, arguments, message):
    error = mistake(gpt, *arguments)
    assert message in error and error.endswith(" --help.\n")


@pytest.mark.parametrize("arguments", [[], ["data"], ["bench"]])
def test_a_group_alone_shows_its_help(gpt, arguments):
    code, out, err = gpt(*arguments)
    assert code in (0, 2) and "Usage:" in out + err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tinny"], "Unknown preset 'tinny': did you mean 'tiny'?"),
        (["--shape", "gpt3"], "Unknown shape 'gpt3': did you mean 'gpt2'?"),
        (["--n-embd", 30, "--n-head", 4], "n_embd 30 is not divisible by n_head 4"),
        (["--n-head", 4, "--n-kv-head", 3], "n_head 4 is not divisible by n_kv_head 3"),
        (["--tokenizer", "words"], "Unknown tokenizer 'words'"),
        (["--vocab-size", 10], "need 257"),
        (["--data", "nothing.txt"], "There is no file or folder nothing.txt"),
        (["--backend", "jax"], "Unknown backend 'jax'"),
        (["--device", "tpu"], "device 'tpu'"),
        (["--dtype", "float8"], "Unknown dtype on"),
        (["--lr-schedule", "linear"], "Unknown lr_schedule 'linear'"),
        (["--batch-size", 0], "batch_size must be at least 1"),
        (["--learning-rate", "nan"], "learning_rate must be a finite number"),
        (["--stop-after", 0], "--stop-after must be at least 1"),
        (["--resume", "nothing"], "There is no run nothing"),
        (["--resume", ""], "There is no run"),
        (["--data", ""], "--data is empty"),
        (["--data", "~nobody/x.txt"], "There is no file or folder ~nobody/x.txt"),
        (["--data", "x" * 300 + ".txt"], "File name too long"),
        (["--data", "/dev/null"], "neither a regular file nor a folder"),
        (["--vocab-size", 2**64], "vocab_size is 18446744073709551616, which is too large"),
    ],
)
def test_train_mistakes_write_nothing(gpt, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(gpt, "train", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00", "is not UTF-8 text: byte 0 is 0xff"),
        (b"Too short.", "fewer than one block"),
    ],
)
def test_data_mistakes_write_no_run(gpt, tmp_path, content, message):
    (tmp_path / "data.txt").write_bytes(content)
    err = mistake(gpt, "train", "--data", tmp_path / "data.txt", "--out", tmp_path / "run", "--tokenizer", "byte")
    assert message in err and not (tmp_path / "run").exists()


@needs("torch")
def test_resume_mistakes_change_nothing(gpt, prose, tmp_path):
    run = tmp_path / "run"
    train(gpt, "--data", prose, "--out", run, *SMALL, "--stop-after", 4)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for arguments, message in (
        (["--n-layer", 3], "--n-layer 3 conflicts with the run, which has 2"),
        (["--learning-rate", 1.0], "--learning-rate 1.0 conflicts with the run"),
        (["--tokenizer", "char"], "--tokenizer char conflicts with the run, which has byte"),
        (["--seed", 7], "--seed 7 conflicts"),
        (["--preset", "small"], "--preset can't change when a run goes on"),
        (["--out", tmp_path / "other"], "leave out --out"),
        (["--max-iters", 0], "max_iters must be at least 1"),
        (["--max-iters", 2], "is at step 4 already, past --max-iters 2"),
        (["--stop-after", 2], "is at step 4 already, past --stop-after 2"),
    ):
        assert message in mistake(gpt, "train", "--resume", run, *arguments)
    assert "holds a run already: go on with --resume" in mistake(gpt, "train", "--data", prose, "--out", run, *SMALL)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert train(gpt, "--resume", run, "--n-layer", 2, "--seed", 1337)["step"] == 12  # what agrees is no conflict


@needs("torch")
def test_a_damaged_checkpoint_is_not_resumed(gpt, prose, tmp_path):
    run = tmp_path / "run"
    train(gpt, "--data", prose, "--out", run, *SMALL, "--stop-after", 4)
    path = runs.resolve(run) / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "do not match the manifest" in mistake(gpt, "train", "--resume", run)
    assert "do not match the manifest" in mistake(gpt, "generate", run, "-p", "x")


@needs("torch")
@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"data": {"folder": 5}, "starts": []}', '{"config": 5, "train": {}, "data": {}, "starts": []}'],
)
def test_a_damaged_run_json_is_not_resumed(gpt, prose, tmp_path, content):
    run = tmp_path / "run"
    train(gpt, "--data", prose, "--out", run, *SMALL, "--stop-after", 4)
    (run / "run.json").write_text(content)
    assert "run.json is not what twingpt wrote" in mistake(gpt, "train", "--resume", run)


@needs("torch")
def test_a_run_is_resumed_from_within_and_metrics_of_any_kind_are_read(gpt, prose, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(gpt, "--data", prose, "--out", run, *SMALL, "--stop-after", 4)
    path = run / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines()
    odd = '{"event": "sampled", "step": 1, "text": "a\u2028b\u0085c"}'
    path.write_text("\n".join([*lines[:2], odd, "[]", "{}", "half of a l", *lines[2:]]), "utf-8")
    monkeypatch.chdir(runs.resolve(run))
    assert train(gpt, "--resume", ".")["step"] == 12
    events = list(read_events(path))
    assert [event["text"] for event in events if event["event"] == "sampled"] == ["a\u2028b\u0085c"]
    assert [event["step"] for event in events if event["event"] == "trained"] == [2, 4, 6, 8, 10, 12]


@needs("torch")
def test_a_run_that_diverged_at_once_can_be_started_again(gpt, prose, tmp_path):
    run = tmp_path / "run"
    common = ["--data", prose, "--out", run, *SMALL, "--warmup-iters", 0, "--eval-interval", 0]
    code, out, err = gpt("train", *common, "--learning-rate", 1e38, "--max-iters", 1, "--json")
    assert code == 2 and out == "" and "Traceback" not in err
    assert "is not finite" in err and "nothing was saved" in err
    assert train(gpt, *common)["step"] == 12
    assert next(event["step"] for event in read_events(run / "metrics.jsonl") if event["event"] == "trained") == 2


@needs("torch")
@pytest.mark.parametrize("name", ["o $x_{$", "o[/x]", "o [x]", pytest.param("ö 東京", marks=names_in_unicode)])
def test_odd_names_of_runs(gpt, prose, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    code, out, err = gpt("train", "--data", prose, "--out", name, *SMALL, "--stop-after", 4)
    assert code == 0, err
    assert f"Checkpoint: {name}/checkpoints/step-00000004" in out and f"--resume '{name}'" in out
    assert (tmp_path / name / "loss.svg").exists()


@needs("torch")
def test_training_goes_on_when_nobody_reads_it(prose, tmp_path):
    command = [sys.executable, "-m", "twingpt", "train", "--data", prose, "--out", tmp_path / "run", *SMALL]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
    assert runs.resolve(tmp_path / "run").name == "step-00000012"


def test_a_broken_backend_says_so(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')")
    done = run_python(
        "import sys; sys.argv = ['gpt', 'train', '--backend', 'torch']\nfrom twingpt.cli import main\nmain()",
        PYTHONPATH=str(tmp_path),
    )
    assert done.returncode == 2 and "The torch backend can't be imported (libtorch.so" in done.stderr
    assert "Traceback" not in done.stderr and "pip install" in done.stderr


def test_doctor_refuses_what_is_not_there(gpt):
    assert "Unknown backend 'foo'" in mistake(gpt, "doctor", "--backend", "foo")
    assert "device 'tpu'" in mistake(gpt, "doctor", "--device", "tpu")


def test_a_backend_that_is_not_installed_names_the_extra(gpt, monkeypatch):
    monkeypatch.setitem(sys.modules, registry.REQUIRED_MODULE["mlx"], None)
    monkeypatch.setattr(registry.platform, "system", lambda: "Linux")
    assert 'pip install "twingpt[mlx-cpu]"' in mistake(gpt, "train", "--backend", "mlx")


def test_unknown_option_and_command(gpt):
    assert gpt("train", "--n-layres", 3)[0] == 2
    assert gpt("trian")[0] == 2


def test_debug_shows_the_traceback():
    done = run_python(
        "import sys; sys.argv = ['gpt', 'train', '--preset', 'none', '--debug']\nfrom twingpt.cli import main\nmain()"
    )
    assert done.returncode == 1 and "Traceback" in done.stderr and "Unknown preset" in done.stderr
