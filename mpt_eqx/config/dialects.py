"""The dialects of config.json, brought into one canonical form before anything else looks at them.

Two programs write `model_type: mpt` with different defaults: llm-foundry (MosaicML's own; its files also lie beside
the models once published on the Hub) and transformers' native port. Before May 2023 the same models had flat files
(`mosaic_gpt`, `replit_lm`). Every key falls in one of four groups: taken over, bookkeeping that cannot change the
maths, known but supported at one value only, and unknown. The last two are refused by name, because a key that
vanishes silently is a wrong model.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpt_eqx.config.overrides import as_tuning, collapse_overrides, expand_overrides
from mpt_eqx.config.parts import (
    MOE_FIELDS,
    MOE_TYPES,
    ActFnConfig,
    AttnConfig,
    BlockOverride,
    FFNConfig,
    InitConfig,
    RopeHFConfig,
)
from mpt_eqx.config.quantization import KEY as QUANTIZATION
from mpt_eqx.config.quantization import read_quantization
from mpt_eqx.config.validation import check_int, shown
from mpt_eqx.errors import ConfigError, printable

# Keys of the canonical form, per part of the config ("" is the top level).
TAKEN = {
    "": {
        *("d_model", "n_heads", "n_layers", "head_dim", "expansion_ratio", "max_seq_len", "vocab_size", "no_bias"),
        *("attention_bias", "norm_type", "norm_eps", "tie_word_embeddings", "learned_pos_emb", "logit_scale"),
        *("final_logit_softcapping", "embedding_fraction", "pad_token_id", "resid_pdrop", "emb_pdrop"),
        "block_overrides",
    },
    "attn_config": {field.name for field in dataclasses.fields(AttnConfig)},
    "ffn_config": {field.name for field in dataclasses.fields(FFNConfig)},
    "init_config": {field.name for field in dataclasses.fields(InitConfig)},
}

# Other spellings of a key, at the top level.
ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "layer_norm_epsilon": "norm_eps",
}

# Where the keys of the flat files of early 2023 belong; `_nest` turns three of them into other values too.
FLAT = {
    "mlp_ratio": ("", "expansion_ratio"),
    "low_precision_layernorm": ("", "norm_type"),
    "multiquery_attention": ("attn_config", "attn_type"),
    "attn_qk_ln": ("attn_config", "qk_ln"),
    "attn_clip_qkv": ("attn_config", "clip_qkv"),
    "param_init_fn": ("init_config", "name"),
    **{
        key: ("attn_config", key)
        for key in (
            *("alibi", "alibi_bias_max", "attn_impl", "attn_pdrop", "softmax_scale", "prefix_lm"),
            "attn_uses_sequence_id",
        )
    },
    **{key: ("init_config", key) for key in TAKEN["init_config"] if key != "name"},
}
MAX_KEY = 1000
FLAT_MODEL_TYPES = ("mosaic_gpt", "replit_lm")

# In rope_hf_config: the length that dynamic rotary positions were trained for, where max_seq_len is another one. The
# key is this library's own. The reference's original_max_position_embeddings would not do, because for this type the
# reference takes max_seq_len whatever is there, and so must we for a file of its making.
TRAINED = "trained_max_seq_len"

# Keys that would change the maths, and the values under which they do not. Supporting one means moving it to TAKEN.
PLAIN_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {},
    "attn_config": {
        "kv_dim": (None,),
        "head_dim": (None,),
        # llm-foundry, too, takes it for single blocks only.
        "nope": (False,),
        "prefix_lm": (False,),
        "reuse_kv_layer_idx": (None,),
        "reuse_kv_x_layer_idx": (None,),
        "seq_parallel_world_size": (None, 1),
        "norm_type": (),
        "norm_eps": (),
    },
    # It makes a token's expert depend on its place in the batch.
    "ffn_config": {"uniform_expert_assignment": (False,)},
    "init_config": {},
}

# Keys that choose a kernel, describe the file or belong to another program. fuse_norm_attn_norm only renames tensors,
# and both names are read; use_pad_tok_in_ffn changes only what is computed at padding, where outputs mean nothing;
# rope_dail_config is looked at in `_check_dail`, quantization_config in `read_quantization`; moe_loss_weight and its
# like weigh what a trainer adds to the loss.
BOOKKEEPING = {
    "": {
        *("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path"),
        *("attn_config", "ffn_config", "init_config", "fc_type", "init_device", "initializer_range", "loss_fn", "name"),
        *("tokenizer_name", "use_cache", "verbose", "bos_token_id", "eos_token_id", "fuse_norm_attn_norm"),
        *("activation_checkpointing_target", "use_pad_tok_in_ffn", QUANTIZATION),
    },
    "attn_config": {
        *("attn_impl", "verbose", "rope_dail_config", "fc_type", "model_type"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "tie_encoder_decoder"),
    },
    "ffn_config": {
        *("fc_type", "bias", "return_bias", "moe_world_size", "moe_loss_weight", "moe_zloss_weight", "device_mesh"),
        *("moe_capacity_factor", "moe_weight_parallelism", "moe_expert_model_parallelism", "lbl_process_group"),
        *("moe_lbl_in_fp32", "memory_optimized_mlp", "mlp_impl", "grouped_mlp", "fp16", "bf16", "num_layers"),
    },
    "init_config": {"verbose"},
}

# What transformers' PretrainedConfig writes or wrote, at the top level and again inside attn_config.
PRETRAINED_CONFIG = {
    *("_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "torch_dtype", "id2label", "label2id"),
    *("is_encoder_decoder", "is_decoder", "add_cross_attention", "output_attentions", "output_hidden_states"),
    *("problem_type", "return_dict", "return_dict_in_generate", "transformers_version", "use_return_dict"),
    *("finetuning_task", "task_specific_params", "torchscript", "pruned_heads", "cross_attention_hidden_size"),
    *("tie_encoder_decoder", "tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id", "use_bfloat16"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"),
    *("diversity_penalty", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "output_scores"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
    *("suppress_tokens", "begin_suppress_tokens", "tf_legacy_loss", "attn_implementation", "_attn_implementation"),
    *("_attn_implementation_autoset", "_commit_hash", "gradient_checkpointing"),
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
            path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, object_pairs_hook=unique_keys
        )
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"{path}: expected JSON, found something else ({str(error) or type(error).__name__})"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def override(d: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `d` with keys replaced; nested objects are merged, and a key replaces its aliases too.

    A larger max_seq_len asks for longer inputs, not for another model: dynamic rotary positions, which depend on the
    trained length, keep the old one.
    """
    result = _merged(d, overrides)
    attn_config, trained = result.get("attn_config"), d.get("max_seq_len", 2048)
    if overrides.get("max_seq_len", trained) != trained and isinstance(attn_config, Mapping):
        rope = attn_config.get("rope_hf_config")
        if isinstance(rope, Mapping) and rope.get("type") == "dynamic":
            result["attn_config"] = {**attn_config, "rope_hf_config": {TRAINED: trained, **_without_none(rope)}}
    return result


def _merged(d: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(d)
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merged(result[key], value)
            continue
        name = ALIASES.get(key, key)
        for alias in (name, *(alias for alias in ALIASES if ALIASES[alias] == name)):
            result.pop(alias, None)
        result[name] = value
    return result


def to_canonical(d: Mapping[str, Any]) -> dict[str, Any]:
    """Returns llm-foundry's own keys with their nested parts, from any supported dialect.

    Raises:
        ConfigError: a key is unknown, contradicts its alias, or has a value that is not supported.
    """
    if not isinstance(d, Mapping):
        raise ConfigError(f"config: expected a dict, found {type(d).__name__}")
    if d.get("model_type", "mpt") not in ("mpt", *FLAT_MODEL_TYPES):
        raise ConfigError(f"model_type: expected 'mpt', found {shown(d['model_type'])}; not supported")
    if d.get("model_type") in FLAT_MODEL_TYPES or ("attn_config" not in d and set(d) & set(FLAT)):
        d = _nest(d)
    parts = {name: _part(d, name) for name in ("attn_config", "ffn_config", "init_config")}
    top = _resolve_aliases(d)
    for name, values in {"": top, **parts}.items():
        _refuse(name, values)
    _check_dail(parts["attn_config"])
    read_quantization(d)

    canonical: dict[str, Any] = {key: top[key] for key in TAKEN[""] if key in top}
    for name, values in parts.items():
        canonical[name] = {key: values[key] for key in TAKEN[name] if key in values}
    attn, ffn, init = (canonical[name] for name in parts)
    # Not of the model, but `from_canonical` looks at it.
    attn["attn_impl"] = parts["attn_config"].get("attn_impl", "flash")

    if _written_by_transformers(d, parts["attn_config"]):
        canonical.setdefault("no_bias", True)
        attn.setdefault("alibi", True)
        # Its embedding treats the padding token like any other.
        canonical.pop("pad_token_id", None)
    # llm-foundry looks at clip_qkv's truth value: 0 and false mean none.
    if attn.get("clip_qkv") in (0, None, False):
        attn["clip_qkv"] = None
    # The same for the norm of the expert weights; jitter by 0 is none; and it takes names of norms in any case.
    for key in ("moe_normalize_expert_weights", "moe_jitter_eps"):
        if key in ffn and ffn[key] in (0, None, False):
            ffn[key] = None
    if isinstance(canonical.get("norm_type"), str):
        canonical["norm_type"] = canonical["norm_type"].lower()
    if isinstance(lim := init.get("emb_init_uniform_lim"), list):
        init["emb_init_uniform_lim"] = tuple(lim)
    # Its YAML reader may leave a number as text.
    if isinstance(div := init.get("init_div_is_residual"), str) and div.isdecimal() and div.isascii():
        init["init_div_is_residual"] = float(div)
    return canonical


def from_canonical(canonical: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of MPTConfig from the canonical form.

    Raises:
        ConfigError: a nested object has an unknown key, or a value is not valid.
    """
    attn, ffn = dict(canonical["attn_config"]), dict(canonical["ffn_config"])
    impl = attn.pop("attn_impl")
    # llm-foundry fills null in these places with its defaults.
    for key in ("rope_hf_config", "attn_temperature_tuning"):
        if attn.get(key, {}) is None:
            del attn[key]
    tuning = attn.get("attn_temperature_tuning", {})
    if "attn_temperature_tuning" in attn:
        attn["attn_temperature_tuning"] = as_tuning(tuning)
    if "rope_hf_config" in attn:
        attn["rope_hf_config"] = _rope(attn["rope_hf_config"])
    if ffn.get("ffn_act_fn") is not None:
        ffn["ffn_act_fn"] = _dataclass("ffn_config.ffn_act_fn", ffn["ffn_act_fn"], ActFnConfig)
    arguments = {
        **canonical,
        "attn_config": AttnConfig(**attn),
        "ffn_config": FFNConfig(**ffn),
        "init_config": InitConfig(**canonical["init_config"]),
    }
    if canonical.get("block_overrides") is not None:
        arguments["block_overrides"] = expand_overrides(canonical["block_overrides"], tuning)
    _check_tuning(impl, arguments["attn_config"], arguments.get("block_overrides") or ())
    return arguments


def as_written(message: str, d: Any) -> str:
    """Returns an error's message with the key that the file used, where that is another spelling or a flat one."""
    spellings = {**{alias: ("", name) for alias, name in ALIASES.items()}, **FLAT}
    for key, (part, name) in spellings.items() if isinstance(d, Mapping) else ():
        path = f"{part}.{name}" if part else name
        if key in d and message.startswith(f"{path}:") and name not in ((d.get(part) or {}) if part else d):
            return f"{key}{message.removeprefix(path)}"
    return message


def to_config_json(canonical: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a config.json from the fields of an MPTConfig: the inverse of `to_canonical`.

    transformers checks types strictly (a whole ratio must be an int, a clip a float), reads the epsilon under a name
    of its own, and recomputes the whole prefix for every token unless use_cache is true. llm-foundry passes unknown
    and unneeded keys of the nested parts on to classes that do not take them.
    """
    d = dict(canonical)
    attn, ffn = dict(canonical["attn_config"]), dict(canonical["ffn_config"])
    d["expansion_ratio"] = _int_if_whole(canonical["expansion_ratio"])
    attn["alibi_bias_max"] = _int_if_whole(attn["alibi_bias_max"])
    attn["attn_pdrop"] = _int_if_whole(attn["attn_pdrop"])
    for key in ("embedding_fraction", "norm_eps", "logit_scale", "final_logit_softcapping", "emb_pdrop", "resid_pdrop"):
        if isinstance(d[key], int):
            d[key] = float(d[key])
    attn["attn_temperature_tuning"] = _floats(attn["attn_temperature_tuning"])
    for key in ("clip_qkv", "softmax_scale"):
        if attn[key] is not None:
            attn[key] = float(attn[key])
    rope = _without_none(attn["rope_hf_config"])
    if rope["type"] == "dynamic" and "original_max_position_embeddings" in rope:
        rope[TRAINED] = rope.pop("original_max_position_embeddings")
    attn["rope_hf_config"] = rope
    if attn["kv_n_heads"] is None:
        del attn["kv_n_heads"]
    if ffn["ffn_act_fn"] is not None:
        act = ffn["ffn_act_fn"]
        keys = {"gelu": ("name", "approximate"), "leaky_relu": ("name", "negative_slope")}
        ffn["ffn_act_fn"] = {key: act[key] for key in keys.get(act["name"], ("name",))}
    if ffn["ffn_type"] in MOE_TYPES:
        moe = {key: ffn[key] for key in MOE_FIELDS}
        extra = {"uniform_expert_assignment": False} if ffn["ffn_type"] == "torch_dmoe" else {"moe_world_size": 1}
        ffn = {**_without_none(ffn), **moe, **extra}
    else:
        ffn = _without_none({key: value for key, value in ffn.items() if key not in MOE_FIELDS})
    init = dict(canonical["init_config"])
    if isinstance(lim := init["emb_init_uniform_lim"], tuple):
        init["emb_init_uniform_lim"] = list(lim)
    impl = "torch"
    if d["block_overrides"] is not None:
        blocks = [
            {**block, "attn_temperature_tuning": _floats(block["attn_temperature_tuning"])}
            for block in d["block_overrides"]
        ]
        d["block_overrides"] = collapse_overrides(blocks)
        # llm-foundry can leave ALiBi out of single blocks with this implementation only. Where that one would count
        # positions otherwise (`_check_tuning`), "torch" makes it refuse the file instead of computing other numbers.
        tunings = [part["attn_temperature_tuning"] for part in (attn, *blocks)]
        counts = attn["attn_uses_sequence_id"] and any(tuning and tuning["attn_scale"] for tuning in tunings)
        if attn["alibi"] and any(block["nope"] for block in blocks) and not counts:
            impl = "flash"
    return {
        "architectures": ["MPTForCausalLM"],
        "model_type": "mpt",
        **d,
        "attn_config": {**attn, "attn_impl": impl},
        "ffn_config": ffn,
        "init_config": init,
        "layer_norm_epsilon": d["norm_eps"],
        "use_cache": True,
    }


def _written_by_transformers(d: Mapping[str, Any], attn_config: Mapping[str, Any]) -> bool:
    """Tells whose defaults stand behind keys that are absent: transformers leaves out what equals its own."""
    return d.get("architectures") == ["MptForCausalLM"] or "model_type" in attn_config


def _nest(d: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a flat file of early 2023 with each key where it belongs now."""
    nested: dict[str, Any] = {key: value for key, value in d.items() if key not in FLAT}
    parts: dict[str, dict[str, Any]] = {"": nested}
    for name in ("attn_config", "init_config"):
        parts[name] = nested[name] = _part(d, name)
    for key, value in d.items():
        if key not in FLAT:
            continue
        if key == "multiquery_attention":
            value = "multiquery_attention" if value else "multihead_attention"
        elif key == "low_precision_layernorm":
            value = "low_precision_layernorm" if value else "layernorm"
        part, name = FLAT[key]
        if parts[part].setdefault(name, value) != value:
            raise ConfigError(
                f"{name}: expected the same value as {key}={shown(value)}, found {shown(parts[part][name])}"
            )
    nested["model_type"] = "mpt"
    return nested


def _check_dail(attn_config: Mapping[str, Any]) -> None:
    """Raises where flash-attn's rotation would not be the plain one."""
    dail = attn_config.get("rope_dail_config") or {}
    if not isinstance(dail, Mapping) or set(dail) - {"type", "pos_idx_in_fp32", "xpos_scale_base"}:
        raise ConfigError(f"attn_config.rope_dail_config: expected type and pos_idx_in_fp32, found {shown(dail)}")
    if not attn_config.get("rope") or attn_config.get("rope_impl", "dail") != "dail":
        return
    for key, plain in (("type", "original"), ("pos_idx_in_fp32", True)):
        if dail.get(key, plain) != plain:
            raise ConfigError(
                f"attn_config.rope_dail_config.{key}: expected {json.dumps(plain)}, found {shown(dail)}; "
                f"other values are not supported"
            )


def _check_tuning(impl: Any, attn_config: AttnConfig, overrides: Sequence[BlockOverride]) -> None:
    """Raises where llm-foundry's two implementations of attention count positions differently, in any block."""
    tunings = [attn_config.attn_temperature_tuning, *(block.attn_temperature_tuning for block in overrides)]
    tuned = any(tuning is not None and tuning.attn_scale for tuning in tunings)
    if tuned and attn_config.attn_uses_sequence_id and impl != "torch":
        raise ConfigError(
            f"attn_config.attn_impl: expected 'torch' for attn_temperature_tuning with attn_uses_sequence_id, "
            f"found {shown(impl)}, with which every packed sequence begins at 0; not supported"
        )


def _rope(d: Any) -> RopeHFConfig:
    """Returns `rope_hf_config`, with the trained length of the type "dynamic" from where this library keeps it."""
    name, trained = "attn_config.rope_hf_config", None
    if isinstance(d, Mapping):
        trained = d.get(TRAINED)
        d = {key: value for key, value in d.items() if key != TRAINED}
        check_int(f"{name}.{TRAINED}", trained, optional=True)
    rope = _dataclass(name, d, RopeHFConfig)
    return dataclasses.replace(rope, original_max_position_embeddings=trained) if rope.type == "dynamic" else rope


def _dataclass(name: str, d: Any, of: type) -> Any:
    """Returns a nested object of config.json as the dataclass `of`."""
    keys = {field.name for field in dataclasses.fields(of)}
    if not isinstance(d, Mapping) or set(d) - keys:
        raise ConfigError(f"{name}: expected an object with keys of {sorted(keys)}, found {shown(d)}; not supported")
    return of(**d)


def _part(d: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = d.get(name)
    if part is None:
        return {}
    if not isinstance(part, Mapping):
        raise ConfigError(f"{name}: expected an object, found {shown(part)}")
    return dict(part)


def _resolve_aliases(d: Mapping[str, Any]) -> dict[str, Any]:
    top = dict(d)
    for alias, name in ALIASES.items():
        if alias in top:
            value = top.pop(alias)
            if top.setdefault(name, value) != value:
                raise ConfigError(
                    f"{name}: expected the same value as {alias}={shown(value)}, found {shown(top[name])}"
                )
    return top


def _refuse(part: str, values: Mapping[str, Any]) -> None:
    """Raises for the first key of one part that is unknown, or known and not at the value that is supported."""
    ignored = BOOKKEEPING[part] | (PRETRAINED_CONFIG if part in ("", "attn_config") else set())
    for key, value in values.items():
        path = f"{part}.{key}" if part else key
        if key in PLAIN_ONLY[part]:
            if value not in PLAIN_ONLY[part][key]:
                supported = " or ".join(json.dumps(plain) for plain in PLAIN_ONLY[part][key]) or "no such key"
                raise ConfigError(f"{path}: expected {supported}, found {shown(value)}; other values are not supported")
        elif key not in TAKEN[part] and key not in ignored:
            raise ConfigError(
                f"{path}: unknown key with value {shown(value)}; it could change the maths, so it is not ignored: "
                f"remove it from the config if it is mere bookkeeping"
            )


def _without_none(d: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in d.items() if value is not None}


def _floats(d: Mapping[str, float] | None) -> dict[str, float] | None:
    """Returns the numbers as floats: llm-foundry wants an override to have the type of what it overrides."""
    return None if d is None else {key: float(value) for key, value in d.items()}


def _int_if_whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the dict of a JSON object; for json.loads, which would let the last of several equal keys win.

    Raises:
        ValueError: two keys are equal, or one could not be shown in an error as it is.
    """
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key '{printable(key)}'")
        if len(key) > MAX_KEY or not key.isprintable():
            raise ValueError(f"expected keys of at most {MAX_KEY} printable characters, found '{printable(key)}'")
        result[key] = value
    return result
