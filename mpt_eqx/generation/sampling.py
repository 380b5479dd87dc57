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
from mpt_eqx.ops.numerics import accum_dtype, tree_sum
from mpt_eqx.ops.platform import varying_as


def temperature(logits: Float[Array, " V"], t: float | Float32[Array, ""]) -> Float[Array, " V"]:
    """Returns logits / t, for a temperature t > 0; 1 is neutral."""
    computed = accum_dtype(logits.dtype)
    return (logits.astype(computed) / jnp.asarray(t, computed)).astype(logits.dtype)


def top_k(logits: Float[Array, " V"], k: int | Int[Array, ""]) -> Float[Array, " V"]:
    """Returns the k ≥ 1 largest logits, and all that equal the k-th; k ≥ V keeps every one."""
    return _truncate(TOP_K, logits, k)


def top_p(logits: Float[Array, " V"], p: float | Float32[Array, ""]) -> Float[Array, " V"]:
    """Returns the fewest largest logits whose probabilities sum to p or more, 0 ≤ p ≤ 1; always at least one.

    Among equal logits at the border, those with the lower index stay.
    """
    return _truncate(TOP_P, logits, p)


def min_p(logits: Float[Array, " V"], p: float | Float32[Array, ""]) -> Float[Array, " V"]:
    """Returns the logits whose probability is at least p times the largest probability, 0 ≤ p ≤ 1; 0 is neutral.

    Source: Nguyen et al. 2024, "Turning up the heat: min-p sampling", arXiv:2407.01082.
    """
    return _truncate(MIN_P, logits, p)


def typical_p(logits: Float[Array, " V"], p: float | Float32[Array, ""]) -> Float[Array, " V"]:
    """Returns the fewest logits, the most typical first, whose probabilities sum to p or more; 0 ≤ p ≤ 1, 1 is neutral.

    A token is the more typical the less its surprise −log P differs from the entropy H, the mean surprise. Tokens as
    typical as the last that is kept stay too. The likeliest token may well go.

    Source: Meister et al. 2022, "Locally typical sampling", arXiv:2202.00666.
    """
    return _truncate(TYPICAL_P, logits, p)


def epsilon_cutoff(logits: Float[Array, " V"], e: float | Float32[Array, ""]) -> Float[Array, " V"]:
    """Returns the logits whose probability is at least e, and the largest in any case; 0 ≤ e < 1, 0 is neutral.

    Source: Hewitt et al. 2022, "Truncation sampling as language model desmoothing", arXiv:2210.15191.
    """
    return _truncate(EPSILON_CUTOFF, logits, e)


def eta_cutoff(logits: Float[Array, " V"], e: float | Float32[Array, ""]) -> Float[Array, " V"]:
    """Returns the logits whose probability is at least η, and the largest in any case; 0 ≤ e < 1, 0 is neutral.

    η = min(e, √e · exp(−H)), where H is the entropy in nats: the flatter the distribution, the lower the cutoff.

    Source: Hewitt et al. 2022, "Truncation sampling as language model desmoothing", arXiv:2210.15191, with α = √ε.
    """
    return _truncate(ETA_CUTOFF, logits, e)


RULES = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
TOP_K, TOP_P, MIN_P, TYPICAL_P, EPSILON_CUTOFF, ETA_CUTOFF = range(len(RULES))


def _truncate(
    rule: int | Int[Array, ""], logits: Float[Array, " V"], value: float | Float32[Array, ""] | Int[Array, ""]
) -> Float[Array, " V"]:
    """Returns the logits that one of the six functions above keeps: one program, so that six are not compiled."""
    value, log_probs = jnp.asarray(value, jnp.float32), log_softmax(logits)
    probs, entropy = jnp.exp(log_probs), _entropy(log_probs)

    def by_mass() -> Bool[Array, " V"]:
        typicality = -jnp.abs(log_probs + entropy)
        keys = _ordered(jnp.where(rule == TYPICAL_P, typicality, logits.astype(jnp.float32)))
        kept = _highest(keys, jnp.where(rule == TOP_K, 1, probs), value, rule == TOP_P)
        # A probability of 1 keeps all, whatever the sum is rounded to.
        return kept | ((rule != TOP_K) & (value >= 1))

    def by_probability() -> Bool[Array, " V"]:
        eta = jnp.minimum(value, jnp.sqrt(value) * jnp.exp(-entropy))
        least = jnp.where(rule == MIN_P, value * probs.max(), jnp.where(rule == ETA_CUTOFF, eta, value))
        return (probs >= least) | (logits == logits.max())

    has_mass = (rule == TOP_K) | (rule == TOP_P) | (rule == TYPICAL_P)
    if isinstance(has_mass, bool):
        kept = by_mass() if has_mass else by_probability()
    else:
        kept = jax.lax.cond(has_mass, by_mass, by_probability)
    return jnp.where(kept, logits, -jnp.inf)


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
    step: Int[Array, " B"],
    processors: Sequence[LogitsProcessor] = (),
    asked: frozenset[str] | None = None,
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
        step: how many of them are new in each row.
        processors: functions of one row.
        asked: as in `sample`.
    """
    logits = _penalised(logits, params, tokens, lengths, step, asked)
    for processor in processors:
        logits = jax.vmap(processor)(logits, tokens, lengths).astype(jnp.float32)
    return logits


@functools.partial(jax.jit, static_argnames="asked")  # for all programs of generation to share what was traced
def _penalised(
    logits: Float32[Array, "B V"],
    params: SamplingParams,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    step: Int[Array, " B"],
    asked: frozenset[str] | None,
) -> Float32[Array, "B V"]:
    """Returns `process_logits` without processors."""
    ids = jnp.arange(logits.shape[-1])
    mask = jnp.arange(tokens.shape[-1]) < lengths[:, None]

    def barred(row: Float32[Array, " V"], p: SamplingParams, step: Int[Array, ""]) -> Array:
        ends = jnp.any(ids[:, None] == p.eos_token_ids, axis=-1)
        return jnp.where((ids >= p.vocab_size) | (ends & (step < p.min_new_tokens)), -jnp.inf, row)

    def some(*names: str) -> bool | None:
        return None if asked is None else not asked.isdisjoint(names)

    p = params
    penalty, size = p.repetition_penalty, p.no_repeat_ngram_size
    logits = _where(some("repetition_penalty"), penalty != 1, repetition_penalty, logits, tokens, mask, penalty)
    logits = _where(some("no_repeat_ngram_size"), size > 0, no_repeat_ngram, logits, tokens, mask, size)
    bars = (step < p.min_new_tokens) | (p.vocab_size < logits.shape[-1])
    return _where(some("min_new_tokens", "vocab_size"), bars, barred, logits, p, step)


@functools.partial(jax.jit, static_argnames="asked")  # likewise
def sample(
    logits: Float32[Array, "B V"],
    params: SamplingParams,
    key: Key[Array, "*B"],
    step: Int[Array, " B"],
    numbers: Int[Array, " B"] | None = None,
    asked: frozenset[str] | None = None,
) -> Int[Array, " B"]:
    """Returns one token for each row. It depends on the row's logits, options and number, the key and the step only.

    A row of temperature 0 takes the largest logit. Others are filtered, in transformers' order of temperature, top_k,
    top_p, min_p, typical_p, epsilon_cutoff and eta_cutoff, and drawn from.

    Args:
        logits: from `process_logits`.
        params: the options of each row.
        key: row i draws with fold_in(fold_in(key, i), step); or a key for each row, that draws with fold_in(key, step).
        step: how many new tokens each row has so far.
        numbers: i of each row; None for 0, 1, …
        asked: the options that change something in some row, as `SamplingParams.asked` returns them; None: the program
            finds out, which on a GPU takes the host to look at each step.
    """
    draws, one_key = params.temperature > 0, key.ndim == 0

    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Int[Array, " B"]:
        p = params
        warped = jax.vmap(temperature)(logits, jnp.where(draws, p.temperature, 1))
        values = jnp.stack(
            [jnp.asarray(p.top_k, jnp.float32), p.top_p, p.min_p, p.typical_p, p.epsilon_cutoff, p.eta_cutoff]
        )
        neutral = jnp.asarray([logits.shape[-1], 1, 0, 1, 0, 0], jnp.float32)[:, None]
        filtered = draws & jnp.where(neutral > 0, values < neutral, values > 0)

        def truncated(
            rule: int | Int[Array, ""], warped: Float32[Array, "B V"], some: bool | None = None
        ) -> Float32[Array, "B V"]:
            return _where(some, filtered[rule], functools.partial(_truncate, rule), warped, values[rule])

        if asked is None:
            warped = jax.lax.fori_loop(0, len(values), truncated, warped)
        else:
            for rule, name in enumerate(RULES):
                warped = truncated(rule, warped, name in asked)

        def row(
            number: Int[Array, ""], key: Key[Array, ""], step: Int[Array, ""], logits: Float32[Array, " V"]
        ) -> Int[Array, ""]:
            own = jax.random.fold_in(key, number) if one_key else key
            return jax.random.categorical(jax.random.fold_in(own, step), logits)

        rows = jnp.arange(logits.shape[0]) if numbers is None else numbers
        drawn = jax.vmap(row, in_axes=(0, None if one_key else 0, 0, 0))(rows, key, step, warped).astype(jnp.int32)
        return jnp.where(draws, drawn, greedy)

    if asked is not None:
        return draw() if "temperature" in asked else greedy
    return jax.lax.cond(jnp.any(draws), draw, lambda: greedy)


def _where(
    some: bool | None,
    asked: Bool[Array | np.ndarray, " B"],
    change: Callable[..., Float[Array, " V"]],
    logits: Float32[Array, "B V"],
    *rows: Any,
) -> Float32[Array, "B V"]:
    """Returns the logits with change(row, …) in the rows that ask for it; at no cost where none does.

    `some` says whether one does; None: it is found out.
    """

    def changed() -> Float32[Array, "B V"]:
        return jnp.where(asked[:, None], jax.vmap(change)(logits, *rows), logits)

    if some is not None:
        return changed() if some else logits
    return jax.lax.cond(jnp.any(asked), changed, lambda: logits)


def _entropy(log_probs: Float32[Array, " V"]) -> Float32[Array, ""]:
    """Returns −Σ P log P in nats; what has no probability adds nothing."""
    return -_sum(jnp.where(jnp.isneginf(log_probs), 0, jnp.exp(log_probs) * log_probs))


def log_softmax(logits: Float[Array, " V"]) -> Float32[Array, " V"]:
    """Returns the logarithms of the probabilities, as `jax.nn.log_softmax` does but for the order of the sum."""
    h = logits.astype(jnp.float32)
    h = h - h.max()
    return h - jnp.log(_sum(jnp.exp(h)))


@jax.jit
def _sum(x: Float32[Array, " V"]) -> Float32[Array, ""]:
    """Returns the sum, in an order that XLA's own sum does not keep: the same for any number of rows."""
    return tree_sum(x)[0]


def _ordered(x: Float32[Array, " V"]) -> Int[Array, " V"]:
    """Returns integers that compare as the numbers do; there must be no NaN."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    # A sign and a magnitude; so −0 becomes 0.
    return jnp.where(bits < 0, jnp.iinfo(jnp.int32).min - bits, bits)


def _highest(
    keys: Int[Array, " V"],
    weights: Float32[Array, " V"],
    enough: Float32[Array, ""],
    tell_apart: bool | Bool[Array, ""],
) -> Bool[Array, " V"]:
    """Returns the fewest entries, the highest keys first, whose weights sum to `enough` or more; all, if all have less.

    Of the entries that equal the last one, all are kept, or, where they are told apart, the first ones that suffice.
    The border is found bit by bit, the highest first, with a sum for each: the sum of fewer weights is not larger when
    it is rounded, either. It has 32 bits of a key, and 32 more of a place.
    """
    places, least = -jnp.arange(keys.shape[0], dtype=jnp.int32), jnp.asarray(jnp.iinfo(jnp.int32).min, jnp.int32)
    # More than 0, so that there is an entry in any case.
    enough = jnp.maximum(enough, jnp.finfo(jnp.float32).tiny)

    def at_least(border: tuple[Int[Array, ""], Int[Array, ""]]) -> Bool[Array, " V"]:
        return (keys > border[0]) | ((keys == border[0]) & (places >= border[1]))

    def with_next_bit(
        i: int | Int[Array, ""], border: tuple[Int[Array, ""], Int[Array, ""]]
    ) -> tuple[Int[Array, ""], Int[Array, ""]]:
        bit = jnp.left_shift(jnp.asarray(1, jnp.int32), jnp.asarray(31 - i % 32, jnp.int32))
        higher = border[0] ^ jnp.where(i < 32, bit, 0), border[1] ^ jnp.where(i < 32, 0, bit)
        fits = _sum(jnp.where(at_least(higher), weights, 0)) >= enough
        return jnp.where(fits, higher[0], border[0]), jnp.where(fits, higher[1], border[1])

    lowest = varying_as((least, least), keys, weights, enough)
    bits = (64 if tell_apart else 32) if isinstance(tell_apart, bool) else jnp.where(tell_apart, 64, 32)
    return at_least(jax.lax.fori_loop(0, bits, with_next_bit, lowest))


def _among(tokens: Int[Array, " T"], mask: Bool[Array, " T"], vocab_size: int) -> Bool[Array, " V"]:
    """Tells of each token of the vocabulary whether it is among those that the mask leaves."""
    places = jnp.where(mask, tokens.astype(jnp.int32), vocab_size)
    return jnp.zeros(vocab_size, bool).at[places].set(True, mode="drop")
