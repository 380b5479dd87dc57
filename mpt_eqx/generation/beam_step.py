"""Beam search, traced: a scan over tokens in which each prompt has M beams.

The beams of prompt b are the rows b·M to b·M + M − 1. A step keeps, drops and ends what transformers 5.23 does in its
beam search without sampling, with two exceptions: prompts do not depend on each other, and what has probability zero is
never kept, however few beams are left. Arguments are checked before, in `beam_search`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from mpt_eqx.generation.sampling import LogitsProcessor, log_softmax, process_logits
from mpt_eqx.generation.sampling_params import SamplingParams
from mpt_eqx.generation.state import DecodeState, constrain, constrain_replicated
from mpt_eqx.generation.steps import decode_step, first_steps, next_logits, not_finite
from mpt_eqx.model import MPT, KVCache
from mpt_eqx.ops.layer_cache import BLOCK


class SearchOptions(eqx.Module):
    """The options of a search, as arrays, so that changing them never recompiles.

    Attributes:
        params: which tokens may come next; of one row, for all beams. What only sampling uses is ignored.
        length_penalty: a sequence's score is its sum of log-probabilities over its length to this power.
        first_found: end as soon as there are M finished sequences.
        never_early: judge what beams can still reach by the longest length, where that is better for them.
    """

    params: SamplingParams
    length_penalty: Float32[Array, ""]
    first_found: Bool[Array, ""]
    never_early: Bool[Array, ""]


class Sequences(eqx.Module):
    """M sequences for each of B prompts, as links to their last tokens.

    Attributes:
        scores: −∞ where there is no sequence.
        lengths: how many new tokens each has.
        parents: the beam, before the last step, that has the tokens before the last one.
        tokens: the last token.
        logprobs: the model's log-probability of it.
    """

    scores: Float32[Array, "B M"]
    lengths: Int[Array, "B M"]
    parents: Int[Array, "B M"]
    tokens: Int[Array, "B M"]
    logprobs: Float32[Array, "B M"]


class BeamState(eqx.Module):
    """B prompts with M beams each, between two steps.

    Attributes:
        rows: the beams, B·M rows.
        scores: the sum of log-probabilities of each beam, the best first; −∞ where there is no beam.
        finished: the best finished sequences so far, the best first.
    """

    rows: DecodeState
    scores: Float32[Array, "B M"]
    finished: Sequences


class BeamStep(eqx.Module):
    """The output of one step, or of N of them with a leading axis: for each beam its parent and its new token."""

    parents: Int[Array, "*N B M"]
    tokens: Int[Array, "*N B M"]
    logprobs: Float32[Array, "*N B M"]


def no_sequences(prompts: int, num_beams: int) -> Sequences:
    """Returns Sequences without any."""
    # Made by numpy, so that no shape costs a compilation; each array is its own, so that it can be donated.
    shape = (prompts, num_beams)
    return Sequences(
        scores=jnp.array(np.full(shape, -np.inf, np.float32)),
        lengths=jnp.array(np.zeros(shape, np.int32)),
        parents=jnp.array(np.zeros(shape, np.int32)),
        tokens=jnp.array(np.zeros(shape, np.int32)),
        logprobs=jnp.array(np.zeros(shape, np.float32)),
    )


def initial_beams(prompts: int, num_beams: int) -> tuple[Float32[Array, "B M"], Sequences]:
    """Returns the scores of the beams at the start, one for each prompt, and no finished sequences."""
    scores = np.full((prompts, num_beams), -np.inf, np.float32)
    scores[:, 0] = 0
    return jnp.array(scores), no_sequences(prompts, num_beams)


def reorder_cache(cache: KVCache, order: Int[Array, " R"]) -> KVCache:
    """Returns a cache with row order[i] in place of row i; blocks that no row has filled yet stay where they are."""

    def reordered(stored: Array) -> Array:
        def block(number: Int[Array, ""] | int, stored: Array) -> Array:
            part = jax.lax.dynamic_slice_in_dim(stored, number * BLOCK, BLOCK, axis=-2)
            return jax.lax.dynamic_update_slice_in_dim(stored, part[order], number * BLOCK, axis=-2)

        return jax.lax.fori_loop(0, (jnp.max(cache.length) + BLOCK - 1) // BLOCK, block, stored)

    layers = jax.tree.map(reordered, cache.layers)
    return eqx.tree_at(lambda c: (c.layers, c.length), cache, (layers, cache.length[order]))


@eqx.filter_jit(donate="all-except-first")
def beam_chunk(
    fixed: tuple[MPT, SearchOptions, tuple[LogitsProcessor, ...]], state: BeamState, steps: int
) -> tuple[BeamState, BeamStep]:
    """Decodes `steps` more tokens of each beam, in one scan; nothing changes for prompts that are done.

    Args:
        fixed: the model, how to search, and the functions of `logits_processors`. They stand together because all other
            arguments are donated.
        state: from `initial_beams` or an earlier call, with room for the tokens. Donated: do not use it again.
        steps: length of the scan.
    """
    model, options, processors = fixed
    prompts, beams = state.scores.shape

    def one(state: BeamState, _: None) -> tuple[BeamState, BeamStep]:
        rows, length = state.rows, jnp.max(state.rows.step) + 1
        logits = next_logits(model, rows.hidden)
        logprobs = jax.vmap(log_softmax)(logits)
        each = jax.tree.map(lambda x: jnp.broadcast_to(x, (prompts * beams, *x.shape)), options.params)
        processed = process_logits(logprobs, each, rows.tokens, rows.cache.length, rows.step, processors)
        totals = (state.scores.reshape(-1, 1) + processed).reshape(prompts, -1)
        ends = jnp.any(jnp.arange(logits.shape[-1])[:, None] == options.params.eos_token_ids, axis=-1)

        done = rows.done.reshape(prompts, beams)[:, 0]
        last = length >= options.params.max_new_tokens
        ended = top_candidates(totals, logprobs, length)
        # Only the top M candidates of all may end; the top M that do not end go on. transformers looks for these among
        # M·max(2, 1 + number of ends) candidates, which always include them: no beam has more ends.
        ended = length_penalized(ended, (ends[ended.tokens] | last) & ~done[:, None], options.length_penalty)
        finished = merge_finished(ended, state.finished)
        going = top_candidates(jnp.where(jnp.tile(ends, beams), -jnp.inf, totals), logprobs, length)

        done_after = done | last | is_done(going.scores[:, 0], finished, length, options)
        parents = jnp.where(done[:, None], jnp.arange(beams), going.parents)
        tokens = jnp.where(done[:, None], options.params.pad_token_id, going.tokens)
        order = (parents + beams * jnp.arange(prompts)[:, None]).ravel()
        alive = jnp.isfinite(state.scores).ravel()
        bad = alive & not_finite(logits, processed if processors else None)
        rows = eqx.tree_at(
            lambda r: (r.cache, r.tokens, r.done, r.step, r.not_finite),
            rows,
            (
                reorder_cache(rows.cache, order),
                rows.tokens[order],
                jnp.repeat(done_after, beams),
                rows.step + 1,
                first_steps(rows, rows.not_finite, bad),
            ),
        )
        after = BeamState(
            rows=decode_step(model, rows, tokens.ravel()),
            scores=jnp.where(done[:, None], state.scores, going.scores),
            finished=finished,
        )
        return after, BeamStep(parents, tokens, jnp.where(done[:, None], 0.0, going.logprobs))

    state, output = jax.lax.scan(one, state, length=steps)
    host = constrain_replicated(model, (state.scores, state.finished, output))
    return BeamState(constrain(model, state.rows), *host[:2]), host[2]


def top_candidates(
    totals: Float32[Array, "B MV"], logprobs: Float32[Array, "BM V"], length: Int[Array, ""]
) -> Sequences:
    """Returns the M best continuations of each prompt's beams by one token.

    Args:
        totals: the sum of log-probabilities of each beam with each token; −∞ for tokens that may not come.
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


def length_penalized(ended: Sequences, counts: Bool[Array, "B M"], length_penalty: Float32[Array, ""]) -> Sequences:
    """Returns the sequences with scores: sums over a power of their lengths, where they count, and −∞ elsewhere.

    Source: Wu et al. 2016, "Google's neural machine translation system", arXiv:1609.08144, whose penalty is a power
    too; the plain power of the number of new tokens, the end among them, as in transformers 5.23.
    """
    scores = ended.scores / ended.lengths.astype(jnp.float32) ** length_penalty
    return eqx.tree_at(lambda s: s.scores, ended, jnp.where(counts, scores, -jnp.inf))


def merge_finished(new: Sequences, before: Sequences) -> Sequences:
    """Returns the M sequences of the highest scores, the best first; of equal ones those that were there before."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), before, new)
    _, places = jax.lax.top_k(both.scores, before.scores.shape[1])
    return jax.tree.map(lambda x: jnp.take_along_axis(x, places, axis=1), both)


def is_done(
    going: Float32[Array, " B"], finished: Sequences, length: Int[Array, ""], options: SearchOptions
) -> Bool[Array, " B"]:
    """Tells of each prompt whether its search ends: its beams cannot, or need not, find anything better.

    Once there are M finished sequences, the best beam is compared with the worst of them, by the score that it would
    have if it ended with its present log-probability: at this length, or with `never_early` and a penalty above 0 at
    the longest, where no beam can reach a higher score.

    Args:
        going: the sum of log-probabilities of the best beam.
        finished: the best finished sequences, M for each prompt.
        length: how many new tokens the beams have.
        options: how to search.

    Source: transformers 5.23.
    """
    longest = options.never_early & (options.length_penalty > 0)
    judged = jnp.where(longest, options.params.max_new_tokens, length).astype(jnp.float32)
    reachable = going / judged**options.length_penalty
    worst = jnp.min(finished.scores, axis=1)
    return jnp.isneginf(going) | (jnp.isfinite(worst) & (options.first_found | (reachable <= worst)))


def finalize(
    finished: Sequences,
    scores: Float32[np.ndarray, "B M"],
    last: BeamStep,
    length: int,
    length_penalty: Float32[Array, ""],
) -> Sequences:
    """Returns the best of finished sequences and of the beams as they are.

    Args:
        finished: the sequences.
        scores: the sum of log-probabilities of each beam; −∞ where there is none.
        last: the output of the last steps.
        length: how many new tokens the beams have.
        length_penalty: as in `SearchOptions`.
    """
    finished, beams, last = jax.tree.map(jnp.asarray, (finished, scores, jax.tree.map(lambda x: x[-1], last)))
    ends = Sequences(beams, jnp.full_like(last.parents, length), last.parents, last.tokens, last.logprobs)
    return merge_finished(length_penalized(ends, jnp.isfinite(beams), length_penalty), finished)


def backtrace(
    sequences: Sequences, steps: list[BeamStep], max_new_tokens: int, pad_token_id: int
) -> tuple[Int[np.ndarray, "B M N"], Float32[np.ndarray, "B M N"]]:
    """Returns the tokens of sequences and their log-probabilities, from the last to the first; on the host.

    Args:
        sequences: the sequences.
        steps: the outputs of all steps so far.
        max_new_tokens: the length of each row that is returned.
        pad_token_id: what follows the end, with log-probability 0.
    """
    shape = (*sequences.scores.shape, max_new_tokens)
    tokens, logprobs = np.full(shape, pad_token_id, np.int32), np.zeros(shape, np.float32)
    beams, prompts = np.asarray(sequences.parents), np.arange(len(tokens))[:, None]
    each = [
        jax.tree.map(lambda x, i=i: x[i], step_output) for step_output in steps for i in range(len(step_output.tokens))
    ]
    for step, output in reversed(list(enumerate(each[:max_new_tokens]))):
        end, inside = sequences.lengths == step + 1, sequences.lengths > step + 1
        tokens[end, step], logprobs[end, step] = sequences.tokens[end], sequences.logprobs[end]
        tokens[inside, step] = output.tokens[prompts, beams][inside]
        logprobs[inside, step] = output.logprobs[prompts, beams][inside]
        beams = np.where(inside, output.parents[prompts, beams], beams)
    return tokens, logprobs
