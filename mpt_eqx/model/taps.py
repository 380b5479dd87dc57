"""Taps: the named places of a forward pass, where activations are captured and edited.

Without captures and edits a tap adds no operation to the program.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from mpt_eqx.errors import MPTError

QUERY_AXIS = {"attn.hook_attn_scores": 1, "attn.hook_pattern": 1}
"""The axis of positions, where it is not the first."""

EVERYWHERE = np.iinfo(np.int32).max


class Edit(eqx.Module):
    """A change of an activation at some positions of its input.

    Attributes:
        change: a function (x, value) -> x of the activation, the same for all positions.
        value: what it takes, as an array that broadcasts to the activation, or has one entry for each of `positions`
            along the axis of positions; None for none.
        positions: where it applies, 0-based, padding and cached tokens counted; None: from `start` on.
        start: as above.
        stop: where it ends; not itself.
        on: False changes nothing.
    """

    change: Callable[[Array, Any], Array]
    value: Shaped[Array | np.ndarray, "..."] | None
    positions: Int[Array | np.ndarray, " *P"] | None
    start: Int[Array | np.ndarray, "*B"]
    stop: Int[Array | np.ndarray, "*B"]
    on: Bool[Array | np.ndarray, "*B"]

    def applies(self, query: Int[Array, " T"]) -> Bool[Array, " T"]:
        """Tells at which of the positions `query` it applies."""
        inside = (query >= self.start) & (query < self.stop)
        if self.positions is not None:
            inside &= jnp.any(query[:, None] == self.positions, axis=-1)
        return inside & self.on

    def __call__(self, x: Shaped[Array, "..."], query: Int[Array, " T"], axis: int) -> Shaped[Array, "..."]:
        """Returns x changed where it applies.

        Args:
            x: the activation.
            query: the positions that it stands for.
            axis: their axis in x.
        """
        value = self.value
        if value is not None and value.ndim == x.ndim and value.shape[axis] != 1:
            if self.positions is None:
                index = jnp.clip(query, 0, value.shape[axis] - 1)
            else:
                index = jnp.argmax(query[:, None] == self.positions, axis=-1)
            value = jnp.take(jnp.asarray(value), index, axis=axis)
        changed = self.change(x, value)
        if changed.shape != x.shape:
            raise MPTError(f"edits: expected an activation of shape {x.shape}, found {changed.shape} after the edit")
        where = self.applies(query).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        return jnp.where(where, changed.astype(x.dtype), x)


class Tap(eqx.Module):
    """What is asked of the places of one forward pass, or of one block, by their names.

    Attributes:
        edits: the edits of each place, in the order in which they are made.
        wanted: the places to capture.
        query: the positions that the call computes.
        found: what was captured.
    """

    edits: dict[str, tuple[Edit, ...]]
    wanted: frozenset[str] = eqx.field(static=True)
    query: Int[Array, " T"] | None
    found: dict[str, Array]

    def __call__(self, place: str, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Returns the activation x of a place, edited; captures it."""
        for edit in self.edits.get(place, ()):
            assert self.query is not None
            x = edit(x, self.query, QUERY_AXIS.get(place, 0))
        if place in self.wanted:
            self.found[place] = x
        return x

    def asks(self, *places: str) -> bool:
        """Tells whether anything is asked of one of the places."""
        return any(place in self.wanted or place in self.edits for place in places)

    def edited(self, *places: str) -> Bool[Array, " T"]:
        """Tells at which positions one of the places is edited."""
        assert self.query is not None
        applied = [edit.applies(self.query) for place in places for edit in self.edits.get(place, ())]
        return jnp.any(jnp.stack(applied), axis=0) if applied else jnp.zeros(self.query.shape, bool)

    def at(self, query: Int[Array, " T"]) -> "Tap":
        """Returns the tap for a call that computes the positions `query`."""
        return Tap(self.edits, self.wanted, query, self.found)

    def of_block(self, number: int) -> "Tap":
        """Returns what is asked within one block, without its prefix and with captures of its own."""
        if not self.edits and not self.wanted:
            return self
        prefix = f"blocks.{number}."
        edits = {name.removeprefix(prefix): edits for name, edits in self.edits.items() if name.startswith(prefix)}
        wanted = frozenset(name.removeprefix(prefix) for name in self.wanted if name.startswith(prefix))
        return Tap(edits, wanted, self.query, {})

    def keep(self, number: int, found: Mapping[str, Array]) -> None:
        """Adds what was captured in one block."""
        self.found.update({f"blocks.{number}.{name}": x for name, x in found.items()})


UNTAPPED = Tap({}, frozenset(), None, {})
"""Nothing is asked."""


def stack_edits(edits: Sequence[Mapping[str, tuple[Edit, ...]] | None]) -> dict[str, tuple[Edit, ...]]:
    """Returns the edits of several rows, or of several blocks, as one pytree with a leading axis.

    Edits that are alike but for their numbers become one; where a row has none of a kind, it is off.
    """
    kinds: dict[tuple[Any, ...], list[tuple[int, Edit]]] = {}
    for row, places in enumerate(edits):
        seen: dict[tuple[Any, ...], int] = {}
        for place, several in sorted((places or {}).items()):
            for edit in several:
                leaves, structure = jax.tree.flatten(edit)
                kind = (place, structure, *((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))
                seen[kind] = seen.get(kind, 0) + 1  # the second edit of a kind in a row is a kind of its own
                kinds.setdefault((*kind, seen[kind]), []).append((row, edit))
    stacked: dict[str, tuple[Edit, ...]] = {}
    for (place, *_), found in kinds.items():
        of_row = dict(found)
        off = eqx.tree_at(lambda edit: edit.on, found[0][1], np.zeros_like(found[0][1].on))
        rows = [of_row.get(row, off) for row in range(len(edits))]
        stacked[place] = (*stacked.get(place, ()), jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows))
    return stacked
