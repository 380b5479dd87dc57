"""Sampling: pure functions on the logits of one row. Entries that are filtered out become −∞."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


def temperature(logits: Float[Array, " V"], t: float | Float32[Array, ""]) -> Float[Array, " V"]:
    """Returns logits / t, for a temperature t > 0."""
    return logits / jnp.asarray(t, logits.dtype)


def top_k(logits: Float[Array, " V"], k: int | Int[Array, ""]) -> Float[Array, " V"]:
    """Returns the k ≥ 1 largest logits, and all that equal the k-th; k ≥ V keeps every one."""
    descending = jnp.sort(logits, descending=True)
    kth = descending[jnp.clip(k, 1, logits.shape[0]) - 1]
    return jnp.where(logits >= kth, logits, -jnp.inf)


def top_p(logits: Float[Array, " V"], p: float | Float32[Array, ""]) -> Float[Array, " V"]:
    """Returns the fewest largest logits whose probabilities sum to p or more, 0 ≤ p ≤ 1; always at least one.

    Among equal logits at the border, those with the lower index stay.
    """
    order = jnp.argsort(logits, descending=True, stable=True)
    probs = jax.nn.softmax(logits[order].astype(jnp.float32))
    before = jnp.cumsum(probs) - probs
    # p = 1 keeps all, whatever the sum is rounded to.
    kept_in_order = (before < p) | (p >= 1) | (jnp.arange(logits.shape[0]) == 0)
    kept = jnp.zeros(logits.shape, bool).at[order].set(kept_in_order)
    return jnp.where(kept, logits, -jnp.inf)
