"""Choosing one token for each row, from its logits and the options of a call.

`choose` applies the functions of `sampling` in the order temperature, top_k, top_p, which is transformers' order.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Key

from mpt_eqx.generation.sampling import temperature, top_k, top_p


class SamplingOptions(eqx.Module):
    """How to choose tokens; every option is an array, so that another value never compiles again.

    Attributes:
        temperature: 0 takes the likeliest token, larger is more random.
        top_k: how many of the likeliest tokens are kept; ≥ vocab_size keeps all.
        top_p: probability that the kept tokens have together at least; 1 keeps all.
        eos_token_ids: tokens that end a row; −1 fills unused places.
        pad_token_id: what follows the end.
    """

    temperature: Float32[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float32[Array, ""]
    eos_token_ids: Int[Array, " E"]
    pad_token_id: Int[Array, ""]


def choose(
    logits: Float32[Array, "B V"], options: SamplingOptions, keys: Key[Array, " B"], step: Int[Array, ""]
) -> Int[Array, " B"]:
    """Returns one token for each row; a row's choice depends on its own logits, key and step alone.

    Args:
        logits: logits of B rows.
        options: how to choose.
        keys: one key for each row.
        step: how many tokens the row has so far; each step draws anew.
    """

    def sample() -> Int[Array, " B"]:
        def row(logits: Float32[Array, " V"], key: Key[Array, ""]) -> Int[Array, ""]:
            warped = temperature(logits, options.temperature)
            warped = top_p(top_k(warped, options.top_k), options.top_p)
            return jax.random.categorical(jax.random.fold_in(key, step), warped)

        return jax.vmap(row)(logits, keys).astype(jnp.int32)

    def greedy() -> Int[Array, " B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(options.temperature > 0, sample, greedy)
