"""Settings from a file, flags and --set: layers, types, mistakes, and TOML there and back."""

import dataclasses
import json
import os
import runpy
from dataclasses import MISSING
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twingpt.backends import registry
from twingpt.core.config import KINDS, GPTConfig, RopeScaling, TrainConfig, coerce, settings_of, without_none
from twingpt.core.errors import UserError
from twingpt.core.presets import PRESETS, SHAPES, preset
from twingpt.core.reading import read_json
from twingpt.training import settings
from twingpt.training.recipes import FINE_TUNING, RECIPES
from twingpt.training.settings import FIELDS, TABLES, gather, read


def written(tmp_path, text: str) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(text)
    return path


def test_flat_keys_and_tables_are_the_same(tmp_path):
    flat = 'preset = "tiny"\nn_layer = 2\ndata = "a.txt"\nlearning_rate = 1\nbackend = "mlx"\ncompile = false\n'
    tables = (
        '[model]\npreset = "tiny"\nn_layer = 2\n[train]\ndata = "a.txt"\nlearning_rate = 1.0\n'
        '[run]\nbackend = "mlx"\ncompile = false\n'
    )
    expected = {
        "preset": "tiny", "n_layer": 2, "data": "a.txt", "learning_rate": 1.0, "backend": "mlx", "compile": False,
    }  # fmt: skip
    assert read(written(tmp_path, flat)) == expected == read(written(tmp_path, tables))
    assert isinstance(read(written(tmp_path, flat))["learning_rate"], float)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_line_ends_and_a_byte_order_mark(tmp_path, end):
    (tmp_path / "train.toml").write_bytes(f"\ufeff[model]{end}n_layer = 2{end}".encode())
    assert read(tmp_path / "train.toml") == {"n_layer": 2}
    (tmp_path / "a.json").write_bytes(f'\ufeff{{{end}"a": 1}}{end}'.encode())
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_every_field_of_both_configurations_is_a_setting():
    for config in (GPTConfig, TrainConfig):
        for field in dataclasses.fields(config):
            assert without_none(FIELDS[field.name].hint) in KINDS
    assert set(FIELDS) == {key for table in TABLES.values() for key in table}
    assert sum(map(len, TABLES.values())) == len(FIELDS)  # no key has two homes


@pytest.mark.parametrize("kind", [GPTConfig, TrainConfig, RopeScaling, settings.SizeSettings, settings.RunSettings])
def test_every_field_is_described(kind):
    for about in settings_of(kind).values():
        assert about.help and not about.help.endswith(".") and without_none(about.hint) in KINDS
        assert all(isinstance(choice, str) for choice in about.choices)
        if about.default not in (MISSING, None):
            assert coerce(about.name, about.hint, about.default) == about.default
            assert not about.choices or about.default in about.choices


def test_the_backends_are_those_there_are():
    assert set(FIELDS["backend"].choices) == {"auto", *registry.BACKENDS}


def test_an_integer_in_a_numbers_place_stays_as_it_is_written():
    config = GPTConfig.from_dict({"vocab_size": 9, "rope_theta": 1000000, "no_rope_layers": [2, 0]})
    assert type(config.rope_theta) is int and config.no_rope_layers == (0, 2)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert GPTConfig.from_dict(config.to_dict()) == config


def test_examples_are_what_set_takes():
    given = [f"{key}={example}" for key, about in FIELDS.items() for example in about.examples]
    assert len(given) >= 4
    gather(None, {}, given)


def test_a_default_that_a_recipe_or_preset_replaces_is_not_stated():
    for values in (*RECIPES.values(), FINE_TUNING, *PRESETS.values()):
        for key, value in values.items():
            assert FIELDS[key].derived or value == FIELDS[key].default


def test_the_page_of_settings_is_as_generated():
    docs = Path(__file__).parents[2] / "docs"
    page = runpy.run_path(str(docs / "settings.py"))["markdown"]()
    assert (docs / "settings.md").read_text("utf-8") == page, "python docs/settings.py writes it anew"
    for key, about in FIELDS.items():
        assert f"| `{key}` |" in page and about.sentence in page


def test_layers(tmp_path):
    path = written(tmp_path, 'n_layer = 2\nbatch_size = 3\nout = "runs/a"\nmax_iters = 5\n')
    values, names = gather(path, {"batch_size": 4, "max_iters": 6, "out": Path("runs/b")}, ["max_iters=7"])
    assert values == {"n_layer": 2, "batch_size": 4, "out": "runs/b", "max_iters": 7}
    assert names == {
        "n_layer": f"n_layer in {path}", "batch_size": "--batch-size", "out": "--out", "max_iters": "--set max_iters",
    }  # fmt: skip
    assert gather(None, {}, ["seed=1", "seed=2"])[0] == {"seed": 2}
    assert gather(None, {}, []) == ({}, {})


@pytest.mark.parametrize(
    ("file", "flags", "pairs", "expected"),
    [
        ('preset = "tiny"\nn_layer = 2\nseed = 1', {"depth": 4}, [], {"depth": 4, "seed": 1}),
        ("depth = 4\nn_head = 2\nseed = 1", {"preset": "tiny"}, [], {"preset": "tiny", "seed": 1}),
        ("depth = 4\nmax_iters = 9", {}, ["depth=6"], {"depth": 6}),
        ("depth = 4", {}, ["depth=6", "max_iters=3"], {"depth": 6, "max_iters": 3}),
        ('norm = "layernorm"\nn_layer = 2', {"shape": "llama"}, [], {"shape": "llama", "n_layer": 2}),
        ('norm = "rmsnorm"\nn_layer = 2', {"preset": "gpt2"}, [], {"preset": "gpt2"}),
        ('norm = "rmsnorm"\nn_layer = 2', {"preset": "tiny"}, [], {"norm": "rmsnorm", "preset": "tiny"}),
        ('backend = "torch"\ndevice = "cuda:0"', {"backend": "mlx"}, [], {"backend": "mlx"}),
        ("n_layer = 2\nblock_size = 64", {"n_layer": 3}, [], {"n_layer": 3, "block_size": 64}),
    ],
)
def test_what_decides_others_replaces_them_in_the_file(tmp_path, file, flags, pairs, expected):
    assert gather(written(tmp_path, file), flags, pairs)[0] == expected


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("n_layer=3", 3),
        ("n_layer = 1_000", 1000),
        ("learning_rate=3e-4", 3e-4),
        ("learning_rate=.5", 0.5),
        ("weight_decay=1", 1.0),
        ("qk_norm=False", False),
        ("compile=true", True),
        ("data=a=b c.txt", "a=b c.txt"),
        ("data=12", "12"),
        ("no_rope_layers=[0,2]", [0, 2]),
        ("no_rope_layers=[]", []),
        ("embedding_lr=none", None),
        ("embedding_lr=0.1", 0.1),
        ("rope_scaling=none", None),
        ("out=none", "none"),
        ("optimizer=none", "none"),  # text where nothing is no answer: the configuration refuses it
    ],
)
def test_values_of_set_are_read_by_type(pair, value):
    values, _ = gather(None, {}, [pair])
    assert values == {pair.split("=")[0].strip(): value}
    assert [type(item) for item in values.values()] == [type(value)]


def test_a_rope_scaling_is_a_table():
    scaling = gather(None, {}, ['rope_scaling={type="llama3", factor=8, original_block_size=64}'])[0]["rope_scaling"]
    assert scaling["type"] == "llama3" and scaling["factor"] == 8 and scaling["high_freq_factor"] == 4.0


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("n_layres=3", "--set: Unknown key 'n_layres': did you mean 'n_layer'?"),
        ("=3", "--set: Unknown key ''"),
        ("foo=1", f"--set: Unknown key 'foo': the nearest of {len(FIELDS)} is 'dropout'."),
        ("n_layer", "--set n_layer: write it as key=value"),
        ("n_layer=two", "--set: n_layer must be of type int, and is 'two'"),
        ("n_layer=2.5", "n_layer must be of type int, and is '2.5'"),
        ("n_layer=none", "n_layer must be of type int, and is 'none'"),
        ("n_layer=" + "9" * 5000, "n_layer must be of type int"),
        ("learning_rate=nan", "learning_rate must be a finite number, and is nan"),
        ("qk_norm=1", "qk_norm must be of type bool, and is '1'"),
        ("no_rope_layers=3", "no_rope_layers must be a list of layer numbers, and is 3"),
        ("no_rope_layers=[0", "no_rope_layers must be a list of layer numbers, and is '[0'"),
        ('no_rope_layers=["a"]', "no_rope_layers must be a list of layer numbers"),
        ("rope_scaling=5", "rope_scaling must be a set of keys or nothing, and is 5"),
        ('rope_scaling={kind="linear"}', "Unknown rope_scaling key 'kind'"),
        ('rope_scaling={type="linear"}', "The rope_scaling is incomplete: it lacks factor."),
        ("rope_scaling={type=1}", "The rope_scaling is incomplete: it lacks factor."),
        ("rope_scaling={beta_fast=1}", "The rope_scaling is incomplete: it lacks type and factor."),
    ],
)
def test_mistakes_of_set(pair, message):
    with pytest.raises(UserError) as error:
        gather(None, {}, [pair])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_leyer = 2", "train.toml: Unknown key 'n_leyer': did you mean 'n_layer'?"),
        ("[model]\nn_leyer = 2", "train.toml: Unknown key 'n_leyer'"),
        ("[modle]\nn_layer = 2", "train.toml: Unknown table 'modle': did you mean 'model'?"),
        ('[model]\nn_layer = "2"', "train.toml: n_layer must be of type int, and is '2'"),
        ("n_layer = 2.0", "train.toml: n_layer must be of type int, and is 2.0"),
        ("n_layer = true", "train.toml: n_layer must be of type int, and is True"),
        ("learning_rate = inf", "train.toml: learning_rate must be a finite number"),
        ("data = 1979-05-27", "train.toml: data must be of type str"),
        ("[train.optimizer]\nname = 1", "train.toml: optimizer must be of type str"),
        ("embedding_lr = 'no'", "train.toml: embedding_lr must be a finite number, and is 'no'"),
        ("[train]\nn_layer = 2", "train.toml: n_layer belongs in [model], and is in [train]"),
        ("[model]\nvocab_size = 2", "train.toml: vocab_size belongs in [train], and is in [model]"),
        ("n_layer = 2\n[model]\nn_layer = 3", "train.toml: n_layer is given twice"),
        ("run = 3", "train.toml: run must be a table, [run], and is 3"),
        ("n_layer = 2\nn_layer = 3\n", "train.toml is not TOML: Cannot overwrite a value (at line 2"),
        ("n_layer = 2\n[train\n", "train.toml is not TOML: Expected ']' at the end of a table declaration (at line 2"),
        ("n_layer = 2\ndata = '", "(at the end, line 2)"),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(UserError) as error:
        read(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    for path, message in ((tmp_path / "no.toml", "There is no file"), (tmp_path, "is a folder: give the TOML file")):
        with pytest.raises(UserError, match=message):
            read(path)
    (tmp_path / "bad.toml").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8 text: byte 0"):
        read(tmp_path / "bad.toml")
    with pytest.raises(UserError, match=r"can't be written: No such file"):
        settings.write(tmp_path / "no" / "x.toml", {}, "")


@pytest.mark.parametrize(
    ("flags", "pairs", "message"),
    [
        ({"preset": "tiny", "depth": 4}, [], "--preset and --depth both say how large the model is: leave one out"),
        ({"preset": "tiny"}, ["depth=4"], "--preset and --set depth both say"),
    ],
)
def test_preset_and_depth_together(flags, pairs, message):
    with pytest.raises(UserError, match=message):
        gather(None, flags, pairs)


@pytest.mark.parametrize("key", ["data", "init_from", "tokenizer"])
def test_a_name_that_no_file_can_keep(key):
    name = os.fsdecode(b"n\xff.txt")
    with pytest.raises(UserError, match=f"{key} is .*, whose bytes are not UTF-8"):
        gather(None, {key: name}, [])
    with pytest.raises(UserError, match=r"data is .*, whose bytes are not UTF-8"):
        gather(None, {"data": ["a.txt", name]}, [])
    assert gather(None, {"out": Path(name)}, [])[0] == {"out": name}


def test_preset_and_depth_together_in_a_file(tmp_path):
    with pytest.raises(UserError, match=r"preset in .* and depth in .* both say"):
        gather(written(tmp_path, 'preset = "tiny"\ndepth = 4'), {}, [])


SCALINGS = st.none() | st.builds(
    lambda factor, size: {"type": "llama3", "factor": factor, "original_block_size": size},
    st.floats(1, 64), st.integers(1, 999),
)  # fmt: skip
RATES = st.floats(0, 1e3, allow_subnormal=False)


@given(
    name=st.sampled_from(sorted(PRESETS)),
    shape=st.sampled_from(["qwen3", "llama", "nano"]),
    model=st.fixed_dictionaries(
        {"no_rope_layers": st.lists(st.integers(0, 3), unique=True), "rope_scaling": SCALINGS,
         "n_inner": st.sampled_from([0, 96]), "head_dim": st.sampled_from([0, 64]), "norm_eps": st.floats(1e-9, 1)}
    ),
    train=st.fixed_dictionaries(
        {"data": st.text(st.characters(exclude_categories=["Cs"])), "embedding_lr": st.none() | RATES,
         "weight_decay": RATES, "decay_weight_decay": st.booleans(), "max_iters": st.integers(1, 10**9)}
    ),
)  # fmt: skip
def test_what_is_written_reads_back_as_the_same_run(tmp_path_factory, name, shape, model, train):
    config, training = preset(name, 256, shape, **model), TrainConfig(**train)
    path = tmp_path_factory.getbasetemp() / "there-and-back.toml"
    settings.write(path, settings.spelled_out(config, training), "a comment")
    values = read(path)
    again = {key: value for key, value in values.items() if key in settings.MODEL_FIELDS}
    assert preset("micro", 256, **again) == config
    assert TrainConfig.from_dict({key: value for key, value in values.items() if key not in again}) == training


def test_every_shape_is_spelled_out():
    for shape in SHAPES:
        config = preset("small", 256, shape)
        assert set(SHAPES[shape]) <= set(settings.spelled_out(config, TrainConfig()))


def test_a_line_of_settings_is_what_set_takes():
    given = ["no_rope_layers=[0, 2]", "qk_norm=false", "embedding_lr=none", "data=a b.txt", "n_layer=3"]
    given.append('rope_scaling={type="linear", factor=2.0}')
    values, _ = gather(None, {}, given)
    line = settings.as_pairs(values)
    assert line == (
        "'no_rope_layers=[0, 2]' qk_norm=false embedding_lr=none 'data=a b.txt' n_layer=3 "
        "'rope_scaling={type=\"linear\", factor=2.0}'"
    )
