"""The order in which a run reads its documents."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Int

from mpt_eqx.errors import MPTError

D = TypeVar("D")


class Sampler(Iterator[D], Generic[D]):
    """Yields documents in an order that is another in each epoch, and the same in each run.

    Attributes:
        state: where it is: `seed`, `epoch`, `position` in the epoch, and what these are of, `documents` and `part`. It
            is made of numbers only, so that JSON holds it. `pack` puts it into its own state.
    """

    def __init__(
        self,
        documents: Sequence[D],
        *,
        seed: int = 0,
        epochs: int | None = None,
        part: tuple[int, int] = (0, 1),
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Begins with the first epoch, or where another was.

        Args:
            documents: anything with a length that numbers pick from.
            seed: of the order, 0 ≤ seed < 2⁶⁴.
            epochs: how often each document comes; None for no end.
            part: (i, n): the i-th of n parts of each epoch, which have no document in common; for processes
                (jax.process_index(), jax.process_count()).
            state: `state` of an earlier one of the same documents, seed and part; None for the start.

        Raises:
            MPTError: an argument is not valid, or there are fewer documents than parts.
        """
        number, parts = part
        if not _is_count(parts, 1) or not _is_count(number, 0) or number >= parts:
            raise MPTError(f"part: expected whole numbers (i, n) with 0 ≤ i < n, found {part!r}")
        if not _is_count(seed, 0) or seed >= 2**64:
            raise MPTError(f"seed: expected a whole number with 0 ≤ seed < 2⁶⁴, found {seed!r}")
        if epochs is not None and not _is_count(epochs, 1):
            raise MPTError(f"epochs: expected a whole number ≥ 1 or None, found {epochs!r}")
        if len(documents) < parts:
            raise MPTError(f"documents: expected at least {parts}, one for each part, found {len(documents)}")
        self._documents, self._epochs = documents, epochs
        self._fixed: dict[str, Any] = {"seed": seed, "documents": len(documents), "part": [number, parts]}
        self._epoch, self._position = 0, 0
        self._order = self._order_of(0)
        if state is not None:
            self.go_to(state)

    @property
    def state(self) -> dict[str, Any]:
        """Where the next document stands."""
        return {**self._fixed, "epoch": self._epoch, "position": self._position}

    def go_to(self, state: Mapping[str, Any]) -> None:
        """Goes on where another was.

        Raises:
            MPTError: it is no state, or one of other documents, another seed or another part.
        """
        if set(state) != set(self.state) or not all(_is_count(state[name], 0) for name in ("epoch", "position")):
            raise MPTError(f"state: expected what `state` of a Sampler was, found {dict(state)!r:.200}")
        for name, value in self._fixed.items():
            if state[name] != value:
                raise MPTError(
                    f"state: expected {name}={value}, as this Sampler has, found {name}={state[name]!r}; go on with "
                    "the documents, seed and part that the state is of"
                )
        order = self._order_of(state["epoch"])
        if state["position"] > len(order):
            raise MPTError(f"state: expected a position of at most {len(order)}, found {state['position']}")
        self._epoch, self._position, self._order = state["epoch"], state["position"], order

    def __next__(self) -> D:
        """Returns the next document."""
        if self._position == len(self._order) and self._epoch + 1 != self._epochs:
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        if self._position == len(self._order):
            raise StopIteration
        document = self._documents[int(self._order[self._position])]
        self._position += 1
        return document

    def _order_of(self, epoch: int) -> Int[np.ndarray, " N"]:
        """Returns the numbers of this part's documents in one epoch."""
        # NumPy promises that these numbers stay as they are; of its permutations it does not.
        numbers = np.random.Philox(np.random.SeedSequence((self._fixed["seed"], epoch)))
        number, parts = self._fixed["part"]
        return np.argsort(numbers.random_raw(self._fixed["documents"]), kind="stable")[number::parts]


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
