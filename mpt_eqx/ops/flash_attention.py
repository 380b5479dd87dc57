"""cuDNN's fused attention of a sequence to itself, with ALiBi, forward and backward in memory linear in its length."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from mpt_eqx.ops.layout import Layout
from mpt_eqx.ops.numerics import accum_dtype
from mpt_eqx.ops.platform import max_cudnn_head, on_mesh
from mpt_eqx.ops.sizes import at_most

MIN_POSITIONS = 32
"""Positions from which on it is used."""

MAX_POSITIONS = 2**16
"""Positions up to which it is used with ALiBi; `with_alibi` has the error there."""

PIECES = 3
"""Numbers of 16 bits that a slope is the sum of."""

MULTIPLE = 8
"""What the kernel's head size is a multiple of."""


def supports_flash_attention(
    q: Float[Array, "N T H"],
    k: Float[Array, "K T H"],
    slopes: Float32[Array, " N"] | None,
    allowed: Bool[Array, "T T"] | None,
    softcap: float | None,
    layout: Layout | None,
) -> bool:
    """Tells whether cuDNN computes attention of such queries to as many keys on a GPU of this machine.

    It does in 16 bits, with ALiBi in bfloat16, with a window and grouped heads, on NVIDIA's GPUs: head sizes up to 128
    from Ampere on, 256 on Hopper and Blackwell (9.0 to 10.3), where ALiBi takes 6 and the sum is rounded up to 8.
    Everything else is computed in blocks of queries, in linear memory, too: float32; ALiBi in float16, whose range
    is too small for the pieces; a softcap, which comes before the bias, so that a bias within q·k would be capped;
    which keys are `allowed`, as of padding and packed sequences: `jax.nn.dot_product_attention` has no argument for
    where packed sequences begin, and takes a mask only as an array of queries × keys; on a mesh what is not sharded as
    `shards_alike` says. A forward derivative, or an export for GPUs, is not to be had of cuDNN; both raise JAX's error.

    Args:
        q: queries.
        k: keys.
        slopes: of ALiBi; None for none.
        allowed: True where a query may see a key, causality apart; None for all.
        softcap: as in `attention`.
        layout: of the model; None for none.

    Source: jax 0.10.2, 0.11.2 and 0.12.0, jax/_src/cudnn/fused_attention_stablehlo.py, check_is_flash_attention: no
    limits on the number of positions without a bias, but in training it must be even: `flash_attention` adds one.
    """
    _, t, h = q.shape
    fits = isinstance(t, int) and t >= MIN_POSITIONS and (slopes is None or at_most(t, MAX_POSITIONS))
    typed = q.dtype == jnp.bfloat16 or (q.dtype == jnp.float16 and slopes is None)
    plain = typed and allowed is None and softcap is None
    local = not on_mesh(q) if layout is None else shards_alike(q, k, layout)
    return fits and plain and local and padded_head(h, slopes is not None) <= max_cudnn_head()


def shards_alike(q: Float[Array, "N T H"], k: Float[Array, "K T H"], layout: Layout) -> bool:
    """Tells whether a mesh shards queries, keys and values alike, over rows and heads, and is the program's only one.

    JAX partitions the kernel for no others. Where the library casts Explicit axes to Auto ones, which are two meshes to
    JAX, a mesh is set; one that `jax.set_mesh` sets cannot be told from that.

    Source: jax 0.10.0, 0.10.2 and 0.12.0, jax/_src/cudnn/fused_attention_stablehlo.py, _check_qkv_bias_mask_spec;
    jax/_src/interpreters/pxla.py, lower_sharding_computation.
    """
    if layout.rules.axes("seq") or not jax.sharding.get_abstract_mesh().empty:
        return False
    return layout.sharding(q.shape, "heads", None, None) == layout.sharding(k.shape, "kv_heads", None, None)


def padded_head(head_size: int, alibi: bool) -> int:
    """Returns the head size that the kernel is given."""
    return -(-(head_size + 2 * PIECES * alibi) // MULTIPLE) * MULTIPLE


def flash_attention(
    q: Float[Array, "N T H"],
    k: Float[Array, "K T H"],
    v: Float[Array, "K T H"],
    slopes: Float32[Array, " N"] | None,
    scale: float,
    window: int | None,
    layout: Layout | None = None,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "N T H"]:
    """Returns causal attention of T positions in a row to themselves; head n reads key head ⌊n·K/N⌋.

    Scores and weights are kept in float32 by the kernel, and no array of queries × keys is made, for the gradient
    neither.

    Args:
        q: queries.
        k: keys.
        v: values.
        slopes: of ALiBi; None for none.
        scale: as in `attention`.
        window: how many keys before its own a query sees; None for all.
        layout: of the model; None for none.
        implementation: of `jax.nn.dot_product_attention`.
    """
    size = q.shape[-1]
    if slopes is not None:
        q, k = with_alibi(q, k, slopes, scale)
    padded = padded_head(size, slopes is not None)
    # The kernel has a batch axis of its own, which vmap adds to; values must be as wide as keys for that. It does not
    # train an odd number of positions; another one at the end is seen by none before it.
    t, odd = q.shape[1], q.shape[1] % 2
    q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, padded - x.shape[-1]))) for x in (q, k, v))

    def whole(x: Float[Array, "M T H"], heads: str) -> Float[Array, "M T H"]:
        # JAX partitions the kernel if q, k and v are sharded alike, and over nothing but rows and heads.
        return x if layout is None else layout.constrain_batched(x, heads, None, None)

    q, k, v = (whole(x, name)[None].swapaxes(1, 2) for x, name in ((q, "heads"), (k, "kv_heads"), (v, "kv_heads")))
    local = None if window is None or window >= t - 1 else (window, 0)
    h = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=local, implementation=implementation
    )
    return whole(h[0].swapaxes(0, 1), "heads")[:, :t, :size]


def with_alibi(
    q: Float[Array, "N T H"], k: Float[Array, "K T H"], slopes: Float32[Array, " N"], scale: float
) -> tuple[Float[Array, "N T E"], Float[Array, "K T E"]]:
    """Returns queries and keys with six more dimensions, so that scale · q kᵀ has ALiBi's bias in it.

    The bias is slope · (key − middle), which differs from `alibi_bias` by a constant per query; softmax removes it.
    The key's place counted from the middle of the sequence is 256·high + low, two integers that 8 bits hold, and
    slope/scale is the sum of three numbers of bfloat16. So the six products are exact in float32, and what errs is
    their sum, of numbers up to slope·T/2. Measured in float32, where the bias is above −20, and with the steepest slope
    of 32 heads, 0.84: 5e-5 at T = 2,048, 2.4e-4 at 8,192, 1.8e-3 at 65,536. A weight of bfloat16 errs by 2e-3 of it.

    Args:
        q: queries of T positions in a row.
        k: keys of the same positions.
        slopes: slope of each query head.
        scale: factor on q·k.

    Source: arXiv:2505.12044, section 3.
    """
    of = jnp.finfo(q.dtype)
    cut = functools.partial(jax.lax.reduce_precision, exponent_bits=of.nexp, mantissa_bits=of.nmant)
    rest, pieces = slopes.astype(accum_dtype(q.dtype)) / scale, []
    for _ in range(PIECES):
        # Not by a cast there and back, which XLA may leave out.
        pieces.append(cut(rest))
        rest = rest - pieces[-1]
    (n, t, _), key_heads = q.shape, k.shape[0]
    places = jnp.arange(t) - t // 2
    low = (places + 128) % 256 - 128
    more_q = jnp.repeat(jnp.stack(pieces, axis=-1), 2, axis=-1)
    more_k = jnp.tile(jnp.stack([places - low, low], axis=-1), PIECES)
    return (
        jnp.concatenate([q, jnp.broadcast_to(more_q[:, None], (n, t, 2 * PIECES)).astype(q.dtype)], axis=-1),
        jnp.concatenate([k, jnp.broadcast_to(more_k, (key_heads, t, 2 * PIECES)).astype(k.dtype)], axis=-1),
    )
