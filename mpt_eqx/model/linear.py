"""Linear map and embedding, with the weights as checkpoints store them or quantised."""

import equinox as eqx
from jaxtyping import Array, DTypeLike, Float, Int

from mpt_eqx.ops.matmul import matmul, take_rows
from mpt_eqx.ops.numerics import rounded
from mpt_eqx.ops.quantized import QuantizedWeight


class Linear(eqx.Module):
    """y = W x + b for each of T positions; W is stored [out, in], and b may be absent."""

    weight: Float[Array, "out in"] | QuantizedWeight
    bias: Float[Array, " out"] | None = None

    def __call__(self, x: Float[Array, "T in"], dtype: DTypeLike | None = None) -> Float[Array, "T out"]:
        """Returns W x + b, summed in float32 and rounded once: to the type of x, or to `dtype`."""
        y = matmul(self.weight, x)
        if self.bias is not None:
            y = y + self.bias.astype(y.dtype)
        return rounded(y, x.dtype if dtype is None else dtype)


class Embedding(eqx.Module):
    """One row of the weight for each token."""

    weight: Float[Array, "V D"] | QuantizedWeight

    def __call__(self, tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Returns the rows of `tokens`."""
        return take_rows(self.weight, tokens)
