"""Beam search, traced: a scan over tokens in which the likeliest beginnings of each prompt's continuation go on.

The beams of prompt b are the rows b·M to b·M + M − 1. What a step keeps, drops and ends is what transformers 5.23
does in its beam search without sampling, but for two things: each prompt stands alone, and what has probability zero
is never kept, however little else there is. Checks stand in `arguments` and `beam`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from mpt_eqx.generation.choose import SamplingOptions, allowed
from mpt_eqx.generation.decode import DecodeState, append, first_step, next_logits, on_mesh, replicated
from mpt_eqx.model import MPT, KVCache
from mpt_eqx.ops.layer_cache import BLOCK


class SearchOptions(eqx.Module):
    """How to search; every option is an array, so that another value never compiles again.

    Attributes:
        choice: what may come, from its options that do not draw.
        length_penalty: the power of its length that a sequence's score is divided by.
        first_found: end as soon as there are M finished sequences.
        never_early: judge what the beams can still reach by the longest length, where that is the better for them.
    """

    choice: SamplingOptions
    length_penalty: Float32[Array, ""]
    first_found: Bool[Array, ""]
    never_early: Bool[Array, ""]


class Sequences(eqx.Module):
    """M sequences for each of B prompts, told by their last tokens.

    Attributes:
        scores: −∞ where there is none.
        lengths: how many new tokens each has.
        parents: the number of the beam, before the last token came, that holds the tokens before it.
        tokens: the last token.
        logprobs: the model's log-probability of it.
    """

    scores: Float32[Array, "B M"]
    lengths: Int[Array, "B M"]
    parents: Int[Array, "B M"]
    tokens: Int[Array, "B M"]
    logprobs: Float32[Array, "B M"]


class BeamState(eqx.Module):
    """What one step hands to the next, for B prompts with M beams each.

    Attributes:
        rows: the beams, B·M rows.
        scores: the sum of log-probabilities of each beam, the best first; −∞ where there is no beam.
        finished: the best finished sequences so far, the best first.
    """

    rows: DecodeState
    scores: Float32[Array, "B M"]
    finished: Sequences


class Grown(eqx.Module):
    """What one step added to the beams, or N of them with a leading axis: the beam each came from, and its token."""

    parents: Int[Array, "*N B M"]
    tokens: Int[Array, "*N B M"]
    logprobs: Float32[Array, "*N B M"]


def no_sequences(prompts: int, num_beams: int) -> Sequences:
    """Returns room for sequences, and none in it."""
    # Made by numpy, so that no shape costs a compilation; each array is its own, so that it can be donated.
    shape = (prompts, num_beams)
    return Sequences(
        scores=jnp.array(np.full(shape, -np.inf, np.float32)),
        lengths=jnp.array(np.zeros(shape, np.int32)),
        parents=jnp.array(np.zeros(shape, np.int32)),
        tokens=jnp.array(np.zeros(shape, np.int32)),
        logprobs=jnp.array(np.zeros(shape, np.float32)),
    )


def first_beams(prompts: int, num_beams: int) -> tuple[Float32[Array, "B M"], Sequences]:
    """Returns the scores of beams of which the first of each prompt is one as yet, and nothing finished."""
    scores = np.full((prompts, num_beams), -np.inf, np.float32)
    scores[:, 0] = 0
    return jnp.array(scores), no_sequences(prompts, num_beams)


def in_order(cache: KVCache, order: Int[Array, " R"]) -> KVCache:
    """Returns a cache of R rows with row order[i] in place of row i; what no row has filled yet stays where it is."""

    def swapped(stored: Array) -> Array:
        def block(number: Int[Array, ""], stored: Array) -> Array:
            part = jax.lax.dynamic_slice_in_dim(stored, number * BLOCK, BLOCK, axis=-2)
            return jax.lax.dynamic_update_slice_in_dim(stored, part[order], number * BLOCK, axis=-2)

        return jax.lax.fori_loop(0, (jnp.max(cache.length) + BLOCK - 1) // BLOCK, block, stored)

    layers = jax.tree.map(swapped, cache.layers)
    return eqx.tree_at(lambda c: (c.layers, c.length), cache, (layers, cache.length[order]))


@eqx.filter_jit(donate="all-except-first")
def search(fixed: tuple[MPT, SearchOptions], state: BeamState, steps: int) -> tuple[BeamState, Grown]:
    """Adds `steps` more tokens to the beams of each prompt, in one scan; nothing changes for prompts that are done.

    Args:
        fixed: the model and how to search. They stand together because all other arguments are donated.
        state: from `first_beams` or an earlier call, with room for the tokens. Donated: do not use it again.
        steps: length of the scan.
    """
    model, options = fixed
    prompts, beams = state.scores.shape

    def one(state: BeamState, _: None) -> tuple[BeamState, Grown]:
        rows, length = state.rows, state.rows.step + 1
        logits = next_logits(model, rows.hidden)
        logprobs = jax.nn.log_softmax(logits)
        open_ = allowed(logprobs, options.choice, rows.tokens, rows.cache.length, rows.step)
        totals = (state.scores.reshape(-1, 1) + open_).reshape(prompts, -1)
        ends = jnp.any(jnp.arange(logits.shape[-1])[:, None] == options.choice.eos_token_ids, axis=-1)

        done = rows.done.reshape(prompts, beams)[:, 0]
        last = length >= options.choice.max_new_tokens
        ended = best(totals, logprobs, length)
        # Only what is among the M likeliest of all may end; the M likeliest that do not end go on. transformers looks
        # for these among M·max(2, 1 + number of ends) candidates, which always hold them: no beam has more ends.
        ended = scored(ended, (ends[ended.tokens] | last) & ~done[:, None], options.length_penalty)
        finished = likeliest(ended, state.finished)
        going = best(jnp.where(jnp.tile(ends, beams), -jnp.inf, totals), logprobs, length)

        done_after = done | last | hopeless(going.scores[:, 0], finished, length, options)
        parents = jnp.where(done[:, None], jnp.arange(beams), going.parents)
        tokens = jnp.where(done[:, None], options.choice.pad_token_id, going.tokens)
        order = (parents + beams * jnp.arange(prompts)[:, None]).ravel()
        alive = jnp.isfinite(state.scores).ravel()
        bad = alive & ~jnp.all(jnp.isfinite(logits), axis=-1)
        rows = eqx.tree_at(
            lambda r: (r.cache, r.tokens, r.done, r.step, r.not_finite),
            rows,
            (
                in_order(rows.cache, order),
                rows.tokens[order],
                jnp.repeat(done_after, beams),
                length,
                first_step(rows, rows.not_finite, bad),
            ),
        )
        after = BeamState(
            rows=append(model, rows, tokens.ravel()),
            scores=jnp.where(done[:, None], state.scores, going.scores),
            finished=finished,
        )
        return after, Grown(parents, tokens, jnp.where(done[:, None], 0.0, going.logprobs))

    state, grown = jax.lax.scan(one, state, length=steps)
    told = replicated(model, (state.scores, state.finished, grown))
    return BeamState(on_mesh(model, state.rows), *told[:2]), told[2]


def best(totals: Float32[Array, "B MV"], logprobs: Float32[Array, "BM V"], length: Int[Array, ""]) -> Sequences:
    """Returns the likeliest continuations of each prompt's beams by one token.

    Args:
        totals: the sum of log-probabilities of each beam with each token; −∞ for what may not come.
        logprobs: the model's log-probabilities of the tokens.
        length: how many new tokens there are with this one.
    """
    vocab_size = logprobs.shape[-1]
    scores, places = jax.lax.top_k(totals, len(logprobs) // len(totals))
    return Sequences(
        scores=scores,
        lengths=jnp.full_like(places, length),
        parents=places // vocab_size,
        tokens=places % vocab_size,
        logprobs=jnp.take_along_axis(logprobs.reshape(totals.shape), places, axis=-1),
    )


def scored(ended: Sequences, counts: Bool[Array, "B M"], length_penalty: Float32[Array, ""]) -> Sequences:
    """Returns the sequences with their sums divided by a power of their lengths, where they count, and −∞ elsewhere.

    Source: Wu et al. 2016, "Google's neural machine translation system", arXiv:1609.08144, whose penalty is a power
    too; the plain power of the number of new tokens, the end among them, as in transformers 5.23.
    """
    scores = ended.scores / ended.lengths.astype(jnp.float32) ** length_penalty
    return eqx.tree_at(lambda s: s.scores, ended, jnp.where(counts, scores, -jnp.inf))


def likeliest(new: Sequences, before: Sequences) -> Sequences:
    """Returns the M sequences of the highest scores, the best first; of equal ones those that were there before."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), before, new)
    _, places = jax.lax.top_k(both.scores, before.scores.shape[1])
    return jax.tree.map(lambda x: jnp.take_along_axis(x, places, axis=1), both)


def hopeless(
    going: Float32[Array, " B"], finished: Sequences, length: Int[Array, ""], options: SearchOptions
) -> Bool[Array, " B"]:
    """Tells of each prompt whether its search ends: with what goes on it cannot, or need not, find anything better.

    Once there are M finished sequences, the best beam is held against the worst of them by the score that it would
    have if it ended with the log-probability it has now: at this length, or with `never_early` and a penalty above 0
    at the longest, where no beam can then reach more.

    Args:
        going: the sum of log-probabilities of the best beam that goes on.
        finished: the best finished sequences, M for each prompt.
        length: how many new tokens the beams have.
        options: how to search.

    Source: transformers 5.23.
    """
    longest = options.never_early & (options.length_penalty > 0)
    judged = jnp.where(longest, options.choice.max_new_tokens, length).astype(jnp.float32)
    reachable = going / judged**options.length_penalty
    worst = jnp.min(finished.scores, axis=1)
    return jnp.isneginf(going) | (jnp.isfinite(worst) & (options.first_found | (reachable <= worst)))


def with_beams(
    finished: Sequences,
    scores: Float32[np.ndarray, "B M"],
    last: Grown,
    length: int,
    length_penalty: Float32[Array, ""],
) -> Sequences:
    """Returns the best of finished sequences and of the beams as they are.

    Args:
        finished: the sequences.
        scores: the sum of log-probabilities of each beam; −∞ where there is none.
        last: what the last steps added to the beams.
        length: how many new tokens the beams have.
        length_penalty: as in `SearchOptions`.
    """
    finished, beams, last = jax.tree.map(jnp.asarray, (finished, scores, jax.tree.map(lambda x: x[-1], last)))
    ends = Sequences(beams, jnp.full_like(last.parents, length), last.parents, last.tokens, last.logprobs)
    return likeliest(scored(ends, jnp.isfinite(beams), length_penalty), finished)


def written(
    sequences: Sequences, steps: list[Grown], max_new_tokens: int, pad_token_id: int
) -> tuple[Int[np.ndarray, "B M N"], Float32[np.ndarray, "B M N"]]:
    """Returns the tokens of sequences and their log-probabilities, read off from the end; on the host.

    Args:
        sequences: their ends.
        steps: what was added to the beams so far.
        max_new_tokens: how many tokens to return of each.
        pad_token_id: what follows the end; with the log-probability 0.
    """
    shape = (*sequences.scores.shape, max_new_tokens)
    tokens, logprobs = np.full(shape, pad_token_id, np.int32), np.zeros(shape, np.float32)
    beams, prompts = np.asarray(sequences.parents), np.arange(len(tokens))[:, None]
    each = [jax.tree.map(lambda x, i=i: x[i], grown) for grown in steps for i in range(len(grown.tokens))]
    for step, grown in reversed(list(enumerate(each[:max_new_tokens]))):
        end, inside = sequences.lengths == step + 1, sequences.lengths > step + 1
        tokens[end, step], logprobs[end, step] = sequences.tokens[end], sequences.logprobs[end]
        tokens[inside, step] = grown.tokens[prompts, beams][inside]
        logprobs[inside, step] = grown.logprobs[prompts, beams][inside]
        beams = np.where(inside, grown.parents[prompts, beams], beams)
    return tokens, logprobs
