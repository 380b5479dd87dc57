"""The modules by themselves: formulas against plain numpy, shapes, initialisation, bad input."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def test_attention_formula():
    """Against float64 numpy, written head by head and query by query."""
    from mpt_eqx.model.attention import attention

    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, t, 4)).astype(np.float32) for t in (3, 5, 5))
    bias = rng.normal(size=(2, 3, 5)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 1, 1, 1]], bool)
    wanted = np.zeros((2, 3, 4))
    for n in range(2):
        for t in range(3):
            scores = [0.5 * q[n, t].astype(np.float64) @ k[n, s] + bias[n, t, s] for s in range(5)]
            weights = np.where(mask[t], np.exp(scores), 0)
            wanted[n, t] = weights @ v[n] / weights.sum()
    np.testing.assert_allclose(attention(*map(jnp.asarray, (q, k, v, bias, mask)), 0.5), wanted, atol=1e-6)


def test_a_query_that_sees_nothing_gets_the_mean_and_not_nan():
    from mpt_eqx.model.attention import attention

    v = jnp.arange(6.0).reshape(1, 3, 2)
    out = attention(v[:, :1], v, v, jnp.zeros((1, 1, 3)), jnp.zeros((1, 3), bool), 1.0)
    np.testing.assert_allclose(out[0, 0], v[0].mean(0))


@pytest.mark.parametrize(
    ("n_heads", "bias_max", "exponents"),
    [
        (4, 8, [2, 4, 6, 8]),
        (4, 16, [4, 8, 12, 16]),
        (12, 8, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
        (1, 8, [8]),
        (3, 8, [4, 8, 2]),
    ],
)
def test_alibi_slopes(n_heads, bias_max, exponents):
    from mpt_eqx.model.positions import alibi_slopes

    np.testing.assert_allclose(alibi_slopes(n_heads, bias_max), 2.0 ** -np.array(exponents), rtol=1e-7)


def test_alibi_bias_is_slope_times_distance():
    from mpt_eqx.model.positions import alibi_bias

    bias = alibi_bias(jnp.array([0.5, 2.0]), jnp.array([2, 3]), jnp.arange(4))
    np.testing.assert_array_equal(bias[0], [[-1, -0.5, 0, 0.5], [-1.5, -1, -0.5, 0]])
    np.testing.assert_array_equal(bias[1], 4 * bias[0])


def test_norm_and_gelu():
    from mpt_eqx.model.ffn import gelu
    from mpt_eqx.model.norms import LayerNorm

    x = np.random.default_rng(0).normal(size=(3, 8))
    wanted = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(LayerNorm(8, 0.1)(jnp.asarray(x, jnp.float32)), wanted, atol=1e-6)
    wanted = np.array([[0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in x])
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), wanted, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 19), st.integers(0, 60))
def test_later_tokens_do_not_change_earlier_logits(tiny_model, position, token):
    tokens = jnp.arange(20, dtype=jnp.int32)
    forward = eqx.filter_jit(tiny_model)
    changed = forward(tokens.at[position].set(token))
    np.testing.assert_array_equal(forward(tokens)[:position], changed[:position])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.booleans(), min_size=12, max_size=12).filter(lambda real: any(real)))
def test_padding_anywhere_changes_no_real_logit_by_its_tokens(tiny_model, real):
    """Tokens at padding, in front, behind or in holes, are never seen."""
    mask = jnp.asarray(real)
    tokens = jnp.arange(12, dtype=jnp.int32)
    forward = eqx.filter_jit(lambda t: tiny_model(t, mask=mask))
    one, other = forward(tokens), forward(jnp.where(mask, tokens, 60))
    np.testing.assert_array_equal(one[mask], other[mask])


@pytest.mark.parametrize("padding", [(3, 0), (0, 4), (2, 2)])
def test_padded_equals_alone(tiny_model, padding):
    tokens = jnp.arange(9, dtype=jnp.int32)
    mask = jnp.pad(jnp.ones(9, bool), padding)
    padded = tiny_model(jnp.pad(tokens, padding), mask=mask)
    np.testing.assert_allclose(padded[mask], tiny_model(tokens), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cached_decode_equals_the_full_forward_at_every_position(tiny_model, dtype):
    from mpt_eqx import KVCache

    model = jax.tree.map(lambda x: x.astype(dtype), tiny_model)
    tokens = jnp.arange(24, dtype=jnp.int32) * 5 % 61
    full = np.asarray(model(tokens), np.float32)
    cache = KVCache.empty(model.config, 32, dtype)
    extend = eqx.filter_jit(model.extend)
    x, cache = extend(tokens[:7], cache)
    rows = [model.unembed(x)]
    for i in range(7, 24):
        x, cache = extend(tokens[i : i + 1], cache)
        rows.append(model.unembed(x))
    assert int(cache.length) == 24
    tolerance = {"float32": 2e-5, "bfloat16": 0.1, "float16": 0.02}[dtype]
    np.testing.assert_allclose(np.concatenate(rows).astype(np.float32), full, atol=tolerance, rtol=0)


@pytest.mark.parametrize("at", [1, 7, 16, 23])
def test_reading_in_two_parts_equals_reading_at_once(tiny_model, at):
    from mpt_eqx import KVCache

    tokens = jnp.arange(24, dtype=jnp.int32)
    empty = KVCache.empty(tiny_model.config, 32, jnp.float32)
    once, _ = tiny_model.extend(tokens, empty)
    first, cache = tiny_model.extend(tokens[:at], empty)
    second, _ = tiny_model.extend(tokens[at:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, second]), once, atol=2e-5)


def test_leaves_are_the_checkpoints_tensors(tiny_config):
    from mpt_eqx import MPT
    from mpt_eqx.checkpoint.names import named_leaves

    for tied in (True, False):
        config = tiny_config(tie_word_embeddings=tied, expansion_ratio=1.5)
        model = MPT(config, key=jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(model)) == config.num_parameters()
        assert ("lm_head.weight" in named_leaves(model)) is not tied


def test_mpt_7b_has_the_published_number_of_parameters():
    from mpt_eqx import AttnConfig, MPTConfig

    config = MPTConfig(
        d_model=4096, n_heads=32, n_layers=32, vocab_size=50432, no_bias=True, attn_config=AttnConfig(alibi=True)
    )
    assert config.num_parameters() == 6_649_286_656


@pytest.mark.parametrize(
    ("init", "matrix", "residual", "embedding"),
    [
        ({}, math.sqrt(2 / 64), math.sqrt(2 / 64) / math.sqrt(8), math.sqrt(2 / 64)),
        ({"init_div_is_residual": False}, math.sqrt(2 / 64), math.sqrt(2 / 64), None),
        ({"init_div_is_residual": 3}, math.sqrt(2 / 64), math.sqrt(2 / 64) / 3, None),
        ({"name": "kaiming_uniform_"}, math.sqrt(2 / 64), None, None),
        ({"fan_mode": "fan_out"}, math.sqrt(2 / 16), None, math.sqrt(2 / 1009)),
        ({"init_nonlinearity": "linear"}, math.sqrt(1 / 64), None, None),
        ({"init_nonlinearity": "leaky_relu", "init_gain": 1.0}, math.sqrt(1 / 64), None, None),
        ({"name": "baseline_", "init_std": 0.02}, 0.02, 0.02 / math.sqrt(8), 0.02),
        ({"name": "small_init_"}, math.sqrt(2 / 320), None, None),
        ({"name": "neox_init_"}, math.sqrt(2 / 320), math.sqrt(2 / 320) / (4 / math.sqrt(10)), None),
        ({"name": "xavier_normal_", "init_gain": 0.7}, 0.7 * math.sqrt(2 / 80), None, None),
        ({"name": "xavier_uniform_"}, 0.0, 0.0, 0.0),
        ({"name": "default_"}, math.sqrt(1 / 192), math.sqrt(1 / 192), 1.0),
        ({"emb_init_std": 0.3}, math.sqrt(2 / 64), None, 0.3),
        ({"emb_init_uniform_lim": 0.6}, None, None, 0.6 / math.sqrt(3)),
        ({"emb_init_uniform_lim": (0.0, 0.6)}, None, None, 0.3 / math.sqrt(3)),
    ],
)
def test_initialisation_spreads_as_llm_foundrys(tiny_config, init, matrix, residual, embedding):
    """Standard deviations of Wqkv (its heads are matrices of 16 rows), of out_proj and of the embedding."""
    from mpt_eqx import MPT, InitConfig

    config = tiny_config(d_model=64, n_layers=4, vocab_size=1009, init_config=InitConfig(**init))
    model = MPT(config, key=jax.random.key(0))
    block = model.blocks[0]
    for weight, wanted in (
        (block.attn.Wqkv.weight, matrix),
        (block.ffn.up_proj.weight, matrix if init.get("fan_mode") != "fan_out" and "xavier" not in str(init) else None),
        (block.attn.out_proj.weight, residual),
        (model.wte.weight, embedding),
    ):
        if wanted is not None:
            np.testing.assert_allclose(np.std(weight), wanted, rtol=0.06, atol=1e-9)
    assert np.all(block.norm_1.weight == 1)


def test_two_keys_two_models(tiny_config):
    from mpt_eqx import MPT

    one, other = (MPT(tiny_config(), key=jax.random.key(i)) for i in range(2))
    assert not np.allclose(one.blocks[0].attn.Wqkv.weight, other.blocks[0].attn.Wqkv.weight)
    assert not np.allclose(one.blocks[0].attn.Wqkv.weight, one.blocks[1].attn.Wqkv.weight)


def test_no_label_no_loss(tiny_model):
    from mpt_eqx.train import next_token_loss

    tokens = jnp.ones((2, 5), jnp.int32)
    assert next_token_loss(tiny_model, tokens, labels=jnp.full((2, 5), -100)) == 0


def test_a_few_steps_of_training_lower_the_loss(tiny_model):
    import optax

    from mpt_eqx.train import next_token_loss

    tokens = jnp.asarray(np.random.default_rng(0).integers(61, size=(4, 16)), jnp.int32)
    optimizer = optax.adamw(1e-2)

    @eqx.filter_jit
    @jax.numpy_dtype_promotion("standard")  # for optax
    def step(model, state):
        loss, grads = eqx.filter_value_and_grad(next_token_loss)(model, tokens)
        updates, state = optimizer.update(grads, state, model)
        return eqx.apply_updates(model, updates), state, loss

    model, state, losses = tiny_model, optimizer.init(eqx.filter(tiny_model, eqx.is_inexact_array)), []
    for _ in range(20):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("bad", [-1, 61, 2**31 - 1])
def test_ids_outside_the_vocabulary_are_refused(tiny_model, bad):
    from mpt_eqx import MPTError

    with pytest.raises(MPTError, match=rf"tokens: expected ids from 0 to 60 \(vocab_size\), found {bad}"):
        tiny_model(jnp.array([1, bad, 3]))


def test_more_than_max_seq_len_is_refused_and_says_how(tiny_model):
    from mpt_eqx import MPTError

    tiny_model(jnp.zeros(256, jnp.int32))
    with pytest.raises(MPTError, match=r"at most max_seq_len=256, found 257.*config_overrides=.'max_seq_len': 257"):
        tiny_model(jnp.zeros(257, jnp.int32))
