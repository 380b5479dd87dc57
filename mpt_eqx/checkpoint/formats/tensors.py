"""What every format has in common: the types that weights may have, and the description of one tensor."""

import dataclasses
import math
import mmap
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


def release_pages(view: np.ndarray) -> None:
    """Takes the pages of a read-only view of a mapped file out of this process's memory.

    What is used again is read again. Other arrays stay as they are, and so does everything on systems without the call.
    """
    mapping: object = view
    while mapping is not None and not isinstance(mapping, mmap.mmap):
        mapping = getattr(mapping, "base", None)
    if mapping is None or view.flags.writeable or view.size == 0 or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = np.frombuffer(mapping, np.uint8).ctypes.data
    low, high = (at - start for at in np.lib.array_utils.byte_bounds(view))
    # Whole pages inside it: the first and the last may be another tensor's as well.
    low, high = -(-low // mmap.PAGESIZE) * mmap.PAGESIZE, high // mmap.PAGESIZE * mmap.PAGESIZE
    if low < high:
        mapping.madvise(mmap.MADV_DONTNEED, low, high - low)
