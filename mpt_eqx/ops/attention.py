"""The formula of attention, with ALiBi's bias and the mask."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from mpt_eqx.ops import numerics
from mpt_eqx.ops.numerics import accum_dtype

Tap = Callable[[str, Float[Array, "N T S"]], Float[Array, "N T S"]]
"""What looks at scores and weights by name, and may change them."""


def attention(
    q: Float[Array, "N T H"],
    k: Float[Array, "N S H"],
    v: Float[Array, "N S H"],
    bias: Float32[Array, "N T S"] | None,
    mask: Bool[Array, "T S"],
    scale: float,
    *,
    softcap: float | None = None,
    dropout: eqx.nn.Dropout | None = None,
    key: PRNGKeyArray | None = None,
    masked_score: float | None = None,
    tap: Tap | None = None,
) -> Float[Array, "N T H"]:
    """Returns softmax(scale · q kᵀ + bias, where masked) v for each of N heads.

    The softmax is taken in float32; its weights are rounded to the type of v, as in the references. A score of −∞,
    such as an overflow of float16, has weight 0; a query that sees nothing else gets NaN.

    Args:
        q: queries of T positions.
        k: keys of S positions.
        v: values of S positions.
        bias: added to the scores; None for none.
        mask: True where a query may see a key. A query that may see none gets the mean of all values.
        scale: factor on q·k, usually 1/√H.
        softcap: scores are squashed into ±softcap before the bias; None for none.
        dropout: on the weights, where a key is given.
        key: randomness of the dropout.
        masked_score: of keys that a query may not see; None for what this function promises.
        tap: of the places "attn.hook_attn_scores" and "attn.hook_pattern"; None for none.

    Source: llm-foundry 8c8dd48, llmfoundry/models/layers/attention.py, scaled_multihead_dot_product_attention.
    """
    # −∞, but the smallest number in a row without any visible key, so that it is not NaN. Chosen as bits, because then
    # no operation on real numbers is added to the formula.
    bits = [int(np.float32(score).view(np.int32)) for score in (-np.inf, np.finfo(np.float32).min)]
    chosen = jnp.where(jnp.any(mask, axis=-1, keepdims=True), jnp.int32(bits[0]), jnp.int32(bits[1]))
    of_rows = jax.lax.bitcast_convert_type(chosen, jnp.float32).astype(accum_dtype(q.dtype))
    hidden = of_rows if masked_score is None else masked_score
    scores = attention_scores(q, k, bias, mask, scale, softcap, hidden)
    weights = jax.nn.softmax(scores if tap is None else tap("attn.hook_attn_scores", scores), axis=-1)
    if tap is not None:
        weights = tap("attn.hook_pattern", weights)
    weights = numerics.apply_dropout(weights, dropout, key)
    mixed = jnp.einsum("NTS,NSH->NTH", weights.astype(v.dtype), v, preferred_element_type=accum_dtype(v.dtype))
    return mixed.astype(v.dtype)


def attention_scores(
    q: Float[Array, "N T H"],
    k: Float[Array, "N S H"],
    bias: Float32[Array, "N #T S"] | None,
    mask: Bool[Array, "#T S"],
    scale: float,
    softcap: float | None,
    masked_score: Float[Array, "T 1"] | float,
) -> Float[Array, "N T S"]:
    """Returns scale · q kᵀ, capped, plus bias; `masked_score` where masked.

    Scores are rounded to the type of q after the product, the scale and the cap, then the float32 bias makes them
    float32 (float64 for float64). This order is the references'. Arguments as in `attention`.
    """
    scores = jnp.einsum("NTH,NSH->NTS", q, k, preferred_element_type=accum_dtype(q.dtype)).astype(q.dtype)
    scores = numerics.scale(scores, scale)
    if softcap is not None:
        scores = numerics.softcap(scores, softcap)
    scores = scores.astype(accum_dtype(q.dtype))
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    return jnp.where(mask, scores, masked_score)


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


def visible(query_pos: Int[Array, " T"], key_pos: Int[Array, " S"], window: int | None) -> Bool[Array, "T S"]:
    """Returns True where a query may see a key: not after itself, nor more than `window` before; None for no limit."""
    mask = key_pos[None, :] <= query_pos[:, None]
    return mask if window is None else mask & (key_pos[None, :] >= query_pos[:, None] - window)
