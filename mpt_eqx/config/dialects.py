"""Reading config.json: its dialects are brought into one canonical form before anything else looks at them.

Two programs write `model_type: mpt` with different defaults: llm-foundry (MosaicML's own; its files also lie beside
the models once published on the Hub) and transformers' native port. Before May 2023 the same models had flat files
(`mosaic_gpt`, `replit_lm`). What becomes of each key says `mpt_eqx.config.keys`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mpt_eqx.config.keys import (
    ALIASES,
    FIXED_VALUE,
    IGNORED,
    INPLACE,
    LEGACY_FLAT,
    LEGACY_FLAT_MODEL_TYPES,
    OTHER_PROGRAMS,
    PRETRAINED_CONFIG,
    SUPPORTED,
    TEXT_PADDING,
    TRAINED,
)
from mpt_eqx.config.overrides import as_tuning, expand_overrides
from mpt_eqx.config.parts import (
    ACTIVATIONS,
    ActFnConfig,
    AttnConfig,
    BlockOverride,
    FFNConfig,
    InitConfig,
    RopeHFConfig,
)
from mpt_eqx.config.quantization import Quantization, read_quantization
from mpt_eqx.config.validation import NULL, check, choice, either, shown, whole
from mpt_eqx.errors import ConfigError, printable

PARTS = ("attn_config", "ffn_config", "init_config")


class Canonical(NamedTuple):
    """The content of a config.json under llm-foundry's own keys, values unchecked.

    Attributes:
        values: the arguments of MPTConfig that the file says, nested parts as dicts.
        attn_impl: llm-foundry's implementation of attention.
        quantization: how the weights are quantised, None if they are not.
        spelling: the key that the file used for a field, by the field's path, where it is another.
    """

    values: dict[str, Any]
    attn_impl: Any
    quantization: Quantization | None
    spelling: dict[str, str]


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
            kept = {key: value for key, value in rope.items() if value is not None}
            result["attn_config"] = {**attn_config, "rope_hf_config": {TRAINED: trained, **kept}}
    return result


def _merged(d: Mapping[str, Any], overrides: Mapping[str, Any], part: str = "") -> dict[str, Any]:
    """Returns `d` with keys replaced; `part` is where it stands in config.json. None takes an unknown key away."""
    result = dict(d)
    for key, value in overrides.items():
        old = result.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            # Another activation has other arguments.
            replaces = key == "ffn_act_fn" and value.get("name", old.get("name")) != old.get("name")
            result[key] = dict(value) if replaces else _merged(old, value, f"{part}.{key}" if part else key)
            continue
        if value is None and key in result and not _is_known(key, part):
            del result[key]
            continue
        name = ALIASES.get(key, key)
        for alias in (name, *(alias for alias in ALIASES if ALIASES[alias] == name)):
            result.pop(alias, None)
        result[name] = value
    return result


def _is_known(key: str, part: str) -> bool:
    """Returns whether anything is known of a key, so that null has a meaning there; of deeper objects all are."""
    if part not in SUPPORTED:
        return True
    known = SUPPORTED[part] | FIXED_VALUE[part].keys() | IGNORED[part]
    return key in known or (not part and key in (*ALIASES, *LEGACY_FLAT))


def to_canonical(d: Mapping[str, Any]) -> Canonical:
    """Returns the canonical form of a config.json in any supported dialect.

    Raises:
        ConfigError: a key is unknown, contradicts its alias, or has a value that is not supported.
    """
    if not isinstance(d, Mapping):
        raise ConfigError("config", f"expected a dict, found {type(d).__name__}")
    if d.get("model_type", "mpt") not in ("mpt", *LEGACY_FLAT_MODEL_TYPES):
        raise ConfigError("model_type", f"expected 'mpt', found {shown(d['model_type'])}; not supported")
    spelling: dict[str, str] = {}
    if d.get("model_type") in LEGACY_FLAT_MODEL_TYPES or ("attn_config" not in d and set(d) & set(LEGACY_FLAT)):
        d = _nest(d, spelling)
    top = _resolve_aliases(d, spelling)
    parts = {name: _part(d, name) for name in PARTS}
    for name, content in {"": top, **parts}.items():
        _refuse(name, content, spelling)
    _check_dail(parts["attn_config"])

    values = {key: value for key, value in top.items() if key in SUPPORTED[""]}
    for name, content in parts.items():
        values[name] = {key: value for key, value in content.items() if key in SUPPORTED[name]}
    if _written_by_transformers(d, parts["attn_config"]):
        values.setdefault("no_bias", True)
        values["attn_config"].setdefault("alibi", True)
    if _written_by_transformers(d, parts["attn_config"]) or d.get(TEXT_PADDING):
        # Its embedding treats the padding token like any other.
        values["text_pad_token_id"] = values.pop("pad_token_id", None)
        spelling["text_pad_token_id"] = "pad_token_id"
    _normalize(values)
    return Canonical(values, parts["attn_config"].get("attn_impl", "flash"), read_quantization(d), spelling)


def build_parts(canonical: Canonical) -> dict[str, Any]:
    """Returns the arguments of MPTConfig, nested parts as dataclasses.

    Raises:
        ConfigError: a nested object has an unknown key, or a value is not valid.
    """
    values = dict(canonical.values)
    attn, ffn, init = (dict(values[name]) for name in PARTS)
    tuning = attn.get("attn_temperature_tuning", {})
    if "attn_temperature_tuning" in attn:
        attn["attn_temperature_tuning"] = as_tuning(tuning)
    if "rope_hf_config" in attn:
        attn["rope_hf_config"] = _rope(attn["rope_hf_config"])
    if ffn.get("ffn_act_fn") is not None:
        ffn["ffn_act_fn"] = _activation(ffn["ffn_act_fn"])
    values |= {"attn_config": AttnConfig(**attn), "ffn_config": FFNConfig(**ffn), "init_config": InitConfig(**init)}
    if values.get("block_overrides") is not None:
        values["block_overrides"] = expand_overrides(values["block_overrides"], tuning)
    _check_tuning(canonical.attn_impl, values["attn_config"], values.get("block_overrides") or ())
    return values


def _normalize(values: dict[str, Any]) -> None:
    """Replaces, in place, each value that llm-foundry takes for another one by that one."""
    attn, ffn, init = (values[name] for name in PARTS)
    # It fills null in these places with its defaults.
    for key in ("rope_hf_config", "attn_temperature_tuning"):
        if attn.get(key, {}) is None:
            del attn[key]
    # It looks at these by truth value: 0 and false mean none.
    for part, key in ((attn, "clip_qkv"), (ffn, "moe_normalize_expert_weights"), (ffn, "moe_jitter_eps")):
        if part.get(key) in (0, None, False):
            part.pop(key, None)
    # It reads this of megablocks' mixture only.
    if ffn.get("ffn_type") != "mb_dmoe":
        ffn.pop("moe_loss_weight", None)
    # It takes names of norms in any case.
    if isinstance(values.get("norm_type"), str):
        values["norm_type"] = values["norm_type"].lower()
    # −1 is some programs' way to say none.
    for key in ("bos_token_id", "eos_token_id", "text_pad_token_id"):
        if values.get(key) == -1:
            values[key] = None
    if isinstance(ends := values.get("eos_token_id"), list):
        values["eos_token_id"] = tuple(ends) or None
    if isinstance(lim := init.get("emb_init_uniform_lim"), list):
        init["emb_init_uniform_lim"] = tuple(lim)
    # Its YAML reader may leave a number as text.
    if isinstance(div := init.get("init_div_is_residual"), str) and div.isdecimal() and div.isascii():
        init["init_div_is_residual"] = float(div)


def _written_by_transformers(d: Mapping[str, Any], attn_config: Mapping[str, Any]) -> bool:
    """Tells whose defaults stand behind keys that are absent: transformers leaves out what equals its own."""
    return d.get("architectures") == ["MptForCausalLM"] or "model_type" in attn_config


def _nest(d: Mapping[str, Any], spelling: dict[str, str]) -> dict[str, Any]:
    """Returns a flat file of early 2023 with each key where it belongs now, and notes its spelling."""
    nested: dict[str, Any] = {key: value for key, value in d.items() if key not in LEGACY_FLAT}
    parts: dict[str, dict[str, Any]] = {"": nested}
    for name in ("attn_config", "init_config"):
        parts[name] = nested[name] = _part(d, name)
    for key, value in d.items():
        if key not in LEGACY_FLAT:
            continue
        if key == "multiquery_attention":
            value = "multiquery_attention" if value else "multihead_attention"
        elif key == "low_precision_layernorm":
            value = "low_precision_layernorm" if value else "layernorm"
        part, name = LEGACY_FLAT[key]
        _take(parts[part], name, value, key, part, spelling)
    nested["model_type"] = "mpt"
    return nested


def _check_dail(attn_config: Mapping[str, Any]) -> None:
    """Raises where flash-attn's rotation would not be the original one."""
    dail = attn_config.get("rope_dail_config") or {}
    if not isinstance(dail, Mapping) or set(dail) - {"type", "pos_idx_in_fp32", "xpos_scale_base"}:
        raise ConfigError("attn_config.rope_dail_config", f"expected type and pos_idx_in_fp32, found {shown(dail)}")
    if not attn_config.get("rope") or attn_config.get("rope_impl", "dail") != "dail":
        return
    for key, fixed in (("type", "original"), ("pos_idx_in_fp32", True)):
        if dail.get(key, fixed) != fixed:
            raise ConfigError(
                f"attn_config.rope_dail_config.{key}",
                f"expected {json.dumps(fixed)}, found {shown(dail)}; other values are not supported",
            )


def _check_tuning(impl: Any, attn_config: AttnConfig, overrides: Sequence[BlockOverride]) -> None:
    """Raises where llm-foundry's two implementations of attention count positions differently, in any block."""
    tunings = [attn_config.attn_temperature_tuning, *(block.attn_temperature_tuning for block in overrides)]
    tuned = any(tuning is not None and tuning.attn_scale for tuning in tunings)
    if tuned and attn_config.attn_uses_sequence_id and impl != "torch":
        raise ConfigError(
            "attn_config.attn_impl",
            f"expected 'torch' for attn_temperature_tuning with attn_uses_sequence_id, found {shown(impl)}, "
            f"with which every packed sequence begins at 0; not supported",
        )


def _rope(d: Any) -> RopeHFConfig:
    """Returns `rope_hf_config`; the trained length of the type "dynamic" has a key of this library's own."""
    name, trained = "attn_config.rope_hf_config", None
    if isinstance(d, Mapping):
        trained = d.get(TRAINED)
        d = {key: value for key, value in d.items() if key != TRAINED}
        check(f"{name}.{TRAINED}", trained, either(whole(), NULL))
    rope: RopeHFConfig = _dataclass(name, d, RopeHFConfig)
    return dataclasses.replace(rope, original_max_position_embeddings=trained) if rope.type == "dynamic" else rope


def _dataclass(name: str, d: Any, of: type) -> Any:
    """Returns a nested object of config.json as the dataclass `of`."""
    keys = {field.name for field in dataclasses.fields(of)}
    if not isinstance(d, Mapping) or set(d) - keys:
        raise ConfigError(name, f"expected an object with keys of {sorted(keys)}, found {shown(d)}; not supported")
    return of(**d)


def _activation(d: Any) -> ActFnConfig:
    """Returns `ffn_act_fn`; like llm-foundry, which passes its keys on, it takes only what the activation takes."""
    path = "ffn_config.ffn_act_fn"
    if isinstance(d, Mapping):
        name = d.get("name", ActFnConfig().name)
        check(f"{path}.name", name, choice(*ACTIVATIONS))
        if name in INPLACE:
            d = {key: value for key, value in d.items() if key != "inplace"}
        for key in set(d) - {"name", *ACTIVATIONS[name]}:
            arguments = ", ".join(ACTIVATIONS[name]) or "no arguments"
            raise ConfigError(f"{path}.{key}", f"expected no such key with {name!r}, which takes {arguments}")
    activation: ActFnConfig = _dataclass(path, d, ActFnConfig)
    return activation


def _part(d: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = d.get(name)
    if part is None:
        return {}
    if not isinstance(part, Mapping):
        raise ConfigError(name, f"expected an object, found {shown(part)}")
    return dict(part)


def _resolve_aliases(d: Mapping[str, Any], spelling: dict[str, str]) -> dict[str, Any]:
    """Returns the top level with each key under its own name, and notes its spelling."""
    top = dict(d)
    for alias, name in ALIASES.items():
        if alias in top:
            _take(top, name, top.pop(alias), alias, "", spelling)
    return top


def _take(values: dict[str, Any], name: str, value: Any, key: str, part: str, spelling: dict[str, str]) -> None:
    """Puts the value of the file's `key` under `name` in `values`, and notes the spelling unless `name` is there."""
    if name not in values:
        values[name] = value
        spelling[f"{part}.{name}" if part else name] = key
    elif values[name] != value:
        raise ConfigError(name, f"expected the same value as {key}={shown(value)}, found {shown(values[name])}")


def _refuse(part: str, values: Mapping[str, Any], spelling: Mapping[str, str]) -> None:
    """Raises for the first key of one part that is unknown, or known and not at the value that is supported."""
    ignored = IGNORED[part] | (PRETRAINED_CONFIG if part in ("", "attn_config") else set())
    ignored |= set() if part else OTHER_PROGRAMS
    for key, value in values.items():
        path = f"{part}.{key}" if part else key
        path = spelling.get(path, path)
        if key in FIXED_VALUE[part]:
            if value not in FIXED_VALUE[part][key]:
                expected = " or ".join(json.dumps(fixed) for fixed in FIXED_VALUE[part][key]) or "no such key"
                raise ConfigError(path, f"expected {expected}, found {shown(value)}; other values are not supported")
        elif key not in SUPPORTED[part] and key not in ignored:
            raise ConfigError(
                path,
                f"unknown key with value {shown(value)}; it could change the maths, so it is not ignored: "
                f"if it is mere bookkeeping, remove it from the file or load with config_overrides={_nested(path)}",
            )


def _nested(path: str) -> str:
    """Returns the config_overrides that take a key away, as Python."""
    *parts, key = path.split(".") if path.count(".") == 1 and path.split(".")[0] in PARTS else [path]
    inner = f"{{'{printable(key)}': None}}"
    return f"{{'{parts[0]}': {inner}}}" if parts else inner
