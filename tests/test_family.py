"""The family of models: every field of the configuration counts, and any valid configuration behaves."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

TOKENS = jnp.asarray([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], jnp.int32)
SEQUENCES = jnp.asarray([0] * 7 + [1] * 5, jnp.int32)
ROPE = {"rope": True, "alibi": False, "rope_impl": "hf"}
LLAMA3 = {
    "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
DYNAMIC = {"type": "dynamic", "factor": 2.0, "trained_max_seq_len": 4}
MOE = {"ffn_type": "torch_dmoe", "moe_num_experts": 4, "moe_top_k": 2, "moe_normalize_expert_weights": 1}
SMALL = {
    "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 61, "max_seq_len": 32, "no_bias": True,
    "attn_config": {"alibi": True},
}  # fmt: skip


def config_of(*changes):
    """The small configuration with nested changes."""
    from mpt_eqx import MPTConfig
    from mpt_eqx.config_dialects import override

    d = SMALL
    for change in changes:
        d = override(d, change)
    return MPTConfig.from_dict(d)


def attn(**keys):
    return {"attn_config": keys}


def ffn(**keys):
    return {"ffn_config": keys}


def init(**keys):
    return {"init_config": keys}


def second_block(**keys):
    return {"block_overrides": {"order": [{"name": "default"}, {"name": "x"}], "overrides": {"x": attn(**keys)}}}


# For each field: what the model is otherwise, and the change that must be noticed.
CHANGES = {
    "MPTConfig.d_model": ({}, {"d_model": 64}),
    "MPTConfig.n_heads": ({}, {"n_heads": 2}),
    "MPTConfig.n_layers": ({}, {"n_layers": 3}),
    "MPTConfig.head_dim": (attn(fused_qkv=False), {"head_dim": 12}),
    "MPTConfig.expansion_ratio": ({}, {"expansion_ratio": 2}),
    "MPTConfig.max_seq_len": (attn(alibi=False), {"max_seq_len": 64}),
    "MPTConfig.vocab_size": ({}, {"vocab_size": 62}),
    "MPTConfig.resid_pdrop": ({}, {"resid_pdrop": 0.5}),
    "MPTConfig.emb_pdrop": ({}, {"emb_pdrop": 0.5}),
    "MPTConfig.learned_pos_emb": (attn(alibi=False), {"learned_pos_emb": False}),
    "MPTConfig.logit_scale": ({}, {"logit_scale": 0.5}),
    "MPTConfig.final_logit_softcapping": ({}, {"final_logit_softcapping": 2.0}),
    "MPTConfig.no_bias": ({}, {"no_bias": False}),
    "MPTConfig.attention_bias": ({}, {"attention_bias": True}),
    "MPTConfig.embedding_fraction": ({}, {"embedding_fraction": 0.1}),
    "MPTConfig.pad_token_id": ({}, {"pad_token_id": 5}),
    "MPTConfig.norm_type": ({}, {"norm_type": "rmsnorm"}),
    "MPTConfig.norm_eps": ({}, {"norm_eps": 0.1}),
    "MPTConfig.tie_word_embeddings": ({}, {"tie_word_embeddings": False}),
    "MPTConfig.block_overrides": ({}, second_block(sliding_window_size=2)),
    "AttnConfig.attn_type": ({}, attn(attn_type="multiquery_attention")),
    "AttnConfig.kv_n_heads": (attn(attn_type="grouped_query_attention", kv_n_heads=2), attn(kv_n_heads=4)),
    "AttnConfig.attn_pdrop": ({}, attn(attn_pdrop=0.5)),
    "AttnConfig.fused_qkv": ({}, attn(fused_qkv=False)),
    "AttnConfig.clip_qkv": ({}, attn(clip_qkv=0.5)),
    "AttnConfig.qk_ln": ({}, attn(qk_ln=True)),
    "AttnConfig.qk_gn": ({}, attn(qk_gn=True)),
    "AttnConfig.softmax_scale": ({}, attn(softmax_scale=0.1)),
    "AttnConfig.attn_logit_softcapping": ({}, attn(attn_logit_softcapping=0.5)),
    "AttnConfig.sliding_window_size": ({}, attn(sliding_window_size=2)),
    "AttnConfig.attn_uses_sequence_id": ({}, attn(attn_uses_sequence_id=True)),
    "AttnConfig.attn_temperature_tuning": ({}, attn(attn_temperature_tuning={"floor_scale": 3, "attn_scale": 0.5})),
    "AttnConfig.alibi": ({"learned_pos_emb": False}, attn(alibi=False)),
    "AttnConfig.alibi_bias_max": ({}, attn(alibi_bias_max=16)),
    "AttnConfig.rope": ({}, attn(rope=True)),
    "AttnConfig.rope_theta": (attn(**ROPE), attn(rope_theta=100)),
    "AttnConfig.rope_impl": (attn(**ROPE, rope_hf_config={"type": "linear", "factor": 4.0}), attn(rope_impl="dail")),
    "AttnConfig.rope_hf_config": (attn(**ROPE), attn(rope_hf_config={"type": "linear", "factor": 4.0})),
    "RopeHFConfig.type": (attn(**ROPE, rope_hf_config=DYNAMIC), attn(rope_hf_config={"type": "linear"})),
    "RopeHFConfig.factor": (attn(**ROPE, rope_hf_config=DYNAMIC), attn(rope_hf_config={"factor": 8.0})),
    "RopeHFConfig.low_freq_factor": (
        attn(**ROPE, rope_hf_config=LLAMA3), attn(rope_hf_config={"low_freq_factor": 0.1}),
    ),
    "RopeHFConfig.high_freq_factor": (
        attn(**ROPE, rope_hf_config=LLAMA3), attn(rope_hf_config={"high_freq_factor": 2.0}),
    ),
    "RopeHFConfig.original_max_position_embeddings": (
        attn(**ROPE, rope_hf_config=LLAMA3), attn(rope_hf_config={"original_max_position_embeddings": 16}),
    ),
    "TemperatureTuning.floor_scale": (
        attn(attn_temperature_tuning={"floor_scale": 3, "attn_scale": 0.5}),
        attn(attn_temperature_tuning={"floor_scale": 5}),
    ),
    "TemperatureTuning.attn_scale": (
        attn(attn_temperature_tuning={"floor_scale": 3, "attn_scale": 0.5}),
        attn(attn_temperature_tuning={"attn_scale": 0.6}),
    ),
    "FFNConfig.ffn_type": ({}, ffn(ffn_type="mptglu")),
    "FFNConfig.ffn_hidden_size": ({}, ffn(ffn_hidden_size=40)),
    "FFNConfig.ffn_act_fn": ({}, ffn(ffn_act_fn={"name": "relu"})),
    "FFNConfig.moe_num_experts": (ffn(**MOE), ffn(moe_num_experts=5)),
    "FFNConfig.moe_top_k": (ffn(**MOE), ffn(moe_top_k=3)),
    "FFNConfig.mlp_type": (ffn(**MOE), ffn(mlp_type="glu")),
    "FFNConfig.moe_jitter_eps": (ffn(**MOE), ffn(moe_jitter_eps=0.5)),
    "FFNConfig.moe_normalize_expert_weights": (ffn(**MOE), ffn(moe_normalize_expert_weights=2)),
    "ActFnConfig.name": (ffn(ffn_act_fn={"name": "relu"}), ffn(ffn_act_fn={"name": "silu"})),
    "ActFnConfig.approximate": ({}, ffn(ffn_act_fn={"name": "gelu", "approximate": "tanh"})),
    "ActFnConfig.negative_slope": (
        ffn(ffn_act_fn={"name": "leaky_relu", "negative_slope": 0.2}), ffn(ffn_act_fn={"negative_slope": 0.3}),
    ),
    "InitConfig.name": ({}, init(name="kaiming_uniform_")),
    "InitConfig.fan_mode": ({}, init(fan_mode="fan_out")),
    "InitConfig.init_nonlinearity": ({}, init(init_nonlinearity="linear")),
    "InitConfig.init_gain": (init(init_nonlinearity="leaky_relu"), init(init_gain=1.0)),
    "InitConfig.init_div_is_residual": ({}, init(init_div_is_residual=False)),
    "InitConfig.init_std": (init(name="baseline_", init_std=0.1), init(init_std=0.2)),
    "InitConfig.emb_init_std": ({}, init(emb_init_std=0.1)),
    "InitConfig.emb_init_uniform_lim": ({}, init(emb_init_uniform_lim=0.1)),
    "BlockOverride.sliding_window_size": ({}, second_block(sliding_window_size=2)),
    "BlockOverride.attn_temperature_tuning": (
        {}, second_block(attn_temperature_tuning={"floor_scale": 3, "attn_scale": 0.5}),
    ),
    "BlockOverride.nope": ({}, second_block(nope=True)),
    "BlockOverride.reuse_kv_layer_idx": ({}, second_block(reuse_kv_layer_idx=-1)),
    "BlockOverride.reuse_kv_x_layer_idx": (attn(fused_qkv=False), second_block(reuse_kv_x_layer_idx=-1)),
}  # fmt: skip


def behaviour(config):
    """The weights a model starts with, what it computes in training, and its gradients, under canonical names."""
    from mpt_eqx import MPT
    from mpt_eqx.checkpoint.names import named_leaves

    model = MPT(config, key=jax.random.key(0))
    ids = SEQUENCES if config.attn_config.attn_uses_sequence_id else None

    @eqx.filter_jit
    def run(model):
        def loss(model):
            logits = model(TOKENS, sequence_ids=ids, key=jax.random.key(1))
            return jnp.sum(logits**2), logits

        grads, logits = eqx.filter_grad(loss, has_aux=True)(model)
        return {"logits": logits, **{f"gradient of {name}": leaf for name, leaf in named_leaves(grads).items()}}

    return {**named_leaves(model), **run(model)}


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_counts(field):
    """Changing it changes the weights a model starts with, its logits, or a gradient."""
    base, change = CHANGES[field]
    before, after = behaviour(config_of(base)), behaviour(config_of(base, change))
    assert config_of(base) != config_of(base, change)
    same = before.keys() == after.keys() and all(
        before[name].shape == after[name].shape and np.allclose(before[name], after[name], rtol=1e-4, atol=1e-6)
        for name in before
    )
    assert not same


def test_no_field_is_left_out():
    from mpt_eqx import config

    parts = (
        *(config.MPTConfig, config.AttnConfig, config.FFNConfig, config.InitConfig, config.RopeHFConfig),
        *(config.TemperatureTuning, config.ActFnConfig, config.BlockOverride),
    )
    fields = {f"{part.__name__}.{field.name}" for part in parts for field in dataclasses.fields(part)}
    assert fields - {f"MPTConfig.{part}_config" for part in ("attn", "ffn", "init")} == set(CHANGES)


def test_sequence_ids_without_their_switch_are_refused():
    from mpt_eqx import MPT, MPTError

    model = MPT(config_of(), key=jax.random.key(0))
    with pytest.raises(
        MPTError, match="sequence_ids: expected none, because attn_config.attn_uses_sequence_id is false"
    ):
        model(TOKENS, sequence_ids=SEQUENCES)


def one_of(*values):
    return st.sampled_from(values)


@st.composite
def configs(draw):
    """Any valid configuration of a small model."""
    n_heads = draw(one_of(1, 2, 3, 4))
    position = draw(one_of("alibi", "rope", "learned", "none", "alibi and rope"))
    attn_type = draw(one_of("multihead_attention", "multiquery_attention", "grouped_query_attention"))
    qk_norm = draw(one_of(None, "qk_ln", "qk_gn"))
    fused = draw(st.booleans())
    rope = {
        "rope": "rope" in position, "rope_theta": draw(one_of(100, 10000.0)), "rope_impl": draw(one_of("hf", "dail")),
        "rope_hf_config": draw(one_of({"type": "no_scaling"}, {"type": "linear", "factor": 2.0}, DYNAMIC, LLAMA3)),
    }  # fmt: skip
    attn_config = {
        "attn_type": attn_type, "alibi": "alibi" in position, "alibi_bias_max": draw(one_of(8, 4.5)), **rope,
        "clip_qkv": draw(one_of(None, 1)), "softmax_scale": draw(one_of(None, 0.3)), "fused_qkv": fused,
        "attn_logit_softcapping": draw(one_of(None, 2.0)), "sliding_window_size": draw(one_of(-1, 0, 3)),
        "attn_temperature_tuning": {"floor_scale": 3, "attn_scale": draw(one_of(0.0, 0.5))},
    }  # fmt: skip
    if attn_type == "grouped_query_attention":
        attn_config["kv_n_heads"] = draw(one_of(*(k for k in (1, 2, 3, 4) if n_heads % k == 0)))
    if qk_norm:
        attn_config[qk_norm] = True
    ffn_type = draw(one_of("mptmlp", "mptglu", "te_ln_mlp", "torch_dmoe", "mb_dmoe"))
    ffn_config = {"ffn_type": ffn_type, "ffn_hidden_size": draw(one_of(None, 20))}
    if ffn_type in ("torch_dmoe", "mb_dmoe"):
        ffn_config |= {
            "moe_num_experts": 3, "moe_top_k": draw(one_of(1, 2)), "mlp_type": draw(one_of("mlp", "glu")),
            "moe_normalize_expert_weights": draw(one_of(None, 1, 2)),
        }  # fmt: skip
    if ffn_type != "te_ln_mlp":
        ffn_config["ffn_act_fn"] = draw(one_of(None, {"name": "silu"}, {"name": "leaky_relu", "negative_slope": 0.1}))
    block = draw(
        one_of(
            None, {"sliding_window_size": 2}, {"reuse_kv_layer_idx": -1}, {"reuse_kv_x_layer_idx": -1}, {"nope": True}
        )
    )
    assume(not (block == {"nope": True} and position in ("learned", "none")))
    assume(not (block == {"reuse_kv_x_layer_idx": -1} and fused))
    return {
        "d_model": 8 * n_heads, "n_heads": n_heads, "n_layers": 2, "vocab_size": 31, "max_seq_len": 16,
        "no_bias": draw(st.booleans()), "attention_bias": draw(one_of(None, True, False)),
        "norm_type": draw(one_of("layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm")),
        "tie_word_embeddings": draw(st.booleans()), "logit_scale": draw(one_of(None, 0.5, "inv_sqrt_d_model")),
        "final_logit_softcapping": draw(one_of(None, 5.0)), "learned_pos_emb": position == "learned",
        "expansion_ratio": draw(one_of(2, 1.5)), "embedding_fraction": draw(one_of(1.0, 0.1)),
        "pad_token_id": draw(one_of(None, 3)), "attn_config": attn_config, "ffn_config": ffn_config,
        "head_dim": draw(one_of(None, 6)) if not fused and rope["rope_impl"] == "hf" else None,
        **({} if block is None else second_block(**block)),
    }  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(configs(), st.integers(1, 10))
def test_any_valid_configuration(d, split):
    """Builds and counts; round trip; causality; padding changes nothing; decoding in parts equals the full forward."""
    from mpt_eqx import MPT, KVCache, MPTConfig

    config = MPTConfig.from_dict(d)
    assert MPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = MPT(config, key=jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == config.num_parameters()

    forward = eqx.filter_jit(lambda model, tokens, mask: model(tokens, mask=mask))
    tokens = TOKENS % 31
    padded, real = jnp.pad(tokens, (0, 4)), jnp.arange(16) < 12
    full = forward(model, padded, real)
    assert np.isfinite(full[:12]).all()
    changed = forward(model, padded.at[11:].set(7), real)
    np.testing.assert_allclose(changed[:11], full[:11], atol=1e-5)
    if not config.attn_config.attn_temperature_tuning.attn_scale:
        left = forward(model, jnp.roll(padded, 4), jnp.roll(real, 4))
        np.testing.assert_allclose(left[4:], full[:12], atol=1e-4)

    extend = eqx.filter_jit(MPT.extend)
    cache, rows = KVCache.empty(config, 16, jnp.float32), []
    for part in (tokens[:split], *tokens[split:, None]):
        x, cache = extend(model, part, cache)
        rows.append(model.unembed(x))
    np.testing.assert_allclose(jnp.concatenate(rows), full[:12], atol=1e-4)


BAD = [
    *[
        (field, value)
        for field in ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size")
        for value in (0, "x")
    ],
    *[(field, "x") for field in ("no_bias", "tie_word_embeddings", "learned_pos_emb", "attention_bias", "norm_type")],
    *[(field, -1) for field in ("resid_pdrop", "emb_pdrop", "norm_eps", "final_logit_softcapping", "pad_token_id")],
    *[("embedding_fraction", 2), ("logit_scale", "x"), ("head_dim", -2), ("block_overrides", 3), ("magic", 0)],
    *[
        (f"attn_config.{field}", "x")
        for field in ("attn_type", "clip_qkv", "softmax_scale", "alibi", "rope", "rope_impl")
    ],
    *[
        (f"attn_config.{field}", -1.5)
        for field in ("sliding_window_size", "alibi_bias_max", "attn_pdrop", "rope_theta")
    ],
    *[("attn_config.rope_hf_config", 3), ("attn_config.attn_temperature_tuning", 3), ("attn_config.magic", 1)],
    *[("ffn_config.ffn_type", "mb_moe"), ("ffn_config.ffn_hidden_size", 0), ("ffn_config.ffn_act_fn", 1)],
]


@settings(max_examples=200, deadline=None)
@given(configs(), st.sampled_from(BAD))
def test_any_invalid_configuration_names_its_field(d, bad):
    from mpt_eqx import ConfigError, MPTConfig

    *parts, field = bad[0].split(".")
    d = json.loads(json.dumps(d))
    (d[parts[0]] if parts else d)[field] = bad[1]
    with pytest.raises(ConfigError, match=field):
        MPTConfig.from_dict(d)


def presets():
    from mpt_eqx.config_presets import PRESETS

    return list(PRESETS)


@pytest.mark.parametrize("name", presets())
def test_a_small_sibling_of_a_known_model(tmp_path, name):
    """The preset with its sizes shrunk: saved, loaded, and generating what its full forward pass says."""
    from mpt_eqx import MPT, AttnConfig, MPTConfig, from_pretrained, generate, save_pretrained

    full = MPTConfig.preset(name)
    assert full.num_parameters() > 1e7 or name == "mpt-small-cpu"
    groups = full.n_heads // full.kv_heads
    grouped = {} if groups == 1 else {"kv_n_heads": 2}
    attn_config = dataclasses.replace(full.attn_config, **grouped)
    assert isinstance(attn_config, AttnConfig)
    config = dataclasses.replace(
        full, d_model=48, n_heads=6, n_layers=2, vocab_size=61, max_seq_len=64, attn_config=attn_config
    )
    save_pretrained(MPT(config, key=jax.random.key(0)), tmp_path)
    model = from_pretrained(tmp_path)
    assert model.config == config
    result = generate(model, TOKENS.tolist(), max_new_tokens=4, return_logits=True)
    logits = model(jnp.concatenate([TOKENS, jnp.asarray(result.tokens[0])]))
    np.testing.assert_allclose(logits[11:-1], result.logits[0], atol=1e-4)


def primitives(config):
    """The operations of a forward pass, those inside of others included, and the shapes it makes."""
    from mpt_eqx import MPT

    skeleton = eqx.filter_eval_shape(MPT, config, key=jax.random.key(0))
    arrays, rest = eqx.partition(skeleton, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    tokens = jax.ShapeDtypeStruct((8,), jnp.int32)
    traced = jax.make_jaxpr(lambda arrays, tokens: eqx.combine(arrays, rest)(tokens))(arrays, tokens)
    found, dims = set(), set()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            found.add(eqn.primitive.name)
            dims.update(dim for out in eqn.outvars for dim in out.aval.shape)
            for param in eqn.params.values():
                for inner in param if isinstance(param, tuple | list) else [param]:
                    if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                        walk(inner)

    walk(traced.jaxpr)
    return found, dims


def test_a_plain_mpt_7b_shows_no_trace_of_what_it_does_not_use():
    from mpt_eqx import MPTConfig

    plain, _ = primitives(MPTConfig.preset("mpt-7b"))
    wanted = {
        *("add", "sub", "mul", "div", "neg", "exp", "erfc", "rsqrt", "max", "reduce_max", "reduce_sum", "dot_general"),
        *("iota", "le", "lt", "select_n", "gather", "broadcast_in_dim", "reshape", "transpose", "split", "squeeze"),
        *("convert_element_type", "stop_gradient", "copy", "jit", "pjit", "custom_jvp_call"),
    }
    assert plain <= wanted, plain - wanted


@pytest.mark.parametrize(
    ("change", "shows"),
    [
        (attn(clip_qkv=1), "min"),
        (attn(attn_logit_softcapping=1.0), "tanh"),
        ({"final_logit_softcapping": 1.0}, "tanh"),
        (attn(**ROPE), "cos"),
        (attn(**ROPE, rope_hf_config=DYNAMIC), "pow"),
        (attn(attn_temperature_tuning={"attn_scale": 0.5}), "floor"),
        (ffn(**MOE), "top_k"),
        (ffn(ffn_act_fn={"name": "silu"}), "logistic"),
        ({"pad_token_id": 3}, "eq"),
    ],
    ids=str,
)
def test_what_a_model_uses_does_show(change, shows):
    assert shows not in primitives(config_of())[0]
    assert shows in primitives(config_of(change))[0]


@pytest.mark.parametrize("change", [{}, attn(**ROPE), attn(**ROPE, rope_hf_config=DYNAMIC)], ids=str)
def test_no_table_of_size_max_seq_len(change):
    assert 131_072 not in primitives(config_of({"max_seq_len": 131_072}, change))[1]


@pytest.mark.parametrize("bias_max", [8, 16, 4.5])
@pytest.mark.parametrize("n_heads", [32, 12])
def test_alibi_at_131072_tokens(n_heads, bias_max):
    """Against float64: a bias is off by at most 2⁻²³ of itself (so 0.0075 at −1.1e5), a probability by 3e-7."""
    from mpt_eqx.model.positions import alibi_bias, alibi_slopes

    t = 131_072
    m = 2 ** (n_heads - 1).bit_length()
    slopes = 2.0 ** (-np.float64(bias_max) * np.arange(1, m + 1) / m)
    if m != n_heads:
        slopes = np.concatenate([slopes[1::2], slopes[0::2]])[:n_heads]
    scores = np.random.default_rng(0).normal(size=t).astype(np.float32)
    worst_bias = worst_probability = 0.0
    for query in (0, 1, 4095, 65_536, t - 1):
        pos = jnp.arange(query + 1)
        bias = alibi_bias(alibi_slopes(n_heads, bias_max), jnp.array([query]), pos)
        found = np.asarray(jax.nn.softmax(bias[:, 0] + scores[: query + 1], axis=-1), np.float64)
        exact = slopes[:, None] * (np.arange(query + 1) - query)
        probabilities = np.exp(exact + scores[: query + 1])
        probabilities /= probabilities.sum(-1, keepdims=True)
        off = np.abs(np.asarray(bias[:, 0], np.float64) - exact)
        assert (off <= np.abs(exact) * 2.0**-23).all()
        worst_bias = max(worst_bias, off.max())
        worst_probability = max(worst_probability, np.abs(found - probabilities).max())
    assert worst_bias < 0.0075
    assert worst_probability < 3e-7


@pytest.mark.parametrize("change", [{}, attn(**ROPE), attn(alibi=False, rope=True), attn(alibi=False)], ids=str)
def test_longer_than_max_seq_len_on_request_but_for_learned_positions(tmp_path, change):
    from mpt_eqx import MPT, CheckpointError, MPTError, from_pretrained, generate, save_pretrained

    config = config_of(change)
    tokens = jnp.arange(40, dtype=jnp.int32)
    save_pretrained(MPT(config, key=jax.random.key(0)), tmp_path)
    model, longer = from_pretrained(tmp_path), {"config_overrides": {"max_seq_len": 48}}
    if config.learned_pos_emb:
        with pytest.raises(
            MPTError, match="at most max_seq_len=32, found 40; learned positions end there; shorten the"
        ):
            model(tokens)
        with pytest.raises(
            CheckpointError,
            match=r"misshaped: .*wpe.weight \(expected \[48, 32\], found \[32, 32\] in model.safetensors\)",
        ):
            from_pretrained(tmp_path, **longer)
        return
    with pytest.raises(MPTError, match=r"at most max_seq_len=32, found 40; .*config_overrides=\{'max_seq_len': 40\}"):
        model(tokens)
    model = from_pretrained(tmp_path, **longer)
    np.testing.assert_allclose(model(tokens)[:32], from_pretrained(tmp_path)(tokens[:32]), atol=1e-5)
    assert generate(model, tokens.tolist(), max_new_tokens=8).tokens.shape == (1, 8)
