"""safetensors files: reading them in place, and writing them so that they can be."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpt_eqx.checkpoint.formats.tensors import FLOATS, TensorInfo, release_pages
from mpt_eqx.config.json_file import unique_keys
from mpt_eqx.errors import CheckpointError, printable

# With the types of quantised weights.
DTYPES = FLOATS | {"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8)}
# With what else a state of training holds.
STATE_DTYPES = DTYPES | {
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
}
# A model of a thousand layers has a header of 2 MB; of a longer one the library would make objects by the gigabyte.
MAX_HEADER = 4 * 2**20
# JAX uses memory of this alignment without copying it.
ALIGNMENT = 64


class TensorToWrite(NamedTuple):
    """A tensor to be written; `read` is called when it is its turn, so that only one is in memory."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def read_safetensors(file: Path, dtypes: Mapping[str, np.dtype] = DTYPES) -> list[TensorInfo]:
    """Returns the tensors of a safetensors file, as views of the file; those of types not in `dtypes` only by name.

    Raises:
        CheckpointError: the file is damaged or something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        data = np.memmap(file, mode="r")
        length = int.from_bytes(bytes(data[:8]), "little")
        if length > MAX_HEADER:
            raise ValueError(f"expected a header of at most {MAX_HEADER} bytes, found {length}")
        # The library checks the header: its types, and that the parts fill the file without gap or overlap.
        with safe_open(file, framework="np"):
            pass
        header = json.loads(bytes(data[8 : 8 + length]), object_pairs_hook=unique_keys)
        header.pop("__metadata__", None)
        return [_tensor_info(name, entry, data[8 + length :], file, dtypes) for name, entry in header.items()]
    except (SafetensorError, OSError, ValueError, RecursionError, MemoryError) as error:
        text = printable(" ".join(str(error).split()) or type(error).__name__, limit=200)
        raise CheckpointError(
            f"{file}: expected a safetensors file, found something else or a part ({text}); "
            f"if it was downloaded, delete it and download it again"
        ) from None


def _tensor_info(
    name: str, entry: dict[str, Any], data: np.ndarray, file: Path, dtypes: Mapping[str, np.dtype]
) -> TensorInfo:
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    dtype: Any = dtypes.get(entry["dtype"])

    def read() -> np.ndarray:
        assert dtype is not None  # of other types nothing but the name is asked for
        return data[start:end].view(dtype).reshape(shape)

    return TensorInfo(name, shape, entry["dtype"] if dtype is None else dtype.name, file.name, read)


def write_order(tensors: Sequence[TensorToWrite]) -> list[TensorToWrite]:
    """Returns tensors in the order in which they are written: those of odd sizes last, so that they shift no other."""
    return sorted(tensors, key=lambda tensor: tensor.nbytes % ALIGNMENT != 0)


def write_safetensors(
    path: Path, tensors: Sequence[TensorToWrite], progress: Callable[[int], object] = lambda written: None
) -> None:
    """Writes tensors one by one, in `write_order`, each aligned to 64 bytes where sizes allow, and syncs the file.

    Args:
        path: the file.
        tensors: what to write.
        progress: called after each tensor with the number of bytes written.

    Raises:
        OSError: the file cannot be written.
    """
    names = {dtype: name for name, dtype in STATE_DTYPES.items()}
    tensors = write_order(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at := at + tensor.nbytes]
        header[tensor.name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces after the JSON are part of the format; they bring the first tensor to a multiple of 64.
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            # Contiguous, because a transposed view would be written in the order of its memory.
            array = np.ascontiguousarray(tensor.read()).astype(tensor.dtype, copy=False)
            f.write(array.reshape(-1).view(np.uint8).data)
            release_pages(array)
            progress(tensor.nbytes)
        f.flush()
        os.fsync(f.fileno())
