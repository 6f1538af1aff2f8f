"""Preparation: data sources to data sets on disk, built once and found again, by name or by what they depend on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from twingpt.core import paths
from twingpt.core.config import TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.locks import locked
from twingpt.core.tokenizer import TOKENIZERS, Tokenizer
from twingpt.core.tokenizer import load as load_tokenizer
from twingpt.data import named, shards, sources, workers
from twingpt.data.builder import DatasetBuilder, LoadedSources, Progress, TokenizerChoice, learn_tokenizer
from twingpt.data.shards import TokenDataset
from twingpt.data.sources import ReadOptions
from twingpt.data.split import parse_share
from twingpt.data.tokenizers import find as find_tokenizer

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")


def folder_of(name: str) -> Path:
    """The folder of the data set called `name`, prepared or not."""
    return paths.home() / "data" / name


def find(spec: str) -> Path | None:
    """The folder of the data set prepared as `spec`, its name or its path; None where there is none."""
    if not spec or named.parse(spec):
        return None
    folder = folder_of(spec) if NAME.fullmatch(spec) else paths.expand(spec)
    return folder if (folder / "manifest.json").is_file() else None


def prepare(
    spec: str | Path,
    tokenizer: str | Tokenizer = TrainConfig.tokenizer,
    vocab_size: int = TrainConfig.vocab_size,
    val: str | None = None,
    rules: int = sources.RULES,
) -> TokenDataset:
    """The data set that was prepared under the name `spec`; else the source `spec` in a tokenizer, or a kind of one.

    `vocab_size` is that of one that learns. A named data set has its own kind, and is a UserError under another
    Tokenizer. `val` is the share that is held out, or a source, and `rules` the version of the rules of reading. The
    data set of a source is found again by the digest of all it depends on, in `paths.home()/data`.
    """
    spec = str(spec)
    kind, given = (tokenizer, None) if isinstance(tokenizer, str) else (tokenizer.kind, tokenizer)
    if there := find(spec):
        data = TokenDataset(there)
        if given and given.digest != data.manifest["tokenizer"]:
            raise UserError(f"{spec} is prepared with another tokenizer than the model's: prepare its text with that.")
        if val is not None:
            raise UserError(
                f"{spec} is prepared with what it holds out: leave out --val-data, or prepare its text again with "
                f"gpt data prepare --val {val}."
            )
        return data
    loaded, choice = _load([spec], val, ReadOptions(rules=rules), None), TokenizerChoice(kind, vocab_size, given)
    [name] = [source.name for source in loaded.sources.values()]
    folder = folder_of(f"{sources.slug(name)[:40]}-{_key(*_digests(loaded), choice.key)}")
    if not folder.exists():
        _build(folder, name, lambda _: loaded, choice)
    return TokenDataset(folder)


def _load(specs: Sequence[str], val: str | None, options: ReadOptions, spool: Path | None) -> LoadedSources:
    """The sources and what is held out; with `spool`, as gpt data prepare has it, a hub's and stdin too.

    A held-out file of a folder or of a glob is not trained on, but under the first rules of reading. Raises UserError
    for a source that is held out whole, and for data that are prepared already.
    """
    option = "--val" if spool else "--val-data"
    share = None if val is None else parse_share(val, option)
    others = [val] if val is not None and share is None else []
    both = UserError(f"{option} {val} is also what is trained on: give other text, or a share.")
    if set(others) & set(specs):
        raise both
    wanted = [*specs, *others]
    for spec in wanted:
        if not spool or not paths.expand(spec).exists() or find(spec) == paths.expand(spec):
            _check_not_prepared(spec, f"{option} {spec}" if spec in others else spec)
    found = options.load(wanted, spool) if spool else {spec: sources.load(spec, options) for spec in wanted}
    held_out = {spec: found[spec] for spec in others}
    files = {path for source in held_out.values() for path in source.files} if options.rules > 1 else set()
    trained = {spec: found[spec].without(files) if files else found[spec] for spec in specs}
    if not all(source.inputs for source in trained.values()):
        raise both
    return LoadedSources(trained, share, held_out)


def _check_not_prepared(spec: str, called: str) -> None:
    """Raise UserError for the name or path of a prepared data set, `called` so, where text is wanted."""
    if there := find(spec):
        known = ", ".join(row["source"] for row in TokenDataset(there).manifest.get("sources", []))
        beside = (
            f"; ./{spec} is the file or folder" if there != paths.expand(spec) and paths.expand(spec).exists() else ""
        )
        raise UserError(
            f"{called} is a prepared data set, and no text: give what it was prepared from{f', {known}' * bool(known)}"
            f"{beside}."
        )


def _digests(loaded: LoadedSources) -> list[str]:
    """What the content of a data set depends on, but for the tokenizer."""
    found = [source.digest for source in loaded.all().values()]
    return [*found, f"{len(loaded.val)} to hold out, or {loaded.share}"]


def shared_tokenizer(
    specs: Sequence[str], kind: str, vocab_size: int, val: str | None = None, rules: int = sources.RULES
) -> Tokenizer:
    """The tokenizer called `kind` for several sources: where it learns, from the training texts of them all.

    It is kept in `paths.home()/tokenizers`, under the digest of all it depends on.
    """
    if kind not in TOKENIZERS:
        return find_tokenizer(kind)
    choice, options = TokenizerChoice(kind, vocab_size), ReadOptions(rules=rules)
    loaded = [_load([spec], val, options, None) for spec in specs]
    folder = paths.home() / "tokenizers" / _key(choice.key, *(digest for one in loaded for digest in _digests(one)))
    if not folder.exists():
        builders = [DatasetBuilder(one, "", choice, Progress(), workers.cores()) for one in loaded]
        tokenizer, _ = learn_tokenizer(builders, choice)
        with _unless_there(folder), _new_folder(folder, alone=False) as temporary:
            shards.write_tokenizer(temporary, tokenizer)
    return load_tokenizer(folder)


def _key(*parts: str) -> str:
    """A short digest of what a folder's content depends on, for its name."""
    return hashlib.sha256("/".join([str(shards.SCHEMA), *parts]).encode()).hexdigest()[:12]


def prepare_named(
    specs: Sequence[str],
    name: str,
    choice: TokenizerChoice,
    options: ReadOptions,
    progress: Progress | None = None,
    val: str | None = None,
) -> TokenDataset:
    """Prepare sources under a name; the same again is found, anything else under that name is a UserError.

    `val` is the share that is held out, or a source.
    """
    if named.parse(name):
        raise UserError(f"{name} is the name of a source: choose another --name.")
    if not NAME.fullmatch(name):
        raise UserError(f"A data set can't be called {name!r}: give a --name of letters, digits, - _ and . alone.")
    folder, specs = folder_of(name), list(dict.fromkeys(specs))

    def load(spool: Path) -> LoadedSources:
        return _load(specs, val, options, spool)

    if folder.exists():
        return _same(folder, name, choice, None if "-" in (*specs, val) else load(folder))
    _build(folder, name, load, choice, progress, alone=True)
    return TokenDataset(folder)


def _same(folder: Path, name: str, choice: TokenizerChoice, loaded: LoadedSources | None) -> TokenDataset:
    """The data set that is there, if it is what would be prepared now; stdin, which is not loaded, never is."""
    data = TokenDataset(folder)
    alike = not choice.tokenizer or choice.tokenizer.digest == data.manifest["tokenizer"]
    if loaded and alike and data.manifest.get("asked") == choice.asked:
        rules, val = data.manifest.get("rules", 1), data.manifest.get("val")
        known = loaded.all() if rules > 1 else loaded.sources  # which had no validation splits
        digests = [source.digest_under(rules) for source in known.values()]
        same_share = isinstance(val, str) if loaded.val else val == loaded.share
        if same_share and digests == [row["sha256"] for row in data.manifest["sources"]]:
            return data
    raise UserError(f"{name} is prepared already, from something else: gpt data rm {name}, or choose another --name.")


# The folder of a data set, which is there whole or not at all -------------------------------------------------


def _build(
    folder: Path,
    name: str,
    load: Callable[[Path], LoadedSources],
    choice: TokenizerChoice,
    progress: Progress | None = None,
    *,
    alone: bool = False,
) -> None:
    """Build what `load` gives of a temporary folder; killed or failed, it leaves nothing that looks like a data set."""
    with _unless_there(folder), _new_folder(folder, alone=alone) as temporary:
        DatasetBuilder(load(temporary), name, choice, progress or Progress(), workers.cores()).write(temporary)


@contextmanager
def _unless_there(folder: Path) -> Iterator[None]:
    """Write a folder, unless another process is faster with the same content; UserError where that can't be."""
    try:
        yield
    except OSError as error:
        if not folder.exists():
            raise UserError(f"The prepared data can't be written to {folder}: {error.strerror}.") from error


@contextmanager
def _new_folder(folder: Path, *, alone: bool) -> Iterator[Path]:
    """`paths.new_folder`, whose lock says that its process lives; what dead ones left for any data set is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with locked(folder.parent, timeout=-1):
            others = paths.remove_leftovers(folder.parent, ".*.tmp", ".*.old")
            if alone and any(re.fullmatch(rf"\.{re.escape(folder.name)}\.\w+\.tmp", other.name) for other in others):
                raise UserError(f"{folder.name} is being prepared by another process: wait for it, or stop that.")
            temporary = stack.enter_context(paths.new_folder(folder))
        yield temporary
