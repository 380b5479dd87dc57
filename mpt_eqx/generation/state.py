"""The state of rows between two programs: made, resized, laid out on a mesh, and taken apart by rows."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mpt_eqx.config import MPTConfig
from mpt_eqx.generation.buckets import cache_bucket
from mpt_eqx.generation.layers import has_layer_loop
from mpt_eqx.model import MPT, KVCache
from mpt_eqx.model.leaves import with_fields
from mpt_eqx.model.taps import Edit, stack_edits
from mpt_eqx.ops.layer_cache import BLOCK
from mpt_eqx.ops.layout import Layout
from mpt_eqx.ops.platform import is_default, on_one_cpu, trim_memory, unwritten

T = TypeVar("T")

LARGE_CACHE = 2**26
"""Bytes of a cache before which freed memory is given back, which takes less time than to fill as many."""

ALIGNED = 64
"""What the address of memory is a multiple of that XLA's CPU backend takes as an array."""

OverRows = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What makes a function of rows of a function of one."""


class DecodeState(eqx.Module):
    """B rows between two steps. Each array has a leading axis of rows.

    Attributes:
        cache: keys and values of the tokens so far; each row has its own length.
        tokens: the tokens so far, at their places in the cache; what stands from a row's length on means nothing.
        hidden: the last token's output of norm_f, from which the next token is chosen.
        done: rows that have ended; they only get padding.
        step: how many tokens each row was given, counting padding.
        not_finite: the first step of each row with logits that were not finite before it had ended; −1 for none.
        nothing_left: the first step of each row at which no token was allowed before it had ended; −1 for none.
        edits: of activations in each row, by place.
    """

    cache: KVCache
    tokens: Int[Array, "B S"]
    hidden: Float[Array, "B D"]
    done: Bool[Array, " B"]
    step: Int[Array, " B"]
    not_finite: Int[Array, " B"]
    nothing_left: Int[Array, " B"]
    edits: dict[str, tuple[Edit, ...]] = eqx.field(default_factory=dict)


def empty_state(model: MPT, rows: int, capacity: int) -> DecodeState:
    """Returns a state of rows without tokens, with room for `capacity` tokens in each."""
    return zeros_of(model, state_shapes(model, rows, capacity))


def zeros_of(model: MPT, shapes: DecodeState) -> DecodeState:
    """Returns what `empty_state` does, of shapes from `state_shapes`.

    The arrays can be donated. On CPUs numpy makes them, so that no shape costs a compilation; elsewhere the device
    makes them, because a whole cache would take long to come from the host.
    """
    if not is_default("cpu"):
        leaves, structure = jax.tree.flatten(shapes)
        return _made_there(model.layout, structure, tuple(leaves))
    return _filled(shapes, functools.partial(_from_numpy, model.layout))


def _filled(shapes: DecodeState, full: Callable[..., Array]) -> DecodeState:
    """Returns the state of full(value, shape and type, name of each axis, …)."""
    zeros = map_with_axes(shapes, functools.partial(full, 0))
    never = [full(-1, x, None) for x in (shapes.not_finite, shapes.nothing_left)]
    return dataclasses.replace(zeros, not_finite=never[0], nothing_left=never[1])


def _from_numpy(layout: Layout | None, value: int, x: jax.ShapeDtypeStruct, *names: str | None) -> Array:
    def part(shape: tuple[int, ...]) -> np.ndarray:
        # JAX takes numpy's memory as it is where it is aligned, also if told not to, and cannot donate it then.
        size = math.prod(shape)
        numbers = np.full(size + 1, value, x.dtype) if value else np.zeros(size + 1, x.dtype)
        first = int(numbers.ctypes.data % ALIGNED == 0)
        return numbers[first : first + size].reshape(shape)

    if layout is None:
        made = jax.device_put(part(x.shape), may_alias=False)
        return made if value else unwritten(made)
    sharding = layout.sharding(x.shape, *names)
    return jax.make_array_from_callback(x.shape, sharding, lambda _: part(sharding.shard_shape(x.shape)))


@functools.partial(jax.jit, static_argnums=range(3))
def _made_there(layout: Layout | None, structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> DecodeState:
    def full(value: int, x: jax.ShapeDtypeStruct, *names: str | None) -> Array:
        array = jnp.full(x.shape, value, x.dtype)
        sharding = None if layout is None else layout.sharding(x.shape, *names)
        return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)

    return _filled(jax.tree.unflatten(structure, leaves), full)


def state_shapes(model: MPT, rows: int, capacity: int) -> DecodeState:
    """Returns the shapes and types of what `empty_state` returns."""
    return _state_shapes(model.config, model.dtype, rows, capacity, has_layer_loop(model))


@functools.lru_cache(maxsize=256)  # tracing them takes as long as reading a short prompt on a GPU
def _state_shapes(config: MPTConfig, dtype: np.dtype, rows: int, capacity: int, joined: bool) -> DecodeState:
    return jax.eval_shape(lambda: zero_state(config, dtype, rows, capacity, as_bits=True, joined=joined))


def zero_state(
    config: MPTConfig, dtype: np.dtype, rows: int, capacity: int, *, as_bits: bool, joined: bool = False
) -> DecodeState:
    """Returns what `empty_state` does, within a program; `as_bits` and `joined` as in `KVCache.empty`."""
    one = jax.eval_shape(lambda: KVCache.empty(config, capacity, dtype, as_bits=as_bits, joined=joined))
    return DecodeState(
        cache=jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), one),
        tokens=jnp.zeros((rows, one.capacity), jnp.int32),
        hidden=jnp.zeros((rows, config.d_model), dtype),
        done=jnp.zeros((rows,), bool),
        step=jnp.zeros((rows,), jnp.int32),
        not_finite=jnp.full((rows,), -1, jnp.int32),
        nothing_left=jnp.full((rows,), -1, jnp.int32),
    )


def map_with_axes(state: DecodeState, function: Callable[..., Any]) -> DecodeState:
    """Returns the state with function(array, name of each axis, …) of each; what the host reads has no names."""

    def whole(x: Any) -> Any:
        return function(x, *(None,) * len(x.shape))

    layers = map_layers(state.cache.layers, function)
    length = function(state.cache.length, "batch")
    return DecodeState(
        cache=with_fields(state.cache, layers=layers, length=length),
        tokens=function(state.tokens, "batch", None),
        hidden=function(state.hidden, "batch", None),
        done=whole(state.done),
        step=whole(state.step),
        not_finite=whole(state.not_finite),
        nothing_left=whole(state.nothing_left),
        edits=jax.tree.map(whole, state.edits),
    )


def map_layers(layers: T, function: Callable[..., Any]) -> T:
    """Returns the layers of a cache with function(array, name of each axis, …) of each array."""
    return jax.tree.map(lambda x: function(x, "batch", "kv_heads", None, "head_dim"), layers)


def constrain(model: MPT, state: DecodeState) -> DecodeState:
    """Returns the state as it is sharded over the model's mesh, if there is one."""
    return state if model.layout is None else map_with_axes(state, model.layout.constrain)


def constrain_replicated(model: MPT, tree: Any) -> Any:
    """Returns arrays that the host is to read, replicated over the model's mesh, if there is one."""
    return tree if model.layout is None else model.layout.constrain_replicated(tree)


def replicate(model: MPT, tree: Any) -> Any:
    """Returns arrays of the host, or of one device, on all devices of the model."""
    return jax.device_put(tree) if model.layout is None else model.layout.replicate(tree)


def one_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what `jax.vmap` does, for arrays of one row, but without an axis of rows in what the function computes.

    Under a `jax.vmap` of the user's there is then one axis, as in a batch of `generate`, and not another of size 1.
    """

    def mapped(*rows: Any) -> Any:
        result = function(*jax.tree.map(lambda x: jnp.squeeze(x, 0), rows))
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), result)

    return mapped


def scan_row(
    step: Callable[[DecodeState, Any], tuple[DecodeState, Any]], state: DecodeState, xs: Any, length: int
) -> tuple[DecodeState, Any]:
    """Returns what `jax.lax.scan` does with a state of one row; the axis of rows is not carried, as in `one_row`."""

    def alone(carry: DecodeState, x: Any) -> tuple[DecodeState, Any]:
        whole = jax.tree.map(lambda x: jnp.expand_dims(x, 0), carry)
        after, y = step(dataclasses.replace(whole, edits=state.edits), x)
        return jax.tree.map(lambda x: jnp.squeeze(x, 0), dataclasses.replace(after, edits={})), y

    # Edits do not change: they are not carried.
    start = jax.tree.map(lambda x: jnp.squeeze(x, 0), dataclasses.replace(state, edits={}))
    carry, ys = jax.lax.scan(alone, start, xs, length)
    return dataclasses.replace(jax.tree.map(lambda x: jnp.expand_dims(x, 0), carry), edits=state.edits), ys


def repeat_and_resize(state: DecodeState, copies: int, capacity: int) -> DecodeState:
    """Returns the state with each row `copies` times in succession, and room for `capacity` tokens in each.

    What stands beyond the capacity is left out: it must hold the tokens of every row. On one CPU only tokens that there
    are are copied, into memory that is otherwise not written.
    """
    hidden = state.hidden
    if isinstance(hidden, jax.core.Tracer | np.ndarray) or not (is_default("cpu") and on_one_cpu(hidden)):
        return by_formula(state, copies, capacity)
    room = -(-capacity // BLOCK) * BLOCK

    def new(x: Array) -> Array:
        shape = (copies * x.shape[0], *x.shape[1:-2], room, x.shape[-1])
        return _from_numpy(None, 0, jax.ShapeDtypeStruct(shape, x.dtype))

    return copied_into(state, jax.tree.map(new, state.cache.layers), copies)


@eqx.filter_jit(donate="all-except-first")
def copied_into(state: DecodeState, layers: Any, copies: int) -> DecodeState:
    """Returns what `repeat_and_resize` does, written into the layers of an empty cache, which are donated."""
    rest = eqx.tree_at(lambda s: s.cache.layers, state, ())
    repeated = jax.tree.map(functools.partial(_repeated, copies=copies), rest)
    room, before = jax.tree.leaves(layers)[0].shape[-2], state.tokens.shape[1]
    tokens = jnp.pad(repeated.tokens[:, :room], ((0, 0), (0, max(room - before, 0))))
    blocks = jnp.minimum(-(-jnp.max(state.cache.length) // BLOCK), min(room, before) // BLOCK)

    def copy(number: Int[Array, ""], layers: Any) -> Any:
        def one(new: Array, old: Array) -> Array:
            block = jax.lax.dynamic_slice_in_dim(old, number * BLOCK, BLOCK, old.ndim - 2)
            block = jnp.repeat(block, copies, axis=0)
            return jax.lax.dynamic_update_slice_in_dim(new, block, number * BLOCK, new.ndim - 2)

        return jax.tree.map(one, layers, state.cache.layers)

    layers = jax.lax.fori_loop(0, blocks, copy, layers)
    return eqx.tree_at(lambda s: (s.cache.layers, s.tokens), repeated, (layers, tokens))


@eqx.filter_jit
def by_formula(state: DecodeState, copies: int, capacity: int) -> DecodeState:
    """Returns what `repeat_and_resize` does."""
    room = -(-capacity // BLOCK) * BLOCK
    layers = jax.tree.map(lambda x: x[..., :room, :], state.cache.layers)
    state = eqx.tree_at(lambda s: (s.cache.layers, s.tokens), state, (layers, state.tokens[:, :room]))

    state = jax.tree.map(functools.partial(_repeated, copies=copies), state)
    cache = jax.vmap(lambda row: row.resized(capacity))(state.cache)
    tokens = jnp.pad(state.tokens, ((0, 0), (0, cache.capacity - state.tokens.shape[1])))
    return eqx.tree_at(lambda s: (s.cache, s.tokens), state, (cache, tokens))


def _repeated(x: Array, copies: int) -> Array:
    # The copy is for the case that nothing changes: what is returned will be donated, what came in will not.
    return jnp.repeat(x, copies, axis=0) if copies > 1 else jnp.copy(x)


@eqx.filter_jit
def row_of(state: DecodeState, row: Int[Array | np.ndarray, ""]) -> DecodeState:
    """Returns a state of one row of another."""
    # Copied, because what is returned will be donated, and what came in will not.
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), state)


@eqx.filter_jit(donate="all-except-first")
def with_row(one: DecodeState, state: DecodeState, row: Int[Array | np.ndarray, ""]) -> DecodeState:
    """Returns the state with a row but its edits replaced by that of a state of one row. Donated, but for that one."""
    whole, part = (dataclasses.replace(each, edits={}) for each in (state, one))
    joined = jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, row, 0), whole, part)
    return dataclasses.replace(joined, edits=state.edits)


def with_edits(model: MPT, state: DecodeState, edits: Sequence[Mapping[str, tuple[Edit, ...]]]) -> DecodeState:
    """Returns the state with edits in each row."""
    if not any(edits):
        return state
    return dataclasses.replace(state, edits=replicate(model, stack_edits(edits)))


def without_idle_edits(state: DecodeState) -> DecodeState:
    """Returns a state of one row without edits that are off, so that it is computed as it would be alone."""
    on = {place: [bool(edit.on[0]) for edit in several] for place, several in jax.device_get(state.edits).items()}
    edits = {place: tuple(itertools.compress(several, on[place])) for place, several in state.edits.items()}
    return dataclasses.replace(state, edits={place: several for place, several in edits.items() if several})


def is_large(model: MPT, rows: int, capacity: int) -> bool:
    """Whether a cache is so large that memory is made free before it is made: the host's, where it has the cache."""
    config = model.config
    size = 2 * rows * capacity * config.n_layers * config.kv_heads * config.head_size * model.dtype.itemsize
    return size >= LARGE_CACHE and is_default("cpu")


def ensure_capacity(model: MPT, state: DecodeState, length: int) -> DecodeState:
    """Returns the state with room for `length` tokens in each row, copied into a larger cache where it had less."""
    if length <= state.cache.capacity:
        return state
    rows = state.tokens.shape[0]
    capacity = cache_bucket(model.config, length, rows)
    if is_large(model, rows, capacity):
        trim_memory()
    return repeat_and_resize(state, 1, capacity)
