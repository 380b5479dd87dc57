"""Norms over the last axis, in float32, rounded once to the type of x, of which alone the gradient is computed."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mpt_eqx.config import LAYERNORMS, MPTConfig
from mpt_eqx.ops.numerics import accum_dtype, mean


class LayerNorm(eqx.Module):
    """(x − mean) / √(variance + eps) · weight + bias, where the bias may be absent.

    llm-foundry's low_precision_layernorm is this too, outside of its mixed-precision training.
    """

    weight: Float[Array, " D"]
    bias: Float[Array, " D"] | None
    eps: float = eqx.field(static=True)

    def __init__(self, size: int, eps: float, *, bias: bool = False):
        self.weight = jnp.ones(size, jnp.float32)
        self.bias = jnp.zeros(size, jnp.float32) if bias else None
        self.eps = eps

    @eqx.filter_checkpoint
    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        """Returns x normed, position by position."""
        h = x.astype(accum_dtype(x.dtype))
        h = h - mean(h)
        h = h * jax.lax.rsqrt(mean(h * h) + self.eps)
        h = h * self.weight.astype(h.dtype)
        if self.bias is not None:
            h = h + self.bias.astype(h.dtype)
        return h.astype(x.dtype)


class RMSNorm(eqx.Module):
    """x / √(mean(x²) + eps) · weight; llm-foundry's rmsnorm, low_precision_rmsnorm and triton_rmsnorm.

    Source: llm-foundry 0.22, llmfoundry/models/layers/norm.py, which is torch.nn.RMSNorm. (Between 2023-04-28 and
    2023-06-26 llm-foundry multiplied by the root instead; weights trained then do not fit.)
    """

    weight: Float[Array, " D"]
    eps: float = eqx.field(static=True)

    def __init__(self, size: int, eps: float):
        self.weight = jnp.ones(size, jnp.float32)
        self.eps = eps

    @eqx.filter_checkpoint
    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        """Returns x normed, position by position."""
        h = x.astype(accum_dtype(x.dtype))
        h = h * jax.lax.rsqrt(mean(h * h) + self.eps)
        return (h * self.weight.astype(h.dtype)).astype(x.dtype)


def make_norm(config: MPTConfig) -> LayerNorm | RMSNorm:
    """Returns a new norm of the residual stream, of the kind `config.norm_type`."""
    if config.norm_type in LAYERNORMS:
        return LayerNorm(config.d_model, config.norm_eps, bias=not config.no_bias)
    return RMSNorm(config.d_model, config.norm_eps)
