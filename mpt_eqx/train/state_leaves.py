"""The leaves of a state by name, as they are saved and put in place again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_eqx.checkpoint.formats.safetensors import STATE_DTYPES
from mpt_eqx.checkpoint.formats.tensors import TensorInfo
from mpt_eqx.errors import CheckpointError, MPTError, first_of
from mpt_eqx.model.leaves import is_array, leaf_name

SHAPE, DTYPE, VALUE = "shape", "dtype", "value"


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by name, such as "model.blocks.0.ffn.up_proj.weight", in the tree's order."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = leaf_name(path)
        leaves[f"{name}#{len(leaves)}" if name in leaves else name] = leaf
    return leaves


def is_key(leaf: Any) -> bool:
    """Tells whether a leaf holds random keys of JAX."""
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def as_saved(leaf: Any) -> Any:
    """Returns an array as it is saved: of keys their numbers."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def spec_of(name: str, leaf: Any) -> dict[str, Any]:
    """Returns what a leaf is: type and shape of an array, the value of a number or text.

    Raises:
        MPTError: an array of this type cannot be saved.
    """
    if is_array(leaf):
        if not is_key(leaf) and np.dtype(leaf.dtype) not in STATE_DTYPES.values():
            raise MPTError(f"{name}: expected a type that safetensors has, found {leaf.dtype}; convert it")
        return {DTYPE: str(leaf.dtype), SHAPE: list(leaf.shape)}
    return {VALUE: leaf if isinstance(leaf, bool | int | float | str) else type(leaf).__name__}


def raise_unless_alike(place: Path, specs: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the leaves of a state that was saved are those of another."""
    found = {name: spec_of(name, leaf) for name, leaf in leaves.items()}
    differences = [
        f"{name} ({_shown(specs.get(name))}, in like {_shown(found.get(name))})"
        for name in {**specs, **found}
        if specs.get(name) != found.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{place}: expected a state like the argument `like`, found {len(differences)} leaves that differ: "
            f"{first_of(differences, limit=3)}; create `like` with the same configuration, optimizer and trainable"
        )


def _shown(spec: Mapping[str, Any] | None) -> str:
    if spec is None:
        return "none"
    return str(spec[VALUE]) if VALUE in spec else f"{spec[DTYPE]}{spec[SHAPE]}"


def fits(tensor: TensorInfo, like: Any) -> bool:
    """Tells whether an array from a file has type and shape of another."""
    if not is_array(like):
        return False
    wanted = jax.eval_shape(jax.random.key_data, like) if is_key(like) else like
    return tensor.shape == wanted.shape and tensor.dtype == np.dtype(wanted.dtype).name


def placed(array: np.ndarray, like: Any) -> Any:
    """Returns an array from a file where another is, in memory of its own."""
    if isinstance(like, np.ndarray | np.generic):
        return np.array(array)
    sharding = getattr(like, "sharding", None)
    if isinstance(like, jax.Array) and not like.committed:
        sharding = None  # it goes where what it is used with is
    if getattr(like, "weak_type", False) and not array.ndim:
        return jnp.asarray(array.item())
    if sharding is None:
        result = jnp.array(array)
    else:
        result = jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))
    return (
        jax.random.wrap_key_data(result, impl=jax.random.key_impl(jnp.empty((), like.dtype)))
        if is_key(like)
        else result
    )
