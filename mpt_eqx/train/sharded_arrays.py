"""Arrays that are sharded over devices, written and read by orbax: each process its own shards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_eqx.errors import CheckpointError


def write_sharded(path: Path, arrays: Mapping[str, jax.Array]) -> None:
    """Writes arrays by name; all processes of their mesh must call it.

    Raises:
        CheckpointError: it cannot be written, or orbax is not there.
    """
    orbax = _orbax()
    try:
        with orbax.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), dict(arrays))
    except Exception as error:  # of a full disk: what the library for its files raises
        raise CheckpointError(f"{path}: cannot be written by orbax ({error})") from error


def read_sharded(path: Path, like: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns arrays by name where others are, on a mesh of any shape; all processes of it must call it.

    Raises:
        CheckpointError: it cannot be read, or orbax is not there.
    """
    orbax = _orbax()
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)
        for name, leaf in like.items()
    }
    try:
        with orbax.StandardCheckpointer() as checkpointer:
            found = checkpointer.restore(path.absolute(), shapes)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read by orbax ({error})") from error
    return {name: _uncommitted(found[name]) if _goes_anywhere(leaf) else found[name] for name, leaf in like.items()}


def _goes_anywhere(leaf: Any) -> bool:
    return not leaf.committed if isinstance(leaf, jax.Array) else getattr(leaf, "sharding", None) is None


def _uncommitted(array: jax.Array) -> jax.Array:
    return jnp.array(np.asarray(array))


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise CheckpointError(
            "states that are sharded over devices need orbax; install it with pip install 'mpt_eqx[train]'"
        ) from error
    return orbax.checkpoint
