"""Products of a weight, floating or quantised, with the positions of a sequence: y = W x."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Float32, Int

from mpt_eqx.errors import MPTError
from mpt_eqx.ops import cpu
from mpt_eqx.ops.numerics import accum_dtype
from mpt_eqx.ops.platform import MAX_DECODE_ROWS, by_platform, nvidia_capability, on_mesh
from mpt_eqx.ops.product import product
from mpt_eqx.ops.quantized import GROUP, QuantizedWeight, dequantize
from mpt_eqx.ops.sizes import at_most
from mpt_eqx.ops.switches import library_switches

MAX_PREFILL_ROWS = 128
"""Positions of one sequence up to which XLA's CPU product is faster with the weight as its left operand."""

MAX_KERNEL_ROWS = 2**24
"""Positions of one sequence up to which the kernel is called; a symbolic number of them it is not called for."""

MAX_UNPACKED_ROWS = 64
"""Positions up to which 4 bits are unpacked within the products on a GPU."""

TILE = 32
"""What rows and columns of a weight are a multiple of that the kernel multiplies by tiles, as in kernel.h."""

PART_SIZE = 2**18
"""Numbers of a weight that are widened at a time, where XLA's CPU backend has no product in its type."""

Weight = Float[Array, "out in"] | QuantizedWeight


class LayerWeight(eqx.Module):
    """One layer's weight among those of all layers, which stay arrays of their own: a loop over layers copies none.

    Attributes:
        layers: the weights, of one shape and type.
        number: of the layer that is meant, from 0.
    """

    layers: tuple[Weight, ...]
    number: Int[Array, ""]

    def check(self) -> None:
        """Raises MPTError unless there are layers, all of one shape and type."""
        found = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), layer) for layer in self.layers]
        other = next((number for number, layer in enumerate(found) if layer != found[0]), None)
        if other is not None or not found:
            described = "no layer" if other is None else f"{found[other]} in layer {other} and {found[0]} in layer 0"
            raise MPTError(
                f"weight: expected layers of one shape and type, found {described}; loop over blocks that are alike"
            )
        for layer in self.layers:
            if isinstance(layer, QuantizedWeight):
                layer.check()


def matmul(weight: Weight | LayerWeight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    """Returns W x for each of T positions, summed in float32 (float64 for float64) and not rounded.

    On one CPU the kernel computes it, if there is one. A position's result is then the same to the bit for any number
    of positions up to MAX_DECODE_ROWS, for any larger number, and for any number of rows under vmap. Many positions in
    bfloat16 it multiplies by the processor's tiles (AMX), with weights of 4 bits rounded as by the formula. A processor
    without them may multiply bfloat16, too: there XLA has a bfloat16 weight. Derivatives always go through XLA.
    """
    if isinstance(weight, QuantizedWeight | LayerWeight):
        weight.check()
    rows = x.shape[0]
    if on_mesh(*jax.tree.leaves(weight), x):
        return _matmul(weight, x)
    if at_most(rows, MAX_DECODE_ROWS):
        return _decode_matmul(weight, x)
    if at_most(rows, MAX_KERNEL_ROWS) and _suits_kernel(weight, x.dtype) and not _suits_xla(weight, x):
        return _kernel_matmul(weight, x)
    return _prefill_matmul(weight, x) if at_most(rows, MAX_PREFILL_ROWS) else _long_matmul(weight, x)


def picks_layers(weight: Any, dtype: DTypeLike) -> bool:
    """Whether the kernel computes products of such a weight with an x of that type, also among those of layers."""
    known = isinstance(weight, QuantizedWeight | jax.Array)
    return known and cpu.available() and _suits_kernel(weight, np.dtype(dtype))


def expert_matmul(x: Float[Array, "T in"], w: Float[Array, "in out"]) -> Float[Array, "T out"]:
    """Returns x w for the weight of one expert, summed in float32 (float64) and rounded to the type of x.

    It never goes through the kernel, for which an expert's part of the weights would be copied.
    """
    return jnp.einsum("Ti,io->To", x, w, preferred_element_type=accum_dtype(x.dtype)).astype(x.dtype)


def take_rows(weight: Weight, tokens: Int[Array, " T"]) -> Float[Array, "T in"]:
    """Returns the rows of `tokens` of a weight."""
    if isinstance(weight, QuantizedWeight):
        weight.check()
    if not at_most(tokens.shape[0], MAX_DECODE_ROWS) or on_mesh(*jax.tree.leaves(weight), tokens):
        return _take_rows(weight, tokens)
    return _decode_take_rows(weight, tokens)


def _plain(weight: Float[Array, "out in"], x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    return jnp.einsum("Ti,oi->To", x, weight, preferred_element_type=accum_dtype(x.dtype))


def _matmul(
    weight: Weight | LayerWeight, x: Float[Array, "T in"], multiply: Callable[..., Array] = _plain
) -> Float[Array, "T out"]:
    """Returns W x: the formula."""
    if isinstance(weight, LayerWeight):
        return _of_layer(functools.partial(_matmul, multiply=multiply), weight, x)
    if not isinstance(weight, QuantizedWeight):
        return multiply(weight, x)
    # Numbers of 8 bits are exact in every type of x; those of 4 bits are scaled before, and rounded to it.
    if weight.values.dtype != jnp.int8:
        return multiply(dequantize(weight.values, weight.scale).astype(x.dtype), x)
    y = multiply(weight.values.astype(x.dtype), x)
    return y * weight.scale.astype(y.dtype).T


def _of_layer(multiply: Callable[..., Array], weight: LayerWeight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    """Returns W x by XLA's own choice among layers."""
    branches = [functools.partial(multiply, layer) for layer in weight.layers]
    return jax.lax.switch(weight.number, branches, x)


def _take_rows(weight: Weight, tokens: Int[Array, " T"]) -> Float[Array, "T in"]:
    return weight.rows(tokens) if isinstance(weight, QuantizedWeight) else weight[tokens]


# From here on: what GPUs and CPUs need. Each function computes a formula of those above, and is differentiated as it.


def _on_gpu(weight: Weight | LayerWeight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    """Returns W x with the weight read once, as it is stored, where XLA would be bound by reading it or a wide copy.

    For one position that is a sum of products in float32, with 4 bits not rounded to the type of x. For more, 4 bits
    are unpacked within the products of the lower and the upper halves of the bytes.
    """
    if isinstance(weight, LayerWeight) or x.dtype == jnp.float64:
        return _matmul(weight, x)
    if isinstance(weight, QuantizedWeight) and weight.values.dtype == jnp.uint8:
        return _by_halves(weight, x) if at_most(x.shape[0], MAX_UNPACKED_ROWS) else _matmul(weight, x)
    if not at_most(x.shape[0], 1):  # a symbol, too
        return _matmul(weight, x)
    values = weight.values if isinstance(weight, QuantizedWeight) else weight
    y = jnp.sum(values.astype(jnp.float32) * x.astype(jnp.float32), axis=1)[None]
    return y * weight.scale.astype(jnp.float32).T if isinstance(weight, QuantizedWeight) else y


def _gpu_kernel(weight: Weight | LayerWeight, x: Float[Array, "T in"]) -> Callable[..., Array] | None:
    """Returns the kernel for this product on the NVIDIA GPU of this machine, from Ampere on; None if there is none."""
    if not isinstance(weight, QuantizedWeight) or nvidia_capability() < (8, 0):
        return None
    # Here, because Pallas takes long to import, and only such GPUs need it.
    from mpt_eqx.ops.int4_gpu import int4_matmul, supports_int4_kernel

    return int4_matmul if supports_int4_kernel(weight, x) else None


def _by_halves(weight: QuantizedWeight, x: Float[Array, "T in"]) -> Float32[Array, "T out"]:
    values, scale = weight.values.reshape(*weight.scale.shape, GROUP // 2), weight.scale.astype(jnp.float32)[..., None]
    halves = [half.astype(jnp.float32) - 8 for half in (values & 15, values >> 4)]
    lower, upper = jnp.unstack(x.reshape(x.shape[0], -1, 2, GROUP // 2), axis=2)
    if x.shape[0] == 1:
        lower, upper = lower.astype(jnp.float32), upper.astype(jnp.float32)
        return jnp.sum((halves[0] * lower + halves[1] * upper) * scale, axis=(1, 2))[None]
    rows = [(half * scale).astype(x.dtype).reshape(weight.values.shape) for half in halves]
    parts = [_plain(w, part.reshape(x.shape[0], -1)) for w, part in zip(rows, (lower, upper), strict=True)]
    return parts[0] + parts[1]


@jax.custom_jvp
def _long_matmul(weight: Weight | LayerWeight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    return _matmul(weight, x)


@jax.custom_jvp
def _prefill_matmul(weight: Weight | LayerWeight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    return by_platform(_product(weight, x), weight, x, default=_matmul, cpu=_weight_first)


def _rows(
    kernel: Callable[..., Array], cpu: Callable[..., Array]
) -> Callable[[Weight | LayerWeight, Float[Array, "T in"]], Float[Array, "T out"]]:
    """Returns a function that multiplies the rows under vmap as if they were more positions."""

    @jax.custom_batching.custom_vmap
    def multiply(weight: Any, x: Array) -> Array:
        return by_platform(
            _product(weight, x), weight, x, default=_matmul, cpu=cpu, gpu=_on_gpu,
            kernel=kernel if _suits_kernel(weight, x.dtype) else None,
            gpu_kernel=_gpu_kernel(weight, x),
        )  # fmt: skip

    @multiply.def_vmap
    @library_switches()
    def _(size: Any, batched: list[Any], weight: Any, x: Array) -> tuple[Array, bool]:
        weight_batched, x_batched = batched
        if any(jax.tree.leaves(weight_batched)):  # with a weight for each row, XLA has the product
            axes = (jax.tree.map(lambda there: 0 if there else None, weight_batched), 0 if x_batched else None)
            return jax.vmap(_matmul, in_axes=axes)(weight, x), True
        return multiply(weight, x.reshape(-1, x.shape[-1])).reshape(size, x.shape[1], -1), True

    @jax.custom_jvp
    def differentiated_as_formula(weight: Weight | LayerWeight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
        return multiply(weight, x)

    differentiated_as_formula.defjvp(_jvp)
    return differentiated_as_formula


@library_switches()
def _jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Float[Array, "T out"], Float[Array, "T out"]]:
    def formula(weight: Weight | LayerWeight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
        return _matmul(weight, x, _plain if on_mesh(*jax.tree.leaves(weight), x) else product)

    return jax.jvp(formula, primals, tangents)


def _product(weight: Weight | LayerWeight, x: Float[Array, "T in"]) -> jax.ShapeDtypeStruct:
    """Returns shape and type of W x."""
    first = _first(weight)
    rows = (first.values if isinstance(first, QuantizedWeight) else first).shape[0]
    return jax.ShapeDtypeStruct((x.shape[0], rows), accum_dtype(x.dtype))


def _first(weight: Weight | LayerWeight) -> Weight:
    """Returns a weight of the shape and type that is asked about."""
    return weight.layers[0] if isinstance(weight, LayerWeight) else weight


def _suits_kernel(weight: Weight | LayerWeight, dtype: np.dtype) -> bool:
    """Whether there is a kernel for such a weight and an x of that type, and no scale in 4 bits would be rounded."""
    if dtype == jnp.float64 or not cpu.available():
        return False
    first = _first(weight)
    if isinstance(first, QuantizedWeight):
        return first.values.dtype == jnp.int8 or first.has_own_scale()
    return first.dtype in cpu.DTYPES


def _suits_xla(weight: Weight | LayerWeight, x: Float[Array, "T in"]) -> bool:
    """Whether XLA multiplies many positions faster than the kernel, which widens bfloat16 if it has no tiles for it."""
    if not isinstance(weight, jax.Array) or not weight.dtype == x.dtype == jnp.bfloat16:
        return False
    return cpu.has_bfloat16_dot() and (not cpu.has_tiles() or any(size % TILE for size in weight.shape))


def _by_kernel(many: bool, weight: Weight | LayerWeight, x: Float[Array, "T in"]) -> Float32[Array, "T out"]:
    layers, number = (weight.layers, weight.number) if isinstance(weight, LayerWeight) else ((weight,), None)
    quantized = [layer for layer in layers if isinstance(layer, QuantizedWeight)]
    values = [layer.values if isinstance(layer, QuantizedWeight) else layer for layer in layers]
    scales = [w.scale.astype(jnp.bfloat16 if w.values.dtype == jnp.uint8 else jnp.float32) for w in quantized]
    x = x if many and x.dtype in cpu.DTYPES else x.astype(jnp.float32)
    return cpu.matmul(values, scales, x, None if number is None else number.astype(jnp.int32), many=many)


def _by_xla(weight: Weight | LayerWeight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    # For a single row XLA would widen the whole weight, outside of the loop over tokens. Of two rows it does not.
    if isinstance(weight, LayerWeight):
        return _of_layer(_by_xla, weight, x)
    rows = x if x.shape[0] > 1 else jnp.concatenate([x, x])
    multiply = _in_parts if isinstance(weight, QuantizedWeight) or weight.dtype == jnp.float16 else _weight_first
    return multiply(weight, rows)[: x.shape[0]]


def _weight_first(weight: Weight | LayerWeight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    """Returns W x with the weight as the left operand, which is up to three times as fast."""
    if isinstance(weight, LayerWeight):
        return _of_layer(_weight_first, weight, x)
    if isinstance(weight, QuantizedWeight):
        return _matmul(weight, x)
    y = jnp.einsum("oi,Ti->oT", weight, x, preferred_element_type=accum_dtype(x.dtype))
    # Without the barrier XLA would exchange the operands to spare the transposition, and copy the weight for that.
    return jax.lax.optimization_barrier(y).T


def _in_parts(weight: Weight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    """Returns W x with some rows of W after the other, widened to float32.

    XLA would widen all of W, and keep all weights of a model widened over the steps of a loop.
    """
    rows = (weight.values if isinstance(weight, QuantizedWeight) else weight).shape[0]
    count = min(max(PART_SIZE // x.shape[1], 1), rows)
    x = x.astype(accum_dtype(x.dtype))

    def part(number: Int[Array, ""] | int, y: Float[Array, "out T"]) -> Float[Array, "out T"]:
        first = jnp.minimum(number * count, rows - count)
        # Behind a barrier that the index passes as well, the weight stays in the loop.
        here, first = jax.lax.optimization_barrier((weight, first))
        some = jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, first, count), here)
        widened = dequantize(some.values, some.scale) if isinstance(some, QuantizedWeight) else some
        return jax.lax.dynamic_update_slice_in_dim(y, jnp.einsum("oi,Ti->oT", widened.astype(x.dtype), x), first, 0)

    return jax.lax.fori_loop(0, -(-rows // count), part, jnp.zeros((rows, x.shape[0]), x.dtype)).T


def _prefill_by_xla(weight: Weight | LayerWeight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    return (_weight_first if at_most(x.shape[0], MAX_PREFILL_ROWS) else _matmul)(weight, x)


_prefill_matmul.defjvp(_jvp)
_long_matmul.defjvp(_jvp)
_decode_matmul = _rows(functools.partial(_by_kernel, False), _by_xla)
_kernel_matmul = _rows(functools.partial(_by_kernel, True), _prefill_by_xla)


@jax.custom_jvp
def _decode_take_rows(weight: Weight, tokens: Int[Array, " T"]) -> Float[Array, "T in"]:
    def on_cpu(weight: Weight, tokens: Int[Array, " T"]) -> Float[Array, "T in"]:
        # XLA would keep a copy of a 16-bit table in float32 beside the loop over tokens.
        return _take_rows(*jax.lax.optimization_barrier((weight, tokens)))

    if isinstance(weight, QuantizedWeight):
        columns, dtype = weight.columns, weight.rows_dtype
    else:
        columns, dtype = weight.shape[1], weight.dtype
    result = jax.ShapeDtypeStruct((tokens.shape[0], columns), dtype)
    return by_platform(result, weight, tokens, default=_take_rows, cpu=on_cpu)


@_decode_take_rows.defjvp
@library_switches()
def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Float[Array, "T in"], Float[Array, "T in"]]:
    return jax.jvp(_take_rows, primals, tangents)
