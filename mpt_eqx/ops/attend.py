"""Attention, in the way that fits: the formula, blocks of a cache, cuDNN, or the CPU kernel."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from mpt_eqx.ops.attention import alibi_bias, attention, visible
from mpt_eqx.ops.blockwise_attention import blockwise_attention
from mpt_eqx.ops.cudnn_attention import cudnn_attention, supports_cudnn
from mpt_eqx.ops.decode_attention import decode_attention, supports_cpu_kernel
from mpt_eqx.ops.layer_cache import KeysValues, LayerCache
from mpt_eqx.ops.platform import by_platform


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
) -> Float[Array, "N T H"]:
    """Returns what the queries of N heads gather from K heads of keys and values; head n reads key head ⌊n·K/N⌋.

    Args:
        q: queries.
        kv: the keys and values of the same T positions, or a cache that has them among others.
        query_pos: positions of the queries; in a cache, also where their keys are.
        scale: factor on q·k.
        slopes: of ALiBi; None for none.
        allowed: True where a query may see a key, causality apart; None for all. Only without a cache.
        window: how many keys before its own a query sees; None for all.
        softcap: as in `attention`.
        dropout: as in `attention`. Only without a cache.
        key: as in `attention`.
    """
    shape, groups = q.shape, q.shape[0] // kv.k.shape[0]
    # The queries that share a key head stand as more positions of that head.
    q = q.reshape(kv.k.shape[0], -1, q.shape[-1])

    def bias_and_mask(key_pos: Int[Array, " S"]) -> tuple[Float32[Array, "K GT S"] | None, Bool[Array, "GT S"]]:
        bias = None if slopes is None else alibi_bias(slopes, query_pos, key_pos)
        mask = visible(query_pos, key_pos, window)
        if allowed is not None:
            mask &= allowed
        if groups > 1:
            bias = None if bias is None else bias.reshape(q.shape[0], -1, bias.shape[-1])
            mask = jnp.tile(mask, (groups, 1))
        return bias, mask

    if isinstance(kv, KeysValues):
        h = attention(q, kv.k, kv.v, *bias_and_mask(query_pos), scale, softcap=softcap, dropout=dropout, key=key)
    elif supports_cpu_kernel(q, kv, shape[1], softcap):
        grouped = None if slopes is None else slopes.reshape(q.shape[0], -1)
        h = decode_attention(q, kv, grouped, query_pos[0], scale, window)
    else:
        length, capacity = query_pos[-1] + 1, kv.k.shape[-2]

        def in_blocks() -> Float[Array, "K GT H"]:
            return blockwise_attention(q, kv, bias_and_mask, length, scale, softcap=softcap)

        def by_cudnn() -> Float[Array, "K GT H"]:
            rows = kv.rows(0, capacity)
            return cudnn_attention(q, rows.k, rows.v, *bias_and_mask(jnp.arange(capacity)), length, scale)

        fused = supports_cudnn(q, capacity, softcap)
        h = by_platform(cuda=by_cudnn, default=in_blocks) if fused else in_blocks()
    return h.reshape(shape)
