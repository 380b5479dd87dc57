"""Attention, in the way that fits: the formula, blocks of a cache, cuDNN, or the CPU kernel."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from mpt_eqx.ops.attention import Tap, alibi_bias, attention, visible
from mpt_eqx.ops.blockwise_attention import blockwise_attention
from mpt_eqx.ops.cudnn_attention import cudnn_attention, supports_cudnn
from mpt_eqx.ops.flash_attention import flash_attention, supports_flash_attention
from mpt_eqx.ops.kernel_attention import kernel_attention, supports_cpu_kernel
from mpt_eqx.ops.layer_cache import KeysValues, LayerCache
from mpt_eqx.ops.layout import Layout
from mpt_eqx.ops.platform import MAX_DECODE_ROWS, is_default
from mpt_eqx.ops.query_blocks import in_query_blocks
from mpt_eqx.ops.sizes import at_most
from mpt_eqx.ops.switches import library_switches


def attend(
    q: Float[Array, "N T H"],
    kv: KeysValues | LayerCache,
    query_pos: Int[Array, " T"],
    *,
    scale: float,
    slopes: Float32[Array, " N"] | None = None,
    allowed: Bool[Array, "T T"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: eqx.nn.Dropout | None = None,
    key: PRNGKeyArray | None = None,
    tap: Tap | None = None,
    layout: Layout | None = None,
) -> Float[Array, "N T H"]:
    """Returns what the queries of N heads gather from K heads of keys and values; head n reads key head ⌊n·K/N⌋.

    Args:
        q: queries.
        kv: the keys and values of the same T positions, or a cache that has them among others.
        query_pos: positions of the queries, one after another without a cache; in a cache, also where their keys are.
        scale: factor on q·k.
        slopes: of ALiBi; None for none.
        allowed: True where a query may see a key, causality apart; None for all. Only without a cache.
        window: how many keys before its own a query sees; None for all.
        softcap: as in `attention`.
        dropout: as in `attention`. Only without a cache.
        key: as in `attention`.
        tap: as in `attention`, for the scores and weights of all N heads; the formula is then used for a cache, too.
        layout: of the model, if it is on a mesh.
    """
    # The queries that share a key head stand as more positions of that head.
    shape, key_heads = q.shape, kv.k.shape[-3]
    grouped = q.reshape(key_heads, -1, q.shape[-1])

    def bias_and_mask(
        slopes: Float32[Array, " N"] | None,
        query_pos: Int[Array, " T"],
        key_pos: Int[Array, " S"],
        allowed: Bool[Array, "T S"] | None = None,
    ) -> tuple[Float32[Array, "K GT S"] | None, Bool[Array, "GT S"]]:
        bias = None if slopes is None else alibi_bias(slopes, query_pos, key_pos)
        mask = visible(query_pos, key_pos, window)
        if allowed is not None:
            mask &= allowed
        if (groups := shape[0] // key_heads) > 1:
            bias = None if bias is None else bias.reshape(key_heads, -1, bias.shape[-1])
            mask = jnp.tile(mask, (groups, 1))
        return bias, mask

    def of_groups(place: str, x: Float[Array, "K GT S"]) -> Float[Array, "K GT S"]:
        assert tap is not None
        return tap(place, x.reshape(*shape[:2], -1)).reshape(x.shape)

    tapped = None if tap is None else of_groups
    if isinstance(kv, KeysValues):

        def formula(
            q: Float[Array, "N T H"], k: Array, v: Array, query_pos: Array, key_pos: Array, allowed: Array | None
        ) -> Float[Array, "N T H"]:
            bias, mask = bias_and_mask(slopes, query_pos, key_pos, allowed)
            grouped = q.reshape(key_heads, -1, q.shape[-1])
            h = attention(grouped, k, v, bias, mask, scale, softcap=softcap, dropout=dropout, key=key, tap=tapped)
            return h.reshape(q.shape)

        if tap is not None or (dropout is not None and key is not None):
            return formula(q, kv.k, kv.v, query_pos, query_pos, allowed)

        def in_blocks_of_queries(q: Float[Array, "N T H"], k: Array, v: Array) -> Float[Array, "N T H"]:
            return in_query_blocks(formula, q, k, v, query_pos, allowed, window)

        if not supports_flash_attention(q, kv.k, slopes, allowed, softcap, layout):
            return in_blocks_of_queries(q, kv.k, kv.v)
        flash = functools.partial(flash_attention, slopes=slopes, scale=scale, window=window, layout=layout)
        return jax.lax.platform_dependent(q, kv.k, kv.v, cuda=flash, default=in_blocks_of_queries)
    capacity = kv.k.shape[-2]
    # A query that stands outside of the cache sees nothing, and gets NaN.
    query_pos = jnp.where((query_pos >= 0) & (query_pos < capacity), query_pos, -1)

    def by_xla(
        q: Float[Array, "K GT H"], kv: LayerCache, slopes: Float32[Array, " N"] | None, query_pos: Int[Array, " T"]
    ) -> Float[Array, "K GT H"]:
        made, length = functools.partial(bias_and_mask, slopes, query_pos), jnp.max(query_pos) + 1

        def in_blocks() -> Float[Array, "K GT H"]:
            return blockwise_attention(q, kv, made, length, scale, softcap=softcap)

        def by_cudnn() -> Float[Array, "K GT H"]:
            rows = kv.rows(0, capacity)
            bias, mask = made(jnp.arange(capacity))
            h = cudnn_attention(q, rows.k, rows.v, bias, mask, length, scale)
            return jnp.where(jnp.any(mask, axis=-1)[:, None], h, jnp.nan)

        def whole() -> Float[Array, "K GT H"]:
            rows = kv.rows(0, capacity)
            bias, mask = made(jnp.arange(capacity))
            v = jnp.where(jnp.any(mask, axis=0)[:, None], rows.v, 0)  # 0 · NaN is NaN
            return attention(q, rows.k, v, bias, mask, scale, softcap=softcap, masked_score=-jnp.inf)

        if supports_cudnn(q, capacity, softcap):
            return jax.lax.platform_dependent(cuda=by_cudnn, default=in_blocks)
        # On a GPU a loop of unknown length over blocks is many small operations, one after another.
        few = at_most(query_pos.shape[0], MAX_DECODE_ROWS) and is_default("gpu")
        return jax.lax.platform_dependent(cuda=whole, rocm=whole, default=in_blocks) if few else in_blocks()

    @jax.custom_jvp
    def from_cache(
        q: Float[Array, "K GT H"], kv: LayerCache, slopes: Float32[Array, " N"] | None, query_pos: Int[Array, " T"]
    ) -> Float[Array, "K GT H"]:
        # What JAX lowers for cuDNN asks for the devices of the program, which it is not told within `by_platform`.
        if supports_cpu_kernel(q, kv, softcap) and not supports_cudnn(q, capacity, softcap):
            return kernel_attention(q, kv, slopes, query_pos, scale, window, by_xla)
        return by_xla(q, kv, slopes, query_pos)

    @library_switches()
    def by_formula(
        q: Float[Array, "K GT H"], kv: LayerCache, slopes: Float32[Array, " N"] | None, query_pos: Int[Array, " T"]
    ) -> Float[Array, "K GT H"]:
        bias, mask = bias_and_mask(slopes, query_pos, jnp.arange(capacity))
        # What no query sees may be anything, and 0 · NaN is NaN: in sums, and in the derivatives of products.
        seen, rows = jnp.any(mask, axis=0)[:, None], kv.rows(0, capacity)
        k, v = jnp.where(seen, rows.k, 0), jnp.where(seen, rows.v, 0)
        return attention(q, k, v, bias, mask, scale, softcap=softcap, masked_score=-jnp.inf, tap=tapped)

    if tapped is not None:
        return by_formula(grouped, kv, slopes, query_pos).reshape(shape)

    # Derivatives are those of the formula: neither the kernel nor a loop of unknown length has any in reverse mode.
    from_cache.defjvp(lambda primals, tangents: jax.jvp(by_formula, primals, tangents))
    return from_cache(grouped, kv, slopes, query_pos).reshape(shape)
