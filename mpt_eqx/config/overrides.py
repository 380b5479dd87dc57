"""block_overrides: llm-foundry's nested notation of what single blocks have otherwise, and one entry for each block.

Source: llm-foundry 0.22, llmfoundry/models/mpt/modeling_mpt.py, _get_override_block_args_list.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mpt_eqx.config.parts import BlockOverride, TemperatureTuning
from mpt_eqx.config.validation import check, shown, whole
from mpt_eqx.errors import ConfigError

FIELDS = {field.name for field in dataclasses.fields(BlockOverride)}
MAX_BLOCKS = 1024
MAX_DEPTH = 16


def expand_overrides(d: Any, tuning: Mapping[str, Any]) -> tuple[BlockOverride, ...]:
    """Returns one entry for each block from {"order": [...], "overrides": {...}, "repeat": n}.

    Args:
        d: `block_overrides` of config.json. Items of "order" are {"name": …} or {"order": [...]}, each with an
            optional "repeat"; the name "default" stands for no override.
        tuning: `attn_temperature_tuning` of all blocks, which an override may replace in part.

    Raises:
        ConfigError: it is not of this form, or overrides what may not be overridden.
    """
    if not isinstance(d, Mapping) or not {"order", "overrides"} <= set(d) <= {"order", "overrides", "repeat"}:
        raise ConfigError(
            "block_overrides", f"expected 'order' and 'overrides' (and perhaps 'repeat'), found {shown(d)}"
        )
    if not isinstance(d["overrides"], Mapping) or not all(isinstance(name, str) for name in d["overrides"]):
        raise ConfigError("block_overrides.overrides", f"expected an object, found {shown(d['overrides'])}")
    if "default" in d["overrides"]:
        raise ConfigError(
            "block_overrides.overrides", "expected an object without the name 'default', which means none"
        )
    blocks = {name: _block(name, override, tuning) for name, override in d["overrides"].items()}
    blocks["default"] = BlockOverride()
    return tuple(blocks[name] for name in _names({"order": d["order"], "repeat": d.get("repeat", 1)}, set(blocks)))


def collapse_overrides(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns llm-foundry's notation from one entry (as a dict) for each block: the inverse of `expand_overrides`."""
    overrides: dict[str, dict[str, Any]] = {}
    order = []
    for block in blocks:
        # By identity, because a window of 0 equals False.
        changed = {key: value for key, value in block.items() if value is not None and value is not False}
        content = {"attn_config": changed}
        name = next((name for name in overrides if overrides[name] == content), f"block_{len(overrides)}")
        if changed:
            overrides[name] = content
        order.append({"name": name if changed else "default"})
    return {"order": order, "overrides": overrides}


def _names(item: Any, known: set[str], depth: int = 0) -> list[str]:
    if depth > MAX_DEPTH:
        raise ConfigError("block_overrides.order", f"expected at most {MAX_DEPTH} orders within another, found more")
    if (
        not isinstance(item, Mapping)
        or ("name" in item) == ("order" in item)
        or set(item) - {"name", "order", "repeat"}
    ):
        raise ConfigError("block_overrides.order", f"expected items with a 'name' or an 'order', found {shown(item)}")
    repeat = item.get("repeat", 1)
    check("block_overrides: repeat", repeat, whole(high=MAX_BLOCKS))
    if "name" in item:
        if not isinstance(item["name"], str) or item["name"] not in known:
            raise ConfigError("block_overrides.order", f"expected one of {sorted(known)}, found {shown(item['name'])}")
        names = [str(item["name"])]
    elif isinstance(item["order"], list):
        names = [name for inner in item["order"] for name in _names(inner, known, depth + 1)]
    else:
        raise ConfigError("block_overrides.order", f"expected a list, found {shown(item['order'])}")
    if len(names) * repeat > MAX_BLOCKS:
        raise ConfigError("block_overrides.order", f"expected at most {MAX_BLOCKS} blocks, found {len(names) * repeat}")
    return names * repeat


def _block(name: str, override: Any, tuning: Mapping[str, Any]) -> BlockOverride:
    path = f"block_overrides.overrides.{name}"
    if not isinstance(override, Mapping) or set(override) - {"attn_config"}:
        raise ConfigError(path, f"expected an object with nothing but 'attn_config', found {shown(override)}")
    attn = override.get("attn_config", {})
    if not isinstance(attn, Mapping) or set(attn) - FIELDS:
        raise ConfigError(
            f"{path}.attn_config", f"expected an object with keys of {sorted(FIELDS)}, found {shown(attn)}"
        )
    values = dict(attn)
    if (changed := values.get("attn_temperature_tuning")) is not None:
        values["attn_temperature_tuning"] = as_tuning(
            {**tuning, **changed} if isinstance(changed, Mapping) else changed
        )
    return BlockOverride(**values)


def as_tuning(d: Any) -> TemperatureTuning:
    """Returns `attn_temperature_tuning` of config.json as a TemperatureTuning."""
    if not isinstance(d, Mapping) or set(d) - {"floor_scale", "attn_scale"}:
        raise ConfigError(
            "attn_config.attn_temperature_tuning", f"expected floor_scale and attn_scale, found {shown(d)}"
        )
    return TemperatureTuning(**d)
