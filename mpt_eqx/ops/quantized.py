"""Weights in 8 or 4 bits, each with a scale for a group of columns."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int8, UInt8

from mpt_eqx.errors import MPTError

GROUP = 32
"""Columns that share a scale in 4 bits."""


class QuantizedWeight(eqx.Module):
    """W = scale · values for each row, or for each group of GROUP columns of it.

    In 8 bits `values` are the numbers from −127 to 127, and every row has one scale. In 4 bits they are numbers from
    −8 to 7 with 8 added, two in a byte: byte b of group g holds column 32·g + b in its lower half and column
    32·g + b + 16 in its upper one.

    Scales are made in float32 for 8 bits, in bfloat16 for 4. Once they are cast to another type, as the floating leaves
    of a model are, that is the type of W, too.

    Attributes:
        values: as above.
        scale: one for each group of columns.
        dtype: the type of W, in which `rows` come out, unless `scale` was cast to another.
    """

    values: Int8[Array, "out in"] | UInt8[Array, "out half"]
    scale: Float[Array, "out groups"]
    dtype: np.dtype = eqx.field(static=True)

    def rows(self, numbers: Int[Array, " T"]) -> Float[Array, "T in"]:
        """Returns some rows of W."""
        return dequantize(self.values[numbers], self.scale[numbers]).astype(self.rows_dtype)

    @property
    def rows_dtype(self) -> np.dtype:
        """The type of W."""
        return self.dtype if self.has_own_scale() else self.scale.dtype

    @property
    def columns(self) -> int:
        """How many columns W has."""
        return self.values.shape[-1] * (2 if self.values.dtype == jnp.uint8 else 1)

    def has_own_scale(self) -> bool:
        """Whether the scales are of the type that they were made in."""
        return self.scale.dtype == (jnp.float32 if self.values.dtype == jnp.int8 else jnp.bfloat16)

    def check(self) -> None:
        """Raises MPTError unless types and shapes of `values` and `scale` are those of a quantised weight."""
        if self.values.dtype not in (jnp.int8, jnp.uint8) or not jnp.issubdtype(self.scale.dtype, jnp.floating):
            raise MPTError(
                f"weight: expected values of int8 or uint8 and a floating scale, found {self.values.dtype} and "
                f"{self.scale.dtype}; cast floating arrays only, with jax.tree.map(lambda x: x.astype(dtype) if "
                "jax.numpy.issubdtype(x.dtype, jax.numpy.floating) else x, model)"
            )
        out, columns = self.values.shape[-2:]
        groups = 1 if self.values.dtype == jnp.int8 else columns * 2 // GROUP
        if self.scale.shape[-2:] != (out, groups) or (groups != 1 and columns * 2 % GROUP):
            raise MPTError(
                f"weight: expected a scale of shape {(out, groups)} for {self.values.dtype} values of "
                f"{self.values.shape}, found {self.scale.shape}; make it with mpt_eqx.quantize"
            )


def dequantize(
    values: Int8[Array, "out in"] | UInt8[Array, "out half"], scale: Float[Array, "out groups"]
) -> Float32[Array, "out in"]:
    """Returns scale · values."""
    if values.dtype == jnp.uint8:
        halves = values.reshape(values.shape[0], -1, 1, GROUP // 2)
        nibbles = jnp.concatenate([halves & 15, halves >> 4], axis=2)
        numbers = nibbles.reshape(*scale.shape, GROUP).astype(jnp.float32) - 8
    else:
        numbers = values.reshape(*scale.shape, -1).astype(jnp.float32)
    return (numbers * scale[..., None].astype(jnp.float32)).reshape(values.shape[0], -1)
