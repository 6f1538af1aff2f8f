"""What the package imports is declared in pyproject.toml, and what is declared is imported; data files too."""

import ast
import re
import sys
from pathlib import Path

import pytest

import twingpt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MODULES = {"mlx-lm": "mlx_lm", "mlflow-skinny": "mlflow", "tomli-w": "tomli_w"}  # where the name is another
# What MLflow needs for its SQLite store.
UNIMPORTED = {"alembic", "sqlalchemy"}


def declared(requirements: list[str]) -> set[str]:
    """The modules of requirements, less the package's own extras."""
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}
    return {MODULES.get(name, name) for name in names - {"twingpt"}}


BASE = declared(PROJECT["project"]["dependencies"])
EXTRAS = {name: declared(given) for name, given in PROJECT["project"]["optional-dependencies"].items()}


def imported(nodes) -> set[str]:
    """The modules of others that these statements import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"twingpt"}


TREES = {path: ast.parse(path.read_text("utf-8")) for path in sorted((ROOT / "twingpt").rglob("*.py"))}


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_is_declared(path):
    assert imported(ast.walk(TREES[path])) <= BASE.union(*EXTRAS.values())
    needed = imported(TREES[path].body)  # as soon as the module is imported
    assert needed <= BASE | ({"mlx"} if path.parent.name == "mlx" else set())


def test_what_is_declared_is_imported():
    everything = set().union(*(imported(ast.walk(tree)) for tree in TREES.values()))
    wanted = BASE.union(*(given for name, given in EXTRAS.items() if name not in ("dev", "llama-cpp")))
    assert wanted - everything <= UNIMPORTED


def test_data_files_are_packaged():
    files = {path for path in (ROOT / "twingpt").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    packaged = {
        path
        for name, given in patterns.items()
        for glob in given
        for path in ROOT.joinpath(*name.split(".")).glob(glob)
    }
    assert files == packaged and ROOT / "twingpt/runs/templates/report.css" in files


def test_the_version_is_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "twingpt.version.__version__"}
    (assigned,) = [node for node in TREES[ROOT / "twingpt" / "version.py"].body if isinstance(node, ast.Assign)]
    assert assigned.value.value == twingpt.__version__  # setuptools reads a literal without importing the package
    written = [path for path in TREES if f'"{twingpt.__version__}"' in path.read_text("utf-8")]
    assert written == [ROOT / "twingpt" / "version.py"]


def test_the_changelog_begins_with_what_comes_and_knows_this_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", twingpt.__version__]


def test_the_source_distribution_has_what_the_tests_read():
    lines = (ROOT / "MANIFEST.in").read_text("utf-8").splitlines()
    named = {name for line in lines if line.startswith(("graft", "include")) for name in line.split()[1:]}
    assert {"tests", "benchmarks", "docs", "CHANGELOG.md"} <= named
    assert all((ROOT / name).exists() for name in named)


def test_the_spec_stays_one_that_is_read_in_an_afternoon():
    core = ROOT / "twingpt" / "core"
    assert sum(len(path.read_text("utf-8").splitlines()) for path in core.rglob("*.py")) <= 4000
