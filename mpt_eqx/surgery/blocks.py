"""keep_blocks: a model of some of the blocks."""

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import jax
import numpy as np
from jax.sharding import NamedSharding

from mpt_eqx.config import BlockOverride, MPTConfig
from mpt_eqx.errors import MPTError
from mpt_eqx.model import MPT
from mpt_eqx.model.agreement import check_agreement
from mpt_eqx.model.leaves import is_array, with_fields
from mpt_eqx.model.stacked import StackedBlocks
from mpt_eqx.ops.switches import model_function


@model_function
def keep_blocks(model: MPT, indices: Iterable[SupportsIndex]) -> MPT:
    """Returns the model with these of its blocks in this order; its configuration says so, block_overrides included.

    A block named twice stands there twice, with the same arrays at first. A block that reads the keys, or the input, of
    another reads those of the nearest one before it that came from that other.

    Also for a model whose number of blocks is another than its config says, if it has no block_overrides: the result's
    config agrees.

    Args:
        model: the model, stacked or not, on a mesh or not.
        indices: of the blocks to keep, in order; as in Python, −1 is the last one. `range(6)` keeps the first six.

    Raises:
        MPTError: an index is none, or a block that is kept reads from one that is not kept before it.
    """
    count = len(model.blocks)
    if model.config.block_overrides is not None:
        check_agreement(model)
    kept = [check_index(position, index, count) for position, index in enumerate(indices)]
    if not kept:
        raise MPTError("indices: expected those of at least one block, found none")
    overrides = None if model.config.block_overrides is None else _overrides(model.config, kept)
    config = dataclasses.replace(model.config, n_layers=len(kept), block_overrides=overrides)
    return with_fields(model, config=config, blocks=_kept(model.blocks, kept))


def check_index(position: int, index: Any, count: int) -> int:
    """Returns the number of a block, of `count`; raises an MPTError unless the index is one."""
    try:
        found = operator.index(index)
    except TypeError:
        found = count
    if isinstance(index, bool | np.bool_) or not -count <= found < count:
        raise MPTError(f"indices[{position}]: expected a whole number from 0 to {count - 1}, found {index!r}")
    return found % count


def _kept(blocks: Any, kept: Sequence[int]) -> Any:
    if not isinstance(blocks, StackedBlocks):
        return tuple(blocks[index] for index in kept)

    def of_layers(leaf: Any) -> Any:
        if not is_array(leaf):
            return leaf
        sharding = getattr(leaf, "sharding", None)
        some = leaf[np.asarray(kept)]
        if isinstance(leaf, jax.core.Tracer) or not isinstance(sharding, NamedSharding):
            return some
        return jax.device_put(some, sharding)

    return StackedBlocks(jax.tree.map(of_layers, blocks.block))


def _overrides(config: MPTConfig, kept: Sequence[int]) -> tuple[BlockOverride, ...]:
    """Returns the overrides of the blocks that are kept, with the places of others counted anew."""
    assert config.block_overrides is not None
    layers, changed = config.layers, []
    for position, index in enumerate(kept):
        override, layer = config.block_overrides[index], layers[index]
        for name, other, what in (
            ("reuse_kv_layer_idx", layer.kv_from, "keys and values"),
            ("reuse_kv_x_layer_idx", layer.kv_x_from, "input"),
        ):
            if other is None:
                continue
            before = [place for place in range(position) if kept[place] == other]
            if not before:
                raise MPTError(
                    f"indices[{position}]: block {index} reads the {what} of block {other}, which is not kept before "
                    f"it; keep {other}, too, or leave out {index}"
                )
            changes: dict[str, Any] = {name: before[-1] - position}
            override = dataclasses.replace(override, **changes)
        changed.append(override)
    return tuple(changed)
