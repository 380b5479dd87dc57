"""Positions: ALiBi, a bias on the attention scores that grows with distance."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int


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
