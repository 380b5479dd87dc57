"""Norms."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class LayerNorm(eqx.Module):
    """(x − mean) / √(variance + eps) · weight over the last axis, in float32, rounded once to the type of x.

    llm-foundry's low_precision_layernorm is this too, outside of its mixed-precision training.
    """

    weight: Float[Array, " D"]
    eps: float = eqx.field(static=True)

    def __init__(self, size: int, eps: float):
        self.weight = jnp.ones(size)
        self.eps = eps

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Returns x normed, position by position."""
        h = x.astype(jnp.float32)
        h = h - jnp.mean(h, axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        return (h * self.weight.astype(jnp.float32)).astype(x.dtype)
