"""Wrappers, such as a LoRA's, around a Linear or an Embedding: what of them a checkpoint has, and their axes."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from mpt_eqx.config import MPTConfig, ShardingRules
from mpt_eqx.errors import ShardingError
from mpt_eqx.model.leaves import is_array, leaf_name
from mpt_eqx.model.linear import Embedding, Linear
from mpt_eqx.ops.quantized import QuantizedWeight
from mpt_eqx.sharding.rules import STACKED, weight_axes

PLACE = re.compile(
    r"(wte|wpe|lm_head|blocks\.(\d+|block)\.(attn\.(Wqkv|Wq|Wk|Wv|out_proj)|ffn\.((up|gate|down)_proj|router\.layer)))"
    r"(?=\.|$)"
)
"""How the names of a Linear or an Embedding of an MPT, and of everything in a wrapper in its place, begin."""

AXES = [field.name for field in dataclasses.fields(ShardingRules) if field.name != "allow_replicated"]


def place_of(name: str) -> str | None:
    """Returns the place of a Linear or an Embedding that a name is in, such as "blocks.0.attn.Wqkv"; None for none."""
    found = PLACE.match(name)
    return None if found is None else found[0]


def find_bases(model: Any) -> dict[str, str]:
    """Returns the name of the checkpoint's Linear or Embedding for each place, as "wte" or, in a wrapper, "wte.base".

    In a wrapper it is the first whose weight has the shape that the configuration gives for the place; a place whose
    wrapper has none is left out.
    """
    found: dict[str, str] = {}
    nodes = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda node: isinstance(node, Linear | Embedding))
    for path, node in nodes:
        if isinstance(node, Linear | Embedding):
            name = leaf_name(path)
            place = place_of(name)
            if place is not None and (name == place or _fits(node.weight, place, model.config)):
                found.setdefault(place, name)
    return found


def array_axes(model: Any) -> dict[str, tuple[str | None, ...]]:
    """Returns the logical axes of each array of a model, arrays or shapes, by its name.

    Those of a wrapper's own arrays are what its attribute `logical_axes` says for the field, or None.

    Raises:
        ShardingError: as `weight_axes`, or a `logical_axes` does not fit.
    """
    bases = find_bases(model)
    found: dict[str, tuple[str | None, ...]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        if is_array(leaf):
            name = leaf_name(path)
            place = place_of(name)
            base = bases.get(place or "")
            if base is not None and re.match(r"\.(weight|bias)(\.|$)", name.removeprefix(base)):
                found[name] = weight_axes(f"{place}{name.removeprefix(base)}", leaf, model.config)
            elif place is not None and (declared := _declared_axes(model, path, name, leaf)) is not None:
                found[name] = declared
            else:
                found[name] = weight_axes(name, leaf, model.config) if base is None else (None,) * len(leaf.shape)
    return found


def _declared_axes(model: Any, path: tuple[Any, ...], name: str, leaf: Any) -> tuple[str | None, ...] | None:
    """Returns what the `logical_axes` of the innermost module that names the array's field says; None if none does."""
    node, axes, owner = model, None, model
    for key in path:
        declared = getattr(node, "logical_axes", None)
        if declared is not None:
            if not isinstance(declared, Mapping) or not all(hasattr(node, field) for field in declared):
                raise ShardingError(
                    f"{name}: expected a mapping from names of fields of {type(node).__name__} to axes, found "
                    f"{declared!r}; change its logical_axes"
                )
            if isinstance(key, GetAttrKey) and key.name in declared:
                axes, owner = declared[key.name], node
        if isinstance(key, GetAttrKey):
            node = getattr(node, key.name)
        elif isinstance(key, SequenceKey):
            node = node[key.idx]
        elif isinstance(key, DictKey):
            node = node[key.key]
        else:
            break  # within a node of another kind, whose children have no names
    if axes is None:
        return None
    layers = (None,) if name.startswith(STACKED) else ()
    rank = len(leaf.shape) - len(layers)
    if not isinstance(axes, tuple) or len(axes) != rank or not all(axis is None or axis in AXES for axis in axes):
        raise ShardingError(
            f"{name}: expected {rank} axes, each None or one of {', '.join(AXES)}, found {axes!r}; change the "
            f"logical_axes of {type(owner).__name__}"
        )
    return (*layers, *axes)


def _fits(weight: Any, place: str, config: MPTConfig) -> bool:
    """Tells whether a weight has the shape that the configuration gives for a place; what a filtered tree has may."""
    if isinstance(weight, QuantizedWeight):
        shape = (weight.values.shape[-2], weight.columns)
    elif is_array(weight):
        shape = weight.shape[-2:]
    else:
        return True
    d, f, v = config.d_model, config.ffn_hidden_size, config.vocab_size
    q, k = config.n_heads * config.head_size, config.kv_heads * config.head_size
    wanted = {
        "wte": (v, d), "lm_head": (v, d), "wpe": (config.max_seq_len, d), "Wqkv": (q + 2 * k, d), "Wq": (q, d),
        "Wk": (k, d), "Wv": (k, d), "out_proj": (d, q), "up_proj": (f, d), "gate_proj": (f, d), "down_proj": (d, f),
        "layer": (config.ffn_config.moe_num_experts, d),
    }  # fmt: skip
    return tuple(shape) == wanted[place.rpartition(".")[2]]
