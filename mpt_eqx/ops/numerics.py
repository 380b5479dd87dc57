"""Rounding and sums. Each function rounds once, to the type of x, as the references do.

Under jit XLA may leave a rounding out and keep more precision.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from mpt_eqx.ops import cpu
from mpt_eqx.ops.platform import MAX_DECODE_ROWS, by_platform, on_mesh
from mpt_eqx.ops.sizes import at_most

ROUNDED = "rounded"
"""What `jax.checkpoint` knows the results of `rounded` by."""


def accum_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the type that sums and functions are computed in: float32, or float64 for float64."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def rounded(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """Returns the result of a linear map in a type; for a gradient this may be kept, in place of the wider sums."""
    return checkpoint_name(x.astype(dtype), ROUNDED)


def scale(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """Returns factor · x; the factor itself is not rounded to the type of x."""
    return (x.astype(accum_dtype(x.dtype)) * factor).astype(x.dtype)


def softcap(x: Float[Array, "*shape"], cap: float) -> Float[Array, "*shape"]:
    """Returns cap · tanh(x / cap), rounded after each of the three steps.

    Args:
        x: scores or logits.
        cap: the largest magnitude that may come out, > 0.

    Source: llm-foundry 0.22, llmfoundry/models/layers/attention.py, scaled_multihead_dot_product_attention.
    """
    h = (x.astype(accum_dtype(x.dtype)) / cap).astype(x.dtype)
    h = jnp.tanh(h.astype(accum_dtype(x.dtype))).astype(x.dtype)
    return scale(h, cap)


def mean(x: Float[Array, "*T D"]) -> Float[Array, "*T 1"]:
    """Returns the mean over the last axis, which stays as an axis of size 1.

    In a decode step on a CPU with the kernel it is summed in a fixed order, because there a row's result does not
    depend on the rest of the batch, and XLA would sum few rows in another order than many.
    """
    rows = x.shape[-2] if x.ndim > 1 else 1
    if at_most(rows, MAX_DECODE_ROWS) and cpu.available() and not on_mesh(x):
        return _decode_mean(x)
    return _mean(x)


def tree_sum(x: Float[Array, "*T D"]) -> Float[Array, "*T 1"]:
    """Returns the sum over the last axis, sixteenth by sixteenth: the same order for any number of rows."""
    *rows, _ = x.shape
    while x.shape[-1] > 1:
        missing = -x.shape[-1] % 16
        whole = jnp.concatenate([x, jnp.zeros((*rows, missing), x.dtype)], axis=-1) if missing else x
        parts = whole.reshape(*rows, 16, -1)
        x = functools.reduce(jnp.add, [parts[..., i, :] for i in range(16)])
    return x


def apply_dropout(
    x: Float[Array, "*shape"], dropout: eqx.nn.Dropout | None, key: PRNGKeyArray | None
) -> Float[Array, "*shape"]:
    """Returns x after dropout, where there is one and a key is given; with p = 1 all is 0, in value and gradient."""
    if dropout is None or key is None or dropout.inference:
        return x
    return jnp.zeros_like(x) if dropout.p == 1 else dropout(x, key=key)


def _mean(x: Float[Array, "*T D"]) -> Float[Array, "*T 1"]:
    return jnp.mean(x, axis=-1, keepdims=True)


@jax.custom_jvp
def _fixed_order_mean(x: Float[Array, "*T D"]) -> Float[Array, "*T 1"]:
    result = jax.ShapeDtypeStruct((*x.shape[:-1], 1), x.dtype)
    return by_platform(result, x, default=_mean, cpu=lambda x: tree_sum(x) / x.shape[-1])


@_fixed_order_mean.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return jax.jvp(_mean, primals, tangents)


_decode_mean = jax.jit(_fixed_order_mean)  # traced and lowered once for all norms of a model
