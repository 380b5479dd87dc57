"""Arrays on the host: types and memory in which JAX takes them without a copy, and gathering them from devices."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpt_eqx.checkpoint.formats.safetensors import ALIGNMENT
from mpt_eqx.checkpoint.formats.tensors import TensorInfo, release_pages
from mpt_eqx.checkpoint.names import is_quantized

CHUNK = 2**24  # elements that are compared or checked at once
COPIED = 2**21  # bytes of a mapped file that are copied before their pages are released


def is_finite(array: np.ndarray) -> bool:
    """Returns whether no element is NaN or infinity, a chunk at a time."""
    flat = array.reshape(-1)
    return all(np.isfinite(flat[at : at + CHUNK]).all() for at in range(0, len(flat), CHUNK))


def is_equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Returns whether two arrays of one shape have equal elements, a chunk at a time."""
    a, b = one.reshape(-1), other.reshape(-1)
    return all(np.array_equal(a[at : at + CHUNK], b[at : at + CHUNK]) for at in range(0, len(a), CHUNK))


def loaded_dtype(name: str, tensor: TensorInfo, dtype: np.dtype | None) -> np.dtype:
    """Returns the type that a tensor is loaded in: `dtype`, or its own for None and for parts of quantised weights."""
    return jax.numpy.dtype(tensor.dtype) if dtype is None or is_quantized(name) else dtype


def is_zero_copy(view: np.ndarray, dtype: np.dtype) -> bool:
    """Returns whether JAX on CPU can use this memory as an array of `dtype` without a copy."""
    return view.dtype == dtype and view.flags.c_contiguous and view.ctypes.data % ALIGNMENT == 0 and view.size > 0


def aligned_copy(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a copy in another type, at an address that JAX uses without copying once more.

    Of a mapped file it releases the pages as it goes, so that memory does not hold the tensor twice.
    """
    size = view.size * dtype.itemsize
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + size].view(dtype).reshape(view.shape)
    if view.flags.c_contiguous:
        flat, step = view.reshape(-1), COPIED // view.itemsize
        for at in range(0, view.size, step):
            np.copyto(copy.reshape(-1)[at : at + step], flat[at : at + step], casting="unsafe")
            release_pages(flat[at : at + step])
    else:
        np.copyto(copy, view, casting="unsafe")
    release_pages(view)
    return copy


def gather_to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Returns a whole array on the host. Of an array on several processes all must call it."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    if not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    # np.asarray(array) would keep a copy as long as the array lives.
    whole = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            # The same holds for what is fetched from another kind of device, so fetch a copy that dies here.
            data = shard.data if shard.device.platform == "cpu" else jax.numpy.copy(shard.data)
            whole[shard.index] = data
    return whole
