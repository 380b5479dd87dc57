"""Edits of activations: what a user writes, checked and turned into what the model applies."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int

from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import MPTError
from mpt_eqx.interp.places import Shape, matching, places
from mpt_eqx.model.taps import Edit

Positions = int | range | slice | Sequence[int] | Int[Array, " P"] | np.ndarray | None
"""Which positions an edit applies to: one, several, or all within a slice; None for all. They count from 0."""

MAX_INT = 2**31 - 1


def Replace(value: ArrayLike, *, positions: Positions = None) -> Edit:
    """Puts `value` in the place of an activation; an array in `edits` does the same.

    Args:
        value: broadcasts to the activation, or has an entry for each of `positions`.
        positions: of the input, padding and tokens of a cache counted. None: all, or the first ones, as many as `value`
            has entries.
    """
    return _edit(_replace, _as_value("value", value), positions)


def Add(value: ArrayLike, *, positions: Positions = None) -> Edit:
    """Adds `value` to an activation, as a steering vector is added; arguments as in `Replace`."""
    return _edit(_add, _as_value("value", value), positions)


def Scale(factor: ArrayLike, *, positions: Positions = None) -> Edit:
    """Multiplies an activation by `factor`; arguments as in `Replace`."""
    return _edit(_scale, _as_value("factor", factor), positions)


def Ablate(mask: ArrayLike = True, *, positions: Positions = None) -> Edit:
    """Puts 0 where `mask` is True; the default is everywhere.

    Of some heads, `Ablate(mask[:, None])` at "blocks.*.attn.hook_z", whose shape is (T, n_heads, head_size).
    """
    return _edit(_ablate, _as_value("mask", mask), positions)


def Apply(function: Callable[[Array], Array], *, positions: Positions = None) -> Edit:
    """Puts function(x) in the place of an activation x; a function in `edits` does the same.

    In generation x holds the positions that a call computes: a chunk of the prompt, then one token. A function that is
    an `eqx.Module` may change its arrays without compiling again. Unlike a bare function, this may be an argument of
    `jax.jit`.
    """
    arrays, rest = eqx.partition(function, eqx.is_array)
    leaves, structure = jax.tree.flatten(rest)
    return _edit(_Function(structure, tuple(leaves)), arrays, positions)


def resolve_edits(config: MPTConfig, edits: Any, length: int, *, in_parts: bool = False) -> dict[str, tuple[Edit, ...]]:
    """Returns the edits of each place, in the order of their names and patterns.

    Args:
        config: the model's.
        edits: for names of places, or patterns of some: an array, a function, one of the edits above, or several.
        length: how many positions there are.
        in_parts: whether they are computed in several calls, as in generation.

    Raises:
        MPTError: an unknown place, a value that does not fit the activation, a position that does not exist.
    """
    if edits is None:
        return {}
    if not isinstance(edits, Mapping):
        raise MPTError(f"edits: expected a mapping from places to edits, found {type(edits).__name__}")
    shapes, found = places(config), dict[str, tuple[Edit, ...]]()
    for pattern, asked in sorted(edits.items(), key=lambda item: str(item[0])):
        several = asked if isinstance(asked, list | tuple) else [asked]
        for name in matching("edits", pattern, list(shapes)):
            made = tuple(_resolved(name, shapes[name], one, length, in_parts) for one in several)
            found[name] = (*found.get(name, ()), *made)
    return found


def _resolved(name: str, shape: Shape, asked: Any, length: int, in_parts: bool) -> Edit:
    """Returns one edit of one place, checked."""
    edit = asked if isinstance(asked, Edit) else Apply(asked) if callable(asked) else Replace(_as_value(name, asked))
    axis, positions, per_position = shape.index("T"), edit.positions, False
    if (given := getattr(edit.value, "shape", None)) is not None:
        per_position = len(given) == len(shape) and given[axis] != 1
        # In generation, keys are as many as the cache has room for.
        sizes = [(1 if in_parts else length) if size == "T" else size for size in shape]
        sizes[axis] = length if positions is None else positions.shape[0]
        if per_position and positions is None and in_parts and given[axis] < length:
            sizes[axis] = given[axis]  # the first ones
        pairs = zip(given[::-1], sizes[::-1], strict=False)
        if len(given) > len(shape) or not all(own in (1, size) for own, size in pairs):
            shown = ", ".join(map(str, sizes))
            raise MPTError(f"edits: {name}: expected a value that broadcasts to ({shown}), found one of shape {given}")
        if per_position and positions is None:
            positions = np.arange(given[axis], dtype=np.int32)
    if isinstance(positions, np.ndarray) and positions.size and positions.max() >= length:
        raise MPTError(f"edits: {name}: expected positions from 0 to {length - 1}, found {positions.max()}")
    # In generation, what starts right after the last position is that of no new tokens.
    if isinstance(edit.start, np.ndarray) and edit.start > max(length - (0 if in_parts else 1), 0):
        raise MPTError(f"edits: {name}: expected positions from 0 to {length - 1}, found those from {edit.start} on")
    return Edit(edit.change, edit.value, positions, edit.start, edit.stop, edit.on, axis, per_position)


def _edit(change: Callable[[Array, Any], Array], value: Any, positions: Positions) -> Edit:
    """Returns an edit that is not yet of a place."""
    start, stop = 0, MAX_INT
    listed: Any = None
    if isinstance(positions, slice):
        start, stop = positions.start or 0, MAX_INT if positions.stop is None else positions.stop
        if positions.step not in (None, 1) or not all(isinstance(end, int) and end >= 0 for end in (start, stop)):
            raise MPTError(f"positions: expected a slice of whole numbers ≥ 0 without a step, found {positions}")
    elif isinstance(positions, jax.Array):
        listed = positions
    elif positions is not None:
        listed = np.atleast_1d(np.asarray(positions))
        if listed.ndim != 1 or not np.issubdtype(listed.dtype, np.integer) or (listed < 0).any():
            raise MPTError(f"positions: expected whole numbers ≥ 0, or a slice of them, found {positions!r}")
        listed = listed.astype(np.int32)
    bounds = np.asarray(start, np.int32), np.asarray(stop, np.int32)
    return Edit(change, value, listed, *bounds, np.asarray(True), 0, False)


def _as_value(name: str, value: Any) -> Any:
    """Returns an array; by numpy, which starts no backend, if it is none yet."""
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if array.dtype == object or not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise MPTError(f"edits: {name}: expected an array, a function or an edit, found {type(value).__name__}")
    return array


def _replace(x: Array, value: Array) -> Array:
    return jnp.broadcast_to(value.astype(x.dtype), x.shape)


def _add(x: Array, value: Array) -> Array:
    return x + value.astype(x.dtype)


def _scale(x: Array, value: Array) -> Array:
    return x * value.astype(x.dtype)


def _ablate(x: Array, value: Array) -> Array:
    return jnp.where(value.astype(bool), jnp.zeros_like(x), x)


@dataclasses.dataclass(frozen=True)
class _Function:
    """What is static of a function: two of the same parts are the same to JAX."""

    structure: jax.tree_util.PyTreeDef
    leaves: tuple[Any, ...]

    def __call__(self, x: Array, arrays: Any) -> Array:
        """Returns what the function makes of x."""
        return eqx.combine(arrays, jax.tree.unflatten(self.structure, self.leaves))(x)
