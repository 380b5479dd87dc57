"""Layout: a mesh of devices and the rules by which activations and the cache are sharded over it."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree, Shaped

from mpt_eqx.config.sharding_rules import ShardingRules
from mpt_eqx.ops.switches import with_auto_axes


class Layout(eqx.Module):
    """A mesh and the rules by which arrays are sharded over it. It has no arrays of its own.

    The mesh has the axis types that the weights have. What a function of the library makes on it has Auto axes.
    """

    mesh: Mesh | AbstractMesh = eqx.field(static=True)
    rules: ShardingRules = eqx.field(static=True)

    def constrain(self, x: Shaped[jax.Array, "..."], *names: str | None) -> Shaped[jax.Array, "..."]:
        """Returns the array with each axis sharded as the rules say for its logical name; None replicates it.

        An axis that the mesh does not divide is replicated. Under `jax.vmap` the new axis is left to XLA.
        """
        return jax.lax.with_sharding_constraint(x, self.sharding(x.shape, *names))

    def constrain_batched(self, x: Shaped[jax.Array, "..."], *names: str | None) -> Shaped[jax.Array, "..."]:
        """Returns what `constrain` does for one row of a batch, where the axis that `jax.vmap` adds is "batch".

        Left to itself, XLA would shard activations as FSDP shards weights, and add up parts of every product instead
        of gathering weights. `jax.vmap` has `spmd_axis_name` for this, but that call is the user's.
        """
        constrain = jax.custom_batching.custom_vmap(lambda x: self.constrain(x, *names))
        constrain.def_vmap(lambda size, batched, x: (self.constrain(x, "batch", *names), True))
        # custom_vmap cannot be transposed, so tangents take the constraint of a row.
        differentiable = jax.custom_jvp(constrain)
        differentiable.defjvp(lambda primals, tangents: (constrain(*primals), self.constrain(*tangents, *names)))
        return differentiable(x)

    def replicate(self, tree: PyTree[Shaped[jax.Array | np.ndarray, "..."]]) -> PyTree[Shaped[jax.Array, "..."]]:
        """Returns arrays of the host on all devices of the mesh. Several processes must all pass the same."""
        sharding = self._named(PartitionSpec())
        if not self.several_processes:
            return jax.device_put(tree, sharding)

        def one(x: jax.Array | np.ndarray) -> jax.Array:
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(one(jax.random.key_data(x)), impl=jax.random.key_impl(x))
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(one, tree)

    def spread(self, tree: PyTree[Shaped[jax.Array, "B T"]]) -> PyTree[Shaped[jax.Array, "B T"]]:
        """Returns batches of the host with their rows over the devices; what is on several, or traced, stays.

        Several processes must all pass the same.
        """

        def one(x: jax.Array) -> jax.Array:
            if isinstance(x, jax.core.Tracer) or len(x.sharding.device_set) > 1:
                return x
            sharding = self.sharding(x.shape, "batch", None)
            if not self.several_processes:
                return jax.device_put(x, sharding)
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(one, tree)

    def constrain_replicated(self, tree: PyTree[Shaped[jax.Array, "..."]]) -> PyTree[Shaped[jax.Array, "..."]]:
        """Returns computed arrays replicated, so that every process can read them; inside jit."""
        return jax.lax.with_sharding_constraint(tree, self._named(PartitionSpec()))

    @property
    def several_processes(self) -> bool:
        """Whether the devices of the mesh belong to several processes."""
        return isinstance(self.mesh, Mesh) and self.mesh.is_multi_process

    def sharding(self, shape: tuple[int, ...], *names: str | None) -> NamedSharding:
        """Returns the sharding that `constrain` gives an array of this shape."""
        parts = [self.rules.axes(name) for name in names]
        divided = [
            axes if size % axes_size(self.mesh, axes) == 0 else () for size, axes in zip(shape, parts, strict=True)
        ]
        return self._named(make_spec(divided))

    def _named(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(with_auto_axes(self.mesh), spec)


def make_spec(parts: Sequence[tuple[str, ...]]) -> PartitionSpec:
    """Returns the PartitionSpec with these mesh axes for each axis of an array; () is None, a single one is a name."""
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in parts))


def axes_size(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> int:
    """Returns the number of devices along these axes of a mesh."""
    return math.prod(mesh.shape[axis] for axis in axes)
