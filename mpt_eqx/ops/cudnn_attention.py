"""cuDNN's fused attention to a cache, for prefill on a GPU."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from mpt_eqx.ops.platform import max_cudnn_head, on_mesh
from mpt_eqx.ops.sizes import at_most

MIN_QUERIES = 32
"""Queries from which on it is used; for fewer, the bias would cost more than the blocks of keys that are read."""

MAX_BIAS_SIZE = 2**27
"""Numbers that the bias of one row may have: it is an array, of heads × queries × keys."""


def supports_cudnn(q: Float[Array, "N T H"], n_keys: int, softcap: float | None) -> bool:
    """Tells whether cuDNN computes attention for such queries on a GPU of this machine.

    Args:
        q: queries.
        n_keys: keys of the cache, seen or not.
        softcap: as in `attention`.

    Source: jax 0.10.2, jax/_src/cudnn/fused_attention_stablehlo.py, check_is_flash_attention.
    """
    n, t, h = q.shape
    # On a mesh it asks for queries, keys and values that are sharded alike, and whole along their positions.
    fits = (
        q.dtype.itemsize == 2 and h % 8 == 0 and h <= min(max_cudnn_head(), 128) and softcap is None and not on_mesh(q)
    )
    return fits and at_most(MIN_QUERIES, t) and at_most(n * t * n_keys, MAX_BIAS_SIZE)


def cudnn_attention(
    q: Float[Array, "N T H"],
    k: Float[Array, "N S H"],
    v: Float[Array, "N S H"],
    bias: Float32[Array, "N T S"] | None,
    mask: Bool[Array, "T S"],
    length: Int[Array, ""],
    scale: float,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "N T H"]:
    """Returns what `attention` does, by one kernel that keeps scores and weights in float32.

    Args:
        q: queries; each may see a key.
        k: keys; anything where no query sees them.
        v: values, likewise.
        bias: as in `attention`; rounded to the type of q.
        mask: as in `attention`.
        length: keys from it on are not read.
        scale: as in `attention`.
        implementation: of `jax.nn.dot_product_attention`.
    """

    def rows(
        q: Float[Array, "B N T H"],
        k: Float[Array, "B N S H"],
        v: Float[Array, "B N S H"],
        bias: Float[Array, "B N T S"],
        length: Int[Array, " B"],
    ) -> Float[Array, "B N T H"]:
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        h = jax.nn.dot_product_attention(
            q, k, v, bias, key_value_seq_lengths=length, scale=scale, implementation=implementation
        )
        return jnp.swapaxes(h, 1, 2)

    # The kernel has a batch axis of its own, and under vmap takes no other place for it than the first.
    @jax.custom_batching.custom_vmap
    def row(*arrays: Array) -> Float[Array, "N T H"]:
        return rows(*(x[None] for x in arrays))[0]

    @row.def_vmap
    def _(size: int, batched: list[bool], *arrays: Array) -> tuple[Float[Array, "B N T H"], bool]:
        return rows(
            *(x if there else jnp.broadcast_to(x, (size, *x.shape)) for x, there in zip(arrays, batched, strict=True))
        ), True

    # The mask is part of the bias, and any number plus NaN is NaN.
    seen = jnp.any(mask, axis=0)[:, None]
    hidden = float(jnp.finfo(q.dtype).min) / 2
    bias = jnp.where(mask, 0 if bias is None else bias, hidden)
    bias = jnp.broadcast_to(bias, (*q.shape[:2], k.shape[1])).astype(q.dtype)
    return row(q, jnp.where(seen, k, 0), jnp.where(seen, v, 0), bias, length.astype(jnp.int32))
