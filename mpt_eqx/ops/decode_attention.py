"""Attention of a decode step: one query to a cache, by the CPU kernel where there is one."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from mpt_eqx.ops import cpu
from mpt_eqx.ops.attention import alibi_bias, visible
from mpt_eqx.ops.blockwise_attention import blockwise_attention
from mpt_eqx.ops.cpu.call import DTYPES
from mpt_eqx.ops.layer_cache import LayerCache
from mpt_eqx.ops.platform import by_platform, on_mesh


def supports_cpu_kernel(q: Float[Array, "K GT H"], cache: LayerCache, queries: int, softcap: float | None) -> bool:
    """Whether the kernel computes this attention: of one query, without a cap, on one device."""
    suits = queries == 1 and softcap is None and cache.dtype in DTYPES and q.dtype == cache.dtype
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
        position: its place.
        scale: as in `attention`.
        window: how many keys before its own it sees; None for all.
    """
    flat = jnp.zeros(q.shape[:2], jnp.float32) if slopes is None else slopes

    def by_xla(
        q: Float[Array, "K G H"],
        k: Shaped[Array, "K S H"],
        v: Shaped[Array, "K S H"],
        slopes: Float32[Array, "K G"],
        position: Int[Array, ""],
    ) -> Float[Array, "K G H"]:
        def bias_and_mask(keys: Int[Array, " S"]) -> tuple[Float32[Array, "K G S"], Bool[Array, "G S"]]:
            bias = alibi_bias(slopes.reshape(-1), position[None], keys).reshape(*slopes.shape, -1)
            return bias, jnp.tile(visible(position[None], keys, window), (slopes.shape[1], 1))

        return blockwise_attention(q, LayerCache(k, v, cache.dtype), bias_and_mask, position + 1, scale)

    def rows(
        q: Float[Array, "B K G H"],
        k: Shaped[Array, "B K S H"],
        v: Shaped[Array, "B K S H"],
        slopes: Float32[Array, "K G"],
        position: Int[Array, " B"],
    ) -> Float[Array, "B K G H"]:
        def by_kernel(q: Array, k: Array, v: Array, slopes: Array, position: Array) -> Array:
            found = cpu.attention(
                q.astype(jnp.float32), k, v, slopes, position, dtype=cache.dtype, scale=scale, window=window
            )
            return found.astype(q.dtype)

        by_rows = jax.vmap(by_xla, in_axes=(0, 0, 0, None, 0))
        return by_platform(q, k, v, slopes, position, cpu=by_kernel, default=by_rows)

    @jax.custom_batching.custom_vmap
    def one(*arrays: Array) -> Float[Array, "K G H"]:
        q, k, v, slopes, position = arrays
        return rows(q[None], k[None], v[None], slopes, position[None])[0]

    @one.def_vmap
    def _(size: int, batched: list[bool], *arrays: Array) -> tuple[Float[Array, "B K G H"], bool]:
        q, k, v, slopes, position = (
            x if there or place == 3 else jnp.broadcast_to(x, (size, *x.shape))
            for place, (x, there) in enumerate(zip(arrays, batched, strict=True))
        )
        return rows(q, k, v, slopes, position), True

    @jax.custom_jvp
    def step(*arrays: Array) -> Float[Array, "K G H"]:
        return one(*arrays)

    @step.defjvp
    def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
        return jax.jvp(by_xla, primals, tangents)

    return step(q, cache.k, cache.v, flat, position.astype(jnp.int32))
