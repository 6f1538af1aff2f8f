"""Several sources as one: weights, whose window comes when, one tokenizer, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.order import window_count
from twingpt.data import builder, mixture
from twingpt.data.mixture import Mixture, parse, prepare_all, title, whole_shares
from twingpt.data.shards import TokenDataset

ZERO, NINE = ord("0"), ord("9")


@pytest.fixture(autouse=True)
def fresh_home(monkeypatch, tmp_path):
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path / "home"))


@pytest.fixture
def digits(tmp_path):
    """A text with none of the letters of `prose`, and not a space."""
    path = tmp_path / "digits.txt"
    path.write_text("".join(str(i * i) for i in range(1500)))
    return path


@pytest.fixture
def mixed(prose, digits) -> Mixture:
    """Bytes of prose and of digits, 7 to 3."""
    return prepare_all([f"{prose}:0.7", f"{digits}:0.3"], "byte", 0)


def test_a_weight_is_a_number_after_the_last_colon():
    given = ["a:0.7", "b:3", "c", "d:e", "x:y:1e-2", "f:"]
    assert parse(given) == [("a", 0.7), ("b", 3.0), ("c", 1.0), ("d:e", 1.0), ("x:y", 0.01), ("f:", 1.0)]
    assert parse("a") == [("a", 1.0)] and parse("a:0.7") == [("a", 0.7)]


def test_a_number_that_is_part_of_a_path_is_no_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talk:12").write_text("text")
    assert parse(["talk:12", "talk:13"]) == [("talk:12", 1.0), ("talk", 13.0)]
    assert parse(["talk:12:2", f"{tmp_path}/t*:12"]) == [("talk:12", 2.0), (f"{tmp_path}/t*:12", 1.0)]


@pytest.mark.parametrize("number", ["0", "-1", "nan", "inf", "-inf", "0.0"])
def test_a_weight_that_is_not_positive(number):
    with pytest.raises(UserError, match=f"--data b:{number}: a weight must be a positive number, and is {number}"):
        parse(["a", f"b:{number}"])


def test_a_source_given_twice():
    with pytest.raises(UserError, match="--data a is given 2 times: give it once, with the sum of the weights"):
        parse(["a:1", "b", "a:2"])


def test_the_same_data_under_two_names(prose):
    with pytest.raises(UserError, match="are the same data: give it once"):
        prepare_all([str(prose), f"{prose.parent}/./{prose.name}"], "byte", 0)


def test_shares_are_exact():
    assert whole_shares([0.7, 0.3]) == [7, 3] and whole_shares([2.0, 2.0, 4.0]) == [1, 1, 2]
    assert whole_shares([0.1, 0.2, 0.7]) == [1, 2, 7] and whole_shares([1e300, 1e300]) == [1, 1]


@given(st.lists(st.floats(1e-300, 1e300), min_size=2, max_size=6))
def test_shares_of_any_weights_are_near_them(weights):
    shares = whole_shares(weights)
    assert min(shares) >= 1 and sum(shares) < 2**31
    near = np.array(weights) / max(weights)
    assert np.allclose(np.array(shares) / sum(shares), near / near.sum(), rtol=1e-6, atol=1e-8)


def test_a_mixture_in_a_configuration():
    mixed = TrainConfig(data=["a:0.7", "b:0.3"])
    assert mixed.data == ("a:0.7", "b:0.3")
    assert TrainConfig.from_dict(json.loads(json.dumps(mixed.to_dict()))) == mixed
    assert TrainConfig(data=["a"]) == TrainConfig(data="a") and TrainConfig(data="a").to_dict()["data"] == "a"
    for wrong in ([], ["a", 3], 3, None):
        with pytest.raises(UserError, match="data must be of type str, or a list of them"):
            TrainConfig(data=wrong)


def test_a_run_of_a_mixture_has_a_short_name():
    assert title(["books/novel.txt:0.7", "notes/:0.3"]) == "novel+notes" and title("novel.txt") == "novel"
    assert len(title([f"a-long-name-{i}.txt" for i in range(50)])) == 60
    assert len(title(["😀" * 60 + ".txt"]).encode()) == 180 and title("l\udce9.txt") == "l\ufffd"


def is_digits(windows) -> np.ndarray:
    """Which rows are of the digits; none is of both."""
    inside = ((windows >= ZERO) & (windows <= NINE)) | (windows == 256)
    assert (inside.all(axis=1) | ~inside[:, :-1].any(axis=1)).all()
    return inside.all(axis=1)


def test_windows_come_from_each_source_by_its_weight(mixed):
    tokens, targets = mixed.batch(0, 1000, 16, 1)
    assert tokens.dtype == np.int32 and tokens.shape == (1000, 16)
    assert np.array_equal(tokens[:, 1:], targets[:, :-1]) and np.shares_memory(tokens, targets)
    of_digits = is_digits(tokens)
    assert of_digits.sum() == 300
    assert np.abs(np.cumsum(of_digits) - 0.3 * np.arange(1, 1001)).max() < 1


def test_a_batch_is_a_function_of_seed_and_number_alone(mixed):
    whole = mixed.batch(40, 60, 16, 1)
    for size in (1, 7, 20):
        parts = [mixed.batch(i, min(size, 100 - i), 16, 1) for i in range(40, 100, size)]
        for which in (0, 1):
            assert np.array_equal(whole[which], np.concatenate([part[which] for part in parts]))
    assert not np.array_equal(whole[0], mixed.batch(40, 60, 16, 2)[0])


def test_each_source_is_gone_through_window_by_window(mixed):
    part = mixed.parts[1]
    n = window_count(len(part.data.splits["train"]), 16)
    count = n * 10 // 3
    tokens, targets = mixed.batch(0, count + 10, 16, 1)
    rows = np.concatenate([tokens, targets[:, -1:]], axis=1)[is_digits(tokens)][:n]
    text = bytes(part.data.splits["train"][:-1].astype(np.uint8))
    starts = sorted({start for row in rows if (start := text.find(bytes(row.astype(np.uint8)))) >= 0})
    assert len(starts) >= n - 1 and set(np.diff(starts)) <= {16, 32}  # the last may end in the end of text
    assert part.name == "digits" and 0.99 < mixed.source_epochs(count, 16, 1)["digits"] <= 1
    assert mixed.epochs(count, 16) == pytest.approx(
        count / sum(window_count(len(p.data.splits["train"]), 16) for p in mixed.parts)
    )


def test_the_held_out_batches_are_those_of_each_source(mixed):
    found = [batch for part in mixed.parts for batch in part.data.validation(4, 16, 2)]
    assert len(found) == 4
    for mine, theirs in zip(mixed.validation(4, 16, 2), found, strict=True):
        assert np.array_equal(mine[0], theirs[0]) and np.array_equal(mine[1], theirs[1])


def test_one_source_is_a_data_set_of_its_own_whatever_its_weight(prose):
    data = prepare_all([f"{prose}:0.4"], "byte", 0)
    assert isinstance(data, TokenDataset)
    assert data.fingerprint == prepare_all(str(prose), "byte", 0).fingerprint
    assert data.epochs(window_count(len(data.splits["train"]), 16), 16) == 1


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_learned_tokenizer_is_learned_from_all_sources_once(prose, digits, kind, monkeypatch):
    mixed = prepare_all([str(prose), str(digits)], kind, 300)
    assert len({part.data.tokenizer.digest for part in mixed.parts}) == 1
    pieces = mixed.tokenizer.pieces
    learned = pieces if kind == "char" else pieces[256:]
    for alphabet in (b"0123456789", b"abcdefghijklmnopqrstuvwxyz"):
        assert any(piece in alphabet if kind == "char" else set(piece) <= set(alphabet) for piece in learned)
    monkeypatch.setattr(builder, "learn_or_find", None)
    again = prepare_all([str(prose), f"{digits}:2"], kind, 300)
    assert [part.data.folder for part in again.parts] == [part.data.folder for part in mixed.parts]
    assert again.fingerprint != mixed.fingerprint  # other weights, another run


def test_two_sources_with_different_tokenizers(prose, digits):
    datasets = [prepare_all(str(prose), "byte", 0), prepare_all(str(digits), "char", 0)]
    with pytest.raises(
        UserError, match=r"prose and digits have different tokenizers, byte of 257 ids .* char of 11 ids"
    ):
        Mixture(datasets, [1.0, 1.0], ["a", "b"])


def test_sources_of_one_name_are_called_as_they_were_given(prose, tmp_path):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "prose.txt"
    other.write_text("Another text. " * 300)
    mixed = prepare_all([str(prose), str(other)], "byte", 0)
    assert [part.name for part in mixed.parts] == [str(prose), str(other)]


def test_a_source_shorter_than_a_block(prose, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Only a few words here.")
    with pytest.raises(UserError, match=r"split of short has .* fewer than one block of 64"):
        prepare_all([str(prose), f"{short}:0.1"], "byte", 0).check(GPTConfig(vocab_size=257, block_size=64))


def test_a_damaged_source_is_never_trained_on(mixed):
    path = mixed.parts[1].data.folder / "train.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    found = [str(part.data.folder) for part in mixed.parts]
    damaged = mixture.open_folders(found, ["prose:0.7", "digits:0.3"])
    with pytest.raises(UserError, match=r"digits.* holds the token id 65535"):
        damaged.batch(0, 20, 16, 1)


def test_prepared_folders_are_opened_where_all_are_there(mixed, tmp_path):
    found = mixture.folders(mixed)
    again = mixture.open_folders(found, ["prose:0.7", "digits:0.3"])
    assert again.fingerprint == mixed.fingerprint
    assert mixture.open_folders(found[:1], ["prose:0.7", "digits:0.3"]) is None
    assert mixture.open_folders([found[0], str(tmp_path / "gone")], ["prose:0.7", "digits:0.3"]) is None


def test_what_a_mixture_says_of_itself(mixed):
    manifest = mixed.manifest
    assert manifest["name"] == "prose 0.7 + digits 0.3" and manifest["vocab_size"] == 257
    for split in ("train", "val"):
        total = sum(part.data.manifest["splits"][split]["tokens"] for part in mixed.parts)
        assert manifest["splits"][split]["tokens"] == total
