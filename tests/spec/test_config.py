"""GPTConfig, TrainConfig and presets."""

import dataclasses
import json

import pytest

from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_count
from twingpt.core.presets import PRESETS, SHAPES, preset


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_embd": 30}, "n_embd 30 is not divisible by n_head 4"),
        ({"n_kv_head": 3}, "n_head 4 is not divisible by n_kv_head 3"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
        ({"n_layer": -1}, "n_layer must be positive"),
        ({"block_size": 1}, "block_size must be at least 2"),
        ({"n_layer": 2.5}, "n_layer must be of type int, and is 2.5"),
        ({"norm_eps": float("nan")}, "norm_eps must be a finite number"),
        ({"rope_theta": float("inf")}, "rope_theta must be a finite number"),
        ({"rope_scaling": 5}, "rope_scaling must be a set of keys or nothing"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor must be a finite number"),
        ({"no_rope_layers": 5}, "no_rope_layers must be a list of layer numbers"),
        ({"no_rope_layers": [0.5]}, "no_rope_layers must be a list of layer numbers"),
        ({"qk_norm": 1}, "qk_norm must be of type bool"),
        ({"block_size": True}, "block_size must be of type int"),
        ({"dropout": 1.0}, "dropout must be in [0, 1)"),
        ({"position": "ropes"}, "Unknown position 'ropes': did you mean 'rope'?"),
        ({"norm": "rms"}, "Unknown norm 'rms'"),
        ({"mlp": "swigl"}, "did you mean 'swiglu'?"),
        ({"head_dim": 9}, "must be even"),
        ({"rope_fraction": 0.0}, "rope_fraction must be in (0, 1]"),
        ({"norm_bias": True}, "an RMSNorm has no bias"),
        ({"no_rope_layers": (4,)}, "no_rope_layers must be layers 0 to 3"),
        ({"position": "learned", "no_rope_layers": (0,)}, "need position='rope'"),
        ({"norm_placement": "before"}, "Unknown norm_placement 'before'"),
        ({"qk_norm": False, "qk_norm_whole": True}, "qk_norm_whole needs qk_norm"),
        ({"full_attention_layers": (0,)}, "need a sliding_window"),
        ({"local_rope_theta": 100.0}, "need a sliding_window"),
        ({"sliding_window": 4, "local_rope_theta": 100.0, "position": "none"}, "need position='rope'"),
        ({"sliding_window": 4, "full_attention_layers": (4,)}, "full_attention_layers must be layers 0 to 3"),
        ({"residual_scale": 0.0}, "residual_scale must be positive"),
        ({"logit_divisor": -1.0}, "logit_divisor must be positive"),
        ({"attn_scale": -0.1}, "attn_scale must be at least 0"),
        ({"sliding_window": -1}, "sliding_window must be at least 0"),
        ({"logit_softcap": -2.0}, "logit_softcap must be at least 0"),
        ({"rope_scaling": {"type": "lineal", "factor": 2.0}}, "did you mean 'linear'?"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "needs original_block_size"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be at least 1"),
        ({"rope_scaling": {"kind": "linear"}}, "Unknown rope_scaling key 'kind'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_block_size": 8, "attention_factor": 0.0}},
            "attention_factor must be positive",
        ),
        ({"n_heads": 4}, "Unknown model configuration key 'n_heads': did you mean 'n_head'?"),
    ],
)
def test_impossible_model(values, message):
    with pytest.raises(UserError) as error:
        GPTConfig.from_dict({"vocab_size": 64, "n_embd": 32, **values})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rte": 1.0}, "did you mean 'learning_rate'?"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"lr_schedule": "cosin"}, "did you mean 'cosine'?"),
        ({"dtype": "float8"}, "Unknown dtype 'float8'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, and is nan"),
        ({"min_lr": 1.0}, "min_lr 1.0 is larger"),
        ({"beta2": 1.0}, "must be below 1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"max_iters": 1.5}, "max_iters must be of type int"),
    ],
)
def test_impossible_training(values, message):
    with pytest.raises(UserError) as error:
        TrainConfig.from_dict(values)
    assert message in str(error.value)


def test_missing_key():
    with pytest.raises(UserError, match="incomplete"):
        GPTConfig.from_dict({"n_layer": 2})


def test_round_trip_through_json():
    scaling = {"type": "llama3", "factor": 8.0, "original_block_size": 64}
    config = GPTConfig(vocab_size=64, n_embd=32, no_rope_layers=(3, 1), rope_scaling=scaling)
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.no_rope_layers == (1, 3)
    train = TrainConfig(max_iters=7)
    assert TrainConfig.from_dict(json.loads(json.dumps(train.to_dict()))) == train


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig(vocab_size=8).n_layer = 2


@pytest.mark.parametrize(
    ("name", "vocab_size", "millions"),
    [("micro", 2048, 2), ("tiny", 4096, 11), ("small", 8192, 27), ("medium", 32768, 81), ("gpt2", 50257, 124.4),
     ("large", 50304, 350)],
)  # fmt: skip
def test_presets_have_the_size_they_say(name, vocab_size, millions):
    assert parameter_count(preset(name, vocab_size)) == pytest.approx(millions * 1e6, rel=0.12)


def test_gpt2_preset_is_gpt2():
    assert parameter_count(preset("gpt2", 50257)) == 124_439_808  # the size of GPT-2 small, positions included


def test_every_preset_takes_every_shape():
    for name in PRESETS:
        for shape in SHAPES:
            config = preset(name, 512, shape)
            assert all(getattr(config, key) == value for key, value in SHAPES[shape].items())


def test_unknown_preset_and_shape():
    with pytest.raises(UserError, match="did you mean 'medium'"):
        preset("medum", 64)
    with pytest.raises(UserError, match="did you mean 'qwen3'"):
        preset("tiny", 64, "qwen")


def test_new_width_drops_the_presets_head_ratio():
    assert preset("micro", 64, n_head=3, n_embd=96).n_kv_head == 3
