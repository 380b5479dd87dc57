"""The order of rounding in low precision: as the references have it, each function rounds once, to the type of x.

Under jit XLA may leave a rounding out and keep more precision.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float


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


def row_sum(x: Float[Array, "*T D"]) -> Float[Array, "*T"]:
    """Returns the sum over the last axis, in an order that does not depend on how many rows there are.

    XLA's CPU backend splits sums over few rows otherwise than those over many, so that a token would be rounded
    otherwise in a batch than alone. A product with ones is summed in the same order for any number of rows above one;
    a single one is therefore summed twice.
    """
    ones = jnp.ones((x.shape[-1], 2), x.dtype)
    rows = x if x.size > x.shape[-1] else jnp.stack([x, x])
    sums = jnp.matmul(rows, ones, precision="highest")[..., 0]
    return sums if rows is x else sums[0]
