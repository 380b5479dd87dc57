"""Attention to a cache, block by block of keys."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from mpt_eqx.ops.attention import attention_scores
from mpt_eqx.ops.layer_cache import BLOCK, LayerCache
from mpt_eqx.ops.numerics import accum_dtype
from mpt_eqx.ops.platform import MAX_DECODE_ROWS, varying_as
from mpt_eqx.ops.sizes import at_most

BiasAndMask = Callable[[Int[Array, " S"]], tuple[Float32[Array, "N T S"] | None, Bool[Array, "T S"]]]


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
    of few queries are kept in between, those of many are computed again. Blocks beyond `length` are not read, and one
    that is masked as a whole changes no bit of the result. A query that sees nothing gets NaN.

    Args:
        q: queries of T positions.
        cache: keys and values.
        bias_and_mask: makes both, for given positions of keys.
        length: how many rows of the cache are to be read.
        scale: as in `attention`.
        softcap: as in `attention`.

    Source: arXiv:1805.02867, section 3.
    """
    sums = accum_dtype(q.dtype)
    blocks = (jnp.minimum(jnp.maximum(_longest(length), 1), cache.k.shape[-2]) + BLOCK - 1) // BLOCK

    def scores(
        number: Int[Array, ""] | int, k: Float[Array, "N S H"]
    ) -> tuple[Float[Array, "N T S"], Bool[Array, "#T S"]]:
        bias, mask = bias_and_mask(number * BLOCK + jnp.arange(BLOCK))
        return attention_scores(q, k, bias, mask, scale, softcap, -jnp.inf), mask

    def measure(
        number: Int[Array, ""] | int, so_far: tuple[Array, Array, Array | None]
    ) -> tuple[Array, Array, Array | None]:
        largest, total, kept = so_far
        block, _ = scores(number, cache.rows(number * BLOCK, BLOCK).k)
        if kept is not None:
            kept = jax.lax.dynamic_update_index_in_dim(kept, block, number, 0)
        new_largest = jnp.maximum(largest, jnp.max(block, axis=-1))
        total = total * jnp.exp(largest - new_largest) + jnp.sum(jnp.exp(block - new_largest[..., None]), axis=-1)
        return new_largest, total, kept

    none = jnp.full(q.shape[:2], float(jnp.finfo(jnp.float32).min), sums)
    small_batch = at_most(q.shape[1], MAX_DECODE_ROWS)
    kept = jnp.zeros((cache.k.shape[-2] // BLOCK, *q.shape[:2], BLOCK), sums) if small_batch else None
    empty = varying_as((none, jnp.zeros_like(none), kept), q, cache, length)
    largest, total, kept = jax.lax.fori_loop(0, blocks, measure, empty)

    def gather(number: Int[Array, ""] | int, mixed: Float[Array, "N T H"]) -> Float[Array, "N T H"]:
        rows = cache.rows(number * BLOCK, BLOCK)
        if kept is None:
            block, mask = scores(number, rows.k)
        else:
            block, (_, mask) = kept[number], bias_and_mask(number * BLOCK + jnp.arange(BLOCK))
        weights = jnp.exp(block - largest[..., None]) / total[..., None]
        # What no query sees may be anything, and 0 · NaN is NaN.
        v = jnp.where(jnp.any(mask, axis=0)[:, None], rows.v, 0)
        return mixed + jnp.einsum("NTS,NSH->NTH", weights.astype(q.dtype), v, preferred_element_type=sums)

    mixed = jax.lax.fori_loop(0, blocks, gather, varying_as(jnp.zeros(q.shape, sums), total))
    return mixed.astype(q.dtype)


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
