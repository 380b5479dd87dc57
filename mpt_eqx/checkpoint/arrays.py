"""From the numbers of a file to memory that JAX can use."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from mpt_eqx.checkpoint.formats.safetensors import ALIGNMENT
from mpt_eqx.checkpoint.formats.tensors import TensorInfo
from mpt_eqx.checkpoint.names import is_quantised

CHUNK = 2**24  # numbers that are looked at together


def finite(array: np.ndarray) -> bool:
    """Tells whether all numbers are finite, a part at a time."""
    flat = array.reshape(-1)
    return all(np.isfinite(flat[at : at + CHUNK]).all() for at in range(0, len(flat), CHUNK))


def kept_dtype(name: str, tensor: TensorInfo, dtype: np.dtype) -> np.dtype:
    """Returns the type that a tensor is to have: the wanted one, but for those of quantised weights their own."""
    return jax.numpy.dtype(tensor.dtype) if is_quantised(name) else dtype


def usable(view: np.ndarray, dtype: np.dtype) -> bool:
    """Tells whether JAX can use this memory as it is."""
    return view.dtype == dtype and view.flags.c_contiguous and view.ctypes.data % ALIGNMENT == 0 and view.size > 0


def aligned_copy(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a copy in another type, at an address that JAX uses without copying once more."""
    size = view.size * dtype.itemsize
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + size].view(dtype).reshape(view.shape)
    np.copyto(copy, view, casting="unsafe")
    return copy


def byte_bar(description: str, total: int, shown: bool) -> tqdm:
    """Returns a progress bar on stderr that counts bytes and goes away at its end."""
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, disable=not shown, leave=False)


def gathered(array: jax.Array | np.ndarray) -> np.ndarray:
    """Returns an array on the host; in several processes all must ask for it."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    if not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    # np.asarray(array) would stay in memory as long as the array does.
    whole = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            # What is copied from another kind of device would stay in memory, too, but for that of a copy.
            data = shard.data if shard.device.platform == "cpu" else jax.numpy.copy(shard.data)
            whole[shard.index] = data
    return whole
