"""The order of rounding in low precision: as the references have it, each function rounds once, to the type of x.

Under jit XLA may leave a rounding out and keep more precision.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray


def wide(dtype: DTypeLike) -> np.dtype:
    """Returns the type that sums and functions are computed in: float32, or float64 for float64."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def scaled(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """Returns factor · x; the factor itself is not rounded to the type of x."""
    return (x.astype(wide(x.dtype)) * factor).astype(x.dtype)


def softcapped(x: Float[Array, "*shape"], cap: float) -> Float[Array, "*shape"]:
    """Returns cap · tanh(x / cap), rounded after each of the three steps.

    Args:
        x: scores or logits.
        cap: the largest magnitude that may come out, > 0.

    Source: llm-foundry 0.22, llmfoundry/models/layers/attention.py, scaled_multihead_dot_product_attention.
    """
    h = (x.astype(wide(x.dtype)) / cap).astype(x.dtype)
    h = jnp.tanh(h.astype(wide(x.dtype))).astype(x.dtype)
    return scaled(h, cap)


@jax.jit  # so that it is one operation outside of jit, too
def row_sum(x: Float[Array, "*T D"]) -> Float[Array, "*T"]:
    """Returns the sum over the last axis, half upon half, in an order that does not depend on how many rows there are.

    XLA's CPU backend splits a reduction over few rows otherwise than one over many, so that a token would be rounded
    otherwise in a batch than alone. On a mesh it is a reduction: halves of a shared axis would be sent about.
    """
    if not jax.typeof(x).sharding.mesh.empty:
        return jnp.sum(x, axis=-1)
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = jnp.concatenate([x, jnp.zeros_like(x[..., :1])], axis=-1)
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def apply_dropout(
    x: Float[Array, "*shape"], dropout: eqx.nn.Dropout | None, key: PRNGKeyArray | None
) -> Float[Array, "*shape"]:
    """Returns x after dropout, where there is one and a key is given; with p = 1 all is 0, in value and gradient."""
    if dropout is None or key is None or dropout.inference:
        return x
    return jnp.zeros_like(x) if dropout.p == 1 else dropout(x, key=key)
