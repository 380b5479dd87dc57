"""The product of a 4-bit weight with a few positions on an NVIDIA GPU, by kernels that unpack it on the way.

XLA unpacks all of a weight into memory before the product with several positions, which takes three times as long. For
one position it does not, but converts every number alone, which takes longer than reading it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, Int32, UInt8

from mpt_eqx.ops.quantized import GROUP, QuantizedWeight
from mpt_eqx.ops.sizes import at_most

try:  # JAX 0.12 says that a later one will be without it
    from jax.experimental.pallas import triton
except ImportError:
    triton = None  # type: ignore[assignment]

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
    """Tells whether there is a kernel for this product: in 16 bits, where JAX has Pallas' backend Triton."""
    (rows, size), count = weight.values.shape, x.shape[0]
    fits = rows % ROWS == 0 and size % (PARTS * BYTES) == 0 and at_most(count, MAX_POSITIONS)
    typed = weight.values.dtype == jnp.uint8 and x.dtype in (jnp.bfloat16, jnp.float16)
    return fits and typed and triton is not None


def int4_matmul(
    weight: QuantizedWeight, x: Float[Array, "T in"], *, interpret: bool = False
) -> Float32[Array, "T out"]:
    """Returns W x for each of T positions, summed in float32; for more than one, weights are rounded to the type of x.

    Args:
        weight: W.
        x: the positions.
        interpret: compute it by JAX's interpreter of kernels, anywhere.
    """
    if x.shape[0] == 1:
        return _one_position(weight, x, interpret=interpret)
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


# From here on: one position, whose product takes as long as the instructions that unpack the weight. Each thread has 16
# bytes of a row, which are a group, and unpacks them in words of 4 bytes by PTX: Triton would do so byte by byte.


def _one_position(weight: QuantizedWeight, x: Float[Array, "1 in"], *, interpret: bool) -> Float32[Array, "1 out"]:
    out, groups = weight.scale.shape
    # About 500 programs, of four warps that take 128 groups at a time, or of one that takes 32.
    rows, here, warps, parts = 8, 32, 1, 1
    if groups >= 512 and groups % 128 == 0:
        parts = PARTS
    elif groups % 128 == 0:
        rows, here, warps = 32 if out >= 16384 else 16 if out >= 8192 else 8, 128, 4
    columns = groups // parts

    def kernel(x_ref, values_ref, scale_ref, y_ref):  # type: ignore[no-untyped-def]
        def add(number: Int32[Array, ""], y: Float32[Array, "R G"]) -> Float32[Array, "R G"]:
            at = pl.ds(number * here, here)
            lower, upper = (x_ref[at, half, :].astype(jnp.float32) for half in (0, 1))
            # Each number n stands as n + 256 or n + 16 in the sums, and means n − 8.
            too_much = (256 + 8) * jnp.sum(lower, axis=1) + (16 + 8) * jnp.sum(upper, axis=1)
            # Before the values are read: otherwise a thread takes twice the registers, and half as many run at a time.
            lower, upper = (jnp.broadcast_to(x[None], (rows, here, HALF)) for x in (lower, upper))
            sums = (group_sums if interpret else _group_sums_by_ptx)(values_ref[:, at, :], lower, upper)
            return y + (sums - too_much) * scale_ref[:, at].astype(jnp.float32)

        y_ref[0] = jnp.sum(jax.lax.fori_loop(0, columns // here, add, jnp.zeros((rows, here), jnp.float32)), axis=1)

    y = pl.pallas_call(
        kernel,
        grid=(out // rows, parts),
        in_specs=[
            pl.BlockSpec((columns, 2, HALF), lambda row, part: (part, 0, 0)),
            pl.BlockSpec((rows, columns, HALF), lambda row, part: (row, part, 0)),
            pl.BlockSpec((rows, columns), lambda row, part: (row, part)),
        ],
        out_specs=pl.BlockSpec((1, rows), lambda row, part: (part, row)),
        out_shape=jax.ShapeDtypeStruct((parts, out), jnp.float32),
        compiler_params=None if interpret else triton.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name="int4_matvec",
    )(x.reshape(groups, 2, HALF), weight.values.reshape(out, groups, HALF), weight.scale)
    return y.sum(0)[None]


def group_sums(
    values: UInt8[Array, "R G 16"], lower: Float32[Array, "R G 16"], upper: Float32[Array, "R G 16"]
) -> Float32[Array, "R G"]:
    """Returns the sums of (256 + n)·lower and (16 + m)·upper for the lower and upper halves n and m of each byte."""
    products = ((values & 15).astype(jnp.float32) + 256) * lower + ((values >> 4).astype(jnp.float32) + 16) * upper
    return jnp.sum(products, axis=2)


def _group_sums_by_ptx(
    values: UInt8[Array, "R G 16"], lower: Float32[Array, "R G 16"], upper: Float32[Array, "R G 16"]
) -> Float32[Array, "R G"]:
    code, constraints = group_sums_ptx()
    [bits] = triton.elementwise_inline_asm(
        code,
        args=[values, lower, upper],
        constraints=constraints,
        pack=HALF,
        result_shape_dtypes=[jax.ShapeDtypeStruct(values.shape, jnp.int32)],
    )
    # One of the 16 has the bits of the sum, the others none. As whole numbers these are added by no instruction.
    return jax.lax.bitcast_convert_type(jnp.sum(bits, axis=2), jnp.float32)


@functools.cache
def group_sums_ptx() -> tuple[str, str]:
    """Returns the code of `group_sums` for 16 bytes, and what its registers are.

    They are 16 for the results, four for the bytes, and 16 each for the two x. A byte is shifted to where its upper
    half begins a float's fraction. With an exponent that is n + 16, and the lower half, with another, n + 256.
    """
    values, halves = HALF, ((HALF + 4, "0x78000", "0x43800000"), (HALF + 4 + HALF, "0x780000", "0x41800000"))
    lines = [".reg .b32 j, v;", ".reg .f32 n, a, b;", "mov.f32 a, 0f00000000;", "mov.f32 b, 0f00000000;"]
    for byte in range(HALF):
        left = 15 - 8 * (byte % 4)
        shift = f"shl.b32 j, ${values + byte // 4}, {left};"
        lines.append(shift if left >= 0 else f"shr.u32 j, ${values + byte // 4}, {-left};")
        for total, (first, mask, exponent) in zip("ab", halves, strict=True):
            lines += [f"lop3.b32 v, j, {mask}, {exponent}, 0xEA;", "mov.b32 n, v;"]  # (j & mask) | exponent
            lines.append(f"fma.rn.f32 {total}, n, ${first + byte}, {total};")
    lines += ["add.f32 a, a, b;", "mov.b32 $0, a;", *(f"mov.b32 ${other}, 0;" for other in range(1, HALF))]
    registers = ["=r"] * HALF + ["r"] * 4 + ["f"] * 2 * HALF
    return "{\n" + "\n".join(lines) + "\n}", ",".join(registers)
