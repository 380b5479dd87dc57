"""Wqkv as three linear maps, one for each of its sections, so that each can be shared by heads."""

import re
from typing import Any

import equinox as eqx
import jax

from mpt_eqx.config import MPTConfig
from mpt_eqx.model.linear import Linear


def qkv_slices(config: MPTConfig) -> dict[str, slice]:
    """Returns the rows of Wqkv that are Wq, Wk and Wv."""
    n, k = config.n_heads * config.head_size, config.kv_heads * config.head_size
    return {"Wq": slice(0, n), "Wk": slice(n, n + k), "Wv": slice(n + k, n + 2 * k)}


def is_qkv_slice(name: str, config: MPTConfig) -> bool:
    """Tells whether a weight is a section of what a checkpoint has as one tensor."""
    found = re.search(r"blocks\.(\d+)\.attn\.W[qkv]\.", name)
    return found is not None and config.attn_config.fused_qkv and config.layers[int(found[1])].kv_from is None


def qkv_slice_of(name: str, config: MPTConfig) -> tuple[str, slice]:
    """Returns of which tensor, by its name, Wq, Wk or Wv is a section, and its rows."""
    (section,) = re.findall(r"\.(W[qkv])\.", name)
    return name.replace(f".{section}.", ".Wqkv."), qkv_slices(config)[section]


def split_qkv(model: Any) -> Any:
    """Returns the model with Wq, Wk and Wv in place of each Wqkv; its arrays may also be shapes, under eval_shape."""

    def split(block: Any) -> Any:
        if block.attn.Wqkv is None:
            return block
        parts = [
            jax.tree.map(lambda array, rows=rows: _rows(array, rows), block.attn.Wqkv)
            for rows in qkv_slices(model.config).values()
        ]
        assert all(isinstance(part, Linear) for part in parts)
        return eqx.tree_at(
            lambda b: (b.attn.Wqkv, b.attn.Wq, b.attn.Wk, b.attn.Wv),
            block,
            (None, *parts),
            is_leaf=lambda node: node is None,
        )

    return eqx.tree_at(lambda m: m.blocks, model, tuple(split(block) for block in model.blocks))


def _rows(array: Any, rows: slice) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((rows.stop - rows.start, *array.shape[1:]), array.dtype)
    return array[rows]
