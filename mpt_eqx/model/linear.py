"""Linear map and embedding, with the weights as checkpoints store them or quantised."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from mpt_eqx import kernel
from mpt_eqx.model.precision import wide
from mpt_eqx.model.quantized import QuantizedWeight, dequantized

FEW = 8
"""Positions of one input up to which a product goes through the CPU kernel."""

Weight = Float[Array, "out in"] | QuantizedWeight


class Linear(eqx.Module):
    """y = W x + b for each of T positions; W is stored [out, in], and b may be absent."""

    weight: Float[Array, "out in"] | QuantizedWeight
    bias: Float[Array, " out"] | None = None

    def __call__(self, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
        """Returns W x + b, summed in float32 and rounded once to the type of x."""
        y = product(self.weight, x)
        if self.bias is not None:
            y = y + self.bias.astype(y.dtype)
        return y.astype(x.dtype)


class Embedding(eqx.Module):
    """One row of the weight for each token."""

    weight: Float[Array, "V D"] | QuantizedWeight

    def __call__(self, tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Returns the rows of `tokens`."""
        return self.weight.rows(tokens) if isinstance(self.weight, QuantizedWeight) else self.weight[tokens]


def product(weight: Weight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    """Returns W x for each of T positions, in float32 (float64 for float64).

    Few positions go through the CPU kernel where there is one, all others through XLA.
    """
    if x.shape[0] <= FEW and kernel.available() and _suits_kernel(weight, x):
        return _by_kernel(weight, x)
    return _by_xla(weight, x)


def _by_xla(weight: Weight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    if isinstance(weight, QuantizedWeight):
        weight = dequantized(weight.values, weight.scale).astype(x.dtype)
    # The weight is the left operand because XLA's CPU product is several times faster that way for few rows.
    return jnp.einsum("oi,Ti->To", weight, x, preferred_element_type=wide(x.dtype))


def _suits_kernel(weight: Weight, x: Float[Array, "T in"]) -> bool:
    """Tells whether the kernel has this product: on one device, of a type that it knows."""
    arrays = (*jax.tree.leaves(weight), x)
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)]
    return all(mesh.empty for mesh in meshes) and all(array.dtype != jnp.float64 for array in arrays)


@jax.custom_jvp
def _by_kernel(weight: Weight, x: Float[Array, "T in"]) -> Float32[Array, "T out"]:
    """Returns what `_by_xla` does; by the kernel where it runs on a CPU and is not differentiated."""
    return _batched(weight, x)


@_by_kernel.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Float[Array, "T out"], Float[Array, "T out"]]:
    return jax.jvp(_by_xla, primals, tangents)


@jax.custom_batching.custom_vmap
def _batched(weight: Weight, x: Float[Array, "T in"]) -> Float32[Array, "T out"]:
    def by_kernel(weight: Weight, x: Float[Array, "T in"]) -> Float32[Array, "T out"]:
        values, scale = (weight.values, weight.scale) if isinstance(weight, QuantizedWeight) else (weight, None)
        return kernel.matvec(values, scale, x.astype(jnp.float32))

    return jax.lax.platform_dependent(weight, x, cpu=by_kernel, default=_by_xla)


@_batched.def_vmap
def _(size: int, batched: list, weight: Weight, x: Array) -> tuple[Float32[Array, "B T out"], bool]:
    """The rows of a batch become more positions; with a weight for each row, XLA has the product."""
    weights_batched, x_batched = batched
    if any(jax.tree.leaves(weights_batched)):
        axes = (jax.tree.map(lambda there: 0 if there else None, weights_batched), 0 if x_batched else None)
        return jax.vmap(_by_xla, in_axes=axes)(weight, x), True
    return _batched(weight, x.reshape(-1, x.shape[-1])).reshape(size, x.shape[1], -1), True
