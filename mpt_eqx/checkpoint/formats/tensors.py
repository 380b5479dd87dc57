"""One tensor of a file: what it is, and how to get at its numbers."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

MAX_RANK = 8
MAX_TENSORS = 25_000  # of a checkpoint; a thousand blocks of every option have 22 000


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        name: as stored.
        shape: its sizes.
        dtype: numpy's name of its type; for types that no weight of an MPT may have, perhaps the file's own name.
        file: the name of the file that holds it.
        read: returns its numbers: a read-only view of the mapped file where the format stores them as they are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)
