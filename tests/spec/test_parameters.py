"""The parameter table and initial values."""

import dataclasses

import numpy as np

from twingpt.core import reference
from twingpt.core.config import GPTConfig
from twingpt.core.parameters import initialise, optimizer_plan, parameter_table, state_table
from twingpt.core.presets import SHAPES

PINNED = (0.013133191503584385, 0.02449054643511772, 0.009753716178238392)
CONFIG = GPTConfig(vocab_size=200, block_size=16, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)


def test_names_and_shapes_are_llamas():
    table = parameter_table(CONFIG)
    assert table["model.embed_tokens.weight"].shape == (200, 64)
    assert table["model.layers.1.self_attn.k_proj.weight"].shape == (32, 64)
    assert table["model.layers.0.mlp.down_proj.weight"].shape == (64, CONFIG.n_inner)
    assert "lm_head.weight" not in table
    assert "lm_head.weight" in parameter_table(dataclasses.replace(CONFIG, tie_embeddings=False))


def test_weight_decay_leaves_norms_and_biases_alone():
    table = parameter_table(GPTConfig.from_dict({**CONFIG.to_dict(), **SHAPES["gpt2"], "n_kv_head": 4}))
    assert {name for name, row in table.items() if not row.decays} == {n for n in table if "norm" in n or "bias" in n}


def test_same_seed_same_bits_and_another_seed_others():
    first, again, other = (dict(initialise(CONFIG, seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_adding_a_layer_changes_no_other():
    small = dict(initialise(CONFIG, 1))
    wide = dict(initialise(dataclasses.replace(CONFIG, n_layer=4), 1))
    for name, array in small.items():  # residual projections keep their draw, and scale with the depth
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            np.testing.assert_allclose(wide[name] * np.sqrt(2), array, rtol=1e-5)
        else:
            assert np.array_equal(wide[name], array)


def test_initial_values_are_as_the_table_says():
    for name, array in initialise(CONFIG, 3):
        row = parameter_table(CONFIG)[name]
        assert array.shape == row.shape and array.dtype == np.float32
        if row.std is None:
            assert (array == row.fill).all()
        else:
            assert abs(array.mean()) < 5 * row.std / np.sqrt(array.size)
            np.testing.assert_allclose(array.std(), row.std, rtol=0.1)


def test_zero_init_makes_every_block_the_identity():
    config = dataclasses.replace(CONFIG, zero_init=True)
    params = dict(initialise(config, 1))
    assert not params["model.layers.0.mlp.down_proj.weight"].any()
    tokens = np.arange(10)[None]
    x = params["model.embed_tokens.weight"][tokens].astype(np.float64)
    head = params["model.embed_tokens.weight"].T
    expected = reference.rms_norm(x, 1.0, config.norm_eps) @ head
    np.testing.assert_allclose(reference.forward(params, tokens, config), expected, atol=1e-12)


def test_initial_bits_are_pinned():
    """A change of the stream would start every old seed from other weights."""
    weights = dict(initialise(CONFIG, 1337))["model.embed_tokens.weight"]
    np.testing.assert_array_equal(weights[0, :3], np.array(PINNED, np.float32))


def test_optimizer_state_has_two_moments_for_each_parameter():
    table, state = parameter_table(CONFIG), state_table(CONFIG, "adamw", "float32")
    assert len(state) == 2 * len(table)
    assert state["adamw.v.model.norm.weight"] == (64,)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    table, plan = parameter_table(CONFIG), optimizer_plan(CONFIG, "muon")
    matrices = {name for batch in plan.muon for name in batch}
    assert matrices == {name for name in table if ".layers." in name and "norm" not in name}
    assert matrices | set(plan.adamw) == set(table) and not matrices & set(plan.adamw)
    for batch in plan.muon:  # of one shape up to turning: w.up with w.down
        assert len({tuple(sorted(table[name].shape)) for name in batch}) == 1
    assert any({"up_proj", "down_proj"} <= {name.split(".")[-2] for name in batch} for batch in plan.muon)
    state = state_table(CONFIG, "muon", "float32")
    assert state["muon.momentum.model.layers.0.mlp.up_proj.weight"] == (CONFIG.n_inner, 64)
    assert len(state) == len(matrices) + 2 * len(plan.adamw)
