"""beam_search: from prompts to the most probable sequences."""

import math
from collections.abc import Sequence
from typing import Literal, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mpt_eqx.errors import GenerationError, Interrupted
from mpt_eqx.generation.beam_step import (
    BeamState,
    BeamStep,
    SearchOptions,
    backtrace,
    beam_chunk,
    finalize,
    initial_beams,
    no_sequences,
)
from mpt_eqx.generation.buckets import DECODE_CHUNK, decode_bucket
from mpt_eqx.generation.generate import GenerateResult
from mpt_eqx.generation.interrupts import held_interrupts
from mpt_eqx.generation.prefix import Prefix, initial_state, prefix_length
from mpt_eqx.generation.prompts import prefill_prompts, progress_bar
from mpt_eqx.generation.sampling import LogitsProcessor
from mpt_eqx.generation.sampling_params import ProcessorOptions, SamplingParams, check_options
from mpt_eqx.generation.state import ensure_capacity, repeat_and_resize, replicate
from mpt_eqx.generation.steps import check_finite, loosen
from mpt_eqx.generation.validate import check_count, check_model, check_number, check_processors, check_prompts
from mpt_eqx.model import MPT
from mpt_eqx.sharding.multihost import check_same_arguments


@check_same_arguments
def beam_search(
    model: MPT,
    prompts: Sequence[Sequence[int]] | Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    num_return_sequences: int = 1,
    logits_processors: Sequence[LogitsProcessor] = (),
    prefix: Prefix | None = None,
    progress: bool | None = None,
    **options: Unpack[ProcessorOptions],
) -> GenerateResult:
    """Searches for the most probable continuations of prompts of any lengths, as transformers' beam search does.

    At each step the num_beams most probable beginnings of a prompt's continuation go on, and those among them that end
    are kept. A sequence's score is the sum of its log-probabilities over its length to the power of length_penalty; the
    length counts new tokens only, with the end. repetition_penalty and logits_processors act on log-probabilities here,
    and not on logits as in `generate`; the score is then the sum of the processed log-probabilities.

    A prompt's result does not depend on the rest of the batch. A program is compiled for each number of prompts and of
    beams, and as in `generate` for each of a few cache sizes; other values of the options never recompile.

    Args:
        model: the model.
        prompts: token ids of each prompt, or of one prompt.
        num_beams: beams for each prompt, ≥ 1; the cache has as many rows.
        max_new_tokens: at most so many tokens are decoded, ≥ 1.
        length_penalty: above 0 favours long sequences, below 0 short ones; max_new_tokens to its power is at most 1e30,
            and at least 1e-30.
        early_stopping: when a prompt's search ends, num_beams sequences having ended: True, at once; False, when the
            best beam, as it is, scores no more than the worst of them; "never", when it could not even at
            max_new_tokens.
        num_return_sequences: rows for each prompt, the best first, from 1 to num_beams. The rows of the first prompt
            come first.
        logits_processors: functions as in `generate`, of log-probabilities instead of logits.
        prefix: as in `generate`.
        progress: as in `generate`.
        **options: which tokens may come next: repetition_penalty, no_repeat_ngram_size, min_new_tokens, eos_token_ids,
            pad_token_id and vocab_size, as `SamplingParams` describes them.

    Returns:
        A result with `scores`.

    Raises:
        GenerationError: an argument or a prompt is not valid, prompt and new tokens exceed max_seq_len, logits are NaN
            or infinite, or the arguments leave fewer sequences than are to be returned.
        Interrupted: Ctrl-C; its `result` holds the best sequences until then, ended or not.
    """
    model = check_model(model)
    params = check_options(model.config, max_new_tokens, options, known=ProcessorOptions, caller="beam_search")
    processors = check_processors(logits_processors, model.config.vocab_size)
    search = search_options(params, max_new_tokens, length_penalty, early_stopping)
    check_count("num_beams", num_beams)
    check_count("num_return_sequences", num_return_sequences)
    if num_return_sequences > num_beams:
        raise GenerationError(
            f"num_return_sequences: expected at most num_beams={num_beams}, found {num_return_sequences}"
        )
    num_beams, max_new_tokens = int(num_beams), int(max_new_tokens)
    before = prefix_length(prefix)
    rows = check_prompts(model.config, prompts, max_new_tokens=max_new_tokens, before=before)
    longest, decoded = max(map(len, rows), default=0), 0
    chunk = decode_bucket(DECODE_CHUNK, max_new_tokens)
    sequences, steps = jax.device_get(no_sequences(len(rows), num_beams)), list[BeamStep]()

    def result() -> GenerateResult:
        best = jax.tree.map(lambda x: x[:, :num_return_sequences], sequences)
        tokens, logprobs = backtrace(best, steps, max_new_tokens, int(params.pad_token_id))
        stopped = np.isin(best.tokens, params.eos_token_ids) & (best.lengths > 0)
        unfinished = np.where(best.lengths == max_new_tokens, "length", "interrupted")
        return GenerateResult(
            tokens=tokens.reshape(-1, max_new_tokens),
            lengths=best.lengths.ravel().astype(np.int64),
            finish_reasons=np.where(stopped, "stop", unfinished).ravel().tolist(),
            logprobs=logprobs.reshape(-1, max_new_tokens),
            scores=best.scores.ravel(),
        )

    if not rows:
        return result()
    try:
        with progress_bar(longest + max_new_tokens, progress) as shown:
            start = initial_state(model, prefix, len(rows), before + longest + min(chunk, max_new_tokens))
            start = prefill_prompts(model, start, rows, before, shown)
            if num_beams > 1:
                with held_interrupts():
                    start = repeat_and_resize(start, num_beams, start.cache.capacity)
            fixed, done = (model, replicate(model, search), processors), np.zeros(1, bool)
            state = BeamState(start, *replicate(model, initial_beams(len(rows), num_beams)))
            while decoded < max_new_tokens and not done.all():
                needed = before + longest + min(decoded + chunk, max_new_tokens)
                with held_interrupts():
                    state = eqx.tree_at(lambda s: s.rows, state, ensure_capacity(model, state.rows, needed))
                    state, output = beam_chunk(fixed, state, chunk)
                    found = (state.finished, state.scores, state.rows.not_finite, state.rows.done, output)
                    found = jax.device_get(found)
                sequences, beams, bad_steps, done, output = found
                check_finite(bad_steps, processors)
                shown.update(min(chunk, max_new_tokens - decoded))
                steps.append(output)
                decoded += chunk
    except KeyboardInterrupt:
        if steps:
            beams = np.where(done.reshape(beams.shape), -np.inf, beams)
            sequences = jax.device_get(finalize(sequences, beams, steps[-1], decoded, search.length_penalty))
        raise Interrupted(result()) from None
    found = np.isfinite(sequences.scores).sum(axis=1)
    for number in np.flatnonzero(found < num_return_sequences):
        raise GenerationError(
            f"prompts[{number}]: found {found[number]} of num_return_sequences={num_return_sequences} sequences before "
            f"no token was left to choose from; {loosen(processors)}"
        )
    return result()


def search_options(
    params: SamplingParams, max_new_tokens: int, length_penalty: float, early_stopping: bool | str
) -> SearchOptions:
    """Returns the options as arrays; arguments as in `beam_search`.

    Raises:
        GenerationError: one of them is not valid.
    """
    # No length to this power is beyond 1e30, so that scores stay within float32.
    most = 30 / math.log10(max(max_new_tokens, 10))
    check_number(
        "length_penalty", length_penalty, f"a number from {-most:.4g} to {most:.4g}", lambda p: -most <= p <= most
    )
    never = isinstance(early_stopping, str) and early_stopping == "never"
    if not never and not isinstance(early_stopping, bool | np.bool_):
        raise GenerationError(f'early_stopping: expected True, False or "never", found {early_stopping!r}')
    return SearchOptions(
        params=params,
        length_penalty=jnp.asarray(np.float32(length_penalty)),
        first_found=jnp.asarray(np.bool_(early_stopping and not never)),
        never_early=jnp.asarray(np.bool_(never)),
    )
