"""The dialects of config.json, brought into one canonical form before anything else looks at them.

Two programs write `model_type: mpt` with different defaults: llm-foundry (MosaicML's own; its files also lie beside
the models once published on the Hub) and transformers' native port. Every key falls in one of four groups: taken
over, bookkeeping that cannot change the maths, known but supported at one value only, and unknown. The last two are
refused by name, because a key that vanishes silently is a wrong model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpt_eqx.errors import ConfigError

# Keys of the canonical form, per part of the config ("" is the top level).
TAKEN = {
    "": {
        *("d_model", "n_heads", "n_layers", "expansion_ratio", "max_seq_len", "vocab_size", "no_bias"),
        *("norm_type", "norm_eps", "tie_word_embeddings"),
    },
    "attn_config": {"alibi", "alibi_bias_max", "clip_qkv", "softmax_scale"},
    "ffn_config": {"ffn_type"},
    "init_config": {
        *("name", "fan_mode", "init_nonlinearity", "init_gain", "init_div_is_residual", "init_std"),
        *("emb_init_std", "emb_init_uniform_lim"),
    },
}

# Other spellings of a key, at the top level.
ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "layer_norm_epsilon": "norm_eps",
}

# Keys that would change the maths, and the values under which they do not. Supporting one means moving it to TAKEN.
PLAIN_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {
        "emb_pdrop": (0,),
        "resid_pdrop": (0,),
        "logit_scale": (None,),
        "final_logit_softcapping": (None,),
        "embedding_fraction": (1,),
        "attention_bias": (False, None),
        "head_dim": (None,),
        "block_overrides": (None,),
        "use_pad_tok_in_ffn": (True,),
        "fuse_norm_attn_norm": (False,),
        "pad_token_id": (None,),
    },
    "attn_config": {
        "attn_type": ("multihead_attention",),
        "attn_pdrop": (0,),
        "attn_logit_softcapping": (None,),
        "attn_uses_sequence_id": (False,),
        "fused_qkv": (True,),
        "kv_n_heads": (None,),
        "kv_dim": (None,),
        "head_dim": (None,),
        "nope": (False,),
        "prefix_lm": (False,),
        "qk_gn": (False,),
        "qk_ln": (False,),
        "reuse_kv_layer_idx": (None,),
        "reuse_kv_x_layer_idx": (None,),
        "rope": (False,),
        "sliding_window_size": (-1,),
        "norm_type": (),
        "norm_eps": (),
    },
    "ffn_config": {"ffn_act_fn": (None,), "ffn_hidden_size": (None,)},
    "init_config": {},
}

# Keys that choose a kernel, describe the file or belong to another program. learned_pos_emb is among them because
# llm-foundry switches it off under ALiBi, whatever a file says (mpt-7b's own says true and has no such tensor); the
# settings of rope because its switch is looked at instead.
BOOKKEEPING = {
    "": {
        *("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path"),
        *("attn_config", "ffn_config", "init_config", "fc_type", "init_device", "initializer_range", "loss_fn", "name"),
        *("tokenizer_name", "use_cache", "verbose", "learned_pos_emb", "bos_token_id", "eos_token_id"),
        *("activation_checkpointing_target",),
    },
    "attn_config": {
        *("attn_impl", "verbose", "rope_theta", "rope_impl", "rope_dail_config", "rope_hf_config"),
        *("fc_type", "model_type"),
    },
    "ffn_config": {"fc_type"},
    "init_config": {"verbose"},
}

# What transformers' PretrainedConfig writes, at the top level and again inside attn_config.
PRETRAINED_CONFIG = {
    *("_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "torch_dtype", "id2label", "label2id"),
    *("is_encoder_decoder", "is_decoder", "add_cross_attention", "output_attentions", "output_hidden_states"),
    *("problem_type", "return_dict", "return_dict_in_generate", "transformers_version", "use_return_dict"),
    *("finetuning_task", "task_specific_params", "torchscript", "pruned_heads", "cross_attention_hidden_size"),
    *("tie_encoder_decoder", "tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id", "use_bfloat16"),
}


def read_json_object(path: str | Path, *, max_bytes: int = 1_000_000) -> dict[str, Any]:
    """Reads a small JSON file whose content must be one object, strictly: no NaN, no duplicate keys.

    Raises:
        ConfigError: the file is missing, too large, or not such an object.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; an MPT checkpoint has its configuration there")
    if path.stat().st_size > max_bytes:
        raise ConfigError(f"{path}: expected at most {max_bytes} bytes, found {path.stat().st_size}")
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
        )
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected JSON, found something else ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def override(d: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `d` with keys replaced; nested objects are merged, and a key replaces its aliases too."""
    result = dict(d)
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = override(result[key], value)
            continue
        name = ALIASES.get(key, key)
        for alias in (name, *(alias for alias in ALIASES if ALIASES[alias] == name)):
            result.pop(alias, None)
        result[name] = value
    return result


def to_canonical(d: Mapping[str, Any]) -> dict[str, Any]:
    """Returns llm-foundry's own keys with their nested parts, from any supported dialect.

    Raises:
        ConfigError: a key is unknown, contradicts its alias, or has a value that is not supported yet.
    """
    if not isinstance(d, Mapping):
        raise ConfigError(f"config: expected a dict, found {type(d).__name__}")
    if d.get("model_type", "mpt") != "mpt":
        raise ConfigError(f"model_type: expected 'mpt', found {d['model_type']!r}; not supported")
    parts = {name: _part(d, name) for name in ("attn_config", "ffn_config", "init_config")}
    top = _resolve_aliases(d)
    for name, values in {"": top, **parts}.items():
        _refuse(name, values)

    canonical: dict[str, Any] = {key: top[key] for key in TAKEN[""] if key in top}
    for name, values in parts.items():
        canonical[name] = {key: values[key] for key in TAKEN[name] if key in values}

    if _written_by_transformers(d, parts["attn_config"]):
        canonical.setdefault("no_bias", True)
        canonical["attn_config"].setdefault("alibi", True)
    # llm-foundry looks at clip_qkv's truth value: 0 and false mean none.
    if not canonical["attn_config"].get("clip_qkv", None):
        canonical["attn_config"]["clip_qkv"] = None
    if isinstance(lim := canonical["init_config"].get("emb_init_uniform_lim"), list):
        canonical["init_config"]["emb_init_uniform_lim"] = tuple(lim)
    # Its YAML reader may leave a number as text.
    if isinstance(div := canonical["init_config"].get("init_div_is_residual"), str) and div.isnumeric():
        canonical["init_config"]["init_div_is_residual"] = float(div)
    return canonical


def to_config_json(canonical: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a config.json from the canonical form: the inverse of `to_canonical`.

    transformers checks types strictly (a whole ratio must be an int, a clip a float), reads the epsilon under a name
    of its own, and recomputes the whole prefix for every token unless use_cache is true.
    """
    d = dict(canonical)
    d["attn_config"] = {**canonical["attn_config"], "attn_impl": "torch", "attn_pdrop": 0}
    d["expansion_ratio"] = _int_if_whole(canonical["expansion_ratio"])
    d["attn_config"]["alibi_bias_max"] = _int_if_whole(canonical["attn_config"]["alibi_bias_max"])
    for key in ("clip_qkv", "softmax_scale"):
        if d["attn_config"][key] is not None:
            d["attn_config"][key] = float(d["attn_config"][key])
    if isinstance(lim := canonical["init_config"]["emb_init_uniform_lim"], tuple):
        d["init_config"] = {**canonical["init_config"], "emb_init_uniform_lim": list(lim)}
    return {
        "architectures": ["MPTForCausalLM"],
        "model_type": "mpt",
        **d,
        "layer_norm_epsilon": canonical["norm_eps"],
        "learned_pos_emb": False,
        "use_cache": True,
    }


def _written_by_transformers(d: Mapping[str, Any], attn_config: Mapping[str, Any]) -> bool:
    """Tells whose defaults stand behind keys that are absent: transformers leaves out what equals its own."""
    return d.get("architectures") == ["MptForCausalLM"] or "model_type" in attn_config


def _part(d: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = d.get(name)
    if part is None:
        return {}
    if not isinstance(part, Mapping):
        raise ConfigError(f"{name}: expected an object, found {part!r}")
    return dict(part)


def _resolve_aliases(d: Mapping[str, Any]) -> dict[str, Any]:
    top = dict(d)
    for alias, name in ALIASES.items():
        if alias in top:
            value = top.pop(alias)
            if top.setdefault(name, value) != value:
                raise ConfigError(f"{name}: expected the same value as {alias}={value!r}, found {top[name]!r}")
    return top


def _refuse(part: str, values: Mapping[str, Any]) -> None:
    """Raises for the first key of one part that is unknown, or known and not at the value that is supported."""
    ignored = BOOKKEEPING[part] | (PRETRAINED_CONFIG if part in ("", "attn_config") else set())
    for key, value in values.items():
        path = f"{part}.{key}" if part else key
        if key in TAKEN[part]:
            continue
        if key in PLAIN_ONLY[part]:
            if value not in PLAIN_ONLY[part][key]:
                supported = " or ".join(json.dumps(plain) for plain in PLAIN_ONLY[part][key]) or "no such key"
                raise ConfigError(f"{path}: expected {supported}, found {value!r}; other values are not supported yet")
        elif key == "attn_temperature_tuning":
            if isinstance(value, Mapping) and value.get("attn_scale", 0):
                raise ConfigError(
                    f"{path}.attn_scale: expected 0, found {value['attn_scale']!r}; other values are not supported yet"
                )
        elif key not in ignored:
            raise ConfigError(
                f"{path}: unknown key with value {value!r}; it could change the maths, so it is not ignored: "
                f"remove it from the config if it is mere bookkeeping"
            )


def _int_if_whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return result
