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


class Edit(eqx.Module):
    """A change of an activation at some positions of its input.

    Attributes:
        change: a function (x, value) -> x of the activation.
        value: the arrays that it takes, such as one that broadcasts to the activation.
        positions: where it applies, 0-based, padding and cached tokens counted; None: from `start` to `stop`.
        start: the first position.
        stop: the one after the last.
        on: False changes nothing.
        axis: that of positions in the activation.
        per_position: whether `value` has an entry for each of `positions` along that axis.
    """

    change: Callable[[Array, Any], Array] = eqx.field(static=True)
    value: Any
    positions: Int[Array | np.ndarray, "*B P"] | None
    start: Int[Array | np.ndarray, "*B"]
    stop: Int[Array | np.ndarray, "*B"]
    on: Bool[Array | np.ndarray, "*B"]
    axis: int = eqx.field(static=True)
    per_position: bool = eqx.field(static=True)

    def applies(self, query: Int[Array, " T"]) -> Bool[Array, " T"]:
        """Tells at which of the positions `query` it applies."""
        inside = (query >= self.start) & (query < self.stop)
        if self.positions is not None:
            inside &= jnp.any(query[:, None] == self.positions, axis=-1)
        return inside & self.on

    def __call__(self, place: str, x: Shaped[Array, "..."], query: Int[Array, " T"]) -> Shaped[Array, "..."]:
        """Returns x changed where it applies.

        Args:
            place: the name of the activation.
            x: the activation.
            query: the positions that it stands for.
        """
        value = self.value
        if self.per_position:
            value = jnp.take(value, jnp.argmax(query[:, None] == self.positions, axis=-1), axis=self.axis)
        changed = self.change(x, jax.tree.map(jnp.asarray, value))
        if changed.shape != x.shape:
            raise MPTError(f"edits: {place}: expected an activation of shape {x.shape}, found {changed.shape}")
        where = self.applies(query).reshape([-1 if axis == self.axis else 1 for axis in range(x.ndim)])
        return jnp.where(where, changed.astype(x.dtype), x)


class Tap(eqx.Module):
    """What is asked of the places of one forward pass, or of one block, by their names.

    Attributes:
        edits: of each place, in the order in which they are made.
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
            x = edit(place, x, self.query)
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


def editing(edits: dict[str, tuple[Edit, ...]]) -> Tap:
    """Returns a tap that edits and captures nothing."""
    return Tap(edits, frozenset(), None, {}) if edits else UNTAPPED


def stack_edits(edits: Sequence[Mapping[str, tuple[Edit, ...]]]) -> dict[str, tuple[Edit, ...]]:
    """Returns the edits of several rows, or of several blocks, as one pytree with a leading axis on each array.

    Edits that are alike but for their numbers become one; where a row has none of a kind, it is off.
    """
    kinds: dict[tuple[Any, ...], dict[int, Edit]] = {}
    for row, places in enumerate(edits):
        for place, several in places.items():
            for number, edit in enumerate(several):
                leaves = tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(edit))
                kind = (place, number, leaves, jax.tree.structure(edit))
                kinds.setdefault(kind, {})[row] = edit
    stacked: dict[str, tuple[Edit, ...]] = {}
    # In the order in which each row makes them.
    for (place, *_), found in sorted(kinds.items(), key=lambda kind: kind[0][:2]):
        first = next(iter(found.values()))
        off = eqx.tree_at(lambda edit: edit.on, first, np.asarray(False))
        rows = [found.get(row, off) for row in range(len(edits))]
        stacked[place] = (*stacked.get(place, ()), jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows))
    return stacked
