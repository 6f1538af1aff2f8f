"""Windows: what is imported and done there, played on another system by tests/windows.py, and its own cases."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import psutil
import pytest

from tests.conftest import needs
from twingpt.backends import host, registry
from twingpt.core import paths
from twingpt.runs import shell
from twingpt.training import interrupt

ROOT = Path(__file__).parents[2]


@needs("torch")
@pytest.mark.skipif(os.name == "nt", reason="this is Windows, where the other tests show it")
def test_the_package_is_imported_trains_resumes_and_converts_without_posix(tmp_path):
    environment = {**os.environ, "TWINGPT_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests" / "windows.py", tmp_path]
    ended = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "twingpt").rglob("*.py")}
    absent = tuple(f"twingpt.backends.{name}" for name in registry.BACKENDS if not registry.installed(name))
    expected = {name.removesuffix(".__init__") for name in modules} - {"twingpt"}
    assert set(found["modules"]) == {name for name in expected if not (absent and name.startswith(absent))}
    assert found["resumed"]["step"] == 6 and found["resumed"]["peak_memory_bytes"] > 0
    assert found["runs"]["runs"][0]["name"] == "a run" and found["text"].startswith("The")
    assert found["stopped"] is True
    assert [name for name in found["checkpoints"] if name[0] != "."] == ["step-00000004", "step-00000006"]
    kept = {"again", "back", "copy.txt", "hf", "home", "prose.txt", "runs", "state"}
    kept |= {"model.gguf"} if importlib.util.find_spec("gguf") else set()
    assert {name for name in found["left"] if not name.endswith(".lock")} == kept  # and no folder of half a model


@pytest.fixture
def windows(monkeypatch):
    """Let `sys` of these modules say that it is Windows."""
    other = types.SimpleNamespace(platform="win32")
    for module in (paths, host, shell):
        monkeypatch.setattr(module, "sys", other)


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("runs\\first", "runs\\first"),
        ("C:\\My runs\\first", '"C:\\My runs\\first"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("", '""'),
    ],
)
def test_words_of_commands_are_quoted_for_cmd(windows, word, quoted):
    assert shell.quote(word) == quoted


def refusing(monkeypatch, times: int, code: int | None) -> list[Path]:
    """Let Path.replace be refused so many times, with an error code of Windows."""
    tried, replace = [], Path.replace

    def refuse(self, target):
        tried.append(self)
        if len(tried) > times:
            return replace(self, target)
        error = PermissionError(13, "The process cannot access the file because it is being used by another process")
        error.winerror = code
        raise error

    monkeypatch.setattr(Path, "replace", refuse)
    return tried


def test_a_file_that_is_read_at_this_moment_is_replaced_when_that_is_over(tmp_path, monkeypatch):
    (tmp_path / "latest").write_text("old", encoding="utf-8")
    tried = refusing(monkeypatch, 3, 32)
    paths.write_atomically(tmp_path / "latest", "new")
    assert len(tried) == 4 and (tmp_path / "latest").read_text("utf-8") == "new"


@pytest.mark.parametrize(("code", "patience"), [(32, 0.0), (None, 60.0), (183, 60.0)])
def test_a_file_that_stays_open_or_is_refused_for_another_reason_is_an_error(tmp_path, monkeypatch, code, patience):
    (tmp_path / "latest").write_text("old", encoding="utf-8")
    monkeypatch.setattr(paths, "PATIENCE", patience)
    tried = refusing(monkeypatch, 3, code)
    with pytest.raises(PermissionError):
        paths.write_atomically(tmp_path / "latest", "new")
    assert len(tried) == 1 and [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_the_peak_of_memory_is_what_the_system_says(monkeypatch):
    found = types.SimpleNamespace(rss=100, peak_wset=700)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: found)
    assert host.process_memory() == host.Memory(100, 700)


@pytest.mark.skipif(os.name != "nt", reason="Ctrl-Break is Windows'")
def test_ctrl_break_is_a_wish_to_stop():
    import signal

    with interrupt.Interrupt() as wish:
        signal.raise_signal(signal.SIGBREAK)
        assert wish.requested


def test_steps_are_compiled_by_default_where_their_compiler_is(monkeypatch):
    assert not registry.compiles("torch", "cpu") and not registry.compiles("mlx", "cpu")
    assert registry.compiles("mlx", "gpu") and registry.compiles("torch", "mps")
    for found in (None, object()):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        assert registry.compiles("torch", "cuda") is registry.compiles("torch", "xpu") is (found is not None)


def test_mlx_is_not_to_be_installed_on_windows(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Windows")
    monkeypatch.setattr(registry, "installed", lambda name: False)
    with pytest.raises(registry.UserError, match="mlx backend is not installed: MLX has no build for Windows"):
        registry.choose("mlx")
