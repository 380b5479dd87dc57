"""Models with adapters and without: made, told what learns, merged."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from mpt_eqx.errors import MPTError
from mpt_eqx.lora.linear import LoRALinear
from mpt_eqx.model import MPT
from mpt_eqx.model.leaves import leaf_name, with_fields
from mpt_eqx.model.linear import Linear
from mpt_eqx.model.stacked import StackedBlocks
from mpt_eqx.ops.numerics import accum_dtype
from mpt_eqx.ops.quantized import QuantizedWeight, dequantize
from mpt_eqx.ops.switches import model_function
from mpt_eqx.sharding import shard
from mpt_eqx.sharding.wrappers import place_of

PLACES = ("Wqkv", "Wq", "Wk", "Wv", "out_proj", "up_proj", "down_proj", "gate_proj")
"""The linear maps of a block that an adapter may be on; a block has some of them."""


@model_function
def add(
    model: MPT,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = ("Wqkv",),
    dropout: float = 0.0,
    key: PRNGKeyArray,
) -> MPT:
    """Returns the model with new adapters, which change nothing yet: A is random, B is zero, as in PEFT.

    The model's own arrays are those that were given, not copies. Adapters are float32 (float64 in a float64 model),
    also over a base in 16, 8 or 4 bits. On a mesh they are replicated.

    Args:
        model: a model, also quantised, stacked or on a mesh.
        rank: of each adapter, ≥ 1.
        alpha: each adapter counts alpha / rank; None for `rank`.
        targets: the linear maps that get one in every block: of Wqkv, out_proj, up_proj, down_proj, and of gate_proj,
            Wq, Wk and Wv in models that have them.
        dropout: probability with which an adapter drops numbers of its input in training, ≥ 0 and < 1. Then a forward
            pass needs a key, unless `equinox.nn.inference_mode` switches it off.
        key: randomness of A.

    Raises:
        MPTError: an argument is not valid, the model has adapters already or none of the linear maps of a target.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise MPTError(f"rank: expected a whole number ≥ 1, found {rank!r}")
    alpha = rank if alpha is None else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise MPTError(f"alpha: expected a finite number > 0 or None, found {alpha!r}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise MPTError(f"dropout: expected a number with 0 ≤ dropout < 1, found {dropout!r}")
    if isinstance(targets, str) or not targets or not all(isinstance(target, str) for target in targets):
        raise MPTError(f'targets: expected some names of linear maps, such as ("Wqkv", "down_proj"), found {targets!r}')
    if adapters(model):
        raise MPTError(
            "model: expected no adapters, found some; merge them with mpt_eqx.lora.merge, or take them off with "
            "mpt_eqx.lora.remove"
        )
    known = {last_of(name): None for name in linears(model)}
    for target in targets:
        if target not in known:
            raise MPTError(
                f"targets: expected some of {', '.join(known)}, found {target!r}{_why_absent(model, target)}"
            )

    def wrap(name: str, linear: Any) -> Any:
        return _new(name, linear) if last_of(name) in targets else linear

    def _new(name: str, linear: Linear) -> LoRALinear:
        *lead, out, columns = shape_of(linear)
        own = jax.random.fold_in(key, PLACES.index(last_of(name)))
        bound, dtype = columns**-0.5, adapter_dtype(model)

        def draw(layer: Any) -> Array:
            return jax.random.uniform(jax.random.fold_in(own, layer), (rank, columns), dtype, -bound, bound)

        a = jax.vmap(draw)(jnp.arange(lead[0])) if lead else draw(int(name.split(".")[1]))
        return with_adapter(linear, a, jnp.zeros((*lead, out, rank), dtype), rank, alpha, dropout)

    return map_linears(wrap, model)


def trainable(model: MPT) -> MPT:
    """Returns a tree like the model: True at the arrays of its adapters, for `TrainState.create(trainable=…)`.

    Raises:
        MPTError: the model has no adapters.
    """
    _check_has_adapters(model)

    def one(node: Any) -> Any:
        off = jax.tree.map(lambda _: False, node)
        if not isinstance(node, LoRALinear):
            return off
        return eqx.tree_at(lambda adapter: (adapter.lora_A.weight, adapter.lora_B.weight), off, (True, True))

    found: MPT = jax.tree.map(one, model, is_leaf=_is_adapter)
    return found


@model_function
def merge(model: MPT) -> MPT:
    """Returns the plain model that computes the same: W + scale · B A in place of each W, in its type.

    Over a base in 8 or 4 bits the result is floating, with all weights dequantised to the type that they had: to round
    W + scale · B A to 8 or 4 bits again would lose a part of the adapter. `mpt_eqx.quantize` does that where it is
    wanted.

    Raises:
        MPTError: the model has no adapters.
    """
    _check_has_adapters(model)

    def one(node: Any) -> Any:
        if isinstance(node, QuantizedWeight):
            return _floating(node)
        if not isinstance(node, LoRALinear):
            return node
        weight, a, b = _floating(node.base.weight), node.lora_A.weight, node.lora_B.weight
        return with_fields(node.base, weight=_merged(weight, a, b, node.scale))

    merged: MPT = jax.tree.map(one, model, is_leaf=lambda node: isinstance(node, LoRALinear | QuantizedWeight))
    if model.layout is None or not isinstance(model.layout.mesh, Mesh):
        return merged
    return shard(merged, model.layout.mesh, model.layout.rules)


def remove(model: MPT) -> MPT:
    """Returns the model without its adapters: the base, whose arrays they did not change; no copy."""
    return map_linears(lambda _, linear: linear.base if isinstance(linear, LoRALinear) else linear, model)


def map_linears(fn: Callable[[str, Linear | LoRALinear], Any], model: MPT) -> MPT:
    """Returns the model with fn(name, linear map) in place of each linear map of blocks that may have an adapter."""

    def one(path: tuple[Any, ...], node: Any) -> Any:
        name = leaf_name(path)
        there = isinstance(node, Linear | LoRALinear) and place_of(name) == name and last_of(name) in PLACES
        return fn(name, node) if there else node

    found: MPT = jax.tree_util.tree_map_with_path(
        one, model, is_leaf=lambda node: isinstance(node, Linear | LoRALinear)
    )
    return found


def linears(model: MPT) -> dict[str, Linear | LoRALinear]:
    """Returns the linear maps that may have an adapter, by name; without the parts of a Wqkv that a mesh split."""
    found: dict[str, Linear | LoRALinear] = {}
    map_linears(lambda name, linear: found.setdefault(name, linear), model)
    if is_split(model):
        return {name: linear for name, linear in found.items() if last_of(name) not in ("Wq", "Wk", "Wv")}
    return found


def adapters(model: MPT) -> dict[str, LoRALinear]:
    """Returns the linear maps that have an adapter, by name."""
    return {name: linear for name, linear in linears(model).items() if isinstance(linear, LoRALinear)}


def last_of(name: str) -> str:
    """Returns the name of a linear map in its block: Wqkv of blocks.0.attn.Wqkv."""
    return name.rpartition(".")[2]


def is_split(model: MPT) -> bool:
    """Tells whether Wqkv is in three parts for a mesh."""
    rules = None if model.layout is None else model.layout.rules
    return rules is not None and model.config.attn_config.fused_qkv and bool(rules.heads or rules.kv_heads)


def is_stacked(model: MPT) -> bool:
    """Tells whether the blocks are stacked, so that each array of theirs is that of all layers."""
    return isinstance(model.blocks, StackedBlocks)


def shape_of(linear: Linear | LoRALinear) -> tuple[int, ...]:
    """Returns the shape of W, quantised or not: [out, in], with an axis of layers first in stacked blocks."""
    weight = linear.base.weight if isinstance(linear, LoRALinear) else linear.weight
    return (*weight.values.shape[:-1], weight.columns) if isinstance(weight, QuantizedWeight) else weight.shape


def adapter_dtype(model: MPT) -> np.dtype:
    """Returns the type of a model's adapters."""
    return np.dtype(accum_dtype(model.dtype))


def with_adapter(
    base: Linear,
    a: Float[Array, "*L rank in"] | np.ndarray,
    b: Float[Array, "*L out rank"] | np.ndarray,
    rank: int,
    alpha: float,
    dropout: float,
    *,
    rslora: bool = False,
    inference: bool = False,
) -> LoRALinear:
    """Returns a linear map with an adapter, which lies on the devices that the linear map lies on."""
    drop = eqx.nn.Dropout(dropout, inference) if dropout else None
    # Not made by Linear(…), whose weight has two axes: in stacked blocks there are three.
    first, second = (
        with_fields(base, weight=_beside(array, jax.tree.leaves(base.weight)[0]), bias=None) for array in (a, b)
    )
    return LoRALinear(base, first, second, drop, None, rank, float(alpha), rslora)


def _beside(array: Any, other: Any) -> Any:
    """Returns an array on the devices of another, replicated over a mesh."""
    if any(isinstance(x, jax.core.Tracer) for x in (array, other)) or not isinstance(other, jax.Array):
        return jnp.asarray(array)
    if not isinstance(other.sharding, NamedSharding):
        return jax.device_put(array, other.sharding) if other.sharding.is_fully_replicated else jnp.asarray(array)
    host = np.asarray(array)
    sharding = NamedSharding(other.sharding.mesh, PartitionSpec(*(None,) * host.ndim))
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@jax.jit
def _merged(weight: Array, a: Array, b: Array, scale: float | Array) -> Array:
    wide = accum_dtype(weight.dtype)
    delta = jnp.einsum("...or,...ri->...oi", b.astype(wide), a.astype(wide), precision="highest")
    return (weight.astype(wide) + scale * delta).astype(weight.dtype)


@jax.jit
def _floating(weight: Any) -> Any:
    """Returns W in its type, of stacked blocks all layers."""
    if not isinstance(weight, QuantizedWeight):
        return weight
    turned = jax.vmap(dequantize) if weight.values.ndim == 3 else dequantize
    return turned(weight.values, weight.scale).astype(weight.rows_dtype)


def _check_has_adapters(model: MPT) -> None:
    if not adapters(model):
        raise MPTError(
            "model: expected one with adapters, found none; mpt_eqx.lora.add makes new ones, and mpt_eqx.lora.load "
            "reads them"
        )


def _why_absent(model: MPT, target: str) -> str:
    """Returns what an error says besides about a linear map that is not there."""
    if is_split(model) and target in ("Wqkv", "Wq", "Wk", "Wv"):
        return (
            ", which rules that shard heads have split into parts; shard the model with rules that do not, such as "
            "mpt_eqx.sharding.FSDP"
        )
    return ""


def _is_adapter(node: Any) -> bool:
    return isinstance(node, LoRALinear)
