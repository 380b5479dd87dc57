"""beam_search: the call people make, and its loop on the host."""

import math
from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mpt_eqx.errors import GenerationError, Interrupted
from mpt_eqx.generation.beam_step import (
    BeamState,
    Grown,
    SearchOptions,
    first_beams,
    no_sequences,
    search,
    with_beams,
    written,
)
from mpt_eqx.generation.choose import SamplingOptions
from mpt_eqx.generation.decode import spread
from mpt_eqx.generation.generate import GenerateResult
from mpt_eqx.generation.loop import (
    CHUNK,
    agree_on_arguments,
    bar,
    check_finite,
    chunk_for,
    everywhere,
    read_prompts,
    with_room,
)
from mpt_eqx.generation.prefix import Prefix, length_of, state_after
from mpt_eqx.generation.validate import check_count, check_ends, check_number, check_options, check_prompts
from mpt_eqx.model import MPT


def beam_search(
    model: MPT,
    prompts: Sequence[Sequence[int]] | Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    num_return_sequences: int = 1,
    repetition_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    min_new_tokens: int = 0,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    vocab_size: int | None = None,
    prefix: Prefix | None = None,
    progress: bool | None = None,
) -> GenerateResult:
    """Searches for the likeliest continuations of prompts of any lengths, as transformers' beam search does.

    At each step the num_beams likeliest beginnings of a prompt's continuation go on, and those among them that end are
    kept aside. A sequence's score is the sum of its log-probabilities over its length to the power of length_penalty;
    the length counts new tokens only, and the end among them. repetition_penalty acts on log-probabilities here, so
    that it is felt otherwise than in `generate`, and then the score has the sum of these penalised log-probabilities.

    A prompt's result does not depend on the prompts beside it. Work is compiled for each number of prompts and of
    beams, and as in `generate` for each of a few sizes of the cache; no other argument compiles again.

    Args:
        model: the model.
        prompts: token ids of each prompt, or of one prompt.
        num_beams: how many beginnings go on, ≥ 1; the cache has as many rows for each prompt.
        max_new_tokens: how many tokens to write at most, ≥ 1.
        length_penalty: above 0 favours long sequences, below 0 short ones; max_new_tokens to its power is at most 1e30,
            and at least 1e-30.
        early_stopping: when a prompt's search ends, num_beams sequences having ended: True, at once; False, when the
            best beam, as it is, scores no more than the worst of them; "never", when it could not even at
            max_new_tokens.
        num_return_sequences: how many rows to return for each prompt, the best first, from 1 to num_beams. The rows of
            the first prompt come first.
        repetition_penalty: as in `generate`.
        no_repeat_ngram_size: as in `generate`.
        min_new_tokens: as in `generate`.
        eos_token_ids: as in `generate`.
        pad_token_id: as in `generate`.
        vocab_size: as in `generate`.
        prefix: as in `generate`.
        progress: as in `generate`.

    Returns:
        A result with `scores`.

    Raises:
        GenerationError: an argument or a prompt is not valid, prompt and new tokens exceed max_seq_len, the model
            gave NaN or infinite logits, or the arguments leave fewer sequences than are to be returned.
        Interrupted: Ctrl-C; its `result` holds the best sequences until then, ended or not.
    """
    agree_on_arguments(locals())
    ends = check_ends(eos_token_ids, model.config.vocab_size)
    choice = check_options(
        model.config,
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        min_new_tokens=min_new_tokens,
        eos_token_ids=ends,
        pad_token_id=pad_token_id,
        vocab_size=vocab_size,
    )
    options = search_options(choice, max_new_tokens, length_penalty, early_stopping)
    check_count("num_beams", num_beams)
    check_count("num_return_sequences", num_return_sequences)
    if num_return_sequences > num_beams:
        raise GenerationError(
            f"num_return_sequences: expected at most num_beams={num_beams}, found {num_return_sequences}"
        )
    num_beams, max_new_tokens = int(num_beams), int(max_new_tokens)
    before = length_of(prefix)
    texts = check_prompts(model.config, prompts, max_new_tokens=max_new_tokens, before=before)
    longest, made = max(map(len, texts), default=0), 0
    chunk = chunk_for(CHUNK, max_new_tokens)
    sequences, steps = jax.device_get(no_sequences(len(texts), num_beams)), list[Grown]()

    def result() -> GenerateResult:
        best = jax.tree.map(lambda x: x[:, :num_return_sequences], sequences)
        tokens, logprobs = written(best, steps, max_new_tokens, pad_token_id)
        stopped = np.isin(best.tokens, ends) & (best.lengths > 0)
        unfinished = np.where(best.lengths == max_new_tokens, "length", "interrupted")
        return GenerateResult(
            tokens=tokens.reshape(-1, max_new_tokens),
            lengths=best.lengths.ravel().astype(np.int64),
            finish_reasons=np.where(stopped, "stop", unfinished).ravel().tolist(),
            logprobs=logprobs.reshape(-1, max_new_tokens),
            scores=best.scores.ravel(),
        )

    if not texts:
        return result()
    try:
        with bar(longest + max_new_tokens, progress) as shown:
            rows = state_after(model, prefix, len(texts), before + longest + min(chunk, max_new_tokens))
            rows = read_prompts(model, rows, texts, before, shown)
            if num_beams > 1:
                rows = spread(rows, num_beams, rows.cache.capacity)
            options, done = everywhere(model, options), np.zeros(1, bool)
            state = BeamState(rows, *everywhere(model, first_beams(len(texts), num_beams)))
            while made < max_new_tokens and not done.all():
                needed = before + longest + min(made + chunk, max_new_tokens)
                state = eqx.tree_at(lambda s: s.rows, state, with_room(model, state.rows, needed))
                state, grown = search((model, options), state, chunk)
                sequences, beams, not_finite, done, grown = jax.device_get(
                    (state.finished, state.scores, state.rows.not_finite, state.rows.done, grown)
                )
                check_finite(not_finite)
                shown.update(min(chunk, max_new_tokens - made))
                steps.append(grown)
                made += chunk
    except KeyboardInterrupt:
        if steps:
            beams = np.where(done.reshape(beams.shape), -np.inf, beams)
            sequences = jax.device_get(with_beams(sequences, beams, steps[-1], made, options.length_penalty))
        raise Interrupted(result()) from None
    found = np.isfinite(sequences.scores).sum(axis=1)
    for number in np.flatnonzero(found < num_return_sequences):
        raise GenerationError(
            f"prompts[{number}]: found {found[number]} of num_return_sequences={num_return_sequences} sequences before "
            f"no token was left to choose from; loosen no_repeat_ngram_size, min_new_tokens or vocab_size"
        )
    return result()


def search_options(
    choice: SamplingOptions, max_new_tokens: int, length_penalty: float, early_stopping: bool | str
) -> SearchOptions:
    """Returns the options as arrays; arguments as in `beam_search`."""
    # So that its power of no length is beyond 1e30, and scores stay numbers of float32.
    most = 30 / math.log10(max(max_new_tokens, 10))
    check_number(
        "length_penalty", length_penalty, f"a number from {-most:.4g} to {most:.4g}", lambda p: -most <= p <= most
    )
    never = isinstance(early_stopping, str) and early_stopping == "never"
    if not never and not isinstance(early_stopping, bool | np.bool_):
        raise GenerationError(f'early_stopping: expected True, False or "never", found {early_stopping!r}')
    return SearchOptions(
        choice=choice,
        length_penalty=jnp.asarray(np.float32(length_penalty)),
        first_found=jnp.asarray(np.bool_(early_stopping and not never)),
        never_early=jnp.asarray(np.bool_(never)),
    )
