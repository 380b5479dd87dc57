"""How arrays lie on a mesh of devices: rules from what an axis means to the axes of the mesh that share it."""

import dataclasses
import math
from collections.abc import Mapping

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree, Shaped

from mpt_eqx.errors import ShardingError

Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Which axes of a mesh share which axes of the arrays; None leaves them whole on every device.

    Attributes:
        vocab: rows of the embedding and of the head, and logits.
        embed: the width of the residual stream, in weights; that of activations stays whole.
        heads: heads of queries, in Wqkv, out_proj and activations.
        kv_heads: heads of keys and values, in Wqkv and the cache.
        head_dim: the size of a head, in the cache and in norms of single heads.
        mlp: the hidden size of the feed-forward network.
        layers: must be None: the blocks of a model are arrays of their own.
        batch: rows of a batch.
        seq: positions of a sequence, in activations.
        experts: the experts of a mixture.
        uneven: along which of these weights stay whole, instead of being an error, where the mesh does not divide
            them. Activations and the cache always do.
    """

    vocab: Axes = None
    embed: Axes = None
    heads: Axes = None
    kv_heads: Axes = None
    head_dim: Axes = None
    mlp: Axes = None
    layers: Axes = None
    batch: Axes = None
    seq: Axes = None
    experts: Axes = None
    uneven: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self) if field.name != "uneven"]
        for name in names:
            axes = getattr(self, name)
            known = axes is None or isinstance(axes, str | tuple)
            if not known or not all(isinstance(axis, str) and axis for axis in mesh_axes(axes)):
                raise ShardingError(f"rules.{name}: expected a mesh axis, a tuple of some, or None, found {axes!r}")
        if self.layers is not None:
            raise ShardingError(
                f"rules.layers: expected None, found {self.layers!r}: it would match nothing, since every block has "
                f"arrays of its own; to share the layers' weights use embed"
            )
        if not isinstance(self.uneven, tuple):
            raise ShardingError(f"rules.uneven: expected a tuple of names, found {self.uneven!r}")
        for together in (("batch", "seq"), ("batch", "kv_heads", "head_dim")):
            used = [axis for name in together for axis in self.axes(name)]
            if twice := [axis for axis in used if used.count(axis) > 1]:
                raise ShardingError(
                    f"rules: expected different mesh axes for {', '.join(together)}, which stand together in "
                    f"activations or in the cache, found {twice[0]!r} twice; change one of them"
                )
        if unknown := [name for name in self.uneven if name not in names]:
            raise ShardingError(f"rules.uneven: expected some of {', '.join(names)}, found {unknown[0]!r}")

    def axes(self, name: str | None) -> tuple[str, ...]:
        """Returns the axes of the mesh that share the logical axis `name`; none for None."""
        return () if name is None else mesh_axes(getattr(self, name))


class Layout(eqx.Module):
    """A mesh and the rules by which arrays lie on it. It has no arrays."""

    mesh: Mesh | AbstractMesh = eqx.field(static=True)
    rules: ShardingRules = eqx.field(static=True)

    def constrained(self, x: Shaped[jax.Array, "..."], *names: str | None) -> Shaped[jax.Array, "..."]:
        """Returns an array of which each axis is shared as the rules have it for its logical name; under vmap, too.

        An axis that the mesh does not divide stays whole.
        """
        return jax.lax.with_sharding_constraint(x, self.sharding(x.shape, *names))

    def constrained_row(self, x: Shaped[jax.Array, "..."], *names: str | None) -> Shaped[jax.Array, "..."]:
        """Returns what `constrained` does for the array of one row of a batch: vmap's axis is that of the batch.

        Otherwise XLA would be free to share the width of activations instead, as the weights of FSDP are, and to add up
        parts of every product where it should gather weights.
        """

        @jax.custom_batching.custom_vmap
        def shared(x: jax.Array) -> jax.Array:
            return self.constrained(x, *names)

        @shared.def_vmap
        def _(size: int, batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
            return self.constrained(x, "batch", *names), True

        @jax.custom_jvp  # because the above cannot be transposed
        def differentiable(x: jax.Array) -> jax.Array:
            return shared(x)

        @differentiable.defjvp
        def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
            return shared(*primals), self.constrained(*tangents, *names)

        return differentiable(x)

    def everywhere(self, tree: PyTree[Shaped[jax.Array | np.ndarray, "..."]]) -> PyTree[Shaped[jax.Array, "..."]]:
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

    def replicated(self, tree: PyTree[Shaped[jax.Array, "..."]]) -> PyTree[Shaped[jax.Array, "..."]]:
        """Returns computed arrays that all devices have, so that every process can read them; under jit."""
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))

    @property
    def several_processes(self) -> bool:
        """Whether the devices of the mesh belong to several processes."""
        return isinstance(self.mesh, Mesh) and self.mesh.is_multi_process

    def sharding(self, shape: tuple[int, ...], *names: str | None) -> NamedSharding:
        """Returns how an array of activations lies, as `constrained` has it."""
        shared = []
        for size, name in zip(shape, names, strict=True):
            axes = self.rules.axes(name)
            shared.append(axes if axes and size % _size(self.mesh, axes) == 0 else None)
        return NamedSharding(self.mesh, spec(shared))


def spec(shared: list[tuple[str, ...] | None]) -> PartitionSpec:
    """Returns a PartitionSpec, in which a single axis stands alone."""
    return PartitionSpec(*(axes[0] if axes and len(axes) == 1 else axes or None for axes in shared))


def automatic(mesh: Mesh) -> Mesh:
    """Returns the mesh with axes over which XLA decides what is not said, which is how the model is written."""
    return Mesh(mesh.devices, mesh.axis_names)


def check_axes(rules: ShardingRules, mesh: Mesh | AbstractMesh) -> None:
    """Refuses rules with an axis that the mesh has not."""
    for field in dataclasses.fields(rules):
        for axis in () if field.name == "uneven" else rules.axes(field.name):
            if axis not in mesh.shape:
                raise ShardingError(
                    f"rules.{field.name}: expected an axis of the mesh, {' or '.join(mesh.shape)}, found {axis!r}; "
                    f"name the mesh's axes so, or change the rule with dataclasses.replace(rules, {field.name}=…)"
                )


def resolved(
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
        elif axis in rules.uneven:
            shared.append(None)
        else:
            raise ShardingError(
                f"{name}: dimension {dimension} ({axis}) has size {size}, which the {parts} devices of mesh axis "
                f"{'×'.join(axes)} do not divide; choose another mesh, or leave it whole with dataclasses.replace("
                f"rules, uneven=(*rules.uneven, {axis!r}))"
            )
    return spec(shared)


def mesh_axes(axes: Axes) -> tuple[str, ...]:
    """Returns the axes of a mesh that a rule or a part of a PartitionSpec names."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _size(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> int:
    sizes: Mapping[str, int] = mesh.shape
    return math.prod(sizes[axis] for axis in axes)
