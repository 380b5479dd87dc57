"""The arrays of a model by name: the path of each in the tree, with dots. Fields are called as tensors are."""

import copy
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def leaf_name(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf or of a module from its path, such as "blocks.0.attn.Wqkv.weight"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def is_array(leaf: Any) -> bool:
    """Tells whether a leaf is an array of JAX or NumPy, or the shape of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def named_arrays(tree: Any) -> list[tuple[str, Any]]:
    """Returns the arrays of a tree with their names, in the tree's order."""
    return [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if is_array(leaf)]


def with_fields(module: T, **values: Any) -> T:
    """Returns a module with other values of its fields, also of static ones, which `equinox.tree_at` does not reach."""
    changed = copy.copy(module)
    for name, value in values.items():
        object.__setattr__(changed, name, value)
    return changed
