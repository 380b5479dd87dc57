"""From rules to a PartitionSpec or NamedSharding for each weight of a model."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mpt_eqx.config import MPTConfig, ShardingRules
from mpt_eqx.errors import ShardingError
from mpt_eqx.model import MPT
from mpt_eqx.model.leaves import is_array, leaf_name
from mpt_eqx.ops.layout import axes_size, make_spec
from mpt_eqx.sharding.qkv import check_not_wrapped
from mpt_eqx.sharding.rules import check_axes
from mpt_eqx.sharding.wrappers import array_axes


def partition_specs(model: MPT | MPTConfig, rules: ShardingRules, mesh: Mesh | AbstractMesh | None = None) -> Any:
    """Returns the model, or that of a configuration, with a PartitionSpec in place of each array, None of other leaves.

    With a mesh, these are the specs that `shard` gives. To place a model by hand, with the first line where the rules
    shard heads or kv_heads:

        model = sharding.split_qkv(model)
        specs = sharding.partition_specs(model, rules, mesh)
        arrays, rest = eqx.partition(model, eqx.is_array)
        arrays = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), arrays, specs)
        model = eqx.combine(arrays, rest)

    The specs are those of the tree as it is: that of Wqkv is the one of each of its three slices, since rows of q, of k
    and of v are each sharded by heads.

    A Linear or Embedding in a wrapper has the specs that it has without; it is found by its shape. The wrapper's own
    arrays are replicated, unless it has an attribute `logical_axes`: a mapping from names of its fields to names of
    axes, such as {"a": (None, "embed"), "b": ("mlp", None)}.

    Args:
        model: a model, which may be on a mesh and quantised, or a configuration.
        rules: which axes of the mesh shard which axes of the arrays.
        mesh: axes of weights that it does not divide are replicated, or an error, as in `shard`. None: the mesh that
            the model is on already; without one, as of a configuration, every axis counts as divided.

    Raises:
        ShardingError: two axes of a weight would be sharded over the same axis of the mesh, the model has an array that
            is none of an MPT's weights nor in a wrapper, Wqkv is wrapped and the rules shard heads, a `logical_axes`
            does not fit, the rules shard nothing of it, a rule names an axis that the mesh does not
            have, or the mesh does not divide an axis of a weight.
    """
    tree = abstract_model(model)
    if mesh is None and tree.layout is not None:
        mesh = tree.layout.mesh
    return _specs(tree, rules, mesh)


def resolve_specs(model: Any) -> Any:
    """Returns a model that has a layout, arrays or shapes, with the PartitionSpec on its mesh in place of each array.

    Raises:
        ShardingError: as `partition_specs`.
    """
    return _specs(model, model.layout.rules, model.layout.mesh)


def _specs(tree: Any, rules: ShardingRules, mesh: Mesh | AbstractMesh | None) -> Any:
    """Returns the specs of a model, arrays or shapes; without a mesh every axis counts as divided."""
    if mesh is not None:
        check_axes(rules, mesh)
    if rules.heads or rules.kv_heads:
        check_not_wrapped(tree)
    axes_of = array_axes(tree)
    _check_rules_match(axes_of, rules)

    def one(name: str, leaf: Any) -> PartitionSpec:
        axes = axes_of[name]
        _check_different(name, axes, rules)
        if mesh is None:
            return make_spec([rules.axes(axis) for axis in axes])
        return _spec_on_mesh(name, units(leaf, axes, tree.config), axes, rules, mesh)

    return _map_arrays(one, tree)


def _spec_on_mesh(
    name: str,
    counts: list[tuple[int, str]],
    axes: tuple[str | None, ...],
    rules: ShardingRules,
    mesh: Mesh | AbstractMesh,
) -> PartitionSpec:
    """Returns the PartitionSpec of one weight on a mesh.

    Args:
        name: its name.
        counts: its `units`.
        axes: its logical axes.
        rules: for a mesh with the axes that they name.
        mesh: the mesh.

    Raises:
        ShardingError: the mesh does not divide an axis, and `rules.allow_replicated` does not name it.
    """
    parts: list[tuple[str, ...]] = []
    for dimension, (axis, (count, _)) in enumerate(zip(axes, counts, strict=True)):
        mesh_axes = rules.axes(axis)
        devices = axes_size(mesh, mesh_axes)
        divided = count % devices == 0
        if not divided and axis not in rules.allow_replicated:
            raise ShardingError(
                f"{name}: dimension {dimension} ({axis}) has size {count}, which the {devices} devices of mesh axis "
                f"{'×'.join(mesh_axes)} do not divide; choose another mesh, or replicate it with dataclasses.replace("
                f"rules, allow_replicated=(*rules.allow_replicated, {axis!r}))"
            )
        parts.append(mesh_axes if divided else ())
    return make_spec(parts)


def named_shardings(model: Any) -> Any:
    """Returns a model that has a layout with a NamedSharding in place of each array, and None for other leaves."""
    return jax.tree.map(lambda spec: NamedSharding(model.layout.mesh, spec), resolve_specs(model), is_leaf=is_spec)


def abstract_model(model: MPT | MPTConfig, dtype: Any = np.float32) -> Any:
    """Returns a model with a ShapeDtypeStruct in place of each array.

    Args:
        model: a model, or a configuration.
        dtype: type of the weights of a configuration's model.
    """
    if not isinstance(model, MPTConfig):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x, model)
    made = eqx.filter_eval_shape(lambda: MPT(model, key=jax.random.key(0)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype) if is_array(x) else x, made)


def units(leaf: Any, axes: tuple[str | None, ...], config: MPTConfig) -> list[tuple[int, str]]:
    """Returns how many indivisible units each axis of a weight has, and what they are: 32 heads, not 4096 rows."""
    numbers = {"heads": config.n_heads, "kv_heads": config.kv_heads, "experts": config.ffn_config.moe_num_experts}
    found = []
    for size, axis in zip(leaf.shape, axes, strict=True):
        number = numbers.get(axis or "") or size
        count = math.gcd(size, number)
        # A quantised weight may have fewer groups along an axis than heads.
        found.append((count, str(axis) if count == number else "groups"))
    return found


def is_spec(node: Any) -> bool:
    """Tells whether a node is a PartitionSpec, which JAX may take for a tuple."""
    return isinstance(node, PartitionSpec)


def _check_different(name: str, axes: tuple[str | None, ...], rules: ShardingRules) -> None:
    """Raises a ShardingError if two axes of a weight are sharded over the same axis of the mesh."""
    used = [axis for logical in axes for axis in rules.axes(logical)]
    if twice := [axis for axis in used if used.count(axis) > 1]:
        raise ShardingError(
            f"{name}: expected different mesh axes for {' and '.join(map(str, axes))}, found {twice[0]!r} twice; "
            f"change one of the two rules"
        )


def _check_rules_match(axes_of: dict[str, tuple[str | None, ...]], rules: ShardingRules) -> None:
    """Raises a ShardingError if the rules shard nothing of a model, neither weights nor activations."""
    matched = {axis for axes in axes_of.values() for axis in axes if axis} | {"batch", "seq", "head_dim"}
    if not any(rules.axes(axis) for axis in matched):
        raise ShardingError(
            f"rules: expected one for an axis that this model has, {', '.join(sorted(matched))}, found {rules}"
        )


def _map_arrays(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Returns the tree with function(name, leaf) in place of each array and None for other leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(leaf_name(path), leaf) if is_array(leaf) else None, tree
    )
