"""How arrays lie on a mesh of devices: rules from what an axis means to the axes of the mesh that share it."""

import dataclasses
import math
from collections.abc import Mapping

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree, Shaped

from mpt_eqx.config.sharding_rules import ShardingRules
from mpt_eqx.errors import ShardingError


class Layout(eqx.Module):
    """A mesh and the rules by which arrays lie on it. It has no arrays."""

    mesh: Mesh | AbstractMesh = eqx.field(static=True)
    rules: ShardingRules = eqx.field(static=True)

    def constrain(self, x: Shaped[jax.Array, "..."], *names: str | None) -> Shaped[jax.Array, "..."]:
        """Returns an array of which each axis is shared as the rules have it for its logical name; under vmap, too.

        An axis that the mesh does not divide stays whole.
        """
        return jax.lax.with_sharding_constraint(x, self.sharding(x.shape, *names))

    def constrain_batched(self, x: Shaped[jax.Array, "..."], *names: str | None) -> Shaped[jax.Array, "..."]:
        """Returns what `constrain` does for the array of one row of a batch: vmap's axis is that of the batch.

        Otherwise XLA would be free to share the width of activations instead, as the weights of FSDP are, and to add up
        parts of every product where it should gather weights.
        """

        @jax.custom_batching.custom_vmap
        def shared(x: jax.Array) -> jax.Array:
            return self.constrain(x, *names)

        @shared.def_vmap
        def _(size: int, batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
            return self.constrain(x, "batch", *names), True

        @jax.custom_jvp  # because the above cannot be transposed
        def differentiable(x: jax.Array) -> jax.Array:
            return shared(x)

        @differentiable.defjvp
        def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
            return shared(*primals), self.constrain(*tangents, *names)

        return differentiable(x)

    def replicate(self, tree: PyTree[Shaped[jax.Array | np.ndarray, "..."]]) -> PyTree[Shaped[jax.Array, "..."]]:
        """Returns arrays of the host that all devices have; in several processes, each hands over the same."""
        sharding = NamedSharding(self.mesh, PartitionSpec())
        if not self.several_processes:
            return jax.device_put(tree, sharding)

        def one(x: jax.Array | np.ndarray) -> jax.Array:
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(one(jax.random.key_data(x)), impl=jax.random.key_impl(x))
            there = np.asarray(x)
            return jax.make_array_from_callback(there.shape, sharding, lambda part: there[part])

        return jax.tree.map(one, tree)

    def constrain_replicated(self, tree: PyTree[Shaped[jax.Array, "..."]]) -> PyTree[Shaped[jax.Array, "..."]]:
        """Returns computed arrays that all devices have, so that every process can read them; under jit."""
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))

    @property
    def several_processes(self) -> bool:
        """Whether the devices of the mesh belong to several processes."""
        return isinstance(self.mesh, Mesh) and self.mesh.is_multi_process

    def sharding(self, shape: tuple[int, ...], *names: str | None) -> NamedSharding:
        """Returns how an array of activations lies, as `constrain` has it."""
        shared = []
        for size, name in zip(shape, names, strict=True):
            axes = self.rules.axes(name)
            shared.append(axes if axes and size % _size(self.mesh, axes) == 0 else None)
        return NamedSharding(self.mesh, make_spec(shared))


def make_spec(shared: list[tuple[str, ...] | None]) -> PartitionSpec:
    """Returns a PartitionSpec, in which a single axis stands alone."""
    return PartitionSpec(*(axes[0] if axes and len(axes) == 1 else axes or None for axes in shared))


def with_auto_axes(mesh: Mesh) -> Mesh:
    """Returns the mesh with axes over which XLA decides what is not said, which is how the model is written."""
    return Mesh(mesh.devices, mesh.axis_names)


def check_axes(rules: ShardingRules, mesh: Mesh | AbstractMesh) -> None:
    """Refuses rules with an axis that the mesh has not."""
    for field in dataclasses.fields(rules):
        for axis in () if field.name == "allow_replicated" else rules.axes(field.name):
            if axis not in mesh.shape:
                raise ShardingError(
                    f"rules.{field.name}: expected an axis of the mesh, {' or '.join(mesh.shape)}, found {axis!r}; "
                    f"name the mesh's axes so, or change the rule with dataclasses.replace(rules, {field.name}=…)"
                )


def resolve_spec(
    name: str, sizes: tuple[int, ...], names: tuple[str | None, ...], rules: ShardingRules, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Returns how a weight lies on a mesh.

    Args:
        name: what it is called in an error.
        sizes: how many of what cannot be divided stand along each axis: numbers, or heads of them.
        names: the logical name of each axis.
        rules: which axes of the mesh share which of these.
        mesh: its axes are those of the rules.

    Raises:
        ShardingError: the mesh does not divide an axis.
    """
    shared: list[tuple[str, ...] | None] = []
    for dimension, (size, axis) in enumerate(zip(sizes, names, strict=True)):
        axes = rules.axes(axis)
        parts = _size(mesh, axes)
        if size % parts == 0:
            shared.append(axes)
        elif axis in rules.allow_replicated:
            shared.append(None)
        else:
            raise ShardingError(
                f"{name}: dimension {dimension} ({axis}) has size {size}, which the {parts} devices of mesh axis "
                f"{'×'.join(axes)} do not divide; choose another mesh, or leave it whole with dataclasses.replace("
                f"rules, allow_replicated=(*rules.allow_replicated, {axis!r}))"
            )
    return make_spec(shared)


def _size(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> int:
    sizes: Mapping[str, int] = mesh.shape
    return math.prod(sizes[axis] for axis in axes)
