"""config.json: dialects, round trips, and one error for each thing that is wrong."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

PLAIN = {
    "model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 97, "no_bias": True,
    "attn_config": {"alibi": True},
}  # fmt: skip


def with_keys(**keys):
    d = {**PLAIN, **keys}
    d["attn_config"] = {**PLAIN["attn_config"], **(keys.get("attn_config") or {})}
    return d


def overrides(content):
    """A block_overrides whose second block has `content`."""
    return {"block_overrides": {"order": [{"name": "default"}, {"name": "x"}], "overrides": {"x": content}}}


def nested(depth):
    order = [{"name": "default"}]
    for _ in range(depth):
        order = [{"order": order}]
    return order


TUNING = {"floor_scale": 3.0, "attn_scale": 0.5}
DYNAMIC = {
    "alibi": False, "rope": True, "rope_impl": "hf",
    "rope_hf_config": {"type": "dynamic", "factor": 2.0, "trained_max_seq_len": 24},
}  # fmt: skip

# As MosaicML published it beside mpt-7b-storywriter.
STORYWRITER = with_keys(
    architectures=["MPTForCausalLM"], auto_map={"AutoConfig": "configuration_mpt.MPTConfig"}, emb_pdrop=0,
    embedding_fraction=1.0, expansion_ratio=4, init_device="cpu", learned_pos_emb=True, logit_scale=None,
    max_seq_len=65536, norm_type="low_precision_layernorm", resid_pdrop=0, tokenizer_name="EleutherAI/gpt-neox-20b",
    torch_dtype="bfloat16", transformers_version="4.28.1", use_cache=False, verbose=0,
    attn_config={
        "alibi_bias_max": 16, "attn_impl": "torch", "attn_pdrop": 0, "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False, "clip_qkv": 6, "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
    },
    init_config={"name": "kaiming_normal_", "fan_mode": "fan_in", "init_gain": 0, "init_std": 0.02, "verbose": 0},
)  # fmt: skip


def test_storywriters_config():
    from mpt_eqx import MPTConfig

    config = MPTConfig.from_dict(STORYWRITER)
    assert (config.attn_config.alibi_bias_max, config.attn_config.clip_qkv, config.max_seq_len) == (16, 6, 65536)
    assert config.tie_word_embeddings and config.init_config.init_std == 0.02


@pytest.mark.parametrize(
    "d",
    [
        PLAIN,
        STORYWRITER,
        with_keys(tie_word_embeddings=False, expansion_ratio=1.5, norm_eps=0.01, norm_type="layernorm"),
        with_keys(
            attn_config={"softmax_scale": 0.5, "alibi_bias_max": 4.5}, init_config={"emb_init_uniform_lim": [0, 1]}
        ),
        with_keys(init_config={"name": "baseline_", "init_std": 0.1, "init_div_is_residual": "3"}),
        # 0 is a window, of the token itself, and False in Python's eyes.
        with_keys(**overrides({"attn_config": {"sliding_window_size": 0}}), attn_config={"sliding_window_size": 3}),
        # llm-foundry has no implementation for these together: "torch" refuses them, "flash" has other numbers.
        with_keys(
            **overrides({"attn_config": {"nope": True}}),
            attn_config={"attn_impl": "torch", "attn_uses_sequence_id": True, "attn_temperature_tuning": TUNING},
        ),
        with_keys(
            **overrides({"attn_config": {"nope": True, "attn_temperature_tuning": TUNING}}),
            attn_config={"attn_impl": "torch", "attn_uses_sequence_id": True},
        ),
        with_keys(attn_config=DYNAMIC),
    ],
    ids=str,
)
def test_round_trip(d):
    from mpt_eqx import MPTConfig

    config = MPTConfig.from_dict(d)
    assert MPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(MPTConfig.from_dict(d))


def test_aliases_and_transformers_defaults():
    from mpt_eqx import MPTConfig

    d = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "layer_norm_epsilon": 0.1}
    config = MPTConfig.from_dict({**d, "attn_config": {"model_type": ""}})
    assert (config.d_model, config.n_heads, config.n_layers, config.norm_eps) == (32, 4, 2, 0.1)
    assert config.attn_config.alibi and config.no_bias
    assert MPTConfig.from_dict({**d, "architectures": ["MptForCausalLM"]}) == config


@pytest.mark.parametrize("off", [0, None, False])
def test_clip_qkv_is_off_when_it_is_false(off):
    from mpt_eqx import MPTConfig

    assert MPTConfig.from_dict(with_keys(attn_config={"clip_qkv": off})).attn_config.clip_qkv is None


@pytest.mark.parametrize("off", [0, 0.0, None])
def test_jitter_by_nothing_is_none(off):
    from mpt_eqx import MPTConfig

    moe = {"ffn_type": "torch_dmoe", "moe_num_experts": 4}
    config = MPTConfig.from_dict(with_keys(ffn_config={**moe, "moe_jitter_eps": off}))
    assert config == MPTConfig.from_dict(with_keys(ffn_config=moe))


def test_the_weight_of_the_balance_is_kept_for_megablocks_mixture():
    from mpt_eqx import ConfigError, FFNConfig, MPTConfig

    def ffn(ffn_type, **keys):
        return MPTConfig.from_dict(with_keys(ffn_config={"ffn_type": ffn_type, **keys}))

    given = ffn("mb_dmoe", moe_num_experts=4, moe_loss_weight=0.05)
    assert given.ffn_config.moe_loss_weight == given.to_dict()["ffn_config"]["moe_loss_weight"] == 0.05
    assert MPTConfig.from_dict(given.to_dict()) == given
    assert ffn("mb_dmoe").ffn_config.moe_loss_weight == 0.1
    for ffn_type in ("torch_dmoe", "mptmlp"):  # llm-foundry does not look at it there
        assert ffn(ffn_type, moe_loss_weight=0.05) == ffn(ffn_type)
        assert "moe_loss_weight" not in ffn(ffn_type).to_dict()["ffn_config"]
        with pytest.raises(ConfigError, match=f"moe_loss_weight: expected no such key with '{ffn_type}'"):
            FFNConfig(ffn_type=ffn_type, moe_loss_weight=0.05)


def test_dynamic_rotation_takes_max_seq_len_like_the_reference_unless_it_was_raised():
    """The reference's own key for a trained length says nothing there; a raised max_seq_len is noted under another."""
    from mpt_eqx import MPTConfig
    from mpt_eqx.config.dialects import override

    def trained(d):
        config = MPTConfig.from_dict(d)
        assert MPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        return config.attn_config.rope_hf_config.original_max_position_embeddings

    rope = {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4}
    d = with_keys(max_seq_len=24, attn_config={**DYNAMIC, "rope_hf_config": rope})
    assert trained(d) is None
    assert trained(override(d, {"max_seq_len": 24})) is None
    raised = override(d, {"max_seq_len": 48})
    assert trained(raised) == 24
    assert trained(override(MPTConfig.from_dict(raised).to_dict(), {"max_seq_len": 96})) == 24
    written = MPTConfig.from_dict(raised).to_dict()["attn_config"]["rope_hf_config"]
    assert written == {"type": "dynamic", "factor": 2.0, "trained_max_seq_len": 24}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": 30, "n_heads": 4}, "hidden_size: expected a multiple of n_heads=4, found 30"),
        ({"num_attention_heads": "x"}, "num_attention_heads: expected a whole number from 1 to"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a whole number from 1 to 1024, found 0"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon: expected a finite number > 0, found 0"),
        ({"layer_norm_epsilon": 0, "norm_eps": 0}, "norm_eps: expected a finite number > 0, found 0"),
        ({"mlp_ratio": 0}, "mlp_ratio: expected a finite number > 0, found 0"),
        ({"model_type": "mosaic_gpt", "attn_qk_ln": 1}, "attn_qk_ln: expected true or false, found 1"),
        ({"model_type": "mosaic_gpt", "attn_clip_qkv": "x"}, "attn_clip_qkv: expected a finite number > 0 or null, fo"),
        ({"alibi": 2}, "alibi: expected true or false, found 2"),
        ({"alibi": True, "prefix_lm": True}, "prefix_lm: expected false, found True"),
        ({"alibi": True, "param_init_fn": "magic_"}, "param_init_fn: expected 'kaiming_normal_' or"),
    ],
)
def test_an_error_names_the_key_that_the_file_used(keys, message):
    import re

    from mpt_eqx import ConfigError, MPTConfig

    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        MPTConfig.from_dict(keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"d_model": 30}, "d_model: expected a multiple of n_heads=4, found 30"),
        ({"d_model": 0}, "d_model: expected a whole number from 1"),
        ({"d_model": 1e400}, "d_model: expected a whole number from 1 to 2147483647, found inf"),
        ({"n_heads": True}, "n_heads: expected a whole number from 1"),
        ({"n_heads": -4}, "n_heads: expected a whole number from 1"),
        ({"n_layers": "2"}, "n_layers: expected a whole number from 1 to 1024, found '2'"),
        ({"n_layers": 10**9}, "n_layers: expected a whole number from 1 to 1024"),
        ({"head_dim": 12}, "head_dim: expected d_model/n_heads=8 or null with fused_qkv, found 12"),
        ({"head_dim": 0}, "head_dim: expected a whole number from 1 to 2147483647 or null, found 0"),
        ({"head_dim": 12, "attn_config": {"fused_qkv": False, "rope": True}}, "=8 or null with rope_impl 'dail', foun"),
        ({"max_seq_len": 10**12}, "max_seq_len: expected a whole number"),
        ({"vocab_size": 0.5}, "vocab_size: expected a whole number"),
        ({"expansion_ratio": 0}, "expansion_ratio: expected a finite number > 0, found 0"),
        ({"expansion_ratio": 1.01}, "expansion_ratio: expected d_model·expansion_ratio to be a whole number"),
        ({"norm_eps": float("nan")}, "norm_eps: expected a finite number > 0, found nan"),
        ({"norm_type": "batchnorm"}, "norm_type: expected 'low_precision_layernorm' or 'layernorm' or"),
        ({"no_bias": 1}, "no_bias: expected true or false, found 1"),
        ({"attention_bias": "yes"}, "attention_bias: expected true or false or null, found 'yes'"),
        ({"learned_pos_emb": None}, "learned_pos_emb: expected true or false, found None"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings: expected true or false, found None"),
        ({"resid_pdrop": 1.5}, "resid_pdrop: expected a probability from 0 to 1, found 1.5"),
        ({"emb_pdrop": None}, "emb_pdrop: expected a probability from 0 to 1, found None"),
        ({"logit_scale": "sqrt"}, "logit_scale: expected a number, 'inv_sqrt_d_model' or null, found 'sqrt'"),
        ({"logit_scale": [1]}, "logit_scale: expected a number, 'inv_sqrt_d_model' or null, found [1]"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping: expected a finite number > 0 or null, found 0"),
        ({"embedding_fraction": 1.5}, "embedding_fraction: expected a number with 0 < f ≤ 1, found 1.5"),
        ({"embedding_fraction": 0}, "embedding_fraction: expected a number with 0 < f ≤ 1, found 0"),
        ({"pad_token_id": 97}, "pad_token_id: expected a whole number from 0 to 96 or null, found 97"),
        ({"attn_config": {"alibi": 1}}, "attn_config.alibi: expected true or false, found 1"),
        ({"attn_config": {"alibi_bias_max": 0}}, "attn_config.alibi_bias_max: expected a finite number > 0"),
        ({"attn_config": {"attn_pdrop": -0.1}}, "attn_config.attn_pdrop: expected a probability from 0 to 1"),
        ({"attn_config": {"attn_type": "flash"}}, "attn_config.attn_type: expected 'multihead_attention' or"),
        ({"attn_config": {"attn_type": "grouped_query_attention"}}, "kv_n_heads: expected a whole number from 1"),
        ({"attn_config": {"kv_n_heads": 2}}, "attn_config.kv_n_heads: expected null with multihead_attention, found 2"),
        ({"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 3}}, "expected a divisor of n_heads=4"),
        ({"attn_config": {"clip_qkv": -1}}, "attn_config.clip_qkv: expected a finite number > 0 or null, found -1"),
        ({"attn_config": {"softmax_scale": "x"}}, "attn_config.softmax_scale: expected a finite number > 0 or null"),
        ({"attn_config": {"attn_logit_softcapping": 0}}, "attn_logit_softcapping: expected a finite number > 0 or nul"),
        ({"attn_config": {"qk_ln": True, "qk_gn": True}}, "attn_config.qk_gn: expected false with qk_ln, found true"),
        ({"attn_config": {"sliding_window_size": -2}}, "attn_config.sliding_window_size: expected a whole number from"),
        ({"attn_config": {"norm_type": "rmsnorm"}}, "attn_config.norm_type: expected no such key"),
        ({"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm: expected false, found True"),
        ({"attn_config": {"nope": True}}, "attn_config.nope: expected false, found True"),
        ({"attn_config": {"kv_dim": 16}}, "attn_config.kv_dim: expected null, found 16"),
        ({"attn_config": {"seq_parallel_world_size": 2}}, "seq_parallel_world_size: expected null or 1, found 2"),
        ({"attn_config": {"magic": 1}}, "attn_config.magic: unknown key with value 1"),
        ({"d_model": 36, "attn_config": {"rope": True}}, "attn_config.rope: expected an even head_dim, found 9"),
        ({"attn_config": {"rope": True, "rope_impl": "x"}}, "attn_config.rope_impl: expected 'dail' or 'hf', found 'x"),
        ({"attn_config": {"rope_theta": 0}}, "attn_config.rope_theta: expected a finite number > 0, found 0"),
        ({"attn_config": {"rope": True, "rope_dail_config": {"type": "xpos"}}}, "rope_dail_config.type: expected \"or"),
        ({"attn_config": {"rope": True, "rope_dail_config": {"pos_idx_in_fp32": False}}}, "fp32: expected true, found"),
        ({"attn_config": {"rope_hf_config": {"type": "yarn"}}}, "rope_hf_config.type: expected 'no_scaling' or 'linea"),
        ({"attn_config": {"rope_hf_config": {"type": "linear", "beta": 1}}}, "rope_hf_config: expected an object with"),
        ({"attn_config": {"rope_hf_config": {"factor": 0}}}, "rope_hf_config.factor: expected a finite number > 0"),
        ({"attn_config": {"rope_hf_config": {"type": "llama3"}}}, "low_freq_factor: expected a finite number > 0, fou"),
        ({"attn_config": {"rope_hf_config": {"type": "llama3", "low_freq_factor": 1, "high_freq_factor": 1,
          "original_max_position_embeddings": 8}}}, "high_freq_factor: expected another value than low_freq_factor"),
        ({"attn_config": {"attn_temperature_tuning": {"scale": 0.1}}}, "tuning: expected floor_scale and attn_scale,"),
        ({"attn_config": {"attn_temperature_tuning": {"floor_scale": 0}}}, "floor_scale: expected a finite number > 0"),
        ({"attn_config": {"attn_temperature_tuning": {"attn_scale": "x"}}}, "attn_scale: expected a finite number, fo"),
        ({"magic": 1}, "magic: unknown key with value 1; it could change the maths"),
        ({"ffn_config": {"ffn_type": "mb_moe"}}, "ffn_config.ffn_type: expected 'mptmlp' or 'mptglu' or 'te_ln_mlp' o"),
        ({"ffn_config": {"ffn_type": "mptgeglu"}}, "found 'mptgeglu'; not supported"),
        ({"ffn_config": 3}, "ffn_config: expected an object, found 3"),
        ({"ffn_config": {"ffn_hidden_size": 1.5}}, "ffn_config.ffn_hidden_size: expected a whole number from 1"),
        ({"ffn_config": {"ffn_act_fn": {"name": "softmax"}}}, "ffn_act_fn.name: expected 'gelu' or 'quick_gelu' or"),
        ({"ffn_config": {"ffn_act_fn": "gelu"}}, "ffn_config.ffn_act_fn: expected an object with keys of"),
        ({"ffn_config": {"ffn_act_fn": {"approximate": "erf"}}}, "approximate: expected 'none' or 'tanh', found 'erf'"),
        ({"ffn_config": {"ffn_act_fn": {"name": "relu", "approximate": "tanh"}}}, "approximate: expected no such key"),
        ({"ffn_config": {"ffn_act_fn": {"name": "leaky_relu", "negative_slope": None}}}, "negative_slope: expected a"),
        ({"ffn_config": {"ffn_type": "te_ln_mlp", "ffn_act_fn": {"name": "relu"}}}, "ffn_act_fn: expected null with t"),
        ({"ffn_config": {"moe_top_k": 2}}, "ffn_config.moe_top_k: expected a whole number from 1 to 1, found 2"),
        ({"ffn_config": {"moe_num_experts": 2}}, "ffn_config.moe_num_experts: expected no such key with 'mptmlp'"),
        ({"ffn_config": {"moe_num_experts": 0}}, "ffn_config.moe_num_experts: expected a whole number from 1 to 4096"),
        ({"ffn_config": {"mlp_type": "x"}}, "ffn_config.mlp_type: expected 'mlp' or 'glu', found 'x'"),
        ({"ffn_config": {"ffn_type": "mb_dmoe", "moe_loss_weight": -1}}, "moe_loss_weight: expected a finite number ≥"),
        ({"ffn_config": {"moe_jitter_eps": -1}}, "ffn_config.moe_jitter_eps: expected a finite number > 0 or null"),
        ({"ffn_config": {"moe_normalize_expert_weights": -1}}, "moe_normalize_expert_weights: expected a finite numbe"),
        ({"ffn_config": {"uniform_expert_assignment": True}}, "uniform_expert_assignment: expected false, found True"),
        ({"init_config": {"name": "magic_"}}, "init_config.name: expected 'kaiming_normal_' or"),
        ({"init_config": {"name": "baseline_"}}, "init_config.init_std: expected a number with name 'baseline_'"),
        ({"expansion_ratio": 1e308}, "expansion_ratio: expected d_model·expansion_ratio to be a whole number, found 3"),
        ({"norm_eps": 10**400}, "norm_eps: expected a finite number > 0, found 1000"),
        ({"d_model": 10**5000}, "d_model: expected a whole number from 1 to 2147483647, found something too long to s"),
        ({"attn_config": {"clip_qkv": []}}, "attn_config.clip_qkv: expected a finite number > 0 or null, found []"),
        ({"attn_config": {"rope_dail_config": {"interleaved": True}}}, "rope_dail_config: expected type and pos_idx_i"),
        ({"attn_config": {"attn_uses_sequence_id": True, "attn_temperature_tuning": {"attn_scale": 1.0}}},
         "attn_config.attn_impl: expected 'torch' for attn_temperature_tuning with attn_uses_sequence_id, found 'flas"),
        ({**overrides({"attn_config": {"attn_temperature_tuning": TUNING}}),
          "attn_config": {"attn_uses_sequence_id": True}},
         "attn_config.attn_impl: expected 'torch' for attn_temperature_tuning with attn_uses_sequence_id, found 'flas"),
        ({"attn_config": {"rope_hf_config": {"trained_max_seq_len": 0}}}, "config.trained_max_seq_len: expected a who"),
        ({"init_config": {"init_div_is_residual": "²"}}, "div_is_residual: expected a finite number > 0 or true or"),
        ({"init_config": {"emb_init_std": -1}}, "emb_init_std: expected a number ≥ 0 or null, found -1"),
        ({"init_config": {"emb_init_uniform_lim": [2, 1]}}, "emb_init_uniform_lim: expected low ≤ high, found [2, 1]"),
        ({"block_overrides": {"order": nested(40), "overrides": {}}}, "expected at most 16 orders within another, fou"),
        ({"block_overrides": {"order": nested(3000), "overrides": {}}}, "expected at most 16 orders within another, f"),
        ({"block_overrides": {"order": [], "overrides": {1: {}}}}, "block_overrides.overrides: expected an object, fo"),
        ({"init_config": {"emb_init_uniform_lim": [1, 2, 3]}}, "emb_init_uniform_lim: expected one bound or"),
        ({"init_config": {"init_div_is_residual": "x"}}, "div_is_residual: expected a finite number > 0 or true or"),
        ({"hidden_size": 64}, "d_model: expected the same value as hidden_size=64, found 32"),
        ({"model_type": "gpt2"}, "model_type: expected 'mpt', found 'gpt2'"),
        ({"model_type": "mosaic_gpt", "attn_qk_ln": True, "attn_config": {"qk_ln": False}},
         "qk_ln: expected the same value as attn_qk_ln=True, found False"),
        ({"block_overrides": []}, "block_overrides: expected 'order' and 'overrides' (and perhaps 'repeat'), found []"),
        ({"block_overrides": {"order": [], "overrides": {"default": {}}}}, "without the name 'default'"),
        ({"block_overrides": {"order": 3, "overrides": {}}}, "block_overrides.order: expected a list, found 3"),
        ({"block_overrides": {"order": [3], "overrides": {}}}, "expected items with a 'name' or an 'order', found 3"),
        ({"block_overrides": {"order": [{"name": "x"}], "overrides": {}}}, "expected one of ['default'], found 'x'"),
        ({"block_overrides": {"order": [{"name": []}], "overrides": {}}}, "expected one of ['default'], found []"),
        ({"block_overrides": {"order": [{"name": "default", "repeat": 0}], "overrides": {}}}, "repeat: expected a who"),
        ({"block_overrides": {"order": [{"name": "default", "repeat": 1024}] * 2, "overrides": {}}}, "at most 1024 bl"),
        ({"block_overrides": {"order": [{"name": "default"}], "overrides": {}}}, "one entry for each of 2 blocks, fou"),
        (overrides({"d_model": 3}), "overrides.x: expected an object with nothing but 'attn_config', found"),
        (overrides({"attn_config": {"clip_qkv": 3}}), "overrides.x.attn_config: expected an object with keys of"),
        (overrides({"attn_config": {"nope": 1}}), "block_overrides: attn_config.nope: expected true or false, found 1"),
        (overrides({"attn_config": {"sliding_window_size": -3}}), "attn_config.sliding_window_size: expected a whole"),
        (overrides({"attn_config": {"attn_temperature_tuning": 3}}), "expected floor_scale and attn_scale, found 3"),
        (overrides({"attn_config": {"reuse_kv_layer_idx": 0}}), "reuse_kv_layer_idx: expected a whole number from -10"),
        (overrides({"attn_config": {"reuse_kv_layer_idx": -2}}), "[1]: reuse_kv_layer_idx: expected at least -1, foun"),
        (overrides({"attn_config": {"reuse_kv_x_layer_idx": -1}}), "expected attn_config.fused_qkv false with it"),
        (overrides({"attn_config": {"reuse_kv_layer_idx": -1, "reuse_kv_x_layer_idx": -1}}), "expected null with reus"),
        ({**overrides({"attn_config": {"nope": True}}), "attn_config": {"alibi": False}},
         "block_overrides[1]: nope: expected false with learned positions, found true"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(keys, message):
    import re

    from mpt_eqx import ConfigError, MPTConfig

    with pytest.raises(ConfigError, match=re.escape(message)):
        MPTConfig.from_dict(with_keys(**keys))


def test_parts_must_be_parts():
    from mpt_eqx import ConfigError, MPTConfig

    with pytest.raises(ConfigError, match="attn_config: expected AttnConfig, found dict; MPTConfig.from_dict takes"):
        MPTConfig(no_bias=True, attn_config={"alibi": True})
    with pytest.raises(ConfigError, match="config: expected a dict, found list"):
        MPTConfig.from_dict([])


def test_overrides_must_be_one_for_each_block(tiny_config):
    from mpt_eqx import BlockOverride, ConfigError

    with pytest.raises(ConfigError, match="block_overrides: expected one entry for each of 2 blocks, found 3"):
        tiny_config(block_overrides=(BlockOverride(),) * 3)
    with pytest.raises(ConfigError, match="block_overrides.1.: expected BlockOverride, found NoneType"):
        tiny_config(block_overrides=(BlockOverride(), None))


def test_order_and_repetition_of_block_overrides():
    from mpt_eqx import BlockOverride, MPTConfig, TemperatureTuning

    notation = {
        "order": [
            {"name": "default"}, {"name": "a", "repeat": 2},
            {"order": [{"name": "b"}, {"name": "default"}], "repeat": 2},
        ],
        "overrides": {
            "a": {"attn_config": {"sliding_window_size": 5, "attn_temperature_tuning": {"attn_scale": 0.5}}},
            "b": {"attn_config": {"reuse_kv_layer_idx": -1}},
        },
        "repeat": 2,
    }  # fmt: skip
    tuning = {"attn_temperature_tuning": {"floor_scale": 7}}
    config = MPTConfig.from_dict(with_keys(n_layers=14, block_overrides=notation, attn_config=tuning))
    a = BlockOverride(sliding_window_size=5, attn_temperature_tuning=TemperatureTuning(floor_scale=7, attn_scale=0.5))
    b, default = BlockOverride(reuse_kv_layer_idx=-1), BlockOverride()
    assert config.block_overrides == (default, a, a, b, default, b, default) * 2
    assert [layer.kv_from for layer in config.layers][:7] == [None, None, None, 2, None, 4, None]
    assert MPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_chain_of_reuse_leads_to_its_root(tiny_config):
    from mpt_eqx import AttnConfig, BlockOverride

    chain = (BlockOverride(), *[BlockOverride(reuse_kv_layer_idx=-1)] * 3)
    assert [layer.kv_from for layer in tiny_config(n_layers=4, block_overrides=chain).layers] == [None, 0, 0, 0]
    chain = (BlockOverride(), *[BlockOverride(reuse_kv_x_layer_idx=-1)] * 3)
    config = tiny_config(n_layers=4, block_overrides=chain, attn_config=AttnConfig(alibi=True, fused_qkv=False))
    assert [layer.kv_x_from for layer in config.layers] == [None, 0, 0, 0]


FLAT = {
    "model_type": "replit_lm", "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 97, "no_bias": True,
    "alibi": True, "alibi_bias_max": 8, "attn_clip_qkv": 6, "attn_qk_ln": True, "mlp_ratio": 2, "softmax_scale": 0.5,
    "low_precision_layernorm": False, "param_init_fn": "baseline_", "init_std": 0.02, "multiquery_attention": True,
}  # fmt: skip


@pytest.mark.parametrize("model_type", ["mosaic_gpt", "replit_lm", "mpt"])
def test_the_flat_files_of_early_2023(model_type):
    from mpt_eqx import AttnConfig, InitConfig, MPTConfig

    assert MPTConfig.from_dict({**FLAT, "model_type": model_type}) == MPTConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=97, no_bias=True, expansion_ratio=2, norm_type="layernorm",
        attn_config=AttnConfig(
            alibi=True, clip_qkv=6, qk_ln=True, softmax_scale=0.5, attn_type="multiquery_attention"
        ),
        init_config=InitConfig(name="baseline_", init_std=0.02),
    )  # fmt: skip


def test_a_flat_key_beside_an_attn_config_is_not_taken_for_one():
    """llm-foundry ignores a misplaced alibi in silence."""
    from mpt_eqx import ConfigError, MPTConfig

    with pytest.raises(ConfigError, match="alibi: unknown key with value True"):
        MPTConfig.from_dict({**PLAIN, "alibi": True})


def test_what_llm_foundry_and_transformers_refuse_to_read_is_not_written(tiny_config):
    """Types they check strictly, and a single block without positions."""
    from mpt_eqx import AttnConfig, BlockOverride, MPTConfig, TemperatureTuning

    config = MPTConfig.from_dict(with_keys(embedding_fraction=1, logit_scale=2, norm_eps=1))
    written = config.to_dict()
    for key in ("embedding_fraction", "logit_scale", "norm_eps", "layer_norm_epsilon"):
        assert type(written[key]) is float
    blocks = (BlockOverride(nope=True, attn_temperature_tuning=TemperatureTuning(attn_scale=1)), BlockOverride())
    for attn_config, impl in ((AttnConfig(alibi=True), "flash"), (AttnConfig(rope=True), "torch")):
        config = tiny_config(attn_config=attn_config, block_overrides=blocks)
        written = config.to_dict()
        assert written["attn_config"]["attn_impl"] == impl and written["learned_pos_emb"] is False
        (override,) = written["block_overrides"]["overrides"].values()
        for tuning in (written["attn_config"], override["attn_config"]):
            assert {type(value) for value in tuning["attn_temperature_tuning"].values()} == {float}
        assert MPTConfig.from_dict(written) == config


def test_ignored_keys_change_nothing_and_norm_types_may_be_in_any_case():
    from mpt_eqx import MPTConfig

    extra = {"_attn_implementation_autoset": True, "attn_implementation": None, "norm_type": "LayerNorm"}
    assert MPTConfig.from_dict(with_keys(**extra)) == MPTConfig.from_dict(with_keys(norm_type="layernorm"))


def test_learned_positions_are_there_only_without_others():
    from mpt_eqx import MPTConfig

    for keys, learned in (({"alibi": True}, False), ({"alibi": False, "rope": True}, False), ({"alibi": False}, True)):
        assert MPTConfig.from_dict(with_keys(learned_pos_emb=True, attn_config=keys)).learned_pos_emb is learned
    assert not MPTConfig.from_dict(with_keys(learned_pos_emb=False, attn_config={"alibi": False})).learned_pos_emb


def test_transformers_pad_token_trains_like_any_other():
    from mpt_eqx import MPTConfig

    assert MPTConfig.from_dict(with_keys(pad_token_id=5)).pad_token_id == 5
    native = with_keys(pad_token_id=5, architectures=["MptForCausalLM"])
    assert MPTConfig.from_dict(native).pad_token_id is None


# The published models by their tensors; the recipes as llm-foundry's benchmark tables print them.
PARAMETERS = {
    "mpt-7b": 6_649_286_656, "mpt-30b": 29_957_200_896, "mpt-1b-redpajama-200b": 1_311_442_944,
    "mpt-1b": 1_315_950_592, "mpt-3b": 2_651_837_440, "mpt-7b-recipe": 6_658_859_008, "mpt-13b": 12_853_954_560,
    "mpt-30b-recipe": 29_975_214_080, "mpt-70b": 64_862_437_376,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_numbers_of_parameters(name):
    from mpt_eqx import MPTConfig

    assert MPTConfig.preset(name).num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize(("name", "billions"), [("phogpt-4b", 3.7), ("replit-code-v1_5-3b", 3.3)])
def test_rounded_numbers_of_parameters(name, billions):
    """As the authors' paper (arXiv:2311.02945) and model card give them."""
    from mpt_eqx import MPTConfig

    assert round(MPTConfig.preset(name).num_parameters() / 1e9, 1) == billions


def test_flops():
    """Against the utilisation llm-foundry prints: 70b on 128 H100 at 1,058 tokens/s each is 428 of 989 TFLOP/s."""
    from mpt_eqx import BlockOverride, ConfigError, FFNConfig, MPTConfig, count_flops

    config = MPTConfig.preset("mpt-70b")
    n = config.num_parameters()
    assert count_flops(config, 2048) == 3 * (2 * n * 2048 + 4 * 80 * 8192 * 2048**2)
    assert count_flops(config, 2048) / 2048 * 1058 == pytest.approx(428e12, rel=0.01)
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    assert count_flops(untied, 2048) == count_flops(config, 2048)
    for ffn_type, counted in (("torch_dmoe", 8), ("mb_dmoe", 2)):
        moe = FFNConfig(ffn_type=ffn_type, moe_num_experts=8, moe_top_k=2)
        config = MPTConfig(d_model=64, n_heads=4, n_layers=1, no_bias=True, ffn_config=moe)
        n = config.num_parameters() - (8 - counted) * 2 * 64 * 256
        assert count_flops(config, 10) == 3 * (2 * n * 10 + 4 * 64 * 100)
    config = MPTConfig(d_model=64, n_heads=4, n_layers=1, block_overrides=(BlockOverride(sliding_window_size=3),))
    with pytest.raises(ConfigError, match="block_overrides: expected null; llm-foundry's count"):
        count_flops(config, 10)
    with pytest.raises(ConfigError, match="seq_len: expected a whole number from 1"):
        count_flops(MPTConfig.preset("mpt-7b"), 0)


def test_an_unknown_preset_lists_the_known_ones():
    from mpt_eqx import ConfigError, MPTConfig

    with pytest.raises(ConfigError, match="preset: expected one of mpt-7b, .*mpt-125m.*, found 'gpt2'"):
        MPTConfig.preset("gpt2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "expected JSON, found something else"),
        ("[1]", "expected a JSON object, found list"),
        ('{"d_model": NaN}', "expected JSON, found something else .NaN is not JSON"),
        ('{"d_model": 1, "d_model": 2}', "duplicate key 'd_model'"),
        ("[" * 100_000, "expected JSON, found something else"),
        ('{"x": "' + "y" * 1_000_000 + '"}', "expected at most 1000000 bytes, found 10000"),
        ('{"n_heads": 3, "attn_config": {"alibi": true}}', "d_model: expected a multiple of n_heads=3, found 2048"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, message):
    from mpt_eqx import ConfigError, MPTConfig

    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        MPTConfig.from_json_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="no such file; an MPT checkpoint has its configuration there"):
        MPTConfig.from_json_file(tmp_path / "none.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = [
    *(*PLAIN, "norm_eps", "expansion_ratio", "init_config", "ffn_config", "logit_scale", "hidden_size", "clip_qkv"),
    *("block_overrides", "pad_token_id", "head_dim", "embedding_fraction", "attention_bias", "no_bias", "resid_pdrop"),
    *("rope", "rope_hf_config", "rope_dail_config", "attn_temperature_tuning", "qk_ln", "sliding_window_size"),
    *("ffn_act_fn", "mlp_ratio", "multiquery_attention", "model_type"),
]


def config_or_error(top, attn):
    """`from_dict` returns a config whose own content reads back equal, or raises a ConfigError."""
    from mpt_eqx import ConfigError, MPTConfig

    try:
        config = MPTConfig.from_dict({**PLAIN, "attn_config": {"alibi": True, **attn}, **top})
    except ConfigError as error:
        assert str(error)
    else:
        assert MPTConfig.from_dict(config.to_dict()) == config


some_keys = st.dictionaries(st.sampled_from(KEYS), json_values, max_size=8)


@settings(max_examples=40, deadline=None)
@given(some_keys, some_keys)
def test_any_dict_is_a_config_or_a_config_error(top, attn):
    config_or_error(top, attn)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(some_keys, some_keys)
def test_any_dict_of_many_is_a_config_or_a_config_error(top, attn):
    config_or_error(top, attn)


BOOKKEEPING = {
    "num_labels": 3, "id2label": {"0": "a"}, "label2id": {"a": 0}, "output_attentions": True, "torchscript": False,
    "problem_type": "regression", "finetuning_task": "x", "pruned_heads": {}, "xla_device": None, "name_or_path": "x",
    "_experts_implementation": "eager", "chunk_size_feed_forward": 0, "unsloth_version": "2",
    "unsloth_fixed": True,
    "peft_config": {"r": 8}, "base_model_name_or_path": "x", "max_new_tokens": 2048, "pretraining_tp": 1,
    "use_exllama": True, "tokenizer_class": "GPTNeoXTokenizer", "rope_scaling": None, "per_layer_config": {},
    "bad_words_ids": [[1]], "task_specific_params": {"text-generation": {"top_k": 3}}, "sep_token_id": 4,
}  # fmt: skip


@pytest.mark.parametrize("key", BOOKKEEPING)
def test_bookkeeping_of_other_programs_is_ignored(key):
    from mpt_eqx import MPTConfig

    assert MPTConfig.from_dict(with_keys(**{key: BOOKKEEPING[key]})) == MPTConfig.from_dict(PLAIN)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: expected null, found {'type'"),
        ({"per_layer_config": {"0": {"d_model": 8}}}, "per_layer_config: expected null or {}, found {'0'"),
        ({"sliding_window": 512}, "sliding_window: expected null, found 512; other values are not supported"),
        ({"parallel_residual": True}, "parallel_residual: unknown key with value True; it could change the maths"),
        ({"parallel_residual": True}, "or load with config_overrides={'parallel_residual': None}"),
        ({"attn_config": {"gate": 1}}, "or load with config_overrides={'attn_config': {'gate': None}}"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config: expected weights that"),
    ],
)
def test_what_could_change_the_maths_is_refused_by_name(keys, message):
    import re

    from mpt_eqx import ConfigError, MPTConfig

    with pytest.raises(ConfigError, match=re.escape(message)):
        MPTConfig.from_dict(with_keys(**keys))


def test_an_override_takes_an_unknown_key_away():
    from mpt_eqx import ConfigError, MPTConfig
    from mpt_eqx.config.dialects import override

    d = with_keys(bookkeeping=1, attn_config={"notes": [1]}, init_config={"x": 2})
    overrides = {"bookkeeping": None, "attn_config": {"notes": None}, "init_config": {"x": None}}
    assert MPTConfig.from_dict(override(d, overrides)) == MPTConfig.from_dict(PLAIN)
    assert "bookkeeping" in d and "notes" in d["attn_config"]
    # Of a known key null is a value, and of a key that is not there it is a slip of the pen.
    for key, found in (
        ("n_layers", "n_layers: expected a whole number"),
        ("n_layrs", "n_layrs: unknown key with value"),
    ):
        with pytest.raises(ConfigError, match=found):
            MPTConfig.from_dict(override(PLAIN, {key: None}))
    with pytest.raises(ConfigError, match="attn_config.prefix_lm: expected false, found None"):
        MPTConfig.from_dict(override(with_keys(attn_config={"prefix_lm": True}), {"attn_config": {"prefix_lm": None}}))


@pytest.mark.parametrize(
    ("keys", "ids"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2}, (1, 2, None, None)),
        ({"eos_token_id": [2, 3]}, (None, (2, 3), None, None)),
        ({"bos_token_id": -1, "eos_token_id": []}, (None, None, None, None)),
        ({"pad_token_id": 5}, (None, None, 5, None)),
        ({"pad_token_id": 5, "architectures": ["MptForCausalLM"]}, (None, None, None, 5)),
        ({"pad_token_id": -1, "architectures": ["MptForCausalLM"]}, (None, None, None, None)),
    ],
)
def test_what_begins_and_ends_a_text(keys, ids):
    """Kept through any number of round trips; transformers' token of padding, which it trains, under another name."""
    from mpt_eqx import MPTConfig

    config = MPTConfig.from_dict(with_keys(**keys))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.text_pad_token_id) == ids
    written = json.loads(json.dumps(config.to_dict()))
    assert MPTConfig.from_dict(written) == config
    assert written["pad_token_id"] == (ids[2] if ids[2] is not None else ids[3])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id: expected a whole number ≥ 0, a tuple of them or null, found '</s>'"),
        (
            {"eos_token_id": [1, None]},
            r"eos_token_id: expected a whole number ≥ 0, a tuple of them or null, found (1, N",
        ),
        ({"bos_token_id": 1.5}, "bos_token_id: expected a whole number from 0"),
        ({"pad_token_id": -2, "architectures": ["MptForCausalLM"]}, "pad_token_id: expected a whole number from 0"),
        ({"pad_token_id": 1, "text_pad_token_id": 2}, "text_pad_token_id: unknown key"),
    ],
)
def test_tokens_of_a_text_that_are_none(keys, message):
    import re

    from mpt_eqx import ConfigError, MPTConfig

    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        MPTConfig.from_dict(with_keys(**keys))


def test_one_token_of_padding():
    from mpt_eqx import ConfigError, MPTConfig

    with pytest.raises(ConfigError, match="text_pad_token_id: expected null with pad_token_id=1, found a token"):
        MPTConfig(pad_token_id=1, text_pad_token_id=2)
