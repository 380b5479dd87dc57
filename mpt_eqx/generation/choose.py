"""Choosing one token for each row, from its logits and the options of a call.

First what may come at all: repetition_penalty, no_repeat_ngram_size, min_new_tokens, and ids below vocab_size. Then,
where tokens are drawn: temperature, top_k, top_p, min_p, typical_p. This is transformers' order.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Key

from mpt_eqx.generation import sampling


class SamplingOptions(eqx.Module):
    """How to choose tokens; every option is an array, so that another value never compiles again.

    Attributes:
        temperature: 0 takes the likeliest token, larger is more random.
        top_k: how many of the likeliest tokens are kept; ≥ V keeps all.
        top_p: probability that the kept tokens have together at least; 1 keeps all.
        min_p: tokens less likely than min_p times the likeliest are left out; 0 keeps all.
        typical_p: probability of the most typical tokens, which are kept; 1 keeps all.
        repetition_penalty: > 1 makes tokens that were there less likely; 1 leaves them.
        no_repeat_ngram_size: no sequence of so many tokens comes twice; 0 lets them.
        min_new_tokens: before so many new tokens a row does not end.
        max_new_tokens: after so many it does.
        vocab_size: ids from it on are never chosen.
        eos_token_ids: tokens that end a row; −1 fills unused places.
        pad_token_id: what follows the end.
    """

    temperature: Float32[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float32[Array, ""]
    min_p: Float32[Array, ""]
    typical_p: Float32[Array, ""]
    repetition_penalty: Float32[Array, ""]
    no_repeat_ngram_size: Int[Array, ""]
    min_new_tokens: Int[Array, ""]
    max_new_tokens: Int[Array, ""]
    vocab_size: Int[Array, ""]
    eos_token_ids: Int[Array, " E"]
    pad_token_id: Int[Array, ""]


def allowed(
    logits: Float32[Array, "B V"],
    options: SamplingOptions,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    step: Int[Array, ""],
) -> Float32[Array, "B V"]:
    """Returns the logits of what may come next; −∞ for what may not.

    Args:
        logits: logits of B rows, or their log-probabilities.
        options: how to choose.
        tokens: prompt and new tokens of each row, from place 0 on.
        lengths: how many of them there are.
        step: how many of them are new.
    """
    ids = jnp.arange(logits.shape[-1])
    there = jnp.arange(tokens.shape[-1]) < lengths[:, None]

    def penalised(row: Float32[Array, " V"], tokens: Int[Array, " S"], there: Bool[Array, " S"]) -> Array:
        return sampling.repetition_penalty(row, tokens, there, options.repetition_penalty)

    def unrepeated(row: Float32[Array, " V"], tokens: Int[Array, " S"], there: Bool[Array, " S"]) -> Array:
        return sampling.no_repeat_ngram(row, tokens, there, options.no_repeat_ngram_size)

    logits = _if(options.repetition_penalty != 1, penalised, logits, tokens, there)
    logits = _if(options.no_repeat_ngram_size > 0, unrepeated, logits, tokens, there)
    ends = jnp.any(ids[:, None] == options.eos_token_ids, axis=-1)
    barred = (ids >= options.vocab_size) | (ends & (step < options.min_new_tokens))
    return jnp.where(barred, -jnp.inf, logits)


def choose(
    logits: Float32[Array, "B V"], options: SamplingOptions, key: Key[Array, ""], step: Int[Array, ""]
) -> Int[Array, " B"]:
    """Returns one token for each row; a row's choice depends on its own logits, its number, key and step alone.

    Args:
        logits: what may come, from `allowed`.
        options: how to choose.
        key: randomness; row i draws from fold_in(fold_in(key, i), step).
        step: how many new tokens the rows have so far.
    """

    def draw() -> Int[Array, " B"]:
        warped = _if(options.temperature != 1, lambda row: sampling.temperature(row, options.temperature), logits)
        warped = _if(options.top_k < logits.shape[-1], lambda row: sampling.top_k(row, options.top_k), warped)
        warped = _if(options.top_p < 1, lambda row: sampling.top_p(row, options.top_p), warped)
        warped = _if(options.min_p > 0, lambda row: sampling.min_p(row, options.min_p), warped)
        warped = _if(options.typical_p < 1, lambda row: sampling.typical_p(row, options.typical_p), warped)

        def row(number: Int[Array, ""], logits: Float32[Array, " V"]) -> Int[Array, ""]:
            return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, number), step), logits)

        return jax.vmap(row)(jnp.arange(logits.shape[0]), warped).astype(jnp.int32)

    def likeliest() -> Int[Array, " B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(options.temperature > 0, draw, likeliest)


def _if(
    asked: Bool[Array, ""], change: Callable[..., Float32[Array, " V"]], logits: Float32[Array, "B V"], *rows: Array
) -> Float32[Array, "B V"]:
    """Returns the logits changed row by row, or untouched at no cost where the change is not asked for."""
    return jax.lax.cond(asked, lambda: jax.vmap(change)(logits, *rows), lambda: logits)
