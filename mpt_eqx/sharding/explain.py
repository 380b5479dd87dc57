"""explain: a table of how the weights of a model lie on a mesh."""

import collections
import math
import re

import jax
from jax.sharding import AbstractMesh, Mesh

from mpt_eqx.config import MPTConfig, ShardingRules
from mpt_eqx.config.sharding_rules import mesh_axes
from mpt_eqx.model import MPT
from mpt_eqx.sharding.shard import _arrays, _is_spec, _name, _resolved_specs, abstract_model, weight_axes, with_layout


def explain(model: MPT | MPTConfig, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> str:
    """Returns a table of how weights lie on a mesh: leaf, shape, spec and bytes per device, with the totals.

    Blocks that are alike share their lines. Nothing is allocated, and `jax.sharding.AbstractMesh` needs no devices.

    Args:
        model: a model, or a configuration, whose weights then count as bfloat16.
        mesh: the mesh.
        rules: which of its axes share what.

    Raises:
        ShardingError: as `shard`.
    """
    tree = with_layout(abstract_model(model, jax.numpy.bfloat16), mesh, rules)
    specs = jax.tree.leaves(_resolved_specs(tree), is_leaf=_is_spec)
    rows: collections.Counter[tuple[str, ...]] = collections.Counter()
    total = share = 0
    for (path, leaf), found in zip(_arrays(tree), specs, strict=True):
        name, nbytes = _name(path), leaf.size * leaf.dtype.itemsize
        part = nbytes // math.prod(mesh.shape[axis] for axes in found for axis in mesh_axes(axes))
        whole = [
            axis
            for axis, axes in zip(weight_axes(name, leaf, tree.config), found, strict=True)
            if rules.axes(axis) and not axes
        ]
        rows[
            re.sub(r"blocks\.\d+\.", "blocks.*.", name),
            " × ".join(map(str, leaf.shape)),
            " ".join("+".join(mesh_axes(axes)) or "·" for axes in found),
            f"{part:,}",
            f"{', '.join(map(str, whole))} whole: not divided" if whole else "",
        ] += 1
        total, share = total + nbytes, share + part
    table = [
        ("leaf", "shape", "spec", "bytes per device", "", ""),
        *((*row[:4], f"{n} times", row[4]) for row, n in rows.items()),
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    devices = math.prod(mesh.shape.values())
    return "\n".join(
        [
            f"mesh: {', '.join(f'{name}={size}' for name, size in mesh.shape.items())}",
            *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table),
            f"total: {total:,} bytes; on each of {devices} devices {share:,} "
            f"({share / 1e9:.2f} GB, {share / total:.1%})",
        ]
    )
