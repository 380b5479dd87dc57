"""shard: a model on a mesh.

`shard` moves a model's weights; `from_pretrained(…, mesh=, rules=)` reads each device's part of them from the files.
Logits, losses, gradients and tokens are then computed by all devices of the mesh.
"""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from mpt_eqx.config import ShardingRules
from mpt_eqx.model import MPT
from mpt_eqx.model.attention import Attention
from mpt_eqx.model.moe import MoE
from mpt_eqx.model.stacked import StackedBlocks
from mpt_eqx.ops.layout import Layout
from mpt_eqx.ops.switches import host_function, with_auto_axes
from mpt_eqx.sharding.mesh import assert_same_mesh
from mpt_eqx.sharding.multihost import assert_same_across_processes
from mpt_eqx.sharding.qkv import split_qkv
from mpt_eqx.sharding.rules import check_axes
from mpt_eqx.sharding.specs import named_shardings


def shard(model: MPT, mesh: Mesh, rules: ShardingRules) -> MPT:
    """Returns the model with its weights sharded over a mesh; outside jit and inside.

    Where the rules shard heads or kv_heads, Wq, Wk and Wv replace Wqkv, because no contiguous part of its rows has the
    q, k and v of some heads. Where they do not, as in FSDP, it stays. `save_pretrained` writes Wqkv in both cases.

    What is wrapped, as by a LoRA, is sharded as it is without; of the wrapper's own arrays `partition_specs` says more.

    Args:
        model: the model; it may be on a mesh already, and its arrays may be NumPy's.
        mesh: devices with named axes, from `make_mesh`, `jax.make_mesh` or `jax.sharding.Mesh`. Its axes may be Auto or
            Explicit, and the weights' axes are then the same. Inside jit they are what `jax.set_mesh` says.
        rules: which axes of the mesh shard which axes of the arrays.

    Raises:
        ShardingError: a rule names an axis that the mesh does not have, the mesh does not divide an axis of a weight,
            processes differ, or as in `partition_specs`.
    """
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(model)) and mesh.is_multi_process:
        assert_same_mesh(mesh)
        assert_same_across_processes(config=model.config.to_dict(), rules=rules)
    tree = host_function(with_layout)(model, mesh, rules)
    return jax.tree.map(
        lambda leaf, sharding: leaf if sharding is None else _place(leaf, sharding), tree, named_shardings(tree),
        is_leaf=lambda node: node is None,
    )  # fmt: skip


def with_layout(model: Any, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> Any:
    """Returns the model, arrays or shapes, with its layout on a mesh and Wqkv split if need be; no array is moved.

    Raises:
        ShardingError: a rule names an axis that the mesh does not have.
    """
    check_axes(rules, mesh)
    tree = split_qkv(model) if rules.heads or rules.kv_heads else model
    layout = Layout(mesh, rules)

    def modules(model: Any) -> tuple[list[Any], list[Any]]:
        blocks = [model.blocks.block] if isinstance(model.blocks, StackedBlocks) else model.blocks
        attentions = [block.attn for block in blocks if isinstance(block.attn, Attention)]
        return [model, *attentions], [block.ffn.experts.mlp for block in blocks if isinstance(block.ffn, MoE)]

    def layouts(model: Any) -> list[Any]:
        return [module.layout for several in modules(model) for module in several]

    always, experts = modules(tree)
    return eqx.tree_at(
        layouts, tree, [*[layout] * len(always), *[layout if rules.experts else None] * len(experts)],
        is_leaf=lambda node: node is None or isinstance(node, Layout),
    )  # fmt: skip


def _place(leaf: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    auto = NamedSharding(with_auto_axes(sharding.mesh), sharding.spec)
    if isinstance(leaf, jax.core.Tracer):
        explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
        return jax.sharding.reshard(leaf, sharding.spec) if explicit else eqx.filter_shard(leaf, auto)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(eqx.filter_shard(leaf, auto), sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)  # from any devices
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.asarray(leaf[index]))
