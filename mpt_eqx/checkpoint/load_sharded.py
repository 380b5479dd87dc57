"""Loading to a mesh: every device gets its shard of each tensor, and the host copies no other process's shards."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mpt_eqx.checkpoint.formats.tensors import TensorInfo
from mpt_eqx.checkpoint.host_arrays import aligned_copy, is_finite, is_zero_copy, loaded_dtype
from mpt_eqx.checkpoint.info import CheckpointInfo
from mpt_eqx.checkpoint.names import named_leaves
from mpt_eqx.checkpoint.progress import byte_bar
from mpt_eqx.errors import CheckpointError
from mpt_eqx.sharding.qkv import qkv_slice_of
from mpt_eqx.sharding.specs import named_shardings


def load_sharded(
    info: CheckpointInfo,
    tensors: Mapping[str, TensorInfo],
    model: Any,
    dtype: np.dtype | None,
    mmap: bool,
    check_finite: bool,
    progress: bool,
) -> dict[str, jax.Array]:
    """Returns the arrays of a model on its mesh by canonical name.

    Args:
        info: the checkpoint.
        tensors: its tensors by canonical name.
        model: the shapes of the model, with its layout.
        dtype: the type of the weights, None for each in its own.
        mmap: as in `from_pretrained`.
        check_finite: as in `from_pretrained`.
        progress: whether to show a bar.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
        ShardingError: rules, mesh and model do not fit together.
    """
    leaves, shardings = named_leaves(model), jax.tree.leaves(named_shardings(model))

    def shard_of(
        index: tuple[slice, ...], of: TensorInfo, view: np.ndarray, dtype: np.dtype, made: dict[str, np.ndarray]
    ) -> np.ndarray:
        if str(index) not in made:  # devices that hold the same shard share its memory
            piece = view[index]
            if check_finite and not is_finite(piece):
                raise CheckpointError(f"{info.directory / of.file}: {of.name} holds NaN or infinity")
            made[str(index)] = piece if zero_copy and is_zero_copy(piece, dtype) else aligned_copy(piece, dtype)
        return made[str(index)]

    total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
    zero_copy = mmap and model.layout.mesh.devices.flat[0].platform == "cpu"
    arrays: dict[str, jax.Array] = {}
    with byte_bar(f"loading {info.directory.name}", total, progress) as bar:
        for (name, leaf), sharding in zip(leaves.items(), shardings, strict=True):
            stored, rows = (name, slice(None)) if name in tensors else qkv_slice_of(name, info.config)
            tensor = tensors[stored]
            view, wanted = tensor.read()[rows], loaded_dtype(name, tensor, dtype)

            arrays[name] = jax.make_array_from_callback(
                leaf.shape, sharding, functools.partial(shard_of, of=tensor, view=view, dtype=wanted, made={})
            )
            bar.update(leaf.size * leaf.dtype.itemsize)
    return arrays
