"""config.json: dialects, round trips, and one error for each thing that is wrong."""

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
    ],
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
        ({"max_seq_len": 10**12}, "max_seq_len: expected a whole number"),
        ({"vocab_size": 0.5}, "vocab_size: expected a whole number"),
        ({"expansion_ratio": 0}, "expansion_ratio: expected a finite number > 0, found 0"),
        ({"expansion_ratio": 1.01}, "expansion_ratio: expected d_model·expansion_ratio to be a whole number"),
        ({"norm_eps": float("nan")}, "norm_eps: expected a finite number > 0, found nan"),
        ({"norm_type": "rmsnorm"}, "norm_type: expected 'low_precision_layernorm' or 'layernorm', found 'rmsnorm'"),
        ({"no_bias": False}, "no_bias: expected true, found false; biases are not supported yet"),
        ({"no_bias": 1}, "no_bias: expected true or false, found 1"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings: expected true or false, found None"),
        ({"attn_config": {"alibi": False}}, "attn_config.alibi: expected true, found false"),
        ({"attn_config": {"alibi_bias_max": 0}}, "attn_config.alibi_bias_max: expected a finite number > 0"),
        ({"attn_config": {"clip_qkv": -1}}, "attn_config.clip_qkv: expected a finite number > 0 or null, found -1"),
        ({"attn_config": {"softmax_scale": "x"}}, "attn_config.softmax_scale: expected a finite number > 0 or null"),
        ({"attn_config": {"qk_ln": True}}, "attn_config.qk_ln: expected false, found True; other values are not supp"),
        ({"attn_config": {"attn_type": "grouped_query_attention"}}, "attn_config.attn_type: expected \"multihead_att"),
        ({"attn_config": {"norm_type": "rmsnorm"}}, "attn_config.norm_type: expected no such key"),
        ({"attn_config": {"rope": True}}, "attn_config.rope: expected false, found True"),
        ({"attn_config": {"magic": 1}}, "attn_config.magic: unknown key with value 1"),
        ({"attn_config": {"attn_temperature_tuning": {"attn_scale": 0.1}}}, "tuning.attn_scale: expected 0, found 0.1"),
        ({"logit_scale": 0.5}, "logit_scale: expected null, found 0.5"),
        ({"magic": 1}, "magic: unknown key with value 1; it could change the maths"),
        ({"ffn_config": {"ffn_type": "mptglu"}}, "ffn_config.ffn_type: expected 'mptmlp', found 'mptglu'"),
        ({"ffn_config": 3}, "ffn_config: expected an object, found 3"),
        ({"init_config": {"name": "magic_"}}, "init_config.name: expected 'kaiming_normal_' or"),
        ({"init_config": {"name": "baseline_"}}, "init_config.init_std: expected a number with name 'baseline_'"),
        ({"init_config": {"emb_init_uniform_lim": [1, 2, 3]}}, "emb_init_uniform_lim: expected one bound or"),
        ({"init_config": {"init_div_is_residual": "x"}}, "init_div_is_residual: expected a finite number > 0, found"),
        ({"hidden_size": 64}, "d_model: expected the same value as hidden_size=64, found 32"),
        ({"model_type": "mosaic_gpt"}, "model_type: expected 'mpt', found 'mosaic_gpt'"),
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


def test_a_config_of_another_model_is_refused():
    from conftest import GOLDEN

    from mpt_eqx import ConfigError, MPTConfig

    d = json.loads((GOLDEN / "hf_default" / "config.json").read_text())
    MPTConfig.from_dict(d)
    with pytest.raises(ConfigError, match=r"attn_config.attn_type: expected .multihead_attention., found 'multiquery"):
        MPTConfig.from_dict({**d, "attn_config": {**d["attn_config"], "attn_type": "multiquery_attention"}})


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
KEYS = [*PLAIN, "norm_eps", "expansion_ratio", "init_config", "ffn_config", "logit_scale", "hidden_size", "clip_qkv"]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), json_values), st.dictionaries(st.sampled_from(KEYS), json_values))
def test_any_dict_is_a_config_or_a_config_error(top, attn):
    from mpt_eqx import ConfigError, MPTConfig

    try:
        config = MPTConfig.from_dict({**PLAIN, "attn_config": {"alibi": True, **attn}, **top})
    except ConfigError as error:
        assert str(error)
    else:
        assert MPTConfig.from_dict(config.to_dict()) == config
