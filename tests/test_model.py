"""The modules by themselves: formulas against plain numpy, shapes, initialisation, bad input."""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import examples, one_in, some
from hypothesis import given
from hypothesis import strategies as st


def test_attention_formula():
    """Against float64 numpy, written head by head and query by query."""
    from mpt_eqx.ops.attention import attention

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
    from mpt_eqx.ops.attention import attention

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
    from mpt_eqx.model.alibi import alibi_slopes

    np.testing.assert_allclose(alibi_slopes(n_heads, bias_max), 2.0 ** -np.array(exponents), rtol=1e-7)


def test_alibi_bias_is_slope_times_distance():
    from mpt_eqx.ops.attention import alibi_bias

    bias = alibi_bias(jnp.array([0.5, 2.0]), jnp.array([2, 3]), jnp.arange(4))
    np.testing.assert_array_equal(bias[0], [[-1, -0.5, 0, 0.5], [-1.5, -1, -0.5, 0]])
    np.testing.assert_array_equal(bias[1], 4 * bias[0])


def test_norm_and_gelu():
    from mpt_eqx.model.activations import gelu
    from mpt_eqx.model.norms import LayerNorm

    x = np.random.default_rng(0).normal(size=(3, 8))
    wanted = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(LayerNorm(8, 0.1)(jnp.asarray(x, jnp.float32)), wanted, atol=1e-6)
    wanted = np.array([[0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in x])
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), wanted, atol=1e-6)


def test_queries_share_a_key_head_with_their_neighbours(tiny_config):
    """Grouped attention is multi-head attention whose key and value heads are repeated one after another."""
    from mpt_eqx import MPT, AttnConfig

    grouped = AttnConfig(alibi=True, fused_qkv=False, attn_type="grouped_query_attention", kv_n_heads=2)
    model = MPT(tiny_config(n_layers=1, attn_config=grouped), key=jax.random.key(0))
    full = MPT(tiny_config(n_layers=1, attn_config=AttnConfig(alibi=True, fused_qkv=False)), key=jax.random.key(0))
    weights = [getattr(block.attn, name).weight for block in model.blocks for name in ("Wq", "Wk", "Wv")]
    repeated = [w if len(w) == 32 else jnp.repeat(w.reshape(2, 8, 32), 2, axis=0).reshape(32, 32) for w in weights]
    full = eqx.tree_at(
        lambda m: [getattr(b.attn, n).weight for b in m.blocks for n in ("Wq", "Wk", "Wv")], full, repeated
    )
    rest = lambda m: [m.wte, *[b.attn.out_proj for b in m.blocks], *[b.ffn for b in m.blocks]]  # noqa: E731
    full = eqx.tree_at(rest, full, rest(model))
    tokens = jnp.arange(9)
    np.testing.assert_allclose(model(tokens), full(tokens), atol=1e-5)


def test_fused_and_unfused_projections_agree(tiny_config):
    from mpt_eqx import MPT, AttnConfig

    kwargs = {"alibi": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2, "qk_ln": True, "clip_qkv": 1.0}
    fused, unfused = (
        MPT(tiny_config(no_bias=False, attn_config=AttnConfig(fused_qkv=f, **kwargs)), key=jax.random.key(0))
        for f in (True, False)
    )
    for i, block in enumerate(unfused.blocks):
        parts = (block.attn.Wq, block.attn.Wk, block.attn.Wv)
        joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        where = lambda m, i=i: (m.blocks[i].attn.Wqkv, m.blocks[i].attn.out_proj, m.blocks[i].ffn)  # noqa: E731
        fused = eqx.tree_at(where, fused, (joined, block.attn.out_proj, block.ffn))
    fused = eqx.tree_at(lambda m: m.wte, fused, unfused.wte)
    np.testing.assert_allclose(fused(jnp.arange(9)), unfused(jnp.arange(9)), atol=1e-5)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_transformer_engines_network(tiny_config):
    """Its own LayerNorm with a bias and eps 1e-5 whatever the rest has, and the tanh gelu."""
    from mpt_eqx import MPT, FFNConfig

    config = tiny_config(norm_type="rmsnorm", norm_eps=0.1, ffn_config=FFNConfig(ffn_type="te_ln_mlp"))
    block = MPT(config, key=jax.random.key(0)).blocks[0]
    rng = np.random.default_rng(0)
    bias, x = rng.normal(size=32).astype(np.float32), rng.normal(size=(3, 32)).astype(np.float32)
    block = eqx.tree_at(lambda b: b.norm_2.bias, block, jnp.asarray(bias))
    h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) + bias
    wanted = gelu_tanh(h @ block.ffn.up_proj.weight.T) @ block.ffn.down_proj.weight.T
    np.testing.assert_allclose(block.ffn(block.norm_2(jnp.asarray(x))), wanted, atol=1e-5)
    assert block.ffn.up_proj.bias is None


@pytest.mark.parametrize(
    ("norm", "mlp_type", "ffn_type"),
    one_in(5, [*itertools.product((None, 1, 2), ("mlp", "glu"), ("torch_dmoe", "mb_dmoe"))]),
)
def test_mixture_of_experts(tiny_config, ffn_type, mlp_type, norm):
    """Token by token and expert by expert in numpy; megablocks has the tanh gelu and a bias on the sum."""
    from mpt_eqx import MPT, FFNConfig

    ffn_config = FFNConfig(
        ffn_type=ffn_type, mlp_type=mlp_type, moe_num_experts=5, moe_top_k=2, moe_normalize_expert_weights=norm,
        ffn_hidden_size=12,
    )  # fmt: skip
    moe = MPT(tiny_config(no_bias=False, ffn_config=ffn_config), key=jax.random.key(0)).blocks[0].ffn
    rng = np.random.default_rng(0)
    x, bias = rng.normal(size=(4, 32)).astype(np.float32), rng.normal(size=32).astype(np.float32)
    if ffn_type == "mb_dmoe":
        moe = eqx.tree_at(lambda m: m.experts.bias, moe, jnp.asarray(bias))
        act = gelu_tanh
    else:
        assert moe.experts.bias is None
        bias, act = 0, lambda x: np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])
    mlp = moe.experts.mlp
    w1, w2 = (np.asarray(w).reshape(5, 12, 32) for w in (mlp.w1, mlp.w2))
    for token, row in zip(x, moe(jnp.asarray(x)), strict=True):
        scores = np.exp(moe.router.layer.weight @ token)
        scores /= scores.sum()
        chosen = np.argsort(scores)[-2:]
        weights = scores[chosen] / (1 if norm is None else np.linalg.norm(scores[chosen], norm))
        wanted = np.zeros(32)
        for expert, weight in zip(chosen, weights, strict=True):
            h = act(w1[expert] @ token)
            if mlp_type == "glu":
                h = h * (np.asarray(mlp.v1).reshape(5, 12, 32)[expert] @ token)
            wanted += weight * (h @ w2[expert])
        np.testing.assert_allclose(row, wanted + bias, atol=1e-5)


def changed(holder, name, change):
    """A mutation: `holder.name` becomes `change(original)`."""
    import importlib

    def mutate(patch):
        module, *path = holder.split(".")
        where = importlib.import_module(f"mpt_eqx.model.{module}")
        for part in path:
            where = getattr(where, part)
        patch.setattr(where, name, change(getattr(where, name)))

    return mutate


def without_gate(original):
    return lambda self, *args: original(eqx.tree_at(lambda m: m.v1, self, None), *args)


def gate_and_value_swapped(original):
    return lambda self, *args: original(eqx.tree_at(lambda m: (m.w1, m.v1), self, (self.v1, self.w1)), *args)


def not_scaled_up(patch):
    from mpt_eqx.ops import numerics

    original = numerics.apply_dropout
    patch.setattr(numerics, "apply_dropout", lambda x, dropout, key: original(x, dropout, key) * (1 - dropout.p))


def the_models_eps(original):
    return lambda size, eps, *, bias: original(size, 0.1, bias=bias)


TE, MOE = "test_transformer_engines_network", "test_mixture_of_experts"


@pytest.mark.parametrize(
    ("test", "arguments", "mutation"),
    [
        (TE, {}, changed("activations", "gelu_tanh", lambda f: lambda x: jax.nn.gelu(x, approximate=False))),
        (TE, {}, changed("block", "LayerNorm", the_models_eps)),
        (TE, {}, changed("ffn", "init_linear", lambda f: lambda c, shape, bias, **kw: f(c, shape, True, **kw))),
        (MOE, {"mlp_type": "glu"}, changed("moe.ExpertMLP", "__call__", without_gate)),
        (MOE, {"mlp_type": "glu"}, changed("moe.ExpertMLP", "__call__", gate_and_value_swapped)),
        ("test_dropout_keeps_the_mean", None, not_scaled_up),
    ],
    ids=[
        "te: exact gelu",
        "te: eps",
        "te: biases",
        "moe: no gate",
        "moe: gate swapped",
        "dropout: not scaled up",
    ],
)
def test_the_test_of_a_formula_notices_a_mutation(tiny_config, monkeypatch, test, arguments, mutation):
    """Of formulas for which there is no reference data."""
    if arguments is not None:
        arguments = {"tiny_config": tiny_config, **arguments}
        arguments |= {"ffn_type": "torch_dmoe", "norm": 1} if test == MOE else {}
    with monkeypatch.context() as patch:
        mutation(patch)
        with pytest.raises(AssertionError):
            globals()[test](**(arguments or {}))


RATES = ["resid_pdrop", "emb_pdrop", "attn_pdrop", "moe_jitter_eps"]


@pytest.mark.parametrize("where", some(RATES, ["attn_pdrop"]))
def test_randomness_in_training(tiny_config, where):
    """With a key, and only then; the same key gives the same; off under inference_mode and when generating."""
    from mpt_eqx import MPT, AttnConfig, FFNConfig, MPTError, generate

    moe = {"ffn_type": "torch_dmoe", "moe_num_experts": 4, "moe_top_k": 2}
    change, plain = {
        "attn_pdrop": ({"attn_config": AttnConfig(alibi=True, attn_pdrop=0.5)}, {}),
        "moe_jitter_eps": (
            {"ffn_config": FFNConfig(**moe, moe_jitter_eps=0.5)}, {"ffn_config": FFNConfig(**moe)}
        ),
    }.get(where, ({where: 0.5}, {}))  # fmt: skip
    model, without = (MPT(tiny_config(n_layers=1, **c), key=jax.random.key(0)) for c in (change, plain))
    tokens = jnp.arange(12)
    with pytest.raises(MPTError, match=r"key: expected a key, .*; switch them off with eqx.nn.inference_mode\(model\)"):
        model(tokens)
    call = eqx.filter_jit(lambda model, **key: model(tokens, **key))
    one, again, other = (call(model, key=jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    still = eqx.nn.inference_mode(model)
    np.testing.assert_array_equal(call(still), call(without))
    np.testing.assert_array_equal(call(still, key=jax.random.key(0)), call(without))
    results = [generate(m, tokens.tolist(), max_new_tokens=3).tokens for m in (model, without)]
    np.testing.assert_array_equal(*results)


def test_dropout_keeps_the_mean():
    """Attention weights are dropped after the softmax, and the rest is scaled up."""
    from mpt_eqx.ops.attention import attention

    v = jnp.ones((1, 64, 2))
    drop = eqx.nn.Dropout(0.25)
    out = jax.vmap(lambda key: attention(v, v, v, None, jnp.ones((64, 64), bool), 1.0, dropout=drop, key=key))(
        jax.random.split(jax.random.key(0), 50)
    )
    np.testing.assert_allclose(out.mean(), 1, atol=0.01)
    assert out.std() > 0.05


def test_dropout_of_everything_has_no_gradient_but_is_finite(tiny_config):
    from mpt_eqx import MPT
    from mpt_eqx.train import next_token_loss

    model = MPT(tiny_config(resid_pdrop=1.0), key=jax.random.key(0))
    grads = eqx.filter_jit(eqx.filter_grad(next_token_loss))(model, jnp.arange(12).reshape(2, 6), key=jax.random.key(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(eqx.filter(grads, eqx.is_array)))
    assert np.all(grads.blocks[0].attn.Wqkv.weight == 0)


@pytest.mark.parametrize("learned", some([True, False], [True]))
def test_a_mask_of_ones_and_zeros(tiny_config, learned):
    """As tokenizers give it; learned and rotary positions count it."""
    from mpt_eqx import MPT, AttnConfig
    from mpt_eqx.train import next_token_loss

    attn_config = AttnConfig() if learned else AttnConfig(rope=True, rope_impl="hf")
    model = MPT(tiny_config(n_layers=1, attn_config=attn_config), key=jax.random.key(0))
    tokens, mask = jnp.arange(8), jnp.asarray([0, 0, 1, 1, 1, 1, 1, 1])
    call, loss = eqx.filter_jit(model), eqx.filter_jit(next_token_loss)
    np.testing.assert_array_equal(call(tokens, mask=mask), call(tokens, mask=mask.astype(bool)))
    one, other = (loss(model, tokens[None], mask=m[None]) for m in (mask, mask.astype(bool)))
    assert one == other


def test_every_row_of_a_batch_has_its_own_dropout(tiny_config):
    from mpt_eqx import MPT
    from mpt_eqx.train import next_token_loss

    model = MPT(tiny_config(n_layers=1, resid_pdrop=0.5), key=jax.random.key(0))
    tokens = jnp.full((2, 6), 5)
    one, other = (
        next_token_loss(model, tokens, labels=tokens.at[1 - row].set(-100), key=jax.random.key(0)) for row in (0, 1)
    )
    assert abs(one - other) > 1e-3


def test_padding_and_holes_in_sequence_ids(tiny_config):
    """A packed sequence gives the numbers it gives alone, wherever it stands; −1 is seen by none."""
    from mpt_eqx import MPT, AttnConfig

    config = tiny_config(n_layers=1, attn_config=AttnConfig(alibi=True, attn_uses_sequence_id=True))
    model = MPT(config, key=jax.random.key(0))
    tokens = jnp.arange(10, dtype=jnp.int32)
    packed = eqx.filter_jit(model)(tokens, sequence_ids=jnp.asarray([0, 0, 0, 1, 1, 1, 1, -1, 2, 2]))
    for rows in (slice(0, 3), slice(3, 7), slice(8, 10)):
        np.testing.assert_allclose(packed[rows], eqx.filter_jit(model)(tokens[rows]), atol=1e-5)


@examples(15, least=2)
@given(st.integers(0, 19), st.integers(0, 60))
def test_later_tokens_do_not_change_earlier_logits(tiny_model, position, token):
    tokens = jnp.arange(20, dtype=jnp.int32)
    forward = eqx.filter_jit(tiny_model)
    changed = forward(tokens.at[position].set(token))
    np.testing.assert_array_equal(forward(tokens)[:position], changed[:position])


@eqx.filter_jit
def masked_logits(model, tokens, mask):
    return model(tokens, mask=mask)


@examples(15, least=2)
@given(st.lists(st.booleans(), min_size=12, max_size=12).filter(lambda real: any(real)))
def test_padding_anywhere_changes_no_real_logit_by_its_tokens(tiny_model, real):
    """Tokens at padding, in front, behind or in holes, are never seen."""
    mask = jnp.asarray(real)
    tokens = jnp.arange(12, dtype=jnp.int32)
    one, other = (masked_logits(tiny_model, t, mask) for t in (tokens, jnp.where(mask, tokens, 60)))
    np.testing.assert_array_equal(one[mask], other[mask])


@pytest.mark.parametrize("padding", some([(3, 0), (0, 4), (2, 2)], [(2, 2)]))
def test_padded_equals_alone(tiny_model, padding):
    tokens = jnp.arange(9, dtype=jnp.int32)
    mask = jnp.pad(jnp.ones(9, bool), padding)
    padded = eqx.filter_jit(tiny_model)(jnp.pad(tokens, padding), mask=mask)
    np.testing.assert_allclose(padded[mask], eqx.filter_jit(tiny_model)(tokens), atol=1e-5)


@pytest.mark.parametrize("dtype", some(["float32", "bfloat16", "float16"], ["float32"]))
def test_cached_decode_equals_the_full_forward_at_every_position(tiny_model, dtype):
    from mpt_eqx import KVCache

    model = jax.tree.map(lambda x: x.astype(dtype), tiny_model)
    tokens = jnp.arange(24, dtype=jnp.int32) * 5 % 61
    full = np.asarray(eqx.filter_jit(model)(tokens), np.float32)
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


@pytest.mark.parametrize("at", some([1, 7, 16, 23], [7]))
def test_reading_in_two_parts_equals_reading_at_once(tiny_model, at):
    from mpt_eqx import KVCache

    tokens = jnp.arange(24, dtype=jnp.int32)
    empty = KVCache.empty(tiny_model.config, 32, jnp.float32)
    extend = eqx.filter_jit(tiny_model.extend)
    once, _ = extend(tokens, empty)
    first, cache = extend(tokens[:at], empty)
    second, _ = extend(tokens[at:], cache)
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
    one_in(
        2,
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
    ),
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


def test_initialisation_of_what_a_plain_model_has_not(tiny_config):
    """Biases, learned positions, the padding token, lm_head, experts."""
    from mpt_eqx import MPT, AttnConfig, FFNConfig, InitConfig

    def model(**kwargs):
        return MPT(tiny_config(d_model=64, n_layers=4, vocab_size=1009, **kwargs), key=jax.random.key(0))

    learned = model(no_bias=False, attn_config=AttnConfig(), pad_token_id=7, tie_word_embeddings=False,
                    init_config=InitConfig(emb_init_std=0.3))  # fmt: skip
    std = math.sqrt(2 / 64)
    np.testing.assert_allclose(np.std(learned.wpe.weight), 0.3, rtol=0.06)
    np.testing.assert_allclose(np.std(learned.lm_head.weight), std, rtol=0.06)
    assert np.all(learned.wte.weight[7] == 0) and np.all(learned.wte.weight[8] != 0)
    assert np.all(learned.blocks[0].attn.Wqkv.bias == 0) and np.all(learned.norm_f.bias == 0)
    default = model(no_bias=False, init_config=InitConfig(name="default_")).blocks[0]
    np.testing.assert_allclose(np.std(default.ffn.down_proj.bias), 1 / math.sqrt(256 * 3), rtol=0.2)

    for ffn_type, w2 in (("torch_dmoe", std), ("mb_dmoe", math.sqrt(2 / 256) / math.sqrt(8))):
        mlp = model(ffn_config=FFNConfig(ffn_type=ffn_type, moe_num_experts=4)).blocks[0].ffn.experts.mlp
        np.testing.assert_allclose(np.std(mlp.w1), std, rtol=0.03)
        np.testing.assert_allclose(np.std(mlp.w2), w2, rtol=0.03)
    raw = FFNConfig(ffn_type="torch_dmoe", moe_num_experts=4)
    mlp = model(ffn_config=raw, init_config=InitConfig(name="default_")).blocks[0].ffn.experts.mlp
    assert mlp.w1.min() >= 0 and 0.99 < mlp.w1.max() < 1


def test_two_keys_two_models(tiny_config):
    from mpt_eqx import MPT

    one, other = (MPT(tiny_config(), key=jax.random.key(i)) for i in range(2))
    assert not np.allclose(one.blocks[0].attn.Wqkv.weight, other.blocks[0].attn.Wqkv.weight)
    assert not np.allclose(one.blocks[0].attn.Wqkv.weight, one.blocks[1].attn.Wqkv.weight)


def test_no_label_no_loss(tiny_model):
    from mpt_eqx.train import next_token_loss

    tokens = jnp.ones((2, 5), jnp.int32)
    assert eqx.filter_jit(next_token_loss)(tiny_model, tokens, labels=jnp.full((2, 5), -100)) == 0


@pytest.fixture(scope="module")
def packed_model(tiny_config):
    from mpt_eqx import MPT, AttnConfig

    attn = AttnConfig(alibi=True, attn_uses_sequence_id=True)
    return MPT(tiny_config(n_layers=1, attn_config=attn), key=jax.random.key(0))


@eqx.filter_jit
def loss_and_logits(model, tokens, mask, ids, labels):
    from mpt_eqx.train import next_token_loss

    row = {"mask": mask[None], "sequence_ids": ids[None], "labels": None if labels is None else labels[None]}
    found = eqx.filter_value_and_grad(next_token_loss)(model, tokens[None], **row)
    return *found, model(tokens, mask=mask, sequence_ids=ids)


@examples(40)
@given(st.lists(st.sampled_from([-1, 0, 0, 1]), min_size=10, max_size=10), st.integers(0, 1023), st.booleans())
def test_the_loss_counts_what_follows_a_real_token_of_its_sequence(packed_model, ids, bits, labelled):
    """Any mask, any sequence ids: picked one by one; padding's ids change nothing, no gradient either."""
    tokens, ids = jnp.arange(10) * 7 % 61, jnp.asarray(ids)
    mask = jnp.asarray([bool(bits >> i & 1) for i in range(10)])
    labels = jnp.where(jnp.arange(10) % 3 == 1, -100, tokens) if labelled else None
    real = np.asarray(mask & (ids >= 0))
    loss, grads, logits = loss_and_logits(packed_model, tokens, mask, ids, labels)
    log_probs, picked = jax.nn.log_softmax(logits), []
    for at in range(1, 10):
        follows = labels[at] != -100 if labelled else real[at] and ids[at] == ids[at - 1]
        if real[at - 1] and follows:
            picked.append(-float(log_probs[at - 1, tokens[at]]))
    np.testing.assert_allclose(loss, np.mean(picked) if picked else 0, rtol=1e-5)
    other, other_grads, _ = loss_and_logits(packed_model, jnp.where(real, tokens, 60), mask, ids, labels)
    assert loss == other
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, two)


def test_the_loss_of_a_padded_row_is_that_of_the_row(packed_model):
    """Left, right, and both; whatever the padding's id. Gradients too."""
    tokens, ids = jnp.asarray([5, 6, 7, 8]), jnp.zeros(4, jnp.int32)
    alone, wanted, _ = loss_and_logits(packed_model, tokens, ids == 0, ids, None)
    for padding in ((2, 0), (0, 2), (1, 1)):
        for pad in (0, 9):
            row, mask = jnp.pad(tokens, padding, constant_values=pad), jnp.pad(ids == 0, padding)
            loss, grads, _ = loss_and_logits(packed_model, row, mask, jnp.zeros(6, jnp.int32), None)
            np.testing.assert_allclose(loss, alone, rtol=1e-6)
            for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_loss_of_packed_sequences_is_that_of_each(packed_model):
    tokens, ids = jnp.asarray([5, 6, 7, 8, 20, 21, 22, 23]), jnp.asarray([0] * 4 + [1] * 4)
    whole = jnp.ones(4, bool)
    packed = loss_and_logits(packed_model, tokens, jnp.ones(8, bool), ids, None)[0]
    each = [loss_and_logits(packed_model, row, whole, jnp.zeros(4, jnp.int32), None)[0] for row in tokens.reshape(2, 4)]
    np.testing.assert_allclose(packed, np.mean(each), rtol=1e-6)


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

    eqx.filter_eval_shape(tiny_model, jnp.zeros(256, jnp.int32))
    with pytest.raises(MPTError, match=r"at most max_seq_len=256, found 257.*config_overrides=.'max_seq_len': 257"):
        tiny_model(jnp.zeros(257, jnp.int32))
