"""Both twins against the float64 reference and against each other, over a family of configurations."""

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import dose, within
from twingpt.backends.kv_layout import bucket
from twingpt.core import reference
from twingpt.core.config import MLPS, NORM_SITES, GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise, state_table
from twingpt.core.presets import SHAPES
from twingpt.core.sampler import Sampling, SamplingRows, sample
from twingpt.core.schedule import hyperparameters

SMALL = {"vocab_size": 97, "block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 32, "init_std": 0.15}
GREEDY = Sampling(temp=0)

MATRIX = {
    "qwen3": {"n_kv_head": 2},
    "gpt2": SHAPES["gpt2"],
    "llama, one kv head": {**SHAPES["llama"], "n_kv_head": 1},
    "head of 40": {"head_dim": 40, "n_kv_head": 2},
    "head of 80": {"head_dim": 80, "n_head": 2},
    "head of 64, three queries a key": {"head_dim": 64, "n_head": 6, "n_kv_head": 2, "n_embd": 36},
    "all biases": {"qkv_bias": True, "attn_out_bias": True, "mlp_bias": True, "norm": "layernorm", "norm_bias": True},
    "qkv bias only": {"qkv_bias": True, "qk_norm": False},
    "layernorm without bias": {"norm": "layernorm"},
    "attention softcap": {"attn_softcap": 3.0, "n_kv_head": 2},
    "logit softcap": {"logit_softcap": 2.0},
    "window": {"sliding_window": 5, "n_kv_head": 2},
    "window of one": {"sliding_window": 1},
    "window and softcap": {"sliding_window": 7, "attn_softcap": 4.0, "n_kv_head": 1},
    "learned positions": {"position": "learned"},
    "no positions": {"position": "none"},
    "rope on some layers": {"no_rope_layers": (1,)},
    "partial rope": {"rope_fraction": 0.5},
    "large theta": {"rope_theta": 1e6},
    "linear scaling": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama3 scaling": {"rope_scaling": {"type": "llama3", "factor": 4.0, "original_block_size": 8}},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_block_size": 8}, "head_dim": 32},
    "yarn, partial": {
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_block_size": 8, "attention_factor": 1.3},
        "rope_fraction": 0.5,
        "head_dim": 32,
    },
    "untied": {"tie_embeddings": False},
    "nano": SHAPES["nano"] | {"zero_init": False},
    "norm after the embedding": {"embed_norm": True},
    "smear": {"smear": True},
    "smear of positions": {"smear": True, "embed_norm": True, "position": "learned"},
    "layernorm after the embedding": {"embed_norm": True, "norm": "layernorm", "norm_bias": True},
    "norms after": {"norm_placement": "post", "n_kv_head": 2},
    "norms on both sides": {"norm_placement": "both"},
    "layernorms on both sides": {"norm_placement": "both", "norm": "layernorm", "norm_bias": True},
    "norm offset": {"norm_offset": True, "init_std": 0.2},
    "layernorm with offset": {"norm_offset": True, "norm": "layernorm", "embed_norm": True},
    "parallel residual": {"parallel_residual": True},
    "qk norm over all heads": {"qk_norm_whole": True, "n_kv_head": 2},
    "window on some layers": {"sliding_window": 5, "full_attention_layers": (1,)},
    "two thetas": {
        "sliding_window": 7,
        "full_attention_layers": (1,),
        "local_rope_theta": 100.0,
        "rope_scaling": {"type": "linear", "factor": 8.0},
    },
    "scales": {"embed_scale": 6.0, "residual_scale": 0.3, "attn_scale": 0.2, "logit_divisor": 7.0},
    "scale and softcaps": {"attn_scale": 0.5, "attn_softcap": 3.0, "logit_divisor": 0.25, "logit_softcap": 2.0},
    "dropout": {"dropout": 0.3},
    **{f"mlp {mlp}": {"mlp": mlp} for mlp in MLPS},
}


def config_of(switches) -> GPTConfig:
    return GPTConfig.from_dict({**SMALL, **switches})


def batch(config, B, T, seed=0):
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (B, T + 1))
    return tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)


def relative(a, b) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def assert_logits_agree(config, twins, B, T):
    params = dict(initialise(config, 1))
    tokens, _ = batch(config, B, T)
    expected = reference.forward(params, tokens, config)
    for engines in twins:
        logits = engines.InferenceEngine(config, params.items(), engines.device).forward(tokens)
        assert logits.shape == (B, T, config.vocab_size) and logits.dtype == np.float32
        assert relative(logits, expected) <= engines.within(1e-5, T), engines


def gradients(engines, config, params, tokens, targets):
    engine = engines.TrainEngine(config, engines.device)
    engine.load(params.items())
    engine.forward_backward(tokens, targets, np.arange(len(tokens)))
    return {name: np.array(g.tolist(), np.float32) for name, g in engine.gradients().items()}


def assert_gradients_agree(config, twins, B, T, floor=1e-6):
    """To 2e-5 of each tensor's largest entry; below `floor` of the model's largest, to 2e-5 of that floor."""
    params = dict(initialise(config, 1))
    tokens, targets = batch(config, B, T)
    ours, theirs = (gradients(engines, config, params, tokens, targets) for engines in twins)
    largest, limit = max(np.abs(g).max() for g in theirs.values()), within(2e-5, *twins, length=T)
    for name, g in theirs.items():
        scale = np.abs(g).max()
        # A gradient that is 0 but for rounding (one key to attend to, a key bias without RoPE): by the largest.
        scale = max(scale, floor * largest) if scale > 1e-6 * largest else largest
        assert np.abs(ours[name] - g).max() <= limit * scale, name


def assert_cached_decoding_agrees(config, twins, B, T):
    params = dict(initialise(config, 1))
    tokens, _ = batch(config, B, T)
    for engines in twins:
        engine = engines.InferenceEngine(config, params.items(), engines.device)
        full = engine.forward(tokens)
        # Feed the text itself: a prompt of every length ends in the same logits as the full pass.
        cache = engine.new_cache(1, 4)
        for length in {1, T // 2 or 1, T}:
            cache.trim(0, cache.lengths[0])
            logits = engine.logits(engine.prefill(cache, 0, tokens[0, :length]))
            assert relative(logits, full[:1, length - 1]) <= engines.within(1e-5, T)
        # And greedy steps on the cache equal the full pass over what they wrote, whatever the rows' lengths.
        for lengths in ([1] * B, [1 + row * (T // 2) // B for row in range(B)]):
            texts = [tokens[row, :length] for row, length in enumerate(lengths)]
            assert_steps_agree(engine, texts, min(T // 2, 12), engines.within(1e-5, T))


def assert_steps_agree(engine, texts, n_steps, limit):
    """Greedy steps of a batch give what the full pass gives for each row by itself; after copies and trims too."""
    B = len(texts)
    cache, texts = engine.new_cache(B + 1, 4), list(texts)
    for row, text in enumerate(texts):
        engine.prefill(cache, row, text)

    def decode(n):
        for _ in range(n):
            handle = engine.step(cache, SamplingRows([GREEDY] * B), np.zeros(B))
            sampled = engine.read(handle)
            for row, (token, log_prob) in enumerate(zip(sampled.tokens, sampled.log_probs, strict=True)):
                before = engine.forward(texts[row][None])[0, -1].astype(np.float64)
                assert abs(log_prob - (before[token] - np.log(np.exp(before).sum()))) <= limit
                texts[row] = np.append(texts[row], token)
                expected = engine.forward(texts[row][None])[0, -1]
                assert relative(engine.logits(handle)[row], expected) <= limit, engine.device
            assert cache.lengths[:B].tolist() == [len(text) for text in texts]

    decode((n_steps + 1) // 2)
    cache.copy(B - 1, B)  # the last row leaves and comes back in the first one's place, a token shorter
    cache.copy(B, 0)
    texts[0] = texts[-1]
    if len(texts[0]) > 1:
        cache.trim(0, 2)
        texts[0] = texts[0][:-1]
        engine.prefill(cache, 0, texts[0][-1:])
    decode(n_steps // 2)


@pytest.mark.parametrize("switches", MATRIX.values(), ids=MATRIX)
def test_logits(switches, twins):
    config = config_of(switches)
    for B, T in ((1, 1), (3, 1), (1, config.block_size), (2, config.block_size), (2, 7)):
        assert_logits_agree(config, twins, B, T)


@pytest.mark.parametrize("switches", MATRIX.values(), ids=MATRIX)
def test_gradients(switches, twins):
    config = config_of(switches)
    for B, T in ((2, config.block_size), (1, 1)):
        assert_gradients_agree(config, twins, B, T)


@pytest.mark.parametrize("switches", MATRIX.values(), ids=MATRIX)
def test_cached_decoding(switches, twins):
    config = config_of(switches)
    for B in (1, 3):
        assert_cached_decoding_agrees(config, twins, B, config.block_size)


@st.composite
def configs(draw):
    position = draw(st.sampled_from(["rope", "rope", "learned", "none"]))
    norm = draw(st.sampled_from(["rmsnorm", "layernorm"]))
    kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    head_dim = draw(st.sampled_from([8, 12, 20, 40, 64, 80]))
    return GPTConfig(
        vocab_size=draw(st.integers(17, 130)),
        block_size=draw(st.integers(2, 33)),
        n_layer=draw(st.integers(1, 3)),
        n_head=kv * group,
        n_kv_head=kv,
        head_dim=head_dim,
        n_embd=draw(st.integers(16, 48)),
        n_inner=draw(st.integers(8, 70)),
        position=position,
        rope_fraction=draw(st.sampled_from([1.0, 0.5])) if position == "rope" else 1.0,
        rope_theta=draw(st.sampled_from([100.0, 10000.0, 500000.0])),
        norm=norm,
        norm_bias=norm == "layernorm" and draw(st.booleans()),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        mlp=draw(st.sampled_from(MLPS)),
        mlp_bias=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        attn_out_bias=draw(st.booleans()),
        norm_placement=draw(st.sampled_from(["pre", "pre", *NORM_SITES])),
        norm_offset=draw(st.booleans()),
        parallel_residual=draw(st.booleans()),
        qk_norm=(qk_norm := draw(st.booleans())),
        qk_norm_whole=qk_norm and draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        embed_norm=draw(st.booleans()),
        smear=draw(st.booleans()),
        attn_softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
        logit_softcap=draw(st.sampled_from([0.0, 10.0])),
        sliding_window=draw(st.sampled_from([0, 0, 3, 16])),
        init_std=0.15,
    )


@pytest.mark.parametrize("examples", dose(15, 100))
def test_any_configuration(examples, twins):
    @given(config=configs(), B=st.integers(1, 3), data=st.data())
    @settings(max_examples=examples)
    def agree(config, B, data):
        T = data.draw(st.integers(1, config.block_size))
        assert_logits_agree(config, twins, B, T)
        # In models this narrow some gradients cancel almost to nothing: 2e-5 of a thousandth of the largest
        # is still less than float32 resolves of that one.
        assert_gradients_agree(config, twins, B, T, floor=1e-3)
        assert_cached_decoding_agrees(config, twins, B, T)

    agree()


def test_long_context_keeps_its_precision(twins):
    assert_logits_agree(config_of({"block_size": 1024, "n_kv_head": 2}), twins, 1, 1024)


@pytest.mark.parametrize("length", [24, 256, 1024, 4096])
def test_rope_by_length(engines, length):
    """On Metal MLX's angles are exact and their sines fast, so that the error grows with the position."""
    config = config_of({"block_size": length})
    x = np.random.default_rng(0).normal(size=(1, 4, length, 8)).astype(np.float32)
    model, device = (import_module(f"twingpt.backends.{engines.NAME}.{name}") for name in ("model", "device"))
    place = [] if engines.NAME == "mlx" else [engines.device]
    with engines.stream():
        rope = model.Rope(config, *(each.name for each in place))
        y = device.to_numpy(rope(device.to_device(x, *place), 0, local=False))
    assert relative(y, reference.rope(x.astype(np.float64), config)) <= engines.within(1e-6, length)


def test_a_context_longer_than_any_memory_costs_nothing_until_it_is_used(engines):
    """As a foreign config.json may claim; the tables of the longer one start short, and grow to the same bits."""
    switches = {"n_layer": 1, "sliding_window": 8, "local_rope_theta": 50.0}
    endless, plain = (config_of({**switches, "block_size": size}) for size in (10**12, 4224))
    tokens, _ = batch(plain, 1, 4200)
    engine, other = (engines.InferenceEngine(c, initialise(c, 1), engines.device) for c in (endless, plain))
    for n in (20, 4200):
        ours, theirs = (e.logits(e.prefill(e.new_cache(1, 16), 0, tokens[0, :n])) for e in (engine, other))
        assert relative(ours, theirs) <= engines.within(0, n)


def test_trimming_the_cache_goes_back(engines):
    config = config_of({"n_kv_head": 2})
    engine = engines.InferenceEngine(config, initialise(config, 1), engines.device)
    tokens, _ = batch(config, 1, 12)
    cache, greedy = engine.new_cache(2, 16), SamplingRows([GREEDY])
    engine.prefill(cache, 0, tokens[0])
    once, _ = (engine.step(cache, greedy, np.zeros(1)) for _ in range(2))
    cache.trim(0, 3)
    with pytest.raises(UserError, match="Row 0 of the KV cache has no logits to sample from: prefill it first"):
        engine.step(cache, greedy, np.zeros(1))
    engine.prefill(cache, 0, tokens[0, -1:])
    again = engine.step(cache, greedy, np.zeros(1))
    assert np.array_equal(engine.read(once).tokens, engine.read(again).tokens)
    assert relative(engine.logits(again), engine.logits(once)) <= engines.within(1e-6)
    with pytest.raises(UserError, match="Row 0 of the KV cache has 13 positions: 14 can't be trimmed"):
        cache.trim(0, 14)
    with pytest.raises(UserError, match="Row 1 of the KV cache has no logits"):
        engine.step(cache, SamplingRows([GREEDY] * 2), np.zeros(2))


def test_a_row_takes_no_more_than_the_context(engines):
    config = config_of({"block_size": 16})
    engine = engines.InferenceEngine(config, initialise(config, 1), engines.device)
    tokens, _ = batch(config, 1, 16)
    cache = engine.new_cache(1, 4)
    engine.prefill(cache, 0, tokens[0])
    for call in (
        lambda: engine.prefill(cache, 0, tokens[0, :1]),
        lambda: engine.step(cache, SamplingRows([GREEDY]), np.zeros(1)),
    ):
        with pytest.raises(UserError, match="17 positions of the KV cache are more than the model's block_size 16"):
            call()
    assert cache.lengths.tolist() == [16]


WINDOWED = {
    "every layer": {"sliding_window": 5, "n_kv_head": 2},
    "one layer of six is full, as in Gemma 3": {
        "n_layer": 6,
        "sliding_window": 4,
        "full_attention_layers": (5,),
        "local_rope_theta": 100.0,
        "n_kv_head": 1,
    },
    "one token": {"sliding_window": 1},
    "two tokens and a softcap": {"sliding_window": 2, "attn_softcap": 4.0, "n_kv_head": 2},
    "learned positions and smear": {"sliding_window": 7, "position": "learned", "smear": True},
    "the whole context": {"sliding_window": 40},
    "more than the context": {"sliding_window": 41},
}


@pytest.mark.parametrize("switches", WINDOWED.values(), ids=WINDOWED)
def test_decoding_past_a_window(switches, engines):
    """By tokens and by chunks narrower than, as wide as and wider than the window; after trims and copies; by steps of
    rows that hold less than the window, all of it and more."""
    config = config_of({**switches, "block_size": 40})
    engine = engines.InferenceEngine(config, initialise(config, 1), engines.device)
    tokens, _ = batch(config, 1, 40)
    full, window = engine.forward(tokens)[0], min(config.sliding_window, 12)
    cache = engine.new_cache(3, 4)

    def feed(row, chunks):
        for n in chunks:
            start = int(cache.lengths[row])
            end = min(start + n, config.block_size)
            if end > start:
                logits = engine.logits(engine.prefill(cache, row, tokens[0, start:end]))
                assert relative(logits[0], full[end - 1]) <= engines.within(1e-5), (row, start, end)

    feed(0, [1] * 40)
    feed(1, [window - 1, window, window + 1, 1, 2, 1, 2 * window, 1, 40])
    for left in (2 * window + 3, window + 1, window, window - 1):
        cache.trim(1, cache.lengths[1] - left)
        cache.copy(1, 2)
        feed(2, [1, 3, 1])
        feed(1, [2, 1])
    for lengths in ([2 * window] * 2, [1, window, window + 1], [max(1, window - 1), 2 * window + 3]):
        assert_steps_agree(engine, [tokens[0, :n] for n in lengths], 7, engines.within(1e-5))


def test_a_layer_with_a_window_is_handed_the_keys_that_it_shows(engines, monkeypatch):
    """And one token of rows with equal lengths no mask, in any layer."""
    config = config_of({"sliding_window": 8, "full_attention_layers": (1,), "block_size": 64})
    engine = engines.InferenceEngine(config, initialise(config, 1), engines.device)
    slots = import_module(f"twingpt.backends.{engines.NAME}.kv_cache").CacheSlots
    update, advance = slots.update, slots.advance
    keys, masks = {}, {}

    def updated(self, layer, *args):
        k, v = update(self, layer, *args)
        keys[layer] = k.shape[2]
        assert k.shape == v.shape
        return k, v

    def advanced(self):
        masks.update({window: getattr(mask, "shape", mask) for window, mask in self.masks.items()})
        advance(self)

    monkeypatch.setattr(slots, "update", updated)
    monkeypatch.setattr(slots, "advance", advanced)
    cache, tokens = engine.new_cache(3, 16), batch(config, 1, 64)[0][0]

    def handed(call):
        keys.clear()
        masks.clear()
        call()
        return keys[0], keys[1], masks[8], masks[0]

    def step(rows):
        return handed(lambda: engine.step(cache, SamplingRows([GREEDY] * rows), np.zeros(rows)))

    assert handed(lambda: engine.prefill(cache, 0, tokens[:8]))[:3] == (8, 8, "causal")
    assert step(1) == (8, 9, None, None)
    narrow, wide, mask, _ = handed(lambda: engine.prefill(cache, 0, tokens[9:30]))  # a chunk: 21 tokens and 7 before
    assert (narrow, wide, mask) == (28, 30, (21, 28))
    assert step(1) == (8, 31, None, None)
    cache.copy(0, 1)
    assert step(2) == (8, 32, None, None)
    cache.copy(0, 2)
    cache.trim(1, 5)
    engine.prefill(cache, 1, tokens[:1])
    assert step(3) == (12, 33, (3, 1, 1, 12), (3, 1, 1, 33))  # rows of 33, 29 and 33: from what the shortest one sees
    engine.prefill(cache, 1, tokens[:4])
    assert step(3) == (8, 34, None, None)
    cache.trim(0, 30)  # a row that its window shows whole: the others hand out all
    engine.prefill(cache, 0, tokens[:1])
    assert step(3) == (35, 35, (3, 1, 1, 35), (3, 1, 1, 35))


def test_a_long_prompt_is_taken_in_chunks(engines):
    config = config_of({"block_size": 1200, "n_kv_head": 2, "sliding_window": 300})
    engine = engines.InferenceEngine(config, initialise(config, 1), engines.device)
    tokens, _ = batch(config, 1, 1100)
    expected = engine.forward(tokens)[:, -1]
    limit = engines.within(1e-5, 1100)
    assert relative(engine.logits(engine.prefill(engine.new_cache(1, 256), 0, tokens[0])), expected) <= limit
    cache = engine.new_cache(2, 256)  # and by the caller's own chunks, beside another row
    engine.prefill(cache, 0, tokens[0, :700])
    engine.prefill(cache, 1, tokens[0, 300:500])
    assert relative(engine.logits(engine.prefill(cache, 0, tokens[0, 700:])), expected) <= limit


def test_repetition_penalty_remembers_the_prompt_and_what_was_written(engines):
    config = config_of({})
    engine = engines.InferenceEngine(config, initialise(config, 1), engines.device)
    cache, written = engine.new_cache(2, 16), [[5, 6, 7], [8, 9]]
    sampling = SamplingRows([Sampling(temp=0, repetition_penalty=penalty) for penalty in (100.0, 1.0)])

    def decode():
        for _ in range(10):
            sampled = engine.read(engine.step(cache, sampling, np.zeros(2)))
            for row, token in enumerate(sampled.tokens):
                written[row].append(int(token))

    for row, text in enumerate(written):
        engine.prefill(cache, row, np.array(text))
    decode()
    assert len(set(written[0])) == len(written[0])
    assert len(set(written[1])) < len(written[1])  # the other row may repeat itself
    whole = written[0][:]
    cache.trim(0, 10)  # and what was trimmed is no repetition
    engine.prefill(cache, 0, np.array(whole[3:4]))
    cache.copy(0, 1)
    written[0] = whole[:4]
    sampling = SamplingRows([Sampling(temp=0, repetition_penalty=100.0)] * 2)
    decode()
    assert written[0][:13] == whole


def test_a_row_keeps_nothing_of_the_text_before_and_a_handle_its_logits(engines):
    config = config_of({"tie_embeddings": False})
    params = dict(initialise(config, 1))
    params["model.embed_tokens.weight"][96] = np.inf
    engine = engines.InferenceEngine(config, params.items(), engines.device)
    cache = engine.new_cache(2, 4)
    with ThreadPoolExecutor(1) as pool:  # a cache that one thread made, and another fills
        pool.submit(engine.prefill, cache, 0, np.arange(12)).result()
    engine.prefill(cache, 1, np.full(10, 96))
    cache.trim(1, 10)
    engine.prefill(cache, 1, np.array([1, 2]))
    both = engine.step(cache, SamplingRows([GREEDY] * 2), np.zeros(2))
    kept = engine.logits(both)
    assert np.isfinite(kept).all()
    one = engine.step(cache, SamplingRows([GREEDY]), np.zeros(1))
    cache.copy(1, 0)
    assert np.array_equal(engine.logits(both), kept) and np.isfinite(engine.logits(one)).all()
    with pytest.raises(UserError, match="The KV cache has 2 rows, and 3 are to be decoded"):
        engine.step(cache, SamplingRows([GREEDY] * 3), np.zeros(3))


def test_threads_extend_the_tables_of_rope_together(twins, monkeypatch):
    torch_engines = twins[1]
    inference = import_module("twingpt.backends.torch.inference")
    monkeypatch.setattr(inference, "ROPE_POSITIONS", 8)
    config = config_of({"block_size": 128})
    long, short = (np.arange(n)[None] % 97 for n in (100, 12))
    for _ in range(20):
        engine = torch_engines.InferenceEngine(config, initialise(config, 1), torch_engines.device)
        with ThreadPoolExecutor(2) as pool:
            for found in [pool.submit(engine.forward, tokens) for tokens in (long, short)]:
                assert np.isfinite(found.result()).all()
        assert engine.rope.length >= 100 == min(100, len(engine.rope.tables[False][0]))


def test_rows_are_sampled_by_settings_of_their_own(twins):
    config = config_of({"n_kv_head": 2})
    params = dict(initialise(config, 1))
    tokens, _ = batch(config, 4, 9)
    settings = [GREEDY, Sampling(temp=1.0, top_p=0.5), Sampling(top_k=3, repetition_penalty=2.0), Sampling(min_p=0.2)]
    prompts = [tokens[row, : 3 + 2 * row] for row in range(4)]
    u = np.random.default_rng(0).random((6, 4))
    texts = []
    for engines in twins:
        engine = engines.InferenceEngine(config, params.items(), engines.device)
        together, alone = engine.new_cache(4, 4), [engine.new_cache(1, 4) for _ in settings]
        for row, prompt in enumerate(prompts):
            engine.prefill(together, row, prompt)
            engine.prefill(alone[row], 0, prompt)
        for drawn in u:
            both = engine.read(engine.step(together, SamplingRows(settings), drawn)).tokens.tolist()
            each = [
                engine.read(engine.step(alone[row], SamplingRows([settings[row]]), drawn[row : row + 1])).tokens[0]
                for row in range(4)
            ]
            assert both == each
            texts.append(both)
    assert texts[:6] == texts[6:]


def test_steps_sample_as_the_spec_does_from_their_logits(engines):
    """With all settings, in rows of other lengths, after a row was trimmed and after one was copied."""
    config = config_of({"vocab_size": 1500})  # a CPU ranks a part of it
    engine = engines.InferenceEngine(config, initialise(config, 1), engines.device)
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 2, "frequency_penalty": 0.9}
    settings = [
        Sampling(temp=0, frequency_penalty=-2), Sampling(**penalties, logit_bias={3: 4, 1499: 4}, min_p=0.1),
        Sampling(presence_penalty=-2, top_k=9), Sampling(temp=0, **penalties),
    ]  # fmt: skip
    texts, n_prompt = [[1, 2, 3, 3], [7], [5, 6, 5, 6, 5], [3] * 6], [4, 1, 3, 0]
    cache, random = engine.new_cache(4, 8), np.random.default_rng(0)
    logits = np.concatenate([engine.logits(engine.prefill(cache, row, np.array(t))) for row, t in enumerate(texts)])

    def decode(n):
        nonlocal logits
        for u in random.random((n, 4)):
            expected = [sample(logits[row], settings[row], u[row], texts[row], n_prompt[row]) for row in range(4)]
            handle = engine.step(cache, SamplingRows(settings, n_prompt), u, log_probs=2)
            sampled, log_p = engine.read(handle), logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            assert sampled.tokens.tolist() == expected
            np.testing.assert_allclose(sampled.log_probs, log_p[range(4), expected], atol=engines.within(1e-5))
            np.testing.assert_allclose(sampled.top, -np.sort(-log_p)[:, :2], atol=engines.within(1e-5))
            assert sampled.top_ids.tolist() == np.argsort(-log_p)[:, :2].tolist()
            logits = engine.logits(handle)
            for text, token in zip(texts, expected, strict=True):
                text.append(token)

    decode(8)
    cache.trim(1, 6)
    texts[1] = [*texts[1][:-6], 9]
    logits[1] = engine.logits(engine.prefill(cache, 1, np.array([9])))
    cache.copy(3, 2)
    texts[2], n_prompt[2], logits[2] = [*texts[3]], n_prompt[3], logits[3]
    decode(8)
    assert len(set(texts[0][4:])) < 4 < len(set(texts[3][6:]))  # one is to repeat itself, and the other not


def test_one_adamw_step_from_the_same_gradients(twins):
    """Against each other, and against torch.optim.AdamW on the same clipped gradients."""
    config = config_of({"n_kv_head": 2})
    rng = np.random.default_rng(0)
    params = dict(initialise(config, 1))
    grads = {name: rng.normal(0, 0.1, p.shape).astype(np.float32) for name, p in params.items()}
    moments = {f"adamw.m.{n}": rng.normal(0, 0.1, p.shape).astype(np.float32) for n, p in params.items()}
    moments |= {f"adamw.v.{n}": rng.random(p.shape).astype(np.float32) * 0.01 for n, p in params.items()}
    train = TrainConfig(warmup_iters=0, learning_rate=1e-2)
    results = [step_with(engines, config, params, moments, grads, train, step=5) for engines in twins]
    for name, theirs in results[1].items():
        assert relative(results[0][name], theirs) <= within(1e-6, *twins), name
    for name, theirs in torch_adamw(config, params, moments, grads, train, step=5).items():
        assert relative(results[1][name], theirs) <= twins[1].within(1e-6), name


@pytest.mark.parametrize("switches", [{"n_kv_head": 2}, SHAPES["gpt2"]], ids=["qwen3", "gpt2"])
def test_one_muon_step_from_the_same_gradients(twins, switches):
    """Against each other, and against Newton-Schulz in float64."""
    config = config_of(switches)
    rng = np.random.default_rng(0)
    params = dict(initialise(config, 1))
    grads = {name: rng.normal(0, 0.1, p.shape).astype(np.float32) for name, p in params.items()}
    shapes = state_table(config, "muon", "float32")
    state = {n: rng.normal(0, 0.1, s).astype(np.float32) ** (2 if ".v." in n else 1) for n, s in shapes.items()}
    train = TrainConfig(optimizer="muon", warmup_iters=0, learning_rate=1e-2, grad_clip=0.0)
    results = [step_with(engines, config, params, state, grads, train, step=5) for engines in twins]
    for name, theirs in results[1].items():
        assert relative(results[0][name], theirs) <= within(1e-5, *twins), name
    h = hyperparameters(train, 5)
    name = "model.layers.1.mlp.up_proj.weight"
    momentum = state[f"muon.momentum.{name}"] * h.momentum + grads[name] * np.float64(1 - h.momentum)
    x = (grads[name] * (1 - h.momentum) + momentum * h.momentum).T  # tall: turned wide
    x /= np.linalg.norm(x)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    assert np.linalg.svd(x, compute_uv=False).min() > 0.6 and np.linalg.svd(x, compute_uv=False).max() < 1.3
    rate = h.matrix_lr * np.sqrt(params[name].shape[0] / params[name].shape[1])
    expected = params[name] * (1 - h.matrix_lr * h.weight_decay) - rate * x.T
    assert relative(results[1][name], expected) <= twins[1].within(1e-5)


def step_with(engines, config, params, moments, grads, train, step):
    engine = engines.TrainEngine(config, engines.device, optimizer=train.optimizer)
    engine.load([*params.items(), *moments.items()])
    if engines.NAME == "torch":
        import torch

        for name, p in engine.params.items():
            p.grad = torch.from_numpy(grads[name].copy()).to(p.device)
        engine.losses = [torch.zeros((), device=engines.device.name)]
    else:
        import mlx.core as mx

        engine.grads = {name: mx.array(g) for name, g in grads.items()}
        engine.losses = [mx.zeros(())]
    engine.counted = engine.batch_targets = 1  # as after one micro-batch of one target
    norm = engine.read([engine.optimizer_step(hyperparameters(train, step))])[0, 1]
    assert norm == pytest.approx(
        np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values())), rel=engines.within(1e-5)
    )
    return dict(engine.state())


def torch_adamw(config, params, moments, grads, train, step):
    import torch

    from twingpt.core.parameters import parameter_table

    table = parameter_table(config)
    tensors = {name: torch.nn.Parameter(torch.from_numpy(p.copy())) for name, p in params.items()}
    groups = [
        {"params": [t for n, t in tensors.items() if table[n].decays is decays], "weight_decay": decay}
        for decays, decay in ((True, train.weight_decay), (False, 0.0))
    ]
    rate = hyperparameters(train, step).vector_lr
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(train.beta1, train.beta2), eps=train.adam_eps)
    for name, tensor in tensors.items():
        m, v = (torch.from_numpy(moments[f"adamw.{slot}.{name}"].copy()) for slot in "mv")
        optimizer.state[tensor] = {"step": torch.tensor(float(step)), "exp_avg": m, "exp_avg_sq": v}
        tensor.grad = torch.from_numpy(grads[name].copy())
    torch.nn.utils.clip_grad_norm_(list(tensors.values()), train.grad_clip)
    optimizer.step()
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def test_a_cache_grows_as_it_fills(twins):
    config = config_of({"n_kv_head": 2, "smear": True, "block_size": 600})
    params = dict(initialise(config, 1))
    tokens, _ = batch(config, 2, 520)
    for engines in twins:
        engine = engines.InferenceEngine(config, params.items(), engines.device)
        cache = engine.new_cache(2, 8)
        for start, end in ((0, 3), (3, 200), (200, 520)):
            for row in range(2):
                handle = engine.prefill(cache, row, tokens[row, start:end])
            expected = engine.forward(tokens[1:, :end])[:, -1]
            assert relative(engine.logits(handle), expected) <= engines.within(1e-5, end), engines
            assert cache.tokens.shape[1] == {3: 256, 200: 256, 520: 600}[end]  # by doubling, up to block_size


def test_a_cache_has_one_of_few_capacities():
    assert [bucket(n, 10**6) for n in (0, 1, 256, 257, 512, 513, 1025)] == [256, 256, 256, 512, 512, 1024, 2048]
    assert (bucket(1, 16), bucket(257, 300), bucket(10**6, 10**6)) == (16, 300, 10**6)


def test_a_long_context_takes_no_memory_before_it_is_filled(engines):
    config = config_of({"block_size": 2**20})
    engine = engines.InferenceEngine(config, initialise(config, 0), engines.device)
    cache = engine.new_cache(1, 16)
    engine.prefill(cache, 0, np.array([5, 6, 7]))
    assert cache.tokens.shape[1] == 256


@pytest.mark.parametrize("switches", ["qwen3", "untied", "logit softcap", "nano"])
@pytest.mark.parametrize("rows", [5, 1000])
def test_log_probabilities_of_targets_and_of_the_likeliest_ids(engines, monkeypatch, switches, rows):
    config = config_of(MATRIX[switches])
    monkeypatch.setattr(import_module(f"twingpt.backends.{engines.NAME}.model"), "LOSS_ROWS", rows)
    params = dict(initialise(config, 1))
    tokens, targets = batch(config, 3, 17)
    targets[1, 9:] = -1
    logits = reference.forward(params, tokens, config)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    engine = engines.InferenceEngine(config, params.items(), engines.device)
    found = engine.read(engine.log_probs(tokens, targets, top_k=4))
    limit = engines.within(1e-5)
    np.testing.assert_allclose(found.targets, -reference.cross_entropy(logits, targets), atol=limit)
    assert not found.targets[1, 9:].any()
    np.testing.assert_allclose(found.top, -np.sort(-expected, axis=-1)[..., :4], atol=limit)
    np.testing.assert_allclose(np.take_along_axis(expected, found.top_ids.astype(int), -1), found.top, atol=limit)
    plain = engine.read(engine.log_probs(tokens, targets))
    assert np.array_equal(plain.targets, found.targets) and plain.top is None and plain.top_ids is None
