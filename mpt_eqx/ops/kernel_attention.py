"""Attention to a cache by the CPU kernel, where a program runs on a CPU and there is one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Shaped

from mpt_eqx.ops import cpu
from mpt_eqx.ops.layer_cache import LayerCache
from mpt_eqx.ops.platform import by_platform, on_mesh
from mpt_eqx.ops.switches import library_switches

OtherWay = Callable[[Array, LayerCache, Array | None, Array], Array]
"""The same attention by XLA, of the first four arguments of `kernel_attention`."""


def supports_cpu_kernel(q: Float[Array, "K GT H"], cache: LayerCache, softcap: float | None) -> bool:
    """Whether the kernel computes this attention: of a known number of queries, without a cap, on one device."""
    suits = isinstance(q.shape[1], int) and softcap is None and cache.dtype in cpu.DTYPES and q.dtype == cache.dtype
    return suits and cpu.available() and not on_mesh(q, cache.k)


def kernel_attention(
    q: Float[Array, "K GT H"],
    cache: LayerCache,
    slopes: Float32[Array, " N"] | None,
    query_pos: Int[Array, " T"],
    scale: float,
    window: int | None,
    by_xla: OtherWay,
) -> Float[Array, "K GT H"]:
    """Returns what `attention` does; each query reads what it sees, and its result depends on no other query.

    Args:
        q: the G · T queries of N = G · K heads, for each head of keys.
        cache: keys and values, those of the same positions among them.
        slopes: of ALiBi; None for none.
        query_pos: places in the cache; −1 for none, where the result is NaN.
        scale: as in `attention`.
        window: how many keys before its own a query sees; None for all.
        by_xla: what takes the kernel's place elsewhere. It may outlive this call, and must not keep any arrays.
    """
    dtype, numbered = cache.dtype, cache.number is not None
    heads, size = q.shape[0], q.shape[-1]

    def one(q: Array, k: Array, v: Array, slopes: Array | None, number: Array, query_pos: Array) -> Array:
        cache = LayerCache(k, v, dtype, number if numbered else None)
        return by_xla(q, cache, slopes, query_pos)

    def on_cpu(
        q: Float[Array, "B K GT H"],
        k: Shaped[Array, "B *L K S H"],
        v: Shaped[Array, "B *L K S H"],
        slopes: Float32[Array, " N"] | None,
        number: Int[Array, "*B"],
        query_pos: Int[Array, "B T"],
    ) -> Float[Array, "B K GT H"]:
        rows, queries = query_pos.shape
        in_groups = q.reshape(rows, heads, -1, queries, size).astype(jnp.float32)
        groups = in_groups.shape[2]
        slopes = jnp.zeros(heads * groups, jnp.float32) if slopes is None else slopes
        found = cpu.attention(
            in_groups, k, v, slopes.reshape(heads, groups), jnp.broadcast_to(number, (rows,)), query_pos,
            dtype=dtype, scale=scale, window=window,
        )  # fmt: skip
        return found.reshape(q.shape).astype(q.dtype)

    @jax.custom_batching.custom_vmap
    def rows(
        q: Float[Array, "B K GT H"],
        k: Shaped[Array, "B *L K S H"],
        v: Shaped[Array, "B *L K S H"],
        slopes: Float32[Array, " N"] | None,
        number: Int[Array, "*B"],
        query_pos: Int[Array, "B T"],
    ) -> Float[Array, "B K GT H"]:
        by_rows = jax.vmap(one, in_axes=(0, 0, 0, None, 0 if number.ndim else None, 0))
        result = jax.ShapeDtypeStruct(q.shape, q.dtype)
        return by_platform(result, q, k, v, slopes, number, query_pos, default=by_rows, cpu=by_rows, kernel=on_cpu)

    @rows.def_vmap
    @library_switches()
    def _(size: int, batched: list[Any], *operands: Any) -> tuple[Float[Array, "A B K GT H"], bool]:
        """Another axis becomes more rows, however many there are."""

        def flat(x: Array, there: bool) -> Array:
            x = x if there else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        slopes, number = operands[3], jnp.asarray(operands[4])
        q, k, v, query_pos = (flat(jnp.asarray(operands[place]), batched[place]) for place in (0, 1, 2, 5))
        if batched[4]:  # else it stays one number, so that a layer's keys are a slice and no gather
            number = jnp.broadcast_to(number.reshape(size, -1), (size, q.shape[0] // size)).reshape(-1)
        elif number.ndim:
            number = jnp.tile(number, size)
        return rows(q, k, v, slopes, number, query_pos).reshape(size, -1, *q.shape[1:]), True

    # Without a number the arrays have no axis of layers: XLA would not write into them in place if they got one here.
    number = jnp.zeros((), jnp.int32) if cache.number is None else cache.number.astype(jnp.int32)
    return rows(q[None], cache.k[None], cache.v[None], slopes, number, query_pos.astype(jnp.int32)[None])[0]
