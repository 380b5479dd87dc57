"""Attention: the formula, and the same read block by block from a cache."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from mpt_eqx.ops.cudnn_attention import cudnn_takes, fused_attention
from mpt_eqx.ops.layer_cache import BLOCK, LayerCache
from mpt_eqx.ops.numerics import apply_dropout, row_sum, scaled, softcapped, wide

FEW = 8
"""Queries of a head up to which the scores of a whole cache are kept: less than the keys take."""

BiasAndMask = Callable[[Int[Array, " S"]], tuple[Float32[Array, "N T S"] | None, Bool[Array, "T S"]]]


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
) -> Float[Array, "N T H"]:
    """Returns softmax(scale · q kᵀ + bias, where masked) v for each of N heads.

    The softmax is taken in float32; its weights are rounded to the type of v, as in the references.

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

    Source: llm-foundry 8c8dd48, llmfoundry/models/layers/attention.py, scaled_multihead_dot_product_attention.
    """
    weights = jax.nn.softmax(attention_scores(q, k, bias, mask, scale, softcap), axis=-1)
    weights = apply_dropout(weights, dropout, key)
    return jnp.einsum("NTS,NSH->NTH", weights.astype(v.dtype), v, preferred_element_type=wide(v.dtype)).astype(v.dtype)


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


def attention_scores(
    q: Float[Array, "N T H"],
    k: Float[Array, "N S H"],
    bias: Float32[Array, "N #T S"] | None,
    mask: Bool[Array, "#T S"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "N T S"]:
    """Returns scale · q kᵀ, capped, plus bias; the smallest float32 where masked.

    Scores are rounded to the type of q after the product, the scale and the cap, then the float32 bias makes them
    float32 (float64 for float64). This order is the references'. Arguments as in `attention`.
    """
    scores = jnp.einsum("NTH,NSH->NTS", q, k, preferred_element_type=wide(q.dtype)).astype(q.dtype)
    scores = scaled(scores, scale)
    if softcap is not None:
        scores = softcapped(scores, softcap)
    scores = scores.astype(wide(q.dtype))
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    # The smallest number instead of −∞, so that a row without any visible key is not NaN.
    return jnp.where(mask, scores, float(jnp.finfo(jnp.float32).min))


def cached_attention(
    q: Float[Array, "N T H"],
    cache: LayerCache,
    bias_and_mask: BiasAndMask,
    length: Int[Array, ""],
    scale: float,
    *,
    softcap: float | None = None,
) -> Float[Array, "N T H"]:
    """Returns what `attention` does with the keys and values of a cache: by cuDNN where it can, else block by block.

    Arguments as in `blockwise_attention`.
    """

    def blocks() -> Float[Array, "N T H"]:
        return blockwise_attention(q, cache, bias_and_mask, length, scale, softcap=softcap)

    def fused() -> Float[Array, "N T H"]:
        rows = cache.rows(0, capacity)
        return fused_attention(q, rows.k, rows.v, *bias_and_mask(jnp.arange(capacity)), length, scale)

    capacity = cache.k.shape[-2]
    if not cudnn_takes(q, capacity, softcap):
        return blocks()
    return jax.lax.platform_dependent(cuda=fused, default=blocks)


def blockwise_attention(
    q: Float[Array, "N T H"],
    cache: LayerCache,
    bias_and_mask: BiasAndMask,
    length: Int[Array, ""],
    scale: float,
    *,
    softcap: float | None = None,
) -> Float[Array, "N T H"]:
    """Returns what `attention` does with the keys and values of a cache, but never holds more than a block of scores.

    The blocks are read twice: first for the largest score and the sum of the softmax, which is scaled down whenever a
    larger score turns up; then for the values, with weights that are rounded where `attention` rounds them. The scores
    of few queries are kept in between, those of many are computed again. Blocks beyond `length` are not read. One that
    is masked as a whole changes no bit of the result, nor does it matter how many queries are asked at once.

    Args:
        q: queries of T positions.
        cache: keys and values.
        bias_and_mask: makes both, for given positions of keys.
        length: how many rows of the cache are to be read.
        scale: as in `attention`.
        softcap: as in `attention`.

    Source: arXiv:1805.02867, section 3.
    """
    # One query alone is asked twice, because XLA's CPU backend sums the products of a single row in another order.
    queries = q if q.shape[1] > 1 else jnp.repeat(q, 2, axis=1)
    sums = wide(q.dtype)
    blocks = (jnp.minimum(_longest(length), cache.k.shape[-2]) + BLOCK - 1) // BLOCK

    def scores(number: Int[Array, ""], k: Float[Array, "N S H"]) -> tuple[Float[Array, "N T S"], Bool[Array, "#T S"]]:
        bias, mask = bias_and_mask(number * BLOCK + jnp.arange(BLOCK))
        return attention_scores(queries, k, bias, mask, scale, softcap), mask

    def measure(number: Int[Array, ""], so_far: tuple[Array, Array, Array | None]) -> tuple[Array, Array, Array | None]:
        largest, total, kept = so_far
        block, _ = scores(number, cache.rows(number * BLOCK, BLOCK).k)
        if kept is not None:
            kept = jax.lax.dynamic_update_index_in_dim(kept, block, number, 0)
        new_largest = jnp.maximum(largest, jnp.max(block, axis=-1))
        total = total * jnp.exp(largest - new_largest) + row_sum(jnp.exp(block - new_largest[..., None]))
        return new_largest, total, kept

    none = jnp.full(queries.shape[:2], float(jnp.finfo(jnp.float32).min), sums)
    few = queries.shape[1] <= FEW
    kept = jnp.zeros((cache.k.shape[-2] // BLOCK, *queries.shape[:2], BLOCK), sums) if few else None
    largest, total, kept = jax.lax.fori_loop(0, blocks, measure, (none, jnp.zeros_like(none), kept))

    def gather(number: Int[Array, ""], mixed: Float[Array, "N T H"]) -> Float[Array, "N T H"]:
        rows = cache.rows(number * BLOCK, BLOCK)
        if kept is None:
            block, mask = scores(number, rows.k)
        else:
            block, (_, mask) = kept[number], bias_and_mask(number * BLOCK + jnp.arange(BLOCK))
        weights = jnp.exp(block - largest[..., None]) / total[..., None]
        # What no query sees may be anything, and 0 · NaN is NaN.
        v = jnp.where(jnp.any(mask, axis=0)[:, None], rows.v, 0)
        return mixed + jnp.einsum("NTS,NSH->NTH", weights.astype(q.dtype), v, preferred_element_type=sums)

    mixed = jax.lax.fori_loop(0, blocks, gather, jnp.zeros(queries.shape, sums))
    return mixed[:, : q.shape[1]].astype(q.dtype)


@jax.custom_batching.custom_vmap
def _longest(length: Int[Array, ""]) -> Int[Array, ""]:
    """Returns `length`, or under vmap the largest one for all rows.

    The rows of a batch then run through the same blocks. With a number of blocks for each row the loop's counter
    would have a batch axis, and every block would be gathered row by row.
    """
    return length


@_longest.def_vmap
def _(size: int, batched: list[bool], length: Int[Array, " B"]) -> tuple[Int[Array, ""], bool]:
    return _longest(jnp.max(length)), False
