"""What every format has in common: the types that weights may have, and the description of one tensor."""

import dataclasses
import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The types of weights, under the names that both safetensors and GGUF have for them."""

FLOAT_NAMES = tuple(dtype.name for dtype in FLOATS.values())
"""The same by numpy's names."""

MAX_RANK = 8
MAX_TENSORS = 25_000  # of a checkpoint; a thousand blocks of every option have 22 000


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        name: name in the file.
        shape: shape.
        dtype: numpy's name of its type; the format's own name where numpy has none.
        file: name of the file that holds it.
        read: returns its values: a read-only view of the mapped file, or a new array where they are dequantised.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)
