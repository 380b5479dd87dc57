"""Checkpoints for other programs: what each ignores, its config.json, GGUF files, and what is refused."""

import hashlib
import json
import shutil
import sys
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from command import run
from conftest import GOLDEN, examples, some
from hypothesis import assume, given
from hypothesis import strategies as st
from mutate import mutant


def arrays(model):
    from mpt_eqx.checkpoint.names import named_leaves

    return {name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}


def zeros_for(config):
    """The tensors of a configuration, as they are written."""
    import equinox as eqx

    from mpt_eqx import MPT
    from mpt_eqx.checkpoint.formats.safetensors import TensorToWrite
    from mpt_eqx.checkpoint.names import named_leaves

    leaves = named_leaves(eqx.filter_eval_shape(lambda: MPT(config, key=jax.random.key(0))))
    dtype = np.dtype(np.float32)
    return {
        name: TensorToWrite(name, leaf.shape, dtype, lambda leaf=leaf: np.zeros(leaf.shape, dtype))
        for name, leaf in leaves.items()
    }


# The values of each key that are tried; the first is plain.
TOP = {
    "no_bias": [True, False], "attention_bias": [None, True, False], "learned_pos_emb": [True, False],
    "logit_scale": [None, 1.0, 0.5, "inv_sqrt_d_model"], "final_logit_softcapping": [None, 30.0],
    "norm_type": ["low_precision_layernorm", "layernorm", "rmsnorm"], "norm_eps": [1e-5, 1e-6, 0.0015],
    "tie_word_embeddings": [True, False], "expansion_ratio": [4, 2, 1.5], "resid_pdrop": [0.0, 0.1, 1.0],
    "emb_pdrop": [0.0, 0.1], "embedding_fraction": [1.0, 0.5], "bos_token_id": [None, 2], "head_dim": [None, 8],
    "eos_token_id": [None, 5, (5, 7)], "n_heads": [4, 6], "max_seq_len": [64, 60],
}  # fmt: skip
ATTENTION = {
    "attn_pdrop": [0.0, 0.1, 1.0], "fused_qkv": [True, False], "clip_qkv": [None, 6, 0.1], "alibi": [True, False],
    "softmax_scale": [None, 0.5, 12**-0.5], "attn_logit_softcapping": [None, 20.0], "sliding_window_size": [-1, 5],
    "attn_uses_sequence_id": [False, True], "alibi_bias_max": [8, 16, 8.0, 7.5], "rope": [False, True],
    "rope_theta": [10000, 500.0], "rope_impl": ["dail", "hf"],
}  # fmt: skip


@st.composite
def configs(draw):
    """Configurations of all kinds, plain in most keys."""
    from mpt_eqx import (
        ActFnConfig,
        AttnConfig,
        BlockOverride,
        ConfigError,
        FFNConfig,
        InitConfig,
        MPTConfig,
        RopeHFConfig,
        TemperatureTuning,
    )

    def some_of(values, count):
        keys = draw(st.sets(st.sampled_from(sorted(values)), max_size=count))
        return {key: values[key][0] for key in values} | {key: draw(st.sampled_from(values[key])) for key in keys}

    def rarely(value):
        return draw(st.integers(0, 7)) == 0 and value

    top, attn = some_of(TOP, 5), some_of(ATTENTION, 4)
    kind = draw(st.sampled_from(["multihead_attention"] * 3 + ["multiquery_attention", "grouped_query_attention"]))
    attn |= {"attn_type": kind} | ({"kv_n_heads": draw(st.sampled_from([2, 4]))} if kind[0] == "g" else {})
    if norm := rarely(draw(st.sampled_from(["qk_ln", "qk_gn"]))):
        attn[norm] = True
    if draw(st.integers(0, 3)) == 0:  # as transformers has it, but for its type
        attn["attn_pdrop"] = top["resid_pdrop"] = 0.1
    if rarely(True):
        attn["rope_hf_config"] = RopeHFConfig(type="dynamic", factor=2.0, original_max_position_embeddings=32)
    if rarely(True):
        attn["attn_temperature_tuning"] = TemperatureTuning(attn_scale=0.1)
    ffn = {"ffn_type": rarely(draw(st.sampled_from(["mptglu", "torch_dmoe", "te_ln_mlp"]))) or "mptmlp"}
    ffn["ffn_hidden_size"] = draw(st.sampled_from([None, None, 192, 96]))
    acts = [None, ActFnConfig(), ActFnConfig(approximate="tanh"), ActFnConfig(name="relu")]
    ffn["ffn_act_fn"] = None if ffn["ffn_type"] == "te_ln_mlp" else rarely(draw(st.sampled_from(acts))) or None
    if pad := rarely(draw(st.sampled_from(["pad_token_id", "text_pad_token_id"]))):
        top[pad] = 3
    override = draw(st.sampled_from([None] * 6 + [{}, {"sliding_window_size": 3}, {"nope": True}]))
    if override is not None:
        top["block_overrides"] = (BlockOverride(), BlockOverride(**override))
    if rarely(True):
        top["init_config"] = InitConfig(emb_init_std=0.02)
    try:
        return MPTConfig(
            d_model=48, n_layers=2, vocab_size=61, attn_config=AttnConfig(**attn), ffn_config=FFNConfig(**ffn), **top
        )
    except ConfigError:
        assume(False)


def meaning(config, program):
    """What a configuration computes, whichever way it is said."""
    from mpt_eqx import ActFnConfig

    attn, ffn = config.attn_config, config.ffn_config
    act = ffn.ffn_act_fn or ActFnConfig(approximate="tanh" if ffn.ffn_type == "te_ln_mlp" else "none")
    pads = (config.pad_token_id, config.text_pad_token_id)
    found = {
        "sizes": (config.d_model, config.n_heads, config.n_layers, config.vocab_size, config.max_seq_len),
        "widths": (config.head_size, config.kv_heads, config.ffn_hidden_size),
        "tied": config.tie_word_embeddings,
        "biases": (config.no_bias, config.has_attention_bias),
        "norm": ("layernorm" in config.norm_type, config.norm_eps, attn.qk_ln, attn.qk_gn),
        "alibi": attn.alibi and attn.alibi_bias_max,
        "rope": attn.rope and (attn.rope_theta, attn.rope_impl, attn.rope_hf_config),
        "learned": config.learned_pos_emb,
        "scores": (attn.clip_qkv, attn.softmax_scale or (48 / config.n_heads) ** -0.5, attn.attn_logit_softcapping),
        "logits": (None if config.logit_scale == 1 else config.logit_scale, config.final_logit_softcapping),
        "layers": config.layers,
        "network": (ffn.ffn_type, act.name if program == "llama.cpp" else act),
        "text": (config.bos_token_id, config.eos_token_id, next((pad for pad in pads if pad is not None), None)),
    }
    if program == "transformers":
        found["training"] = (attn.attn_pdrop, config.resid_pdrop, config.emb_pdrop, config.embedding_fraction)
        found["more"] = (config.pad_token_id, attn.attn_uses_sequence_id)
    return found


@examples(300, least=25)
@given(configs(), st.sampled_from(["transformers", "llama.cpp"]))
def test_whatever_is_computed_otherwise_is_named(config, program):
    """And nothing else is: the table and what a program computes are two sides of one thing."""
    from mpt_eqx.config.programs import computed_by, differences

    keys = {one.key for one in differences(program, config)}
    # Written as it is, because older versions compute it.
    keys -= {"attn_config.qk_ln"} if program == "llama.cpp" else set()
    computed = computed_by(program, config)
    assert bool(keys) == (meaning(computed, program) != meaning(config, program)), keys
    assert computed_by(program, computed) == computed


# As in transformers 5.24, MptConfig and MptAttentionConfig, which take no other type; `just reference` compares.
THEIR_TYPES = {
    "d_model": int, "n_heads": int, "n_layers": int, "expansion_ratio": int, "max_seq_len": int, "vocab_size": int,
    "resid_pdrop": float | int, "layer_norm_epsilon": float, "emb_pdrop": float | int, "learned_pos_emb": bool,
    "logit_scale": float | str | None, "no_bias": bool, "embedding_fraction": float, "norm_type": str,
    "use_cache": bool, "tie_word_embeddings": bool, "pad_token_id": int | None, "bos_token_id": int | None,
    "eos_token_id": int | list | None,
}  # fmt: skip
THEIR_ATTENTION = {
    "attn_type": str, "attn_pdrop": int, "attn_impl": str, "clip_qkv": float | None, "softmax_scale": float | None,
    "prefix_lm": bool, "qk_ln": bool, "attn_uses_sequence_id": bool, "alibi": bool, "alibi_bias_max": int,
}  # fmt: skip


def is_of(value, kind):
    kinds = getattr(kind, "__args__", (kind,))
    return any(type(value) is one for one in kinds)


@examples(200, least=25)
@given(configs())
def test_config_json_for_transformers(config):
    """Every key is one of its classes', of exactly the type there, and says what transformers computes."""
    from mpt_eqx import MPTConfig
    from mpt_eqx.config.programs import computed_by, config_json_for

    computed = computed_by("transformers", config)
    written = json.loads(json.dumps(config_json_for("transformers", computed)))
    assert MPTConfig.from_dict(written) == computed
    assert written.pop("model_type") == "mpt" and written.pop("architectures") == ["MptForCausalLM"]
    attn = written.pop("attn_config")
    for found, types in ((written, THEIR_TYPES), (attn, THEIR_ATTENTION)):
        assert [key for key, value in found.items() if not is_of(value, types[key])] == []


@examples(200, least=25)
@given(configs())
def test_config_json_for_llm_foundry(config):
    """All that its own files say, and no key of transformers' or of this library's own."""
    from mpt_eqx import MPTConfig
    from mpt_eqx.config.keys import TEXT_PADDING, TRAINED
    from mpt_eqx.config.programs import computed_by, config_json_for, differences

    computed = computed_by("llm-foundry", config)
    written = json.loads(json.dumps(config_json_for("llm-foundry", computed)))
    assert MPTConfig.from_dict(written) == computed
    assert not {"layer_norm_epsilon", TEXT_PADDING} & written.keys()
    assert TRAINED not in written["attn_config"]["rope_hf_config"]
    if not differences("llm-foundry", config):
        assert computed.layers == config.layers and computed.head_dim == config.head_dim


@examples(60, least=6)
@given(config=configs())
def test_a_gguf_header_says_what_llama_cpp_computes(config, tmp_path_factory):
    from mpt_eqx import CheckpointError, checkpoint_info
    from mpt_eqx.checkpoint.formats.gguf_vocabulary import Vocabulary
    from mpt_eqx.checkpoint.programs import target_for, write_target

    try:
        target = target_for("llama.cpp", config, zeros_for(config), lossy=True)
    except CheckpointError as error:
        assert "found one that it has no place for" in str(error)
        return
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_target(path, target, None, Vocabulary(), show=False)
    info = checkpoint_info(path)
    assert not info.problems
    assert meaning(info.config, "llama.cpp") == meaning(target.config, "llama.cpp")


# A configuration for each rule; "tiny" is plain.
ASKED = {
    "head_dim": {"head_dim": 12, "attn": {"fused_qkv": False}},
    "attn_config.rope": {"attn": {"rope": True}},
    "attn_config.qk_gn": {"attn": {"qk_gn": True}},
    "attn_config.qk_ln": {"attn": {"qk_ln": True}},
    "attn_config.attn_logit_softcapping": {"attn": {"attn_logit_softcapping": 20.0}},
    "attn_config.sliding_window_size": {"attn": {"sliding_window_size": 5}},
    "attn_config.attn_temperature_tuning": {"attn": {"attn_temperature_tuning": "tuned"}},
    "block_overrides": {"block_overrides": "shared"},
    "logit_scale": {"logit_scale": "inv_sqrt_d_model"},
    "final_logit_softcapping": {"final_logit_softcapping": 30.0},
    "norm_type": {"norm_type": "rmsnorm"},
    "ffn_config.ffn_type": {"ffn": {"ffn_type": "mptglu"}},
    "attn_config.attn_type": {"attn": {"attn_type": "multiquery_attention"}},
    "attn_config.alibi": {"attn": {"alibi": False}},
    "attn_config.alibi_bias_max": {"attn": {"alibi_bias_max": 16}},
    "learned_pos_emb": {"attn": {"alibi": False}, "learned_pos_emb": True},
    "no_bias": {"no_bias": False},
    "attention_bias": {"attention_bias": True},
    "ffn_config.ffn_hidden_size": {"ffn": {"ffn_hidden_size": 64}},
    "expansion_ratio": {"expansion_ratio": 2},
    "ffn_config.ffn_act_fn": {"ffn": {"ffn_act_fn": "relu"}},
    "attn_config.attn_uses_sequence_id": {"attn": {"attn_uses_sequence_id": True}},
    "attn_config.attn_pdrop": {"attn": {"attn_pdrop": 0.1}},
    "resid_pdrop": {"resid_pdrop": 0.1},
    "emb_pdrop": {"emb_pdrop": 0.1},
    "embedding_fraction": {"embedding_fraction": 0.1},
    "pad_token_id": {"pad_token_id": 3},
    "attn_config.softmax_scale": {"attn": {"softmax_scale": 0.5}},
    "attn_config.rope_hf_config": {"attn": {"rope": True, "rope_impl": "hf", "rope_hf_config": "dynamic"}},
}


def asked(key, make):
    from mpt_eqx import ActFnConfig, AttnConfig, BlockOverride, FFNConfig, RopeHFConfig, TemperatureTuning

    objects = {
        "tuned": TemperatureTuning(attn_scale=0.1),
        "shared": (BlockOverride(), BlockOverride(reuse_kv_layer_idx=-1)),
        "relu": ActFnConfig(name="relu"),
        "dynamic": RopeHFConfig(type="dynamic", original_max_position_embeddings=32),
    }

    def filled(values):
        return {name: objects.get(v, v) if isinstance(v, str) else v for name, v in values.items()}

    values = dict(ASKED[key])
    attn = AttnConfig(**{"alibi": True, **filled(values.pop("attn", {}))})
    ffn = FFNConfig(**filled(values.pop("ffn", {})))
    return make(attn_config=attn, ffn_config=ffn, **filled(values))


def rules():
    from mpt_eqx.config.programs import RULES

    return [(program, rule.key) for program, rules in RULES.items() for rule in rules]


# Keys that change the shapes of matrices: nothing of such a model can be written.
FATAL = {
    "transformers": {"head_dim", "attn_config.attn_type", "ffn_config.ffn_hidden_size", "expansion_ratio"},
    "llama.cpp": {"head_dim"},
    "llm-foundry": set(),
}


@pytest.mark.parametrize(("program", "key"), rules(), ids=map("-".join, rules()))
def test_each_key_that_is_ignored_is_refused_by_name(program, key, tiny_config):
    """With its value and what follows; what is left of the model is written on request, where anything is."""
    from mpt_eqx import CheckpointError
    from mpt_eqx.checkpoint.programs import target_for
    from mpt_eqx.config.programs import RULES, differences

    config = asked(key, tiny_config)
    tensors = zeros_for(config)
    (line,) = (one for one in differences(program, config) if one.key == key)
    (rule,) = (rule for rule in RULES[program] if rule.key == key)
    assert str(line) == f"{key}={line.value!r}: {rule.consequence}" and line.value is not None
    with pytest.raises(CheckpointError) as error:
        target_for(program, config, tensors, lossy=False)
    assert str(line) in str(error.value)
    if key in FATAL[program] or (key == "block_overrides" and program != "llm-foundry"):
        message = f"expected a model that {program} can compute, found one that it has no place for"
        assert str(error.value).startswith(message)
        with pytest.raises(CheckpointError, match=message):
            target_for(program, config, tensors, lossy=True)
        return
    assert str(error.value).startswith(f"expected a model that {program} computes as it is, found ")
    assert str(error.value).endswith(f"; lossy=True, or --lossy, writes what {program} computes instead")
    target = target_for(program, config, tensors, lossy=True)
    assert line in target.differences
    assert {tensor.name: tensor.shape for tensor in target.tensors}.items() <= {
        name: tensor.shape for name, tensor in tensors.items()
    }.items()
    if program != "llm-foundry" and (program, key) != ("llama.cpp", "attn_config.qk_ln"):
        assert differences(program, target.config) == []


def test_a_plain_model_loses_nothing(tiny_config):
    from mpt_eqx.config.programs import PROGRAMS, differences

    for program in PROGRAMS:
        assert differences(program, tiny_config()) == []


@pytest.mark.parametrize("program", ["transformers", "llm-foundry"])
@pytest.mark.parametrize(
    "name", some(("hf_default", "f_unfused_qkv", "f_clip_qkv", "hf_untied"), ("f_unfused_qkv", "f_clip_qkv"))
)
def test_what_is_written_has_the_same_numbers(name, program, tmp_path):
    """transformers has one matrix for queries, keys and values: three become its rows."""
    from mpt_eqx import from_pretrained
    from mpt_eqx.checkpoint import convert

    assert convert(GOLDEN / name, tmp_path / "m", program=program).lost == ()
    one, other = arrays(from_pretrained(GOLDEN / name)), arrays(from_pretrained(tmp_path / "m"))
    fused = program == "transformers"
    assert any("Wqkv" in name for name in other) == (fused or name != "f_unfused_qkv")
    for key, array in other.items():
        parts = [key] if key in one else [key.replace("Wqkv", part) for part in ("Wq", "Wk", "Wv")]
        np.testing.assert_array_equal(array, np.concatenate([one[part] for part in parts]))
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    if name == "f_clip_qkv":
        assert type(written["attn_config"]["clip_qkv"]) is float
    assert written["architectures"] == ["MptForCausalLM" if fused else "MPTForCausalLM"]


def test_a_whole_number_to_clip_becomes_what_transformers_takes(golden, tmp_path):
    """`clip_qkv: 6`, which its own class refuses."""
    from mpt_eqx.checkpoint import convert

    source = shutil.copytree(GOLDEN / "hf_clip_qkv", tmp_path / "s")
    config = json.loads((source / "config.json").read_text())
    config["attn_config"] |= {"clip_qkv": 6, "attn_pdrop": 0.0, "alibi_bias_max": 8.0}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "m", program="transformers")
    attn = json.loads((tmp_path / "m" / "config.json").read_text())["attn_config"]
    assert [repr(attn[key]) for key in ("clip_qkv", "attn_pdrop", "alibi_bias_max")] == ["6.0", "0", "8"]


def test_what_is_lost_is_left_out_of_the_file(tmp_path):
    """So that whoever reads it computes what the program does."""
    from mpt_eqx import CheckpointError, checkpoint_info
    from mpt_eqx.checkpoint import convert

    with pytest.raises(CheckpointError, match=r"no_bias=False: biases are left out; lossy=True, or --lossy, writes"):
        convert(GOLDEN / "f_bias", tmp_path / "m", program="transformers")
    assert not (tmp_path / "m").exists()
    info = convert(GOLDEN / "f_bias", tmp_path / "m", program="transformers", lossy=True)
    assert [one.key for one in info.lost] == ["no_bias"]
    written = checkpoint_info(tmp_path / "m")
    assert written.config.no_bias and not [t.name for t in written.tensors if "bias" in t.name]


IN_GGUF = ("hf_default", "hf_untied", "hf_clip_qkv", "hf_fp16", "f_bias", "f_learned_pos", "f_gqa_kv2", "hf_bf16")


@pytest.mark.parametrize("name", some((*IN_GGUF, "f_expansion2", "f_no_pos", "hf_sharded"), IN_GGUF[4:]))
def test_gguf_reads_back(name, tmp_path):
    """Equal tensors, in the types that they had but for norms and biases, which llama.cpp wants in float32."""
    from mpt_eqx import from_pretrained
    from mpt_eqx.checkpoint import convert, save_gguf

    model = from_pretrained(GOLDEN / name)
    save_gguf(model, tmp_path / "saved.gguf")
    convert(GOLDEN / name, tmp_path / "converted.gguf", program="llama.cpp")
    again = from_pretrained(tmp_path / "saved.gguf", dtype="float32")
    assert meaning(again.config, "llama.cpp") == meaning(model.config, "llama.cpp")
    wanted = arrays(model)
    assert arrays(again).keys() == wanted.keys()
    for key, array in arrays(again).items():
        np.testing.assert_array_equal(array, wanted[key].astype(np.float32))
    other = from_pretrained(tmp_path / "converted.gguf", dtype="float32")
    assert all((arrays(other)[key] == array).all() for key, array in arrays(again).items())


def test_types_in_gguf(tiny_model, tmp_path):
    """Matrices are of the type that is asked for; the rest is float32; blocks are ggml's, bit for bit."""
    import gguf

    from mpt_eqx.checkpoint import save_gguf

    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0"):
        assert save_gguf(tiny_model, tmp_path / "m.gguf", type=kind) == []
        reader = gguf.GGUFReader(tmp_path / "m.gguf")
        found = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        assert {found[name] for name in found if "norm" in name} == {"F32"}
        assert {found[name] for name in found if "norm" not in name} == {kind}
        assert all(tensor.data_offset % 64 == 0 for tensor in reader.tensors)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        assert fields == {
            "general.architecture": "mpt", "general.alignment": 64, "general.name": "m",
            "general.quantization_version": 2,
            "general.file_type": {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}[kind],
            "mpt.context_length": 256, "mpt.embedding_length": 32, "mpt.block_count": 2, "mpt.vocab_size": 61,
            "mpt.feed_forward_length": 128, "mpt.attention.head_count": 4, "mpt.attention.max_alibi_bias": 8.0,
            "mpt.attention.layer_norm_epsilon": pytest.approx(1e-5), "tokenizer.ggml.model": "no_vocab",
        }  # fmt: skip


def reference_blocks(rows, kind):
    """ggml's quantize_row_q8_0_ref and quantize_row_q4_0_ref, number by number in float32."""
    f = np.float32
    out = bytearray()
    for block in rows.reshape(-1, 32):
        largest = max(block, key=abs)
        d = f(abs(largest)) / f(127) if kind == "Q8_0" else f(largest) / f(-8)
        inverse = f(1) / d if d else f(0)
        out += np.float16(d).tobytes()
        if kind == "Q8_0":
            # roundf: halves away from zero
            scaled = [float(x * inverse) for x in block]
            out += np.array([np.copysign(np.floor(abs(x) + 0.5), x) for x in scaled], np.int8).tobytes()
        else:
            numbers = [min(15, int(f(x * inverse) + f(8.5))) for x in block]
            out += bytes(low | high << 4 for low, high in zip(numbers[:16], numbers[16:], strict=True))
    return bytes(out)


# Of the bytes that ggml's own functions make of `rows()`; `just reference` computes them anew.
RECORDED = {
    "Q8_0": "3e9749e85d9ebd0ac5680003498bf1a217d5cf230efd07e669ccfbc8e4eb7655",
    "Q4_0": "c29ca1ae89ecb61781face68fb24da8f6ea4f9e4df7ba62666697a342ea5df0b",
}


def rows():
    values = np.random.default_rng(0).standard_normal((8, 96)).astype(np.float32)
    values[1] = 0
    values[2, :32] = np.arange(32) - 15.5  # halves, and two largest of opposite signs
    values[3] *= 1e-4
    values[4] = values[4].astype(ml_dtypes.bfloat16).astype(np.float32)
    return values


@pytest.mark.parametrize("kind", RECORDED)
def test_blocks_are_those_of_ggml(kind):
    import gguf

    from mpt_eqx.checkpoint.formats.gguf_writer import _converted

    found = _converted("w", rows(), gguf.GGMLQuantizationType[kind], gguf).tobytes()
    assert found == reference_blocks(rows(), kind)
    assert hashlib.sha256(found).hexdigest() == RECORDED[kind]


@pytest.fixture
def dtyped(tiny_model):
    """The small model in another type, or with one array in another."""
    import equinox as eqx

    def make(dtype, where=None):
        if where is None:
            return jax.tree.map(lambda leaf: leaf.astype(dtype), tiny_model)
        return eqx.tree_at(where, tiny_model, replace_fn=lambda leaf: leaf.astype(dtype))

    return make


def test_the_type_of_matrices_is_that_of_the_model(dtyped, tmp_path):
    from mpt_eqx import CheckpointError, checkpoint_info
    from mpt_eqx.checkpoint import save_gguf

    for dtype, kind in (("float32", "GGUF (F32)"), ("float16", "GGUF (F16, F32)"), ("bfloat16", "GGUF (BF16, F32)")):
        save_gguf(dtyped(dtype), tmp_path / "m.gguf")
        assert checkpoint_info(tmp_path / "m.gguf").format == kind
    save_gguf(dtyped("bfloat16", lambda m: m.norm_f.weight), tmp_path / "m.gguf")  # float32 all the same
    with pytest.raises(CheckpointError, match="type: expected one with matrices of bfloat16 and float32; pass F32 or"):
        save_gguf(dtyped("bfloat16", lambda m: m.wte.weight), tmp_path / "m.gguf")


def test_what_save_gguf_refuses(dtyped, tiny_config, tmp_path, monkeypatch):
    import equinox as eqx

    from mpt_eqx import MPT, CheckpointError, quantize
    from mpt_eqx.checkpoint import save_gguf

    model, path = dtyped("float32"), tmp_path / "m.gguf"

    def refused(message, model=model, path=path, **options):
        with pytest.raises(CheckpointError, match=message):
            save_gguf(model, path, **options)
        assert not list(tmp_path.iterdir())

    refused("m.bin: expected a file whose name ends in .gguf, found another name", path=tmp_path / "m.bin")
    refused("type: expected F32 or F16 or BF16 or Q8_0 or Q4_0, found 'Q9'", type="Q9")
    refused(
        "model: expected weights that are not quantised, found int8; quantise what .* type='Q8_0'",
        quantize(model, "int8"),
    )
    odd = MPT(tiny_config(d_model=24, n_layers=1), key=jax.random.key(0))
    refused("rows of a multiple of 32 for Q8_0, found transformer.wte.weight with 24.*; take F16", odd, type="Q8_0")
    far = eqx.tree_at(lambda m: m.wte.weight, model, replace_fn=lambda leaf: leaf.at[3, 5].set(65520.0))
    refused("transformer.wte.weight does not fit into F16; take BF16 or F32", far, type="F16")
    refused("companions_from: expected a checkpoint with a tokenizer", companions_from=GOLDEN / "hf_default")
    alone = SimpleNamespace(several_processes=True, rules=SimpleNamespace(heads=None, kv_heads=None))
    object.__setattr__(spread := dtyped("float32"), "layout", alone)
    refused("model: expected one process, found a model on several; write it with save_pretrained", spread)
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(r"writing GGUF needs the gguf library; install it with pip install 'mpt_eqx\[gguf\]'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"program": "vllm"}, "program: expected 'transformers', 'llama.cpp', 'llm-foundry', found 'vllm'"),
        ({"type": "F16"}, "type: expected program='transformers', 'llama.cpp' or 'llm-foundry' with it"),
        ({"lossy": True}, "lossy: expected program='transformers', 'llama.cpp' or 'llm-foundry' with it"),
        (
            {"program": "transformers", "quantize": "int8"},
            "quantize: expected none for transformers, found 'int8'; no other program reads it .for llama.cpp take",
        ),
        ({"program": "llama.cpp", "dtype": "float16"}, "dtype: expected none for llama.cpp, whose types are asked for"),
        (
            {"program": "llm-foundry", "type": "F16"},
            "type: expected none for llm-foundry, whose types are asked for by",
        ),
        ({"program": "llama.cpp"}, "m: expected a file whose name ends in .gguf, found another name"),
    ],
)
def test_arguments_that_exclude_each_other(options, message, tmp_path):
    from mpt_eqx import MPTError
    from mpt_eqx.checkpoint import convert

    with pytest.raises(MPTError, match=message):
        convert(GOLDEN / "hf_default", tmp_path / "m", **options)
    assert not list(tmp_path.iterdir())


def test_sources_that_are_refused(dtyped, tmp_path):
    from mpt_eqx import CheckpointError, quantize, save_pretrained
    from mpt_eqx.checkpoint import convert

    save_pretrained(dtyped("bfloat16", lambda m: m.wte.weight), tmp_path / "mixed")
    with pytest.raises(CheckpointError, match="mixed: expected tensors of one type for transformers; pass dtype="):
        convert(tmp_path / "mixed", tmp_path / "n", program="transformers")
    convert(tmp_path / "mixed", tmp_path / "n", program="transformers", dtype="bfloat16")
    save_pretrained(quantize(dtyped("float32"), "int8"), tmp_path / "int8")
    with pytest.raises(CheckpointError, match="expected weights that are not quantised, found int8; convert what it"):
        convert(tmp_path / "int8", tmp_path / "m.gguf", program="llama.cpp")
    convert(tmp_path / "mixed", tmp_path / "m.gguf", program="llama.cpp", type="F32")
    with pytest.raises(CheckpointError, match="m.gguf: expected another file than the source"):
        convert(tmp_path / "m.gguf", tmp_path / "m.gguf", program="llama.cpp")
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(CheckpointError, match="d.gguf: expected a file to replace, or nothing, found a directory"):
        convert(tmp_path / "mixed", tmp_path / "d.gguf", program="llama.cpp", type="F32")


@pytest.mark.parametrize("moment", ["writing", "syncing", "replacing"])
def test_a_gguf_file_is_replaced_in_one_step(moment, one_block_model, tmp_path, monkeypatch):
    """Whatever fails, the old one stays, and nothing lies beside it."""
    import os

    import gguf

    from mpt_eqx import CheckpointError, checkpoint_info
    from mpt_eqx.checkpoint import save_gguf

    path = tmp_path / "m.gguf"
    save_gguf(one_block_model, path, type="F16")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        where, name = {
            "writing": (gguf.GGUFWriter, "write_tensor_data"), "syncing": (os, "fsync"), "replacing": (os, "replace"),
        }[moment]  # fmt: skip
        patch.setattr(where, name, fail)
        with pytest.raises(CheckpointError, match="m.gguf: cannot be written .*No space left on device"):
            save_gguf(one_block_model, path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    assert checkpoint_info(path).format == "GGUF (F16, F32)"
    (tmp_path / "m.gguf.mpt_eqx-0a1b2c3d").touch()  # of a save that was killed
    save_gguf(one_block_model, path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"] and checkpoint_info(path).format == "GGUF (F32)"


def test_the_command_line(tmp_path):
    done = run("convert", GOLDEN / "f_bias", tmp_path / "m.gguf", "--for", "llama.cpp", "--type", "Q8_0")
    assert (done.returncode, done.stdout) == (0, "") and "parameters from safetensors in" in done.stderr
    assert run("inspect", tmp_path / "m.gguf").returncode == 0
    done = run("convert", GOLDEN / "f_bias", tmp_path / "t", "--for", "transformers")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "mpt-eqx: error: expected a model that transformers computes as it is, found no_bias="
    )
    done = run("convert", GOLDEN / "f_bias", tmp_path / "t", "--for", "transformers", "--lossy")
    assert done.returncode == 0
    assert done.stderr.startswith("transformers ignores no_bias=False: biases are left out\n")
    done = run("convert", "a", "b", "--for", "vllm")
    assert done.returncode == 2 and "invalid choice: 'vllm'" in done.stderr
    assert "mpt-eqx convert ./mpt-7b ./mpt-7b.gguf --for llama.cpp --type Q8_0" in run("convert", "--help").stdout


def test_progress_is_shown_where_it_is_asked_for(tmp_path, capfd):
    from mpt_eqx.checkpoint import convert

    convert(GOLDEN / "hf_default", tmp_path / "m.gguf", program="llama.cpp", progress=True)
    assert "writing m.gguf" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "part", "other"),
    [
        ("computed_by", "dict(TAKEN[program])", "dict(TAKEN['transformers'])"),
        ("computed_by", "_dropout_in_transformers(config)", "config.attn_config.attn_pdrop"),
        ("_activation", "ffn.ffn_act_fn", "None"),
    ],
)
def test_mutants_are_found(function, part, other, monkeypatch):
    """The property above notices where the table and what is computed part."""
    from mpt_eqx.config import programs

    changed = mutant(programs, function, part, other)
    for name in ("computed_by", "differences"):
        monkeypatch.setattr(programs, name, getattr(changed, name))
    with pytest.raises(BaseException):  # noqa: B017  hypothesis raises groups, too
        test_whatever_is_computed_otherwise_is_named()
