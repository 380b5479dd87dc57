"""The product of a 4-bit weight with a few positions on an NVIDIA GPU, by a kernel that unpacks it on the way.

XLA unpacks all of a weight into memory before such a product, which takes three times as long.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Float32, Int32, UInt8

from mpt_eqx.ops.platform import nvidia_capability
from mpt_eqx.ops.quantized import GROUP, QuantizedWeight
from mpt_eqx.ops.sizes import at_most

MAX_POSITIONS = 64
"""Positions up to which it is used; from here on XLA's product takes longer than its unpacking."""

PARTS = 4
"""Parts of the columns, each by programs of its own: rows alone are too few for all of a GPU."""

BYTES = 128
"""Bytes of a row that are unpacked at a time."""

ROWS = 64
"""What the number of the weight's rows is a multiple of."""

HALF = GROUP // 2
"""Bytes of a group, each with two columns."""


def supports_int4_kernel(weight: QuantizedWeight, x: Float[Array, "T in"]) -> bool:
    """Tells whether there is a kernel for this product on a GPU of this machine: from Ampere on, in 16 bits."""
    (rows, size), count = weight.values.shape, x.shape[0]
    fits = rows % ROWS == 0 and size % (PARTS * BYTES) == 0 and at_most(count, MAX_POSITIONS) and count > 1
    typed = weight.values.dtype == jnp.uint8 and x.dtype in (jnp.bfloat16, jnp.float16)
    return fits and typed and nvidia_capability() >= (8, 0)


def int4_matmul(
    weight: QuantizedWeight, x: Float[Array, "T in"], *, interpret: bool = False
) -> Float32[Array, "T out"]:
    """Returns W x for each of T positions, summed in float32; weights are rounded to the type of x.

    Args:
        weight: W.
        x: the positions.
        interpret: compute it by JAX's interpreter of kernels, anywhere.
    """
    (out, size), count = weight.values.shape, x.shape[0]
    rows, warps, positions = (32, 2, 16) if count <= 16 else (64, 4, 32 if count <= 32 else 64)
    columns = size // PARTS
    # Of each group the lower halves of the bytes are the first columns, and the upper ones the last.
    halves = jnp.pad(x, ((0, positions - count), (0, 0))).reshape(positions, -1, 2, HALF)
    lower, upper = (halves[:, :, half].reshape(positions, size) for half in (0, 1))

    def kernel(lower_ref, upper_ref, values_ref, scale_ref, y_ref):  # type: ignore[no-untyped-def]
        def add(number: Int32[Array, ""], y: Float32[Array, "R P"]) -> Float32[Array, "R P"]:
            here, groups = pl.ds(number * BYTES, BYTES), pl.ds(number * (BYTES // HALF), BYTES // HALF)
            scale = scale_ref[:, groups].astype(jnp.float32)
            scale = jnp.broadcast_to(scale[:, :, None], (*scale.shape, HALF)).reshape(rows, BYTES)
            for fraction, x_ref in zip(fractions(values_ref[:, here]), (lower_ref, upper_ref), strict=True):
                weights = fraction * (16 * scale) - 24 * scale  # scale · (n − 8), to the bit
                y += jnp.dot(weights.astype(x.dtype), x_ref[:, here].T, preferred_element_type=jnp.float32)
            return y

        y_ref[0] = jax.lax.fori_loop(0, columns // BYTES, add, jnp.zeros((rows, positions), jnp.float32))

    parts = pl.pallas_call(
        kernel,
        grid=(out // rows, PARTS),
        in_specs=[
            pl.BlockSpec((positions, columns), lambda row, part: (0, part)),
            pl.BlockSpec((positions, columns), lambda row, part: (0, part)),
            pl.BlockSpec((rows, columns), lambda row, part: (row, part)),
            pl.BlockSpec((rows, columns // HALF), lambda row, part: (row, part)),
        ],
        out_specs=pl.BlockSpec((1, rows, positions), lambda row, part: (part, row, 0)),
        out_shape=jax.ShapeDtypeStruct((PARTS, out, positions), jnp.float32),
        compiler_params=None if interpret else triton.CompilerParams(num_warps=warps, num_stages=3),
        interpret=interpret,
        name="int4_matmul",
    )(lower, upper, weight.values, weight.scale)
    y: Float32[Array, "T out"] = parts.sum(0)[:, :count].T
    return y


def fractions(values: UInt8[Array, "R C"]) -> list[Float32[Array, "R C"]]:
    """Returns 1 + n/16 for the number n, from 0 to 15, in the lower and in the upper half of each byte.

    n is put where the first four bits of a float's fraction are, because GPUs are slower to convert whole numbers.
    """
    bits = values.astype(jnp.int32)
    numbers = [(bits << shift) & 0x780000 for shift in (19, 15)]
    return [jax.lax.bitcast_convert_type(number | 0x3F800000, jnp.float32) for number in numbers]
