"""The product of a weight with positions where derivatives are taken: both of the backward pass are plain products.

Left to JAX, the gradient of a weight shared by the rows of a batch is a product over two axes, for which XLA's CPU
backend copies each operand transposed; and in 16 bits products of the backward pass would be mixed, of float32 with
16 bits, which no hardware has.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from mpt_eqx.ops import cpu
from mpt_eqx.ops.numerics import accum_dtype
from mpt_eqx.ops.platform import by_platform


def product(weight: Float[Array, "out in"], x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    """Returns W x for each of T positions, summed in float32 (float64 for float64) and not rounded.

    Its cotangent is rounded to the wider type of the operands, as that of a rounded result is. Under `jax.vmap` the
    rows of a batch are more positions. Not for arrays on a mesh, where a batch and its positions may be sharded apart.
    """
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return _product.bind(x, weight, precision=precision)


def _wider(a: np.dtype, b: np.dtype) -> np.dtype:
    return a if a.itemsize >= b.itemsize else b


def _einsum(formula: str, a: Array, b: Array, precision: Any) -> Array:
    wider = _wider(a.dtype, b.dtype)
    a, b = a.astype(wider), b.astype(wider)
    return jnp.einsum(formula, a, b, precision=precision, preferred_element_type=accum_dtype(wider))


def _forward(x: Array, weight: Array, *, precision: Any) -> Array:
    return _einsum("Ti,oi->To", x, weight, precision)


def _of_x(slope: Array, x: Any, weight: Array, *, precision: Any) -> Array:
    rounded = slope.astype(_wider(x.aval.dtype, weight.dtype))
    return _einsum("To,oi->Ti", rounded, weight, precision).astype(x.aval.dtype)


def _of_weight(slope: Array, x: Array, weight: Any, *, precision: Any) -> Array:
    rounded = slope.astype(_wider(x.dtype, weight.aval.dtype))
    if rounded.dtype == x.dtype == jnp.bfloat16 and cpu.has_bfloat16_dot():
        # Where both operands are summed over their first axis, XLA widens them, which takes three times as long.
        return _einsum("oT,Ti->oi", _by_rows(rounded.T), x, precision).astype(weight.aval.dtype)
    return _einsum("To,Ti->oi", rounded, x, precision).astype(weight.aval.dtype)


@jax.custom_jvp
def _by_rows(x: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Returns x itself, which on a CPU then lies in memory row by row; an exported program cannot ask for that."""

    def same(x: Array) -> Array:
        return x

    def stored(x: Array) -> Array:
        return with_layout_constraint(x, Layout(major_to_minor=(0, 1)))

    return by_platform(jax.ShapeDtypeStruct(x.shape, x.dtype), x, default=same, cpu=same, kernel=stored)


_by_rows.defjvp(lambda primals, tangents: (_by_rows(*primals), *tangents))


def _batch(operands: tuple[Array, Array], axes: tuple[Any, Any], *, precision: Any) -> tuple[Array, int]:
    (x, weight), (x_axis, weight_axis) = operands, axes
    if weight_axis is not None:  # with a weight for each row, rows are no positions of one product
        return jax.vmap(functools.partial(_forward, precision=precision), in_axes=axes)(x, weight), 0
    rows = jnp.moveaxis(x, x_axis, 0)
    found = _product.bind(rows.reshape(-1, rows.shape[-1]), weight, precision=precision)
    return found.reshape(*rows.shape[:2], -1), 0


_product = Primitive("product")
_product.def_impl(lambda x, weight, **how: jax.jit(_forward, static_argnames="precision")(x, weight, **how))
_product.def_abstract_eval(
    lambda x, weight, **_: jax.core.ShapedArray((x.shape[0], weight.shape[0]), accum_dtype(x.dtype))
)
ad.defbilinear(_product, _of_x, _of_weight)
batching.primitive_batchers[_product] = _batch
mlir.register_lowering(_product, mlir.lower_fun(_forward, multiple_results=False))
