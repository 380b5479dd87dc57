"""Linear map and embedding, with the weights as checkpoints store them or quantised."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from mpt_eqx.ops import cpu
from mpt_eqx.ops.numerics import wide
from mpt_eqx.ops.quantized import QuantizedWeight, dequantized

FEW = 8
"""Positions of one input up to which a product is one of few rows; steps of decoding have one, prompts more."""

PART = 2**18
"""Numbers of a weight that are widened at a time, where XLA's CPU backend has no product in its type."""

Weight = Float[Array, "out in"] | QuantizedWeight  # what a product is made with


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
        # XLA's CPU backend would keep a copy of a 16-bit table in float32 beside a loop. A barrier that the tokens pass
        # as well stays in the loop.
        weight, tokens = jax.lax.optimization_barrier((self.weight, tokens))
        return weight.rows(tokens) if isinstance(weight, QuantizedWeight) else weight[tokens]


def product(weight: Weight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    """Returns W x for each of T positions, in float32 (float64 for float64).

    On one CPU few positions are multiplied by the kernel, where there is one. A position's result is then the same to
    the last bit for any number of positions and of rows under vmap.
    """
    arrays = (*jax.tree.leaves(weight), x)
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)]
    if x.shape[0] <= FEW and all(mesh.empty for mesh in meshes):
        return _few(weight, x)
    return _many(weight, x)


def product_by_xla(weight: Weight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    """Returns what `product` does, never by the kernel, which would have a part of a larger array copied first."""
    # A single row would be summed in another order than several.
    rows = x if x.shape[0] > 1 else jnp.concatenate([x, x])
    return _many(weight, rows)[: x.shape[0]]


def _many(weight: Weight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    """Returns the product by XLA."""
    scale = None
    if isinstance(weight, QuantizedWeight):
        # Numbers of 8 bits are exact in every type of x, those of 4 bits have been scaled before and are rounded to it.
        whole = weight.values.dtype == jnp.int8
        scale = weight.scale.astype(wide(x.dtype)) if whole else None
        weight = (weight.values if whole else dequantized(weight.values, weight.scale)).astype(x.dtype)
    y = jnp.einsum("oi,Ti->oT", weight, x, preferred_element_type=wide(x.dtype))
    if jax.default_backend() == "cpu":
        # With the weight as the left operand XLA's CPU product is several times faster. Without the barrier XLA would
        # exchange them to spare the transposition of y, and copy the weight for that.
        y = jax.lax.optimization_barrier(y)
    return (y if scale is None else y * scale).T


@jax.custom_jvp
def _few(weight: Weight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    """Returns what `_many` does; in another way, where it runs on a CPU and is not differentiated."""
    return _few_rows(weight, x)


@_few.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Float[Array, "T out"], Float[Array, "T out"]]:
    return jax.jvp(_many, primals, tangents)


@jax.custom_batching.custom_vmap
def _few_rows(weight: Weight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    on_cpu = _by_kernel if cpu.available() and x.dtype != jnp.float64 else _by_xla_on_cpu
    return jax.lax.platform_dependent(weight, x, cpu=on_cpu, default=_many)


@_few_rows.def_vmap
def _(size: int, batched: list, weight: Any, x: Array) -> tuple[Float[Array, "B T out"], bool]:
    """The rows of a batch become more positions; with a weight for each row, XLA has the product."""
    weight_batched, x_batched = batched
    if any(jax.tree.leaves(weight_batched)):
        axes = (jax.tree.map(lambda there: 0 if there else None, weight_batched), 0 if x_batched else None)
        return jax.vmap(_many, in_axes=axes)(weight, x), True
    return _few_rows(weight, x.reshape(-1, x.shape[-1])).reshape(size, x.shape[1], -1), True


def _by_kernel(weight: Weight, x: Float[Array, "T in"]) -> Float32[Array, "T out"]:
    values, scale = (weight.values, weight.scale) if isinstance(weight, QuantizedWeight) else (weight, None)
    return cpu.matvec(values, scale, x.astype(jnp.float32))


def _by_xla_on_cpu(weight: Weight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    if not isinstance(weight, QuantizedWeight) and weight.dtype != jnp.float16:
        return product_by_xla(weight, x)
    rows = x if x.shape[0] > 1 else jnp.concatenate([x, x])  # as there
    return _in_parts(weight, rows)[: x.shape[0]]


def _in_parts(weight: Weight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    """Returns the product with a part of the rows of W after the other, widened to float32.

    XLA would widen all of W, and keep all weights of a model widened over the steps of a loop.
    """
    rows = (weight.values if isinstance(weight, QuantizedWeight) else weight).shape[0]
    count = min(max(PART // x.shape[1], 1), rows)
    x = x.astype(wide(x.dtype))

    def part(number: Int[Array, ""], y: Float[Array, "out T"]) -> Float[Array, "out T"]:
        first = jnp.minimum(number * count, rows - count)
        here, first = jax.lax.optimization_barrier((weight, first))  # as in Embedding
        taken = jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, first, count), here)
        widened = dequantized(taken.values, taken.scale) if isinstance(taken, QuantizedWeight) else taken
        # Behind a barrier, because a product that is fused with what makes its operand is summed in another order.
        widened = jax.lax.optimization_barrier(widened.astype(x.dtype))
        return jax.lax.dynamic_update_slice_in_dim(y, jnp.einsum("oi,Ti->oT", widened, x), first, 0)

    return jax.lax.fori_loop(0, -(-rows // count), part, jnp.zeros((rows, x.shape[0]), x.dtype)).T
