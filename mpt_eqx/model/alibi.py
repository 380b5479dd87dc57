"""ALiBi: a bias on the attention scores, slope · (key − query), that grows with distance.

Here are the slopes; `ops.attention.alibi_bias` makes the bias of them.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32


def alibi_slopes(n_heads: int, alibi_bias_max: float) -> Float32[Array, " N"]:
    """Returns the slope of each head: 2^(−alibi_bias_max·i/M) for i = 1..M, M the next power of two ≥ n_heads.

    When M exceeds n_heads, the even i come first, then the odd ones, and the first n_heads of these are taken.

    Args:
        n_heads: attention heads N.
        alibi_bias_max: exponent of the flattest slope, > 0; 8 in most models.

    Source: llm-foundry 8c8dd48, llmfoundry/models/layers/attention.py, gen_slopes.
    """
    m = 2 ** (n_heads - 1).bit_length()
    slopes = 2.0 ** (-alibi_bias_max * np.arange(1, m + 1) / m)
    if m != n_heads:
        slopes = np.concatenate([slopes[1::2], slopes[0::2]])[:n_heads]
    return jnp.asarray(slopes, dtype=jnp.float32)


class ALiBi(eqx.Module):
    """ALiBi's slopes for a number of heads; they follow from the configuration and are no weights."""

    n_heads: int = eqx.field(static=True)
    bias_max: float = eqx.field(static=True)

    def slopes(self) -> Float32[Array, " N"]:
        """Returns the slope of each head."""
        return alibi_slopes(self.n_heads, self.bias_max)
