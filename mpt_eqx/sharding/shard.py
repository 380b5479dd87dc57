"""Models on a mesh of devices: which axis of each weight is shared by which axis of the mesh.

`shard` places a model's weights; `from_pretrained(…, mesh=, rules=)` reads them there. What the model computes, its
losses, gradients and tokens are then computed by all devices of the mesh.
"""

import math
import re
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mpt_eqx.config import MPTConfig, ShardingRules
from mpt_eqx.errors import ShardingError
from mpt_eqx.model import MPT
from mpt_eqx.model.moe import MoE
from mpt_eqx.ops.layout import Layout, check_axes, make_spec, resolve_spec, with_auto_axes
from mpt_eqx.sharding.multihost import assert_same_across_processes
from mpt_eqx.sharding.qkv import split_qkv
from mpt_eqx.sharding.rules import WEIGHT_AXES


def make_mesh(**axes: int) -> Mesh:
    """Returns a mesh over the devices there are, with axes of these sizes: for example fsdp=2, tp=4.

    Raises:
        ShardingError: it needs more devices than there are, or a size is not a positive whole number.
    """
    for name, size in axes.items():
        if not isinstance(size, int) or size < 1:
            raise ShardingError(f"{name}: expected a number of devices, ≥ 1, found {size!r}")
    needed, there = math.prod(axes.values()), jax.device_count()
    if needed > there:
        raise ShardingError(
            f"mesh: expected at most {there} devices, which there are, found {needed} "
            f"({' × '.join(f'{name}={size}' for name, size in axes.items())}); make it smaller, or, to try it on a "
            f"CPU, set XLA_FLAGS=--xla_force_host_platform_device_count={needed} before JAX starts"
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=jax.devices()[:needed])


def partition_specs(model: MPT | MPTConfig, rules: ShardingRules) -> Any:
    """Returns the model, or that of a configuration, with a PartitionSpec in place of each array.

    That of a Wqkv is meant for each of its sections: the rows of q, of k and of v are shared by heads, and never one
    device's rows across them.

    Raises:
        ShardingError: two axes of a weight would be shared by the same axis of the mesh, a leaf is none of an MPT's, or
            the rules match nothing in the model.
    """
    tree = abstract_model(model)

    def one(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = _name(path)
        return make_spec(
            [rules.axes(axis) for axis in _unshared_twice(name, weight_axes(name, leaf, tree.config), rules)]
        )

    _refuse_useless(tree, rules)
    return _map_arrays(one, tree)


def shard(model: MPT, mesh: Mesh, rules: ShardingRules) -> MPT:
    """Returns the model with its weights where the rules have them; inside jit and outside.

    Where heads are shared, Wq, Wk and Wv stand in place of each Wqkv, as its sections; `save_pretrained` writes it as
    it was. The mesh's axes may be Auto or Explicit; the model lies on one with Auto axes.

    Args:
        model: the model.
        mesh: devices with named axes; `jax.make_mesh`, `jax.sharding.Mesh` and `make_mesh` make one.
        rules: which of its axes share what.

    Raises:
        ShardingError: a rule names an axis that the mesh has not, the mesh does not divide an axis of a weight, or as
            `partition_specs`.
    """
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(model)):
        assert_same_mesh(mesh)
        if mesh.is_multi_process:
            assert_same_across_processes(config=model.config.to_dict(), rules=rules)
    placed = with_layout(model, mesh, rules)
    shardings = named_shardings(placed)
    return jax.tree.map(
        lambda leaf, sharding: leaf if sharding is None else _placed(leaf, sharding), placed, shardings,
        is_leaf=lambda node: node is None,
    )  # fmt: skip


def _placed(leaf: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.core.Tracer) or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return eqx.filter_shard(leaf, sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)  # from whatever devices it lies on
    return jax.make_array_from_callback(leaf.shape, sharding, lambda part: np.asarray(leaf[part]))


def with_layout(model: Any, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> Any:
    """Returns the model, or its shapes, as it lies on a mesh, with its layout, and nothing moved yet."""
    check_axes(rules, mesh)
    tree = split_qkv(model) if rules.heads or rules.kv_heads else model
    layout = Layout(with_auto_axes(mesh) if isinstance(mesh, Mesh) else mesh, rules)

    def told(model: Any) -> list[Any]:
        experts = [block.ffn.experts.mlp for block in model.blocks if isinstance(block.ffn, MoE)]
        return [part.layout for part in (model, *experts)]

    count = len(told(tree)) - 1
    return eqx.tree_at(told, tree, [layout, *[layout if rules.experts else None] * count], is_leaf=_is_layout)


def assert_same_mesh(mesh: Mesh) -> None:
    """Refuses a mesh of several processes that is not one of all, or not the same in all."""
    if not mesh.is_multi_process:
        return
    here = {device.process_index for device in mesh.devices.flat}
    if missing := sorted(set(range(jax.process_count())) - here):
        raise ShardingError(
            f"mesh: expected devices of all {jax.process_count()} processes, or of one, found none of process "
            f"{missing[0]}; make it of all of jax.devices()"
        )
    assert_same_across_processes(mesh=dict(mesh.shape), devices=[device.id for device in mesh.devices.flat])


def named_shardings(model: Any) -> Any:
    """Returns a model that has a layout with a NamedSharding in place of each array, and None elsewhere."""
    specs = _resolved_specs(model)
    return jax.tree.map(lambda s: NamedSharding(model.layout.mesh, s), specs, is_leaf=_is_spec)


def abstract_model(model: MPT | MPTConfig, dtype: Any = np.float32) -> Any:
    """Returns the shapes of a model, or those of that of a configuration, whose weights have a type."""
    if not isinstance(model, MPTConfig):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_array(x) else x, model)
    key = jax.random.key(0)
    made = eqx.filter_eval_shape(lambda: MPT(model, key=key))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype) if hasattr(x, "shape") else x, made)


def weight_axes(name: str, leaf: Any, config: MPTConfig) -> tuple[str | None, ...]:
    """Returns the logical names of a weight's axes.

    Raises:
        ShardingError: no rule says so, or its rank is another one.
    """
    base, _, part = name.partition(".weight.")
    found = [axes for pattern, axes in WEIGHT_AXES if re.fullmatch(pattern, f"{base}.weight" if part else name)]
    if len(found) != 1 or len(found[0]) != len(leaf.shape):
        raise ShardingError(
            f"{name}: expected one of an MPT's weights, which one rule matches, found shape {tuple(leaf.shape)} and "
            f"{len(found)} rules; shard the MPT before other arrays are added to it"
        )
    axes = found[0]
    if config.attn_config.qk_gn and re.search(r"\.[qk]_ln\.", name):
        axes = ("head_dim",)
    if part == "scale" and leaf.shape[1] == 1:
        axes = (axes[0], None)
    return axes


def _sizes(leaf: Any, axes: tuple[str | None, ...], config: MPTConfig) -> tuple[int, ...]:
    """Returns how many of what cannot be divided stand along each axis of a weight."""
    units = {"heads": config.n_heads, "kv_heads": config.kv_heads, "experts": config.ffn_config.moe_num_experts}
    # Of a quantised weight's groups there may be fewer than heads.
    both = ((size, units.get(axis or "") or size) for size, axis in zip(leaf.shape, axes, strict=True))
    return tuple(math.gcd(size, unit) for size, unit in both)


def _resolved_specs(tree: Any) -> Any:
    """Returns how each weight of a model with a layout lies on its mesh."""
    rules, mesh = tree.layout.rules, tree.layout.mesh
    _refuse_useless(tree, rules)

    def one(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = _name(path)
        axes = _unshared_twice(name, weight_axes(name, leaf, tree.config), rules)
        return resolve_spec(name, _sizes(leaf, axes, tree.config), axes, rules, mesh)

    return _map_arrays(one, tree)


def _unshared_twice(name: str, axes: tuple[str | None, ...], rules: ShardingRules) -> tuple[str | None, ...]:
    used = [axis for logical in axes for axis in rules.axes(logical)]
    if len(used) != len(set(used)):
        twice = next(axis for axis in used if used.count(axis) > 1)
        raise ShardingError(
            f"{name}: expected different mesh axes for {' and '.join(str(axis) for axis in axes)}, found {twice!r} "
            f"twice; change one of the two rules"
        )
    return axes


def _refuse_useless(tree: Any, rules: ShardingRules) -> None:
    matched = {axis for path, leaf in _arrays(tree) for axis in weight_axes(_name(path), leaf, tree.config)}
    matched |= {"batch", "seq", "head_dim"}
    if not any(rules.axes(axis) for axis in matched if axis):
        raise ShardingError(
            f"rules: expected one that matches something in this model, found {rules}; it has "
            f"{', '.join(sorted(axis for axis in matched if axis))}"
        )


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_layout(node: Any) -> bool:
    return node is None or isinstance(node, Layout)


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def _arrays(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if _is_array(leaf)]


def _map_arrays(function: Any, tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path, leaf) if _is_array(leaf) else None, tree)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
