"""Linear map and embedding, with the weights as checkpoints store them or quantised."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mpt_eqx.model.precision import wide
from mpt_eqx.model.quantized import QuantizedWeight, dequantized


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


def product(weight: Float[Array, "out in"] | QuantizedWeight, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
    """Returns W x for each of T positions, in float32 (float64 for float64)."""
    if isinstance(weight, QuantizedWeight):
        weight = dequantized(weight.values, weight.scale).astype(x.dtype)
    # The weight is the left operand because XLA's CPU product is several times faster that way for few rows.
    return jnp.einsum("oi,Ti->To", weight, x, preferred_element_type=wide(x.dtype))
