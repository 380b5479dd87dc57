"""Choosing a token: pure functions on the logits of one row, and `process_logits` and `sample`, which apply them.

Each function of one row does what the class of that name in transformers 5.23, generation/logits_process.py, does with
its default min_tokens_to_keep of 1. Entries that are filtered out become −∞, and those that are stay so. All are for
jit and vmap: an option may be a traced array, so that changing it never recompiles, and has a neutral value that leaves
the logits as they are. Probabilities are computed in float32 whatever the type of the logits, which the result has too.
They are summed in a fixed order, so that a row keeps the same entries alone and in a batch. Nothing is sorted: on a CPU
that takes as long for 50,000 logits as a whole step of a small model.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from mpt_eqx.generation.sampling_params import SamplingParams
from mpt_eqx.ops.numerics import accum_dtype


def temperature(logits: Float[Array, " V"], t: float | Float32[Array, ""]) -> Float[Array, " V"]:
    """Returns logits / t, for a temperature t > 0; 1 is neutral."""
    computed = accum_dtype(logits.dtype)
    return (logits.astype(computed) / jnp.asarray(t, computed)).astype(logits.dtype)


def top_k(logits: Float[Array, " V"], k: int | Int[Array, ""]) -> Float[Array, " V"]:
    """Returns the k ≥ 1 largest logits, and all that equal the k-th; k ≥ V keeps every one."""
    keys = _ordered(logits)
    kth = _border(keys, jnp.ones(logits.shape, jnp.float32), k)
    return jnp.where(keys >= kth, logits, -jnp.inf)


def top_p(logits: Float[Array, " V"], p: float | Float32[Array, ""]) -> Float[Array, " V"]:
    """Returns the fewest largest logits whose probabilities sum to p or more, 0 ≤ p ≤ 1; always at least one.

    Among equal logits at the border, those with the lower index stay.
    """
    keys, probs = _ordered(logits), _softmax(logits)
    last = _border(keys, probs, p)
    # Of the entries that equal the last one kept, the first ones, until they have what the larger ones leave of p.
    places, level = -jnp.arange(logits.shape[0], dtype=jnp.int32), keys == last
    last_place = _border(places, jnp.where(level, probs, 0), p - _tree_sum(jnp.where(keys > last, probs, 0)))
    # p = 1 keeps all, whatever the sum is rounded to.
    kept = (keys > last) | (level & (places >= last_place)) | (p >= 1)
    return jnp.where(kept, logits, -jnp.inf)


def min_p(logits: Float[Array, " V"], p: float | Float32[Array, ""]) -> Float[Array, " V"]:
    """Returns the logits whose probability is at least p times the largest probability, 0 ≤ p ≤ 1; 0 is neutral.

    Source: Nguyen et al. 2024, "Turning up the heat: min-p sampling", arXiv:2407.01082.
    """
    probs = _softmax(logits)
    return _with_probability(logits, probs, p * probs.max())


def typical_p(logits: Float[Array, " V"], p: float | Float32[Array, ""]) -> Float[Array, " V"]:
    """Returns the fewest logits, the most typical first, whose probabilities sum to p or more; 0 ≤ p ≤ 1, 1 is neutral.

    A token is the more typical the less its surprise −log P differs from the entropy H, the mean surprise. Tokens as
    typical as the last that is kept stay too. The likeliest token may well go.

    Source: Meister et al. 2022, "Locally typical sampling", arXiv:2202.00666.
    """
    log_probs = log_softmax(logits)
    typical = _ordered(-jnp.abs(log_probs + _entropy(log_probs)))
    last = _border(typical, jnp.exp(log_probs), p)
    # p = 1 keeps all, whatever the sum is rounded to.
    return jnp.where((typical >= last) | (p >= 1), logits, -jnp.inf)


def epsilon_cutoff(logits: Float[Array, " V"], e: float | Float32[Array, ""]) -> Float[Array, " V"]:
    """Returns the logits whose probability is at least e, and the largest in any case; 0 ≤ e < 1, 0 is neutral.

    Source: Hewitt et al. 2022, "Truncation sampling as language model desmoothing", arXiv:2210.15191.
    """
    return _with_probability(logits, _softmax(logits), e)


def eta_cutoff(logits: Float[Array, " V"], e: float | Float32[Array, ""]) -> Float[Array, " V"]:
    """Returns the logits whose probability is at least η, and the largest in any case; 0 ≤ e < 1, 0 is neutral.

    η = min(e, √e · exp(−H)), where H is the entropy in nats: the flatter the distribution, the lower the cutoff.

    Source: Hewitt et al. 2022, "Truncation sampling as language model desmoothing", arXiv:2210.15191, with α = √ε.
    """
    log_probs = log_softmax(logits)
    eta = jnp.minimum(e, jnp.sqrt(e) * jnp.exp(-_entropy(log_probs)))
    return _with_probability(logits, jnp.exp(log_probs), eta)


def repetition_penalty(
    logits: Float[Array, " V"],
    tokens: Int[Array, " T"],
    mask: Bool[Array, " T"],
    penalty: float | Float32[Array, ""],
) -> Float[Array, " V"]:
    """Makes the tokens that a row has already less likely, or with a penalty < 1 likelier.

    The logit of each is divided by the penalty where it is ≥ 0 and multiplied by it where it is negative, once however
    often the token occurs.

    Args:
        logits: logits of the next token.
        tokens: tokens of the row so far, from 0 to V − 1 where they count.
        mask: which of them count; the others may hold anything.
        penalty: > 0; 1 is neutral.

    Source: Keskar et al. 2019, "CTRL", arXiv:1909.05858; the case of a negative logit as in transformers 5.23.
    """
    computed = accum_dtype(logits.dtype)
    wider, factor = logits.astype(computed), jnp.asarray(penalty, computed)
    penalised = jnp.where(wider < 0, wider * factor, wider / factor).astype(logits.dtype)
    return jnp.where(_among(tokens, mask, logits.shape[0]), penalised, logits)


def no_repeat_ngram(
    logits: Float[Array, " V"], tokens: Int[Array, " T"], mask: Bool[Array, " T"], n: int | Int[Array, ""]
) -> Float[Array, " V"]:
    """Bans each token that would end a sequence of n tokens that the row has already.

    These are the tokens that followed the last n − 1 tokens wherever those stood before; n = 1 bans every token of the
    row. Nothing sees to it that a token is left. Takes memory for T + V entries, and n − 1 steps.

    Args:
        logits: logits of the next token.
        tokens: tokens of the row so far, from 0 to V − 1 where they count.
        mask: which of them count: one stretch without gaps. The others, before and after it, may hold anything.
        n: length of a sequence that must not come twice, ≥ 0; 0 is neutral.

    Source: Paulus et al. 2017, "A deep reinforced model for abstractive summarization", arXiv:1705.04304.
    """
    places = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    earlier = jnp.asarray(n, jnp.int32) - 1
    length = jnp.sum(mask, dtype=jnp.int32)
    end = jnp.max(jnp.where(mask, places, -1)) + 1

    def preceded_alike(i: Int[Array, ""], alike: Bool[Array, " T"]) -> Bool[Array, " T"]:
        return alike & (jnp.roll(tokens, i) == tokens[end - i])

    # Only places with n − 1 tokens before them, so that what a roll brings in from the other end is never looked at.
    follows = mask & (places - earlier >= end - length) & (earlier >= 0)
    # No step at all for an n that no row reaches, however large.
    steps = jnp.where(earlier < length, earlier, 0)
    follows = jax.lax.fori_loop(1, steps + 1, preceded_alike, follows)
    return jnp.where(_among(tokens, follows, logits.shape[0]), -jnp.inf, logits)


LogitsProcessor = Callable[[Float32[Array, " V"], Int[Array, " S"], Int[Array, ""]], Float[Array, " V"]]
"""What `logits_processors` takes: a function of one row's logits, tokens and number of tokens, which JAX traces."""


def process_logits(
    logits: Float32[Array, "B V"],
    params: SamplingParams,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    step: Int[Array, ""],
    processors: Sequence[LogitsProcessor] = (),
) -> Float32[Array, "B V"]:
    """Returns the logits of the tokens that may come next, −∞ for all others.

    repetition_penalty, no_repeat_ngram_size, min_new_tokens and vocab_size come first, then the processors in their
    order; so transformers does with its argument `logits_processor`. What greedy decoding takes the maximum of is this,
    and what `sample` filters.

    Args:
        logits: logits of B rows, or their log-probabilities.
        params: the options of each row.
        tokens: prompt and new tokens of each row, from place 0 on.
        lengths: how many of them there are.
        step: how many of them are new.
        processors: functions of one row.
    """
    ids = jnp.arange(logits.shape[-1])
    mask = jnp.arange(tokens.shape[-1]) < lengths[:, None]

    def barred(row: Float32[Array, " V"], p: SamplingParams) -> Array:
        ends = jnp.any(ids[:, None] == p.eos_token_ids, axis=-1)
        return jnp.where((ids >= p.vocab_size) | (ends & (step < p.min_new_tokens)), -jnp.inf, row)

    p = params
    logits = _where(p.repetition_penalty != 1, repetition_penalty, logits, tokens, mask, p.repetition_penalty)
    logits = _where(p.no_repeat_ngram_size > 0, no_repeat_ngram, logits, tokens, mask, p.no_repeat_ngram_size)
    logits = _where((step < p.min_new_tokens) | (p.vocab_size < logits.shape[-1]), barred, logits, p)
    for processor in processors:
        logits = jax.vmap(processor)(logits, tokens, lengths).astype(jnp.float32)
    return logits


def sample(
    logits: Float32[Array, "B V"], params: SamplingParams, key: Key[Array, ""], step: Int[Array, ""]
) -> Int[Array, " B"]:
    """Returns one token for each row. It depends on the row's logits, options and number, the key and the step only.

    A row of temperature 0 takes the largest logit. Others are filtered, in transformers' order of temperature, top_k,
    top_p, min_p, typical_p, epsilon_cutoff and eta_cutoff, and drawn from.

    Args:
        logits: from `process_logits`.
        params: the options of each row.
        key: row i draws with fold_in(fold_in(key, i), step).
        step: how many new tokens the rows have so far.
    """
    draws = params.temperature > 0

    def greedy() -> Int[Array, " B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Int[Array, " B"]:
        p, warped = params, logits
        warped = _where(draws & (p.temperature != 1), temperature, warped, p.temperature)
        warped = _where(draws & (p.top_k < logits.shape[-1]), top_k, warped, p.top_k)
        warped = _where(draws & (p.top_p < 1), top_p, warped, p.top_p)
        warped = _where(draws & (p.min_p > 0), min_p, warped, p.min_p)
        warped = _where(draws & (p.typical_p < 1), typical_p, warped, p.typical_p)
        warped = _where(draws & (p.epsilon_cutoff > 0), epsilon_cutoff, warped, p.epsilon_cutoff)
        warped = _where(draws & (p.eta_cutoff > 0), eta_cutoff, warped, p.eta_cutoff)

        def row(number: Int[Array, ""], logits: Float32[Array, " V"]) -> Int[Array, ""]:
            return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, number), step), logits)

        drawn = jax.vmap(row)(jnp.arange(logits.shape[0]), warped).astype(jnp.int32)
        return jnp.where(draws, drawn, greedy())

    return jax.lax.cond(jnp.any(draws), draw, greedy)


def _where(
    asked: Bool[Array | np.ndarray, " B"],
    change: Callable[..., Float[Array, " V"]],
    logits: Float32[Array, "B V"],
    *rows: Any,
) -> Float32[Array, "B V"]:
    """Returns the logits with change(row, …) in the rows that ask for it; at no cost where none does."""

    def changed() -> Float32[Array, "B V"]:
        return jnp.where(asked[:, None], jax.vmap(change)(logits, *rows), logits)

    return jax.lax.cond(jnp.any(asked), changed, lambda: logits)


def _with_probability(
    logits: Float[Array, " V"], probs: Float32[Array, " V"], least: float | Float32[Array, ""]
) -> Float[Array, " V"]:
    """Returns the logits with at least this probability, and in any case all that equal the largest."""
    return jnp.where((probs >= least) | (logits == logits.max()), logits, -jnp.inf)


def _entropy(log_probs: Float32[Array, " V"]) -> Float32[Array, ""]:
    """Returns −Σ P log P in nats; what has no probability adds nothing."""
    return -_tree_sum(jnp.where(jnp.isneginf(log_probs), 0, jnp.exp(log_probs) * log_probs))


def _softmax(logits: Float[Array, " V"]) -> Float32[Array, " V"]:
    """Returns the probabilities, as `jax.nn.softmax` does but for the order of the sum."""
    h = logits.astype(jnp.float32)
    weights = jnp.exp(h - h.max())
    return weights / _tree_sum(weights)


def log_softmax(logits: Float[Array, " V"]) -> Float32[Array, " V"]:
    """Returns the logarithms of the probabilities, as `jax.nn.log_softmax` does but for the order of the sum."""
    h = logits.astype(jnp.float32)
    h = h - h.max()
    return h - jnp.log(_tree_sum(jnp.exp(h)))


@jax.jit
def _tree_sum(x: Float32[Array, " V"]) -> Float32[Array, ""]:
    """Returns the sum, sixteenth by sixteenth: the same order for any number of rows, which XLA's sum does not keep.

    `numerics.tree_sum` halves instead, which for a vocabulary takes four times as many passes.
    """
    while x.shape[0] > 1:
        x = functools.reduce(jnp.add, jnp.pad(x, (0, -x.shape[0] % 16)).reshape(16, -1))
    return x[0]


def _ordered(x: Float[Array, " V"]) -> Int[Array, " V"]:
    """Returns integers of the same size that compare as the numbers do; there must be no NaN."""
    integer = jnp.iinfo(f"int{jnp.finfo(x.dtype).bits}")
    bits = jax.lax.bitcast_convert_type(x, integer.dtype)
    # A sign and a magnitude; so −0 becomes 0.
    return jnp.where(bits < 0, integer.min - bits, bits)


@jax.jit
def _border(
    keys: Int[Array, " V"], weights: Float32[Array, " V"], enough: float | Float32[Array, ""] | Int[Array, ""]
) -> Int[Array, ""]:
    """Returns the largest border such that the weights of the entries with keys ≥ border sum to `enough` or more.

    That is the key of an entry, or the least integer if all entries together have less. Finds the border bit by bit,
    the highest first, with a sum for each: the sum of fewer weights is not larger when it is rounded, either.
    """
    integer = jnp.iinfo(keys.dtype)
    # More than 0, so that there is an entry in any case.
    enough = jnp.maximum(jnp.asarray(enough, jnp.float32), jnp.finfo(jnp.float32).tiny)

    def with_next_bit(i: Int[Array, ""] | int, border: Int[Array, ""]) -> Int[Array, ""]:
        higher = border ^ jnp.left_shift(jnp.ones_like(border), jnp.asarray(integer.bits - 1 - i, border.dtype))
        return jnp.where(_tree_sum(jnp.where(keys >= higher, weights, 0)) >= enough, higher, border)

    return jax.lax.fori_loop(0, integer.bits, with_next_bit, jnp.asarray(integer.min, keys.dtype))


def _among(tokens: Int[Array, " T"], mask: Bool[Array, " T"], vocab_size: int) -> Bool[Array, " V"]:
    """Tells of each token of the vocabulary whether it is among those that the mask leaves."""
    places = jnp.where(mask, tokens.astype(jnp.int32), vocab_size)
    return jnp.zeros(vocab_size, bool).at[places].set(True, mode="drop")
