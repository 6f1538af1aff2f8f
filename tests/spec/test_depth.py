"""One dial: what a depth derives, for every depth and shape."""

import pytest

from twingpt.backends import registry
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_count
from twingpt.core.presets import PRESETS, SHAPES, preset
from twingpt.training import depth, recipes

CPU = registry.Device("cpu", "cpu", "", ("float32",), ("float32",), "float32", None)
DEPTHS = range(1, depth.DEEPEST + 1)


def resolve(vocab_size=2048, **options):
    return recipes.resolve(options, CPU, vocab_size)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab_size", [2, 257, 50257])
def test_every_depth_is_valid_and_more_depth_is_more_of_everything(shape, vocab_size):
    before = None
    for n in DEPTHS:
        config, train = resolve(vocab_size, depth=n, shape=shape)
        assert all(getattr(config, key) == value for key, value in SHAPES[shape].items())
        assert config.n_layer == n and config.n_embd == config.n_head * config.head_dim
        step = train.batch_size * train.gradient_accumulation_steps * config.block_size
        tokens, parameters = train.max_iters * step, parameter_count(config)
        assert tokens == pytest.approx(20 * parameters, rel=0.01)  # whole steps of Chinchilla's horizon
        assert step & (step - 1) == 0 and train.batch_size * config.block_size <= depth.MICRO_TOKENS
        now = (config.n_embd, config.n_head, config.head_dim, config.block_size, parameters, step, tokens)
        now += (-train.learning_rate, -train.min_lr)
        assert before is None or all(a <= b for a, b in zip(before, now, strict=True)), (n, before, now)
        before = now


def test_depth_4_is_micro_and_depth_12_is_gpt2():
    micro, four = preset("micro", 2048), resolve(depth=4)[0]
    assert (four.n_layer, four.n_embd, four.n_head) == (micro.n_layer, micro.n_embd, micro.n_head)
    assert parameter_count(four) == pytest.approx(parameter_count(micro), rel=0.1)
    twelve, _ = resolve(50257, depth=12, shape="gpt2")
    assert twelve == preset("gpt2", 50257)
    assert parameter_count(resolve(50257, depth=12)[0]) == pytest.approx(124.4e6, rel=0.01)
    assert resolve(depth=20)[0].n_embd == 1280  # nanochat's d20


def test_heads_have_fused_kernels_where_the_width_allows_four_of_them():
    widths = {n: resolve(depth=n)[0].head_dim for n in DEPTHS}
    assert [widths.pop(n) for n in range(1, 5)] == [16, 16, 32, 48]
    assert set(widths.values()) == {64}
    assert {name: preset(name, 2048).head_dim for name in PRESETS if name != "micro"} == dict.fromkeys(
        ("tiny", "small", "medium", "gpt2", "large"), 64
    )
    assert preset("micro", 2048).head_dim == 48  # README's first run and the golden runs are of it


def test_rates_follow_nanochat():
    rates = {n: resolve(depth=n)[1] for n in (4, 12, 20)}
    assert rates[12].learning_rate == 1.5e-3 and rates[4].learning_rate == 3e-3  # (192 / 768) ** -0.5 is 2
    assert rates[20].learning_rate == pytest.approx(1.5e-3 * (1280 / 768) ** -0.5, rel=0.005)
    assert {train.matrix_lr for train in rates.values()} == {0.02}
    assert {(train.optimizer, train.lr_schedule) for train in rates.values()} == {("muon", "wsd")}
    assert rates[4].min_lr == 3e-4


@pytest.mark.parametrize(
    "given",
    [
        {"n_layer": 3}, {"n_embd": 256}, {"n_head": 3}, {"head_dim": 32}, {"n_kv_head": 1}, {"block_size": 64},
        {"batch_size": 4}, {"gradient_accumulation_steps": 3}, {"max_iters": 7}, {"learning_rate": 1e-2},
        {"min_lr": 1e-5}, {"matrix_lr": 0.1}, {"optimizer": "adamw"}, {"lr_schedule": "cosine"}, {"warmup_iters": 5},
    ],
)  # fmt: skip
def test_what_is_given_replaces_what_is_derived(given):
    config, train = resolve(depth=4, **given)
    (key, value), values = *given.items(), config.to_dict() | train.to_dict()
    assert values[key] == value


def test_what_follows_from_a_given_value_follows_from_the_new_one():
    config, train = resolve(depth=4)
    step = train.batch_size * train.gradient_accumulation_steps * config.block_size
    for given in ({"batch_size": 8}, {"block_size": 128}, {"block_size": 128, "batch_size": 2}):
        other, small = resolve(depth=4, **given)
        assert small.batch_size * small.gradient_accumulation_steps * other.block_size == step
        assert small.max_iters == train.max_iters
    wide, train = resolve(depth=4, n_embd=768)
    assert wide.n_head == 12 and train.learning_rate == 1.5e-3 and train.max_iters == 9122
    assert resolve(depth=4, n_embd=768, head_dim=128)[0].n_head == 6
    assert resolve(depth=12, batch_size=16)[1].gradient_accumulation_steps == 8
    assert resolve(depth=2, learning_rate=1e-2)[1].min_lr == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be from 1 to 48, and is 0"),
        ({"depth": 49}, "depth must be from 1 to 48, and is 49"),
        ({"depth": 2.5}, "depth must be of type int"),
        ({"depth": 4, "preset": "tiny"}, "preset and depth both say how large"),
        ({"depth": 4, "n_embd": 0}, "n_embd must be positive"),
        ({"depth": 4, "n_embd": 999}, "n_embd 999 is not divisible by n_head 15"),
        ({"depth": 4, "head_dim": 0, "n_head": 0}, "n_head must be positive"),
        ({"depth": 4, "block_size": 0}, "block_size must be positive"),
        ({"depth": 4, "batch_size": 0}, "batch_size must be at least 1"),
        ({"depth": 4, "gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"depth": 4, "shape": "gpt3"}, "did you mean 'gpt2'?"),
        ({"depth": 4, "n_layers": 3}, "did you mean 'n_layer'?"),
    ],
)
def test_impossible_depths(options, message):
    with pytest.raises(UserError) as error:
        resolve(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_depth_in_words():
    config, train = resolve(50257, depth=12)
    assert depth.describe(12, config, train) == "depth 12: 123.6M parameters, 2.5B tokens, 18,853 steps"
