"""stack: a model with alike blocks as one block."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mpt_eqx.errors import MPTError
from mpt_eqx.model import MPT
from mpt_eqx.model.agreement import check_agreement
from mpt_eqx.model.leaves import is_array
from mpt_eqx.model.stacked import StackedBlocks
from mpt_eqx.ops.switches import model_function


@model_function
def stack(model: MPT) -> MPT:
    """Returns the model with its blocks as one, whose arrays have a leading axis of layers, run by `jax.lax.scan`.

    The time to trace and compile it does not depend on the number of layers. Every function of this library takes
    either form, with the same results but for rounding. `model.blocks.block` is the stacked block, `model.blocks[i]`
    one of those in it. Generation works with single blocks, because a step of decoding would copy all weights: call
    `unstack` once before many calls of `generate`.

    Works on a mesh, where the axis of layers is replicated, and inside jit and grad.

    Args:
        model: a model; stacked already, it is returned as it is.

    Raises:
        MPTError: blocks are not alike, or one reads the keys or the input of another; says which differs in what.
    """
    if isinstance(model.blocks, StackedBlocks):
        return model
    check_agreement(model)
    for i, layer in enumerate(model.config.layers):
        for name, other in (("keys and values", layer.kv_from), ("input", layer.kv_x_from)):
            if other is not None:
                raise MPTError(
                    f"blocks.{i}: expected a block that is by itself, found one that reads the {name} of block "
                    f"{other}; such a model cannot be stacked"
                )
    first, *others = model.blocks
    for i, block in enumerate(others, start=1):
        if found := _difference(block, first, f"blocks.{i}", "blocks.0"):
            raise MPTError(
                f"{found}; only blocks that are alike can be stacked: change all of them alike, or leave the model as "
                f"single blocks, with mpt_eqx.unstack"
            )
    return eqx.tree_at(lambda m: m.blocks, model, StackedBlocks(jax.tree.map(_stacked, *model.blocks)))


def _stacked(*leaves: Any) -> Any:
    """Returns arrays under one another, each sharded as it was; of other leaves, which are equal, the first."""
    if not is_array(leaves[0]):
        return leaves[0]
    whole, sharding = jnp.stack(leaves), getattr(leaves[0], "sharding", None)
    if isinstance(leaves[0], jax.core.Tracer) or not isinstance(sharding, NamedSharding):
        return whole
    return jax.device_put(whole, NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec)))


def _difference(one: Any, other: Any, name: str, other_name: str) -> str | None:
    """Returns what the first thing is in which two parts of a model differ other than in numbers, None if nothing."""
    if is_array(one) and is_array(other):
        shapes = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in (one, other)]
        return None if shapes[0] == shapes[1] else f"{name}: expected {shapes[1]} as {other_name}, found {shapes[0]}"
    if type(one) is not type(other):
        kinds = [type(x).__name__ if isinstance(x, eqx.Module) or is_array(x) else f"{x!r:.80}" for x in (one, other)]
        return f"{name}: expected {kinds[1]} as {other_name}, found {kinds[0]}"
    if isinstance(one, eqx.Module) and dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            pair = (getattr(one, field.name), getattr(other, field.name))
            names = (f"{name}.{field.name}", f"{other_name}.{field.name}")
            if found := _difference(*pair, *names):
                return found
        return None
    if isinstance(one, tuple | list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return next(filter(None, (_difference(*pair, f"{name}.{i}", f"{other_name}.{i}") for i, pair in pairs)), None)
    return None if one == other else f"{name}: expected {other!r:.80} as {other_name}, found {one!r:.80}"
