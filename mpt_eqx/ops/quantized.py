"""Weights in 8 or 4 bits, each with a scale for a group of columns."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float32, Int, Int8, UInt8

GROUP = 32
"""Columns that share a scale in 4 bits."""


class QuantizedWeight(eqx.Module):
    """W = scale · values for each row, or for each group of GROUP columns of it.

    In 8 bits `values` are the numbers from −127 to 127, and every row has one scale. In 4 bits they are numbers from
    −8 to 7 with 8 added, two in a byte: byte b of group g holds column 32·g + b in its lower half and column
    32·g + b + 16 in its upper one.

    Attributes:
        values: as above.
        scale: one for each group of columns.
        dtype: the type of W, in which `rows` come out.
    """

    values: Int8[Array, "out in"] | UInt8[Array, "out half"]
    scale: Float32[Array, "out 1"] | BFloat16[Array, "out groups"]
    dtype: np.dtype = eqx.field(static=True)

    def rows(self, numbers: Int[Array, " T"]) -> Float[Array, "T in"]:
        """Returns some rows of W."""
        return dequantize(self.values[numbers], self.scale[numbers]).astype(self.dtype)


def dequantize(
    values: Int8[Array, "out in"] | UInt8[Array, "out half"], scale: Float[Array, "out groups"]
) -> Float32[Array, "out in"]:
    """Returns scale · values."""
    if values.dtype == jnp.uint8:
        halves = values.reshape(len(values), -1, 1, GROUP // 2)
        nibbles = jnp.concatenate([halves & 15, halves >> 4], axis=2)
        numbers = nibbles.reshape(*scale.shape, GROUP).astype(jnp.float32) - 8
    else:
        numbers = values.reshape(*scale.shape, -1).astype(jnp.float32)
    return (numbers * scale[..., None].astype(jnp.float32)).reshape(len(values), -1)
