"""explain: a table of how the weights of a model are sharded over a mesh."""

import collections
import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from mpt_eqx.config import MPTConfig, ShardingRules
from mpt_eqx.config.sharding_rules import mesh_axes
from mpt_eqx.model import MPT
from mpt_eqx.model.leaves import named_arrays
from mpt_eqx.ops.layout import axes_size
from mpt_eqx.sharding.shard import with_layout
from mpt_eqx.sharding.specs import abstract_model, is_spec, resolve_specs, units
from mpt_eqx.sharding.wrappers import array_axes


def explain(model: MPT | MPTConfig, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> str:
    """Returns a table of weights on a mesh: name, shape, spec and bytes per device, with the totals.

    Weights that are alike in several blocks have one line. Nothing is allocated; a `jax.sharding.AbstractMesh` needs no
    devices.

    Args:
        model: a model, or a configuration, whose weights then count as bfloat16.
        mesh: the mesh.
        rules: which of its axes shard which axes of the weights.

    Raises:
        ShardingError: as in `shard`.
    """
    tree = with_layout(abstract_model(model, jax.numpy.bfloat16), mesh, rules)
    rows: collections.Counter[tuple[str, ...]] = collections.Counter()
    total = per_device = 0
    specs, axes_of = jax.tree.leaves(resolve_specs(tree), is_leaf=is_spec), array_axes(tree)
    for (name, leaf), spec in zip(named_arrays(tree), specs, strict=True):
        nbytes = leaf.size * leaf.dtype.itemsize
        part = nbytes // math.prod(axes_size(mesh, mesh_axes(axes)) for axes in spec)
        rows[
            re.sub(r"blocks\.\d+\.", "blocks.*.", name),
            " × ".join(map(str, leaf.shape)),
            " ".join("+".join(mesh_axes(axes)) or "·" for axes in spec),
            f"{part:,}",
            _replicated(axes_of[name], leaf, spec, tree),
        ] += 1
        total, per_device = total + nbytes, per_device + part
    table = [
        ("leaf", "shape", "spec", "bytes per device", "", ""),
        *((*row[:4], f"×{count}", row[4]) for row, count in rows.items()),
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        [
            f"mesh: {', '.join(f'{name}={size}' for name, size in mesh.shape.items())}",
            *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table),
            f"total: {total:,} bytes; on each of {math.prod(mesh.shape.values())} devices {per_device:,} "
            f"({readable_bytes(per_device)}, {per_device / total:.1%})",
        ]
    )


def _replicated(axes: tuple[str | None, ...], leaf: Any, spec: PartitionSpec, model: Any) -> str:
    """Returns which axes of a weight are replicated although a rule shards them, and why."""
    rules = model.layout.rules
    reasons = [
        f"{count} {unit} over {axes_size(model.layout.mesh, rules.axes(axis))} devices"
        for axis, (count, unit), part in zip(axes, units(leaf, axes, model.config), spec, strict=True)
        if rules.axes(axis) and not part
    ]
    return f"replicated ({', '.join(reasons)})" if reasons else ""


def readable_bytes(nbytes: int) -> str:
    """Returns a number of bytes with the largest unit of which there is at least one, such as "416.10 MB"."""
    power = min(max(len(str(nbytes)) - 1, 0) // 3, 4)
    return f"{nbytes / 1000**power:.2f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}" if power else f"{nbytes} bytes"
