"""The family of models: every field of the configuration counts, and any valid configuration behaves."""

import dataclasses
import itertools
import json
import math
import re
from collections import Counter

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from census import transcribed
from conftest import examples, one_in, some
from hypothesis import given
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
    from mpt_eqx.config.dialects import override

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
    "ActFnConfig.alpha": (ffn(ffn_act_fn={"name": "elu", "alpha": 0.2}), ffn(ffn_act_fn={"alpha": 0.3})),
    "ActFnConfig.min_val": (ffn(ffn_act_fn={"name": "hardtanh", "min_val": 0.2}), ffn(ffn_act_fn={"min_val": 0.3})),
    "ActFnConfig.max_val": (ffn(ffn_act_fn={"name": "hardtanh", "max_val": 0.2}), ffn(ffn_act_fn={"max_val": 0.3})),
    "ActFnConfig.beta": (ffn(ffn_act_fn={"name": "softplus", "beta": 2.0}), ffn(ffn_act_fn={"beta": 3.0})),
    "ActFnConfig.threshold": (
        ffn(ffn_act_fn={"name": "softplus", "threshold": -5.0}), ffn(ffn_act_fn={"threshold": 5.0}),
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
    """Yields the weights that a model starts with, what it computes in training, and its gradients."""
    from mpt_eqx import MPT
    from mpt_eqx.checkpoint.names import named_leaves

    model = MPT(config, key=jax.random.key(0))
    ids = SEQUENCES if config.attn_config.attn_uses_sequence_id else None

    def forward(model):
        return model(TOKENS, sequence_ids=ids, key=jax.random.key(1))

    yield named_leaves(model)
    yield {"logits": forward(model)}
    yield named_leaves(eqx.filter_jit(eqx.filter_grad(lambda model: jnp.sum(forward(model) ** 2)))(model))


def alike(a, b):
    """Tells whether two dictionaries of arrays have the same names, shapes and values."""
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape and np.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a
    )


@pytest.mark.parametrize("field", one_in(8, CHANGES))
def test_every_field_counts(field):
    """Changing it changes the weights a model starts with, its logits, or else a gradient."""
    base, change = CHANGES[field]
    assert config_of(base) != config_of(base, change)
    stages = zip(behaviour(config_of(base)), behaviour(config_of(base, change)), strict=True)
    assert not all(alike(before, after) for before, after in stages)


def test_no_field_is_left_out():
    from mpt_eqx import config

    parts = (
        *(config.MPTConfig, config.AttnConfig, config.FFNConfig, config.InitConfig, config.RopeHFConfig),
        *(config.TemperatureTuning, config.ActFnConfig, config.BlockOverride),
    )
    fields = {f"{part.__name__}.{field.name}" for part in parts for field in dataclasses.fields(part)}
    parts_and_text = {*(f"{part}_config" for part in ("attn", "ffn", "init")), "bos_token_id", "eos_token_id"}
    fields -= {f"MPTConfig.{name}" for name in (*parts_and_text, "text_pad_token_id")}  # of no effect on the model
    assert fields - {"FFNConfig.moe_loss_weight"} == set(CHANGES)  # counts in next_token_loss: see test_train.py


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
def overrides(draw, n_layers, *, may_nope, fused):
    """block_overrides for every block: windows, tuning and nope combined, and chains of blocks that read others."""
    blocks = {}
    for i in range(n_layers):
        reuse = ["reuse_kv_layer_idx"] + ["reuse_kv_x_layer_idx"] * (not fused)
        reused = {draw(one_of(*reuse)): -draw(st.integers(1, i))} if i and draw(st.booleans()) else {}
        changed = {
            "sliding_window_size": draw(one_of(None, None, 0, 2, -1)),
            "attn_temperature_tuning": draw(one_of(None, None, {"attn_scale": 0.7}, {"attn_scale": 0.0})),
            "nope": True if may_nope and draw(st.booleans()) else None,
        }
        blocks[f"block {i}"] = attn(**reused, **{key: value for key, value in changed.items() if value is not None})
    return {"order": [{"name": name} for name in blocks], "overrides": blocks}


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
    # Where llm-foundry's two implementations would count the positions of packed sequences otherwise, "torch" does as
    # this library.
    attn_config = {
        "attn_type": attn_type, "alibi": "alibi" in position, "alibi_bias_max": draw(one_of(8, 4.5, 16)), **rope,
        "clip_qkv": draw(one_of(None, 1)), "softmax_scale": draw(one_of(None, 0.3)), "fused_qkv": fused,
        "attn_logit_softcapping": draw(one_of(None, 2.0)), "sliding_window_size": draw(one_of(-1, 0, 3)),
        "attn_temperature_tuning": {"floor_scale": 3, "attn_scale": draw(one_of(0.0, 0.5))},
        "attn_uses_sequence_id": draw(st.booleans()), "attn_impl": "torch", "attn_pdrop": draw(one_of(0, 0.5)),
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
            "moe_normalize_expert_weights": draw(one_of(None, 1, 2)), "moe_loss_weight": draw(one_of(0, 0.1, 0.5)),
        }  # fmt: skip
    if ffn_type != "te_ln_mlp":
        ffn_config["ffn_act_fn"] = draw(one_of(None, {"name": "silu"}, {"name": "leaky_relu", "negative_slope": 0.1}))
    n_layers = draw(one_of(2, 3, 4))
    blocks = draw(st.one_of(st.none(), overrides(n_layers, may_nope=position != "learned", fused=fused)))
    return {
        "d_model": 8 * n_heads, "n_heads": n_heads, "n_layers": n_layers, "vocab_size": 31, "max_seq_len": 16,
        "resid_pdrop": draw(one_of(0.0, 0.5)), "emb_pdrop": draw(one_of(0.0, 0.5)),
        "no_bias": draw(st.booleans()), "attention_bias": draw(one_of(None, True, False)),
        "norm_type": draw(one_of("layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm")),
        "tie_word_embeddings": draw(st.booleans()), "logit_scale": draw(one_of(None, 0.5, "inv_sqrt_d_model")),
        "final_logit_softcapping": draw(one_of(None, 5.0)), "learned_pos_emb": position == "learned",
        "expansion_ratio": draw(one_of(2, 1.5)), "embedding_fraction": draw(one_of(1.0, 0.1)),
        "pad_token_id": draw(one_of(None, 3)), "attn_config": attn_config, "ffn_config": ffn_config,
        "head_dim": draw(one_of(None, 6)) if not fused and rope["rope_impl"] == "hf" else None,
        "block_overrides": blocks,
    }  # fmt: skip


@pytest.mark.slow
@examples(20)
@given(configs(), st.integers(1, 10), st.integers(1, 11))
def test_any_valid_configuration(d, split, at):
    """Builds and counts; round trip; causality; padding changes nothing; decoding in parts equals the full forward.

    Sequences packed into one input do not see each other, and dropout is off under inference_mode.
    """
    from mpt_eqx import MPT, KVCache, MPTConfig, MPTError

    config = MPTConfig.from_dict(d)
    assert MPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = eqx.filter_jit(MPT)(config, key=jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array))) == config.num_parameters()
    if config.resid_pdrop or config.emb_pdrop or config.attn_config.attn_pdrop:
        with pytest.raises(MPTError, match="key: expected a key"):
            model(TOKENS % 31)
    model = eqx.nn.inference_mode(model)

    # One program for all: without packing, every token is of the same sequence.
    packs = config.attn_config.attn_uses_sequence_id

    @eqx.filter_jit
    def forward(model, tokens, mask, ids):
        return model(tokens, mask=mask, sequence_ids=ids)

    tokens, ids = TOKENS % 31, jnp.zeros(16, jnp.int32) if packs else None
    padded, real = jnp.pad(tokens, (0, 4)), jnp.arange(16) < 12
    full = forward(model, padded, real, ids)
    assert np.isfinite(full[:12]).all()
    changed = forward(model, padded.at[at:].set(7), real, ids)
    np.testing.assert_allclose(changed[:at], full[:at], atol=1e-5)
    if all(layer.attn_temperature_tuning is None for layer in config.layers):
        left = forward(model, jnp.roll(padded, 4), jnp.roll(real, 4), ids)
        np.testing.assert_allclose(left[4:], full[:12], atol=1e-4)
    if packs:
        ids = (jnp.arange(16) >= at).astype(jnp.int32)
        apart, other = (forward(model, row, real, ids) for row in (padded, padded.at[:at].set(7)))
        np.testing.assert_allclose(apart[:at], full[:at], atol=1e-5)
        np.testing.assert_allclose(other[at:12], apart[at:12], atol=1e-5)

    extend, unembed = eqx.filter_jit(MPT.extend), eqx.filter_jit(MPT.unembed)
    cache, rows = KVCache.empty(config, 16, jnp.float32), []
    for part in (tokens[:split], *tokens[split:, None]):
        x, cache = extend(model, part, cache)
        rows.append(unembed(model, x))
    np.testing.assert_allclose(jnp.concatenate(rows), full[:12], atol=1e-4)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PARTS = ("attn_config", "ffn_config", "init_config")


def all_keys():
    """The path of each key that config.json may have, and of an unknown one in each place."""
    from mpt_eqx import config
    from mpt_eqx.config import keys as known_keys

    def fields(part):
        return [field.name for field in dataclasses.fields(part)]

    top = known_keys.SUPPORTED[""] | known_keys.IGNORED[""] | set(known_keys.ALIASES)
    keys = [(key,) for key in sorted(top - set(PARTS))]
    for known in (known_keys.SUPPORTED, known_keys.IGNORED, known_keys.FIXED_VALUE):
        keys += [(part, key) for part in PARTS for key in sorted(known[part])]
    inner = {
        ("attn_config", "rope_hf_config"): [*fields(config.RopeHFConfig), "trained_max_seq_len"],
        ("attn_config", "attn_temperature_tuning"): fields(config.TemperatureTuning),
        ("attn_config", "rope_dail_config"): ["type", "pos_idx_in_fp32", "xpos_scale_base"],
        ("ffn_config", "ffn_act_fn"): fields(config.ActFnConfig),
        ("block_overrides",): ["order", "overrides", "repeat"],
        ("block_overrides", "overrides", "x", "attn_config"): fields(config.BlockOverride),
    }
    keys += [(*path, key) for path in inner for key in inner[path]]
    return [*keys, *((*path, "magic") for path in ((), *((part,) for part in PARTS), *inner))]


# A value that is fine by itself may contradict another; then that one may be named.
CONTRADICTED = {
    "d_model": {"head_dim", "expansion_ratio", "rope"}, "hidden_size": {"head_dim", "expansion_ratio", "rope"},
    "n_heads": {"rope"}, "num_attention_heads": {"d_model", "kv_n_heads", "head_dim", "rope"},
    "n_layers": {"block_overrides"}, "num_hidden_layers": {"block_overrides"},
    "vocab_size": {"pad_token_id"}, "alibi": {"nope"}, "rope": {"head_dim", "nope"},
    "attn_type": {"kv_n_heads"}, "learned_pos_emb": {"nope"}, "order": {"block_overrides"},
    "overrides": {"order"}, "repeat": {"block_overrides"}, "attn_impl": set(),
    "moe_num_experts": {"moe_top_k"}, "ffn_type": {"moe_num_experts", "ffn_act_fn"}, "qk_ln": {"qk_gn"},
    "name": {"init_std", "approximate", "negative_slope", "alpha", "min_val", "max_val", "beta", "threshold"},
    "type": {"low_freq_factor"},
    "fused_qkv": {"head_dim", "reuse_kv_x_layer_idx"}, "reuse_kv_layer_idx": {"reuse_kv_x_layer_idx"},
    # An unknown key of a small object: the object is named, and the key shown.
    "magic": {"rope_hf_config", "attn_temperature_tuning", "rope_dail_config", "ffn_act_fn", "block_overrides"},
}  # fmt: skip


def with_value(d, path, value):
    """A copy of a configuration with one value replaced, and objects made on the way to it."""
    key, *rest = path
    if not rest:
        return {**d, key: value}
    inner = d.get(key)
    return {**d, key: with_value(inner if isinstance(inner, dict) else {}, rest, value)}


@examples(600)
@given(configs(), st.sampled_from(all_keys()), json_values)
def test_any_value_of_any_key_is_taken_or_named(d, path, value):
    """A config with this value reads back equal, or the error names the key or one that the value contradicts."""
    from mpt_eqx import ConfigError, MPTConfig
    from mpt_eqx.config.keys import ALIASES

    d = {key: value for key, value in d.items() if key != ALIASES.get(path[0])}
    if path[0] == "block_overrides":
        names = [{"name": "x"}] + [{"name": "default"}] * (d["n_layers"] - 1)
        d = {**d, "block_overrides": {"order": names, "overrides": {"x": {}}}}
    try:
        config = MPTConfig.from_dict(with_value(d, path, value))
    except ConfigError as error:
        names = {path[-1], *CONTRADICTED.get(path[-1], ())}
        assert any(re.search(rf"\b{name}\b", str(error)) for name in names), error
    else:
        assert MPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


TUNED_BLOCK = {"attn_temperature_tuning": {"attn_scale": 1.0}}
TUNED = {**TUNED_BLOCK, "attn_uses_sequence_id": True}
# What contradicts itself whatever else there is, and the field that is named.
CONTRADICTIONS = [
    (attn(qk_ln=True, qk_gn=True), "attn_config.qk_gn"),
    (attn(attn_type="multihead_attention", kv_n_heads=1), "attn_config.kv_n_heads"),
    (attn(attn_type="grouped_query_attention", kv_n_heads=None), "attn_config.kv_n_heads"),
    (attn(attn_type="grouped_query_attention", kv_n_heads=5), "attn_config.kv_n_heads"),
    (attn(fused_qkv=True) | {"head_dim": 6}, "head_dim"),
    (attn(fused_qkv=False, rope=True, rope_impl="dail") | {"head_dim": 6}, "head_dim"),
    (attn(fused_qkv=False, rope=True, rope_impl="hf") | {"head_dim": 5}, "attn_config.rope"),
    (attn(rope=True, rope_dail_config={"type": "xpos"}, rope_impl="dail"), "attn_config.rope_dail_config.type"),
    (attn(rope_hf_config={"type": "llama3"}), "attn_config.rope_hf_config.low_freq_factor"),
    (attn(rope_hf_config={**LLAMA3, "low_freq_factor": 4.0}), "attn_config.rope_hf_config.high_freq_factor"),
    (attn(**TUNED, attn_impl="flash"), "attn_config.attn_impl"),
    (ffn(ffn_type="te_ln_mlp", ffn_act_fn={"name": "silu"}), "ffn_config.ffn_act_fn"),
    (ffn(ffn_type="mptmlp", moe_num_experts=2, moe_top_k=1), "ffn_config.moe_num_experts"),
    (ffn(ffn_type="torch_dmoe", moe_num_experts=2, moe_top_k=3), "ffn_config.moe_top_k"),
    (ffn(ffn_act_fn={"name": "silu", "approximate": "tanh"}, ffn_type="mptmlp"), "ffn_config.ffn_act_fn.approximate"),
    (init(name="baseline_", init_std=None), "init_config.init_std"),
    (init(emb_init_uniform_lim=[1, -1]), "init_config.emb_init_uniform_lim"),
    ({"expansion_ratio": 1.01} | ffn(ffn_hidden_size=None), "expansion_ratio"),
    ({"pad_token_id": 31}, "pad_token_id"),
    ({"norm_eps": 1e-5, "layer_norm_epsilon": 1e-6}, "norm_eps"),
    ({"hidden_size": 1}, "d_model"),
    ({"n_layers": 5, "block_overrides": {"order": [{"name": "default"}], "overrides": {}}}, "block_overrides"),
    (attn(alibi=False, rope=False) | {"learned_pos_emb": True} | second_block(nope=True), "block_overrides[1]: nope"),
    (attn(fused_qkv=True) | second_block(reuse_kv_x_layer_idx=-1), "block_overrides[1]: reuse_kv_x_layer_idx"),
    (second_block(reuse_kv_layer_idx=-2), "block_overrides[1]: reuse_kv_layer_idx"),
    (
        second_block(reuse_kv_layer_idx=-1, reuse_kv_x_layer_idx=-1),
        "block_overrides: attn_config.reuse_kv_x_layer_idx",
    ),
    (attn(attn_uses_sequence_id=True, attn_impl="flash") | second_block(**TUNED_BLOCK), "attn_config.attn_impl"),
]


@examples(200)
@given(configs(), st.sampled_from(CONTRADICTIONS))
def test_any_contradiction_names_its_field(d, contradiction):
    from mpt_eqx import ConfigError, MPTConfig

    change, field = contradiction
    # Neither the overrides nor the head width of the random configuration, which would be wrong with the change too.
    d = {**d, "block_overrides": None, "head_dim": None, "n_layers": 2}
    for key, value in change.items():
        d[key] = {**d.get(key, {}), **value} if key in PARTS else value
    with pytest.raises(ConfigError, match=rf"^{re.escape(field)}: "):
        MPTConfig.from_dict(d)


def presets():
    from mpt_eqx.config.presets import PRESETS

    return list(PRESETS)


def shrunk(full):
    """The configuration of a large model with small sizes, and a number of heads that is no power of two."""
    grouped = {} if full.kv_heads == full.n_heads else {"kv_n_heads": 2}
    attn_config = dataclasses.replace(full.attn_config, **grouped)
    return dataclasses.replace(
        full, d_model=48, n_heads=6, n_layers=2, vocab_size=61, max_seq_len=64, attn_config=attn_config
    )


# One; the others differ from it in more than their sizes.
SIBLINGS = ("mpt-7b",)


@pytest.mark.parametrize("name", some(presets(), SIBLINGS))
def test_a_small_sibling_of_a_known_model(tmp_path, name):
    """The preset with its sizes shrunk: saved, loaded, and generating what its full forward pass says."""
    from mpt_eqx import MPT, MPTConfig, from_pretrained, generate, save_pretrained

    full = MPTConfig.preset(name)
    assert full.num_parameters() > 1e7 or name == "mpt-small-cpu"
    config = shrunk(full)
    save_pretrained(MPT(config, key=jax.random.key(0)), tmp_path)
    model = from_pretrained(tmp_path)
    assert model.config == config
    result = generate(model, TOKENS.tolist(), max_new_tokens=4, return_logits=True)
    logits = eqx.filter_jit(model)(jnp.concatenate([TOKENS, jnp.asarray(result.tokens[0])]))
    np.testing.assert_allclose(logits[11:-1], result.logits[0], atol=1e-4)


def with_random_weights(config):
    """A model whose every tensor matters, biases and norms too, and whose q, k and v reach 6; and its tensors."""
    from mpt_eqx import MPT
    from mpt_eqx.checkpoint.names import named_leaves, with_leaves

    rng, w = np.random.default_rng(0), {}
    skeleton = eqx.filter_eval_shape(MPT, config, key=jax.random.key(0))
    for name, leaf in named_leaves(skeleton).items():
        spread = 3 if "Wqkv" in name else 1
        drawn = rng.normal(size=leaf.shape) * (spread / math.sqrt(leaf.shape[-1]) if len(leaf.shape) > 1 else 0.3)
        w[name] = (drawn + ("norm" in name or "_ln" in name) * name.endswith("weight")).astype(np.float32)
    model = with_leaves(skeleton, {name: jnp.asarray(array) for name, array in w.items()})
    return model, {name: array.astype(np.float64) for name, array in w.items()}


def krutrim():
    """Krutrim-1 but for its sizes: grouped queries, clip_qkv, and heads that are no power of two."""
    from mpt_eqx import MPTConfig

    grouped = {"attn_type": "grouped_query_attention", "kv_n_heads": 8, "clip_qkv": 6, "alibi": True}
    return MPTConfig.from_dict(
        {"d_model": 4608, "n_heads": 48, "n_layers": 32, "max_seq_len": 4096, "no_bias": True, "attn_config": grouped}
    )


TRANSCRIBED = [
    *("krutrim-1", "sea-lion-7b", "sea-lion-3b", "phogpt-4b", "replit-code-v1_5-3b", "mpt-7b", "mpt-7b-storywriter"),
    *("mpt-1b-redpajama-200b", "mpt-125m"),
]


@pytest.mark.parametrize("name", one_in(2, TRANSCRIBED))
def test_against_a_transcription_of_the_formulas(name):
    """A checkpoint's own combination of features, each of which makes a difference."""
    from mpt_eqx import MPTConfig

    config = shrunk(krutrim() if name == "krutrim-1" else MPTConfig.preset(name))
    model, w = with_random_weights(config)
    tokens, attn = TOKENS.tolist(), config.attn_config
    wanted = transcribed(w, config, tokens)
    np.testing.assert_allclose(model(TOKENS), wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)

    others = [dataclasses.replace(config, attn_config=dataclasses.replace(attn, **change)) for change in (
        *([{"alibi_bias_max": 12}] if attn.alibi else []), *([{"clip_qkv": None}] if attn.clip_qkv else []),
        *([{"qk_ln": False}] if attn.qk_ln else []),
    )]  # fmt: skip
    others += [dataclasses.replace(config, logit_scale=None)] if config.logit_scale else []
    for other in others:
        assert np.abs(transcribed(w, other, tokens) - wanted).max() > 0.01
    # Something added to every key alike is lost in the softmax.
    for tensor in (tensor for tensor in w if not tensor.endswith("k_ln.bias")):
        bent = {**w, tensor: w[tensor] * 1.5} if "_ln" not in tensor else {**w, tensor: w[tensor][::-1]}
        assert np.abs(transcribed(bent, config, tokens) - wanted).max() > 0.001, tensor


def test_the_gradient_of_sea_lions_embedding():
    """A tenth of what the input side gives and all of the output side, each by differences in float64."""
    from mpt_eqx import MPTConfig

    config = shrunk(MPTConfig.preset("sea-lion-7b"))
    assert config.embedding_fraction == 0.1
    model, w = with_random_weights(config)
    tokens, rng = TOKENS.tolist(), np.random.default_rng(1)
    weight, toward = rng.normal(size=(len(tokens), 61)), rng.normal(size=(61, 48)) * 1e-4
    embedding = w["transformer.wte.weight"]

    def loss(into, out):
        moved = {"transformer.wte.weight": embedding + into, "lm_head.weight": embedding + out}
        return np.sum(weight * transcribed({**w, **moved}, config, tokens))

    from_input = (loss(toward, 0) - loss(-toward, 0)) / 2
    from_output = (loss(0, toward) - loss(0, -toward)) / 2
    weighted = eqx.filter_grad(lambda model: jnp.sum(jnp.asarray(weight, jnp.float32) * model(TOKENS)))
    grads = eqx.filter_jit(weighted)(model)
    found = np.sum(np.asarray(grads.wte.weight, np.float64) * toward)
    np.testing.assert_allclose(found, 0.1 * from_input + from_output, rtol=1e-3)
    assert abs(0.9 * from_input) > 0.1 * abs(found)


def traced(config, how, *, length=132):
    """The operations of a full forward pass ("forward"), or of `extend` with a small cache, and the arrays given.

    Of more positions than `MAX_PREFILL_ROWS`, so that one product stands for each, on whatever platform.
    """
    from mpt_eqx import MPT, KVCache

    config = dataclasses.replace(config, max_seq_len=max(config.max_seq_len, length))
    skeleton = eqx.filter_eval_shape(MPT, config, key=jax.random.key(0))
    arrays, rest = eqx.partition(skeleton, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    tokens = jax.ShapeDtypeStruct((length,), jnp.int32)

    def forward(arrays, tokens):
        return eqx.combine(arrays, rest)(tokens)

    def extend(arrays, tokens, cache):
        model = eqx.combine(arrays, rest)
        x, cache = model.extend(tokens, cache)
        return model.unembed(x), cache

    if how == "forward":
        return jax.make_jaxpr(forward)(arrays, tokens), arrays
    return jax.make_jaxpr(extend)(arrays, tokens, KVCache.empty(config, 256, jnp.float32)), arrays


def jaxprs(jaxpr):
    """A jaxpr and those inside of it: of functions that are called, of loops' bodies."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for param in eqn.params.values():
            for inner in param if isinstance(param, tuple | list) else [param]:
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    yield from jaxprs(inner)


# What only rearranges or wraps or (lt) looks for indices below 0, of which there is more or less from one version of
# JAX to the next.
PLUMBING = {
    "lt",
    *("jit", "pjit", "custom_jvp_call", "custom_vmap_call", "closed_call", "while", "scan", "stop_gradient", "copy"),
    *("convert_element_type", "bitcast_convert_type", "broadcast_in_dim", "reshape", "squeeze", "slice", "transpose"),
    *("optimization_barrier", "name", "remat2"),
}


def operations(config, how):
    """How often each operation on real numbers and on masks stands in the program, and how many arrays are weights."""
    trace, arrays = traced(config, how)
    found = Counter(weights=len(jax.tree.leaves(arrays)))
    for jaxpr in jaxprs(trace.jaxpr):
        for eqn in jaxpr.eqns:
            out = eqn.outvars[0].aval if eqn.outvars else None
            real = out is not None and jnp.issubdtype(out.dtype, jnp.floating)
            mask = out is not None and out.dtype == bool and out.ndim > 1
            if (real or mask) and eqn.primitive.name not in PLUMBING:
                found[eqn.primitive.name] += 1
    return found


def total(*parts):
    return {name: n for name in {k for p in parts for k in p} if (n := sum(p.get(name, 0) for p in parts))}


# (x − mean) / √(variance + eps) · weight. The sums are divided by the width.
NORM = {"reduce_sum": 2, "div": 2, "sub": 1, "mul": 3, "add": 1, "rsqrt": 1, "weights": 1}
# q kᵀ; scale; slope · distance, added; key ≤ query, and where it is not.
SCORES = {"dot_general": 1, "mul": 2, "add": 1, "le": 1, "select_n": 1}
# Wqkv, the mix of values and out_proj.
ATTENTION = {"dot_general": 3, "split": 1, "weights": 2}
SOFTMAX = {"reduce_max": 1, "max": 1, "sub": 1, "exp": 1, "reduce_sum": 1, "div": 1}
# Keys and values written, and read twice.
CACHE = {"scatter": 2, "dynamic_slice": 4}
# A running maximum and sum, scaled down when it grows; then the weights, for values that anything sees, added up.
ONLINE = {
    "reduce_max": 1, "max": 1, "sub": 3, "exp": 3, "mul": 1, "reduce_sum": 1, "add": 2, "div": 1, "select_n": 1,
}  # fmt: skip
# down(gelu(up(x))); gelu is x · ½ · erfc(−x · √½).
MLP = {"dot_general": 2, "mul": 3, "neg": 1, "erfc": 1, "weights": 2}
RESIDUAL = {"add": 2}
LAYER = {
    "forward": total(NORM, ATTENTION, SCORES, SOFTMAX, RESIDUAL, NORM, MLP),
    "extend": total(NORM, ATTENTION, SCORES, SCORES, CACHE, ONLINE, RESIDUAL, NORM, MLP),
}
# Looked up in the embedding, and multiplied by it in the end.
OUTSIDE = total({"gather": 1, "weights": 1}, NORM, {"dot_general": 1})


@pytest.fixture
def without_kernel(monkeypatch):
    """XLA has all products and the attention, so that their operations can be counted."""
    from mpt_eqx.ops import cpu

    monkeypatch.setattr(cpu, "available", lambda: False)


@pytest.mark.parametrize("how", ["forward", "extend"])
def test_a_plain_mpt_7b_computes_its_formula_and_nothing_else(without_kernel, how):
    from mpt_eqx import MPTConfig

    for n_layers in (1, 3):
        config = dataclasses.replace(MPTConfig.preset("mpt-7b"), n_layers=n_layers)
        assert operations(config, how) == total(OUTSIDE, *[LAYER[how]] * n_layers)


def times(n, part):
    return {name: n * count for name, count in part.items()}


TURN = {"split": 1, "mul": 4, "sub": 1, "add": 1, "concatenate": 1}  # one of q and k
ANGLES = {"mul": 1, "cos": 1, "sin": 1}
NO_ALIBI = {"mul": -1, "add": -1}
TANH_CAP = {"div": 1, "tanh": 1, "mul": 1}
# For each feature: what the model is otherwise, the change, and what it adds to each layer and outside of them.
FEATURES = {
    "embedding_fraction": ({}, {"embedding_fraction": 0.1}, {}, {"mul": 2, "add": 1}),
    "pad_token_id": ({}, {"pad_token_id": 3}, {}, {"eq": 0, "select_n": 1}),
    "logit_scale": ({}, {"logit_scale": "inv_sqrt_d_model"}, {}, {"mul": 1}),
    "final_logit_softcapping": ({}, {"final_logit_softcapping": 1.0}, {}, TANH_CAP),
    "untied": ({}, {"tie_word_embeddings": False}, {}, {"weights": 1}),
    "learned positions": (
        attn(alibi=False) | {"learned_pos_emb": False}, {"learned_pos_emb": True}, {},
        {"gather": 1, "add": 1, "weights": 1},
    ),
    "biases": ({}, {"no_bias": False}, {"add": 6, "weights": 6}, {"add": 1, "weights": 1}),
    "attention_bias": ({}, {"attention_bias": True}, {"add": 1, "weights": 1}, {}),
    "unfused qkv": ({}, attn(fused_qkv=False), {"split": -1, "dot_general": 2, "weights": 2}, {}),
    "clip_qkv": ({}, attn(clip_qkv=1), {"max": 1, "min": 1}, {}),
    "qk_ln": ({}, attn(qk_ln=True), times(2, NORM), {}),
    "qk_gn": ({}, attn(qk_gn=True), times(2, NORM), {}),
    "attn_logit_softcapping": ({}, attn(attn_logit_softcapping=1.0), TANH_CAP, {}),
    "sliding_window_size": ({}, attn(sliding_window_size=3), {"ge": 1, "and": 1}, {}),
    "no ALiBi": ({"learned_pos_emb": False}, attn(alibi=False), NO_ALIBI, {}),
    "rope": ({}, attn(**ROPE), total(NO_ALIBI, times(2, total(TURN, ANGLES))), {}),
    "dynamic rope": (
        attn(**ROPE), attn(rope_hf_config=DYNAMIC),
        times(2, {"add": 1, "max": 1, "mul": 2, "div": 1, "sub": 1, "pow": 2}), {},
    ),
    "temperature": (
        {}, attn(attn_temperature_tuning={"attn_scale": 0.5}),
        {"div": 1, "floor": 1, "add": 2, "log": 1, "mul": 2}, {},
    ),
    "rmsnorm": ({}, {"norm_type": "rmsnorm"}, times(2, RMS := {"reduce_sum": -1, "div": -1, "sub": -1}), RMS),
    "GLU": ({}, ffn(ffn_type="mptglu"), {"dot_general": 1, "mul": 1, "weights": 1}, {}),
    "mixture of experts": (
        {}, ffn(**MOE),
        # A softmax over the router's scores, the largest of which are normed; and the sum over the experts.
        total(
            SOFTMAX, {"dot_general": 1, "top_k": 1, "integer_pow": 1, "reduce_sum": 1, "pow": 1, "div": 1},
            {"weights": 1, "scatter": 1, "mul": 1, "add": 1},
        ), {},
    ),
    "silu": ({}, ffn(ffn_act_fn={"name": "silu"}), {"mul": -2, "neg": -1, "erfc": -1, "logistic": 1}, {}),
}  # fmt: skip


# What concerns the scores, which are computed twice from a cache.
IN_SCORES = {
    "attn_logit_softcapping": TANH_CAP, "sliding_window_size": {"ge": 1, "and": 1}, "no ALiBi": NO_ALIBI,
    "rope": NO_ALIBI,
}  # fmt: skip


@pytest.mark.parametrize("how", ["forward", "extend"])
@pytest.mark.parametrize("feature", one_in(8, FEATURES))
def test_what_a_model_uses_does_show(without_kernel, feature, how):
    base, change, per_layer, outside = FEATURES[feature]
    if how == "extend":
        per_layer = total(per_layer, IN_SCORES.get(feature, {}))
    added = operations(config_of(base, change), how)
    added.subtract(operations(config_of(base), how))
    assert {name: n for name, n in added.items() if n} == total(times(2, per_layer), outside) != {}


@pytest.mark.parametrize("how", ["forward", "extend"])
@pytest.mark.parametrize(
    "change",
    [{}, attn(**ROPE), attn(alibi=False, rope=True), attn(**ROPE, rope_hf_config={"type": "dynamic"}),
     attn(**ROPE, rope_hf_config=LLAMA3), attn(alibi=False) | {"learned_pos_emb": False},
     attn(sliding_window_size=4096, attn_uses_sequence_id=True)],
    ids=str,
)  # fmt: skip
def test_no_table_of_size_max_seq_len(change, how):
    """Neither among the weights, nor among constants and inputs of the program, nor on the way."""
    trace, arrays = traced(config_of({"max_seq_len": 131_072}, change), how, length=12)
    shapes = [array.shape for array in (*jax.tree.leaves(arrays), *trace.consts)]
    for jaxpr in jaxprs(trace.jaxpr):
        variables = [*jaxpr.invars, *jaxpr.constvars, *jaxpr.outvars]
        variables += [v for eqn in jaxpr.eqns for v in (*eqn.invars, *eqn.outvars)]
        shapes += [v.aval.shape for v in variables]
    assert len(shapes) > 100 and max(np.prod(shape, dtype=int) for shape in shapes) < 131_072


@pytest.mark.parametrize(("n_heads", "bias_max"), one_in(6, [*itertools.product((32, 12), (8, 16, 4.5))]))
def test_alibi_at_131072_tokens(n_heads, bias_max):
    """Against float64: a bias is off by at most 2⁻²³ of itself (so 0.0075 at −1.1e5), a probability by 3e-7."""
    from mpt_eqx.model.alibi import alibi_slopes
    from mpt_eqx.ops.attention import alibi_bias

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


@pytest.mark.parametrize(("n_heads", "bias_max"), one_in(2, [*itertools.product((32, 12), (8, 16))]))
def test_attention_at_131072_tokens(n_heads, bias_max):
    """What keys near and far weigh with ALiBi, against float64, in both formulas: all at once, and block by block."""
    from mpt_eqx.model.alibi import alibi_slopes
    from mpt_eqx.ops.attention import alibi_bias, attention
    from mpt_eqx.ops.blockwise_attention import blockwise_attention
    from mpt_eqx.ops.layer_cache import LayerCache

    t, query = 131_072, 131_071
    heads = jnp.asarray([0, n_heads // 2, n_heads - 1])
    slopes, pos = alibi_slopes(n_heads, bias_max)[heads], jnp.arange(t)
    scores = np.random.default_rng(0).normal(size=t).astype(np.float32)
    # A score for each key, and values that pick single keys out: the query, its neighbours, the far end.
    picked = query - np.array([0, 1, 2, 100, 5000, 30_000, 65_536, 131_071])
    q = jnp.zeros((3, 1, 8)).at[..., 0].set(1)
    k = jnp.zeros((3, t, 8)).at[..., 0].set(scores)
    v = jnp.zeros((3, t, 8)).at[:, picked, np.arange(8)].set(1)

    def bias_and_mask(keys):
        return alibi_bias(slopes, jnp.array([query]), keys), keys[None] <= query

    at_once = attention(q, k, v, *bias_and_mask(pos), 1.0)
    by_block = blockwise_attention(q, LayerCache(k, v, np.dtype("float32")), bias_and_mask, jnp.asarray(t), 1.0)
    exact = np.exp(np.asarray(slopes, np.float64)[:, None] * (np.arange(t) - query) + scores)
    exact = (exact / exact.sum(-1, keepdims=True))[:, picked]
    assert exact.max() > 0.05
    for found in (at_once, by_block):
        assert np.abs(found[:, 0] - exact).max() < 3e-7


@pytest.mark.parametrize(
    "change", some([{}, attn(alibi=False), attn(**ROPE), attn(alibi=False, rope=True)], [{}, attn(alibi=False)]),
    ids=str,
)  # fmt: skip
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
    np.testing.assert_allclose(
        eqx.filter_jit(model)(tokens)[:32], eqx.filter_jit(from_pretrained(tmp_path))(tokens[:32]), atol=1e-5
    )
    assert generate(model, tokens.tolist(), max_new_tokens=8).tokens.shape == (1, 8)
