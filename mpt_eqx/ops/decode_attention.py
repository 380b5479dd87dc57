"""Attention of a decode step: one query to a cache, by the CPU kernel where there is one."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from mpt_eqx.ops import cpu
from mpt_eqx.ops.attention import alibi_bias, visible
from mpt_eqx.ops.blockwise_attention import blockwise_attention
from mpt_eqx.ops.layer_cache import LayerCache
from mpt_eqx.ops.platform import by_platform, on_mesh
from mpt_eqx.ops.switches import library_switches


def supports_cpu_kernel(q: Float[Array, "K GT H"], cache: LayerCache, queries: int, softcap: float | None) -> bool:
    """Whether the kernel computes this attention: of one query, without a cap, on one device."""
    suits = queries == 1 and softcap is None and cache.dtype in cpu.DTYPES and q.dtype == cache.dtype
    return suits and cpu.available() and not on_mesh(q, cache.k)


def decode_attention(
    q: Float[Array, "K G H"],
    cache: LayerCache,
    slopes: Float32[Array, "K G"] | None,
    position: Int[Array, ""],
    scale: float,
    window: int | None,
) -> Float[Array, "K G H"]:
    """Returns what `attention` does for one query in each head.

    Args:
        q: its G heads for each head of keys.
        cache: keys and values, its own among them.
        slopes: of ALiBi; None for none.
        position: its place in the cache; −1 for none, where the result is NaN.
        scale: as in `attention`.
        window: how many keys before its own it sees; None for all.
    """
    # The functions below may outlive this call, and must not keep its arrays.
    dtype, numbered = cache.dtype, cache.number is not None
    slopes = jnp.zeros(q.shape[:2], jnp.float32) if slopes is None else slopes

    def by_xla(
        q: Float[Array, "K G H"],
        k: Shaped[Array, "L K S H"],
        v: Shaped[Array, "L K S H"],
        slopes: Float32[Array, "K G"],
        number: Int[Array, ""],
        position: Int[Array, ""],
    ) -> Float[Array, "K G H"]:
        def bias_and_mask(keys: Int[Array, " S"]) -> tuple[Float32[Array, "K G S"], Bool[Array, "G S"]]:
            bias = alibi_bias(slopes.reshape(-1), position[None], keys).reshape(*slopes.shape, -1)
            return bias, jnp.tile(visible(position[None], keys, window), (slopes.shape[1], 1))

        cache = LayerCache(k, v, dtype, number) if numbered else LayerCache(k[0], v[0], dtype)
        return blockwise_attention(q, cache, bias_and_mask, position + 1, scale)

    @jax.custom_batching.custom_vmap
    def rows(
        q: Float[Array, "B K G H"],
        k: Shaped[Array, "B L K S H"],
        v: Shaped[Array, "B L K S H"],
        slopes: Float32[Array, "K G"],
        number: Int[Array, "*B"],
        position: Int[Array, " B"],
    ) -> Float[Array, "B K G H"]:
        def on_cpu(q: Array, k: Array, v: Array, slopes: Array, number: Array, position: Array) -> Array:
            layer = jnp.broadcast_to(number, position.shape)
            found = cpu.attention(
                q.astype(jnp.float32), k, v, slopes, layer, position, dtype=dtype, scale=scale, window=window
            )
            return found.astype(q.dtype)

        by_rows = jax.vmap(by_xla, in_axes=(0, 0, 0, None, 0 if number.ndim else None, 0))
        result = jax.ShapeDtypeStruct(q.shape, q.dtype)
        return by_platform(result, q, k, v, slopes, number, position, default=by_rows, cpu=by_rows, kernel=on_cpu)

    @rows.def_vmap
    @library_switches()
    def _(size: int, batched: list[bool], *operands: Any) -> tuple[Float[Array, "A B K G H"], bool]:
        """Another axis becomes more rows, however many there are."""

        def flat(x: Array, there: bool) -> Array:
            x = x if there else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        arrays = [jnp.asarray(x) for x in operands]  # a constant is none yet
        q, k, v, position = (flat(arrays[place], batched[place]) for place in (0, 1, 2, 5))
        number = arrays[4]
        if batched[4]:  # else it stays one number, so that a layer's keys are a slice and no gather
            number = jnp.broadcast_to(number.reshape(size, -1), (size, q.shape[0] // size)).reshape(-1)
        elif number.ndim:
            number = jnp.tile(number, size)
        return rows(q, k, v, arrays[3], number, position).reshape(size, -1, *q.shape[1:]), True

    k, v = (cache.k, cache.v) if numbered else (cache.k[None], cache.v[None])
    number = jnp.zeros((), jnp.int32) if cache.number is None else cache.number.astype(jnp.int32)
    return rows(q[None], k[None], v[None], slopes, number, position.astype(jnp.int32)[None])[0]
