"""Positions: where tokens stand, and ALiBi, a bias on the attention scores that grows with distance."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int


class Positions(eqx.Module):
    """Where the T queries of one call stand, and what they may see.

    Attributes:
        query: place of each query in its input, 0-based, padding counted; in the cache, also where its key is written.
        token: how many real tokens stand before each query; the same as `query` where nothing is padded.
        allowed: True where a query may see a key; None for all keys. Those after the query are hidden besides.
    """

    query: Int[Array, " T"]
    token: Int[Array, " T"]
    allowed: Bool[Array, "T T"] | None


def token_positions(mask: Bool[Array, " T"]) -> Int[Array, " T"]:
    """Returns each place minus the padding up to it, but at least 0.

    Source: llm-foundry 0.22, llmfoundry/models/mpt/modeling_mpt.py, MPTModel.forward.
    """
    return jnp.maximum(jnp.arange(mask.shape[0]) - jnp.cumsum(~mask), 0)


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


def alibi_bias(
    slopes: Float32[Array, " N"], query_pos: Int[Array, " T"], key_pos: Int[Array, " S"]
) -> Float32[Array, "N T S"]:
    """Returns the bias of ALiBi: slope · (key − query), ≤ 0 for the past.

    The references write slope · (key − last key), which differs by a constant per query; softmax removes it. Measured
    from the query the numbers stay small where they matter, and prefill and decode agree by construction.

    Args:
        slopes: slope of each head.
        query_pos: positions of the queries, in tokens.
        key_pos: positions of the keys, in tokens.

    Source: arXiv:2108.12409, section 3; llm-foundry 8c8dd48, llmfoundry/models/layers/attention.py, build_alibi_bias.
    """
    distance = key_pos[None, :] - query_pos[:, None]
    return slopes[:, None, None] * distance.astype(jnp.float32)


class ALiBi(eqx.Module):
    """The bias of ALiBi for a number of heads; computed for the positions at hand, never as a table."""

    n_heads: int = eqx.field(static=True)
    bias_max: float = eqx.field(static=True)

    def __call__(self, query_pos: Int[Array, " T"], key_pos: Int[Array, " S"]) -> Float32[Array, "N T S"]:
        """Returns the bias to add to the scores."""
        return alibi_bias(self.slopes(), query_pos, key_pos)

    def slopes(self) -> Float32[Array, " N"]:
        """Returns the slope of each head."""
        return alibi_slopes(self.n_heads, self.bias_max)
