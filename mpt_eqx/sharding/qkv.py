"""Wqkv as three linear maps, Wq, Wk and Wv, so that each can be sharded by heads."""

import re
from typing import Any

import equinox as eqx
import jax

from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import ShardingError
from mpt_eqx.model.linear import Linear
from mpt_eqx.model.stacked import StackedBlocks


def qkv_slices(config: MPTConfig) -> dict[str, slice]:
    """Returns the rows of Wqkv that are Wq, Wk and Wv."""
    n, k = config.n_heads * config.head_size, config.kv_heads * config.head_size
    return {"Wq": slice(0, n), "Wk": slice(n, n + k), "Wv": slice(n + k, n + 2 * k)}


def is_qkv_slice(name: str, config: MPTConfig) -> bool:
    """Tells whether a weight is a slice of a tensor that a checkpoint has as one, Wqkv."""
    found = re.search(r"blocks\.(\d+)\.attn\.W[qkv]\.", name)
    return found is not None and config.attn_config.fused_qkv and config.layers[int(found[1])].kv_from is None


def qkv_slice_of(name: str, config: MPTConfig) -> tuple[str, slice]:
    """Returns the name of the Wqkv tensor of which a Wq, Wk or Wv is a slice, and the rows."""
    (part,) = re.findall(r"\.(W[qkv])\.", name)
    return name.replace(f".{part}.", ".Wqkv."), qkv_slices(config)[part]


def split_qkv(model: Any) -> Any:
    """Returns the model, arrays or shapes, with Wq, Wk and Wv in place of each Wqkv.

    This is what `shard` does where the rules shard heads or kv_heads; `save_pretrained` writes Wqkv of it again. A
    wrapper around Wqkv stays.
    """
    stacked = isinstance(model.blocks, StackedBlocks)

    def split(block: Any) -> Any:
        if type(block.attn.Wqkv) is not Linear:
            return block
        parts = [
            jax.tree.map(lambda array, rows=rows: _rows(array, rows, axis=int(stacked)), block.attn.Wqkv)
            for rows in qkv_slices(model.config).values()
        ]
        return eqx.tree_at(
            lambda b: (b.attn.Wqkv, b.attn.Wq, b.attn.Wk, b.attn.Wv), block, (None, *parts),
            is_leaf=lambda node: node is None,
        )  # fmt: skip

    if stacked:
        return eqx.tree_at(lambda m: m.blocks.block, model, split(model.blocks.block))
    return eqx.tree_at(lambda m: m.blocks, model, tuple(split(block) for block in model.blocks))


def check_not_wrapped(model: Any) -> None:
    """Raises a ShardingError if something else than a Linear stands for Wqkv, which then cannot be split."""
    blocks = {"block": model.blocks.block} if isinstance(model.blocks, StackedBlocks) else dict(enumerate(model.blocks))
    for number, block in blocks.items():
        if block.attn.Wqkv is not None and type(block.attn.Wqkv) is not Linear:
            raise ShardingError(
                f"blocks.{number}.attn.Wqkv: expected a Linear, split into Wq, Wk and Wv where rules shard heads, "
                f"found {type(block.attn.Wqkv).__name__}; shard the model first, and then wrap Wq, Wk and Wv"
            )


def _rows(array: Any, rows: slice, axis: int) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        shape = (*array.shape[:axis], rows.stop - rows.start, *array.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, array.dtype)
    return array[:, rows] if axis else array[rows]
