"""generate and stream: from prompts to new tokens."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from mpt_eqx.errors import GenerationError, Interrupted
from mpt_eqx.generation.buckets import DECODE_CHUNK, cache_bucket, decode_bucket
from mpt_eqx.generation.interrupts import held_interrupts
from mpt_eqx.generation.prefix import Prefix, initial_state, like_rows, prefix_length
from mpt_eqx.generation.prompts import prefill_prompts, progress_bar
from mpt_eqx.generation.sampling import LogitsProcessor
from mpt_eqx.generation.sampling_params import SamplingOptions, SamplingParams, check_options
from mpt_eqx.generation.state import DecodeState, is_large, repeat_and_resize, with_edits
from mpt_eqx.generation.steps import compile_decode, decode_tokens
from mpt_eqx.generation.validate import (
    check_count,
    check_edits,
    check_key,
    check_model,
    check_one_prompt,
    check_processors,
    check_prompts,
)
from mpt_eqx.model import MPT
from mpt_eqx.model.taps import Edit
from mpt_eqx.ops.switches import each_in_host_context
from mpt_eqx.sharding.multihost import check_same_arguments


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """The output of `generate`, for B rows and N = max_new_tokens.

    Attributes:
        tokens: the new tokens; pad_token_id after the end of a row.
        lengths: how many tokens each row has; the end-of-sequence token counts.
        finish_reasons: "stop" where an end-of-sequence token ended a row, "length" where max_new_tokens did;
            "interrupted" in the result of an interrupted call.
        logprobs: the model's log-probability of each token, in nats, before any processing; 0 after the end. Of a
            16-bit model they come from logits that are rounded to its type, and are off by hundredths of a nat;
            `model(tokens, logits_dtype="float32")` does not round.
        logits: the model's logits, before any processing; 0 after the end; None unless asked for.
        scores: from `beam_search`, the sum of the log-probabilities that the search went by over length to the power of
            length_penalty; None otherwise.
    """

    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, " B"]
    finish_reasons: list[str]
    logprobs: Float[np.ndarray, "B N"]
    logits: Float[np.ndarray, "B N V"] | None = None
    scores: Float[np.ndarray, " B"] | None = None


@check_same_arguments
def generate(
    model: MPT,
    prompts: Sequence[Sequence[int]] | Sequence[int],
    *,
    max_new_tokens: int,
    num_return_sequences: int = 1,
    key: PRNGKeyArray | None = None,
    return_logits: bool = False,
    logits_processors: Sequence[LogitsProcessor] = (),
    edits: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
    prefix: Prefix | None = None,
    until: Callable[[int, list[int]], bool] | None = None,
    progress: bool | None = None,
    **options: Unpack[SamplingOptions],
) -> GenerateResult:
    """Continues prompts of any lengths; a row's result does not depend on the rest of the batch.

    A program is compiled for each batch size and each of a few cache sizes (512, 2048 tokens, then powers of two; 256,
    too, from eight rows on), whatever the lengths of the prompts; further ones for max_new_tokens below 5, and for the
    first use of return_logits, of another num_return_sequences, of a prefix and of other logits_processors; on a GPU,
    which waits for the host at each branch, for each set of options that are not their defaults. Other values of the
    options never recompile. Decoding ends within eight tokens of the last row's end, on a GPU within sixteen.

    Where the CPU kernel runs, a row's logits are the same to the bit in any batch. Elsewhere they differ by rounding,
    about 1e-5 in float32, which changes a token only where two are equally likely to within that.

    Args:
        model: the model.
        prompts: token ids of each prompt, or of one prompt.
        max_new_tokens: at most so many tokens are decoded for each row, ≥ 0.
        num_return_sequences: rows for each prompt, ≥ 1; more than one need temperature > 0. The rows of the first
            prompt come first.
        key: randomness, needed when temperature > 0; row i draws its n-th token with fold_in(fold_in(key, i), n). Or an
            array of keys, one for each row, which then draws with fold_in(key[i], n), whatever the other rows are.
        return_logits: keep the model's logits of every step, B·N·V float32 numbers.
        logits_processors: functions (logits Float["V"], tokens Int["S"], length Int[""]) -> Float["V"], called in this
            order for each row and step. `tokens` is the prompt with the new tokens, of which `length` count; the rest
            is padding. They come after repetition_penalty, no_repeat_ngram_size, min_new_tokens and vocab_size, and
            before temperature and the filters, as in transformers; −inf bans a token. JAX traces them, once for each
            function object and cache size: keep the object to compile once. A processor that is an `eqx.Module` may
            change its arrays without compiling again.
        edits: of activations by place, as in `interp.run`; or a list of them, or None, for each prompt. Positions count
            from the start of the prefix or prompt, and apply to what the call computes; `interp.Add(vector,
            positions=slice(len(prompt), None))` steers the new tokens. New numbers never compile again.
        prefix: what stands before every prompt, from `prefill` with this model; prompts may then be empty.
        until: a function of a row's number and its new tokens, called after each; True ends the row there, as an
            end-of-sequence token does.
        progress: whether to show a bar on stderr when it takes over two seconds; None: where that is a terminal.
        **options: how tokens are chosen, greedily by default: temperature, top_k, top_p, min_p, typical_p,
            epsilon_cutoff, eta_cutoff, repetition_penalty, no_repeat_ngram_size, min_new_tokens, eos_token_ids,
            pad_token_id and vocab_size, as `SamplingParams` describes them.

    Raises:
        GenerationError: an argument or a prompt is not valid, prompt and new tokens exceed max_seq_len, logits are NaN
            or infinite, or the arguments leave no token to choose.
        Interrupted: Ctrl-C; its `result` holds what was decoded until then.
    """
    model = check_model(model)
    params = check_options(model.config, max_new_tokens, options, least=0)
    processors = check_processors(logits_processors, model.config.vocab_size)
    if until is not None and not callable(until):
        raise GenerationError(f"until: expected a function of a row's number and tokens, found {type(until).__name__}")
    temperature, pad_token_id = float(params.temperature), int(params.pad_token_id)
    check_count("num_return_sequences", num_return_sequences)
    max_new_tokens, num_return_sequences = int(max_new_tokens), int(num_return_sequences)  # numpy's are welcome
    if num_return_sequences > 1 and temperature == 0:
        raise GenerationError(
            f"num_return_sequences: expected 1 with temperature=0, found {num_return_sequences}; all of them would be "
            "the same, so draw with temperature > 0 or use beam_search"
        )
    before = prefix_length(prefix)
    rows = check_prompts(model.config, prompts, max_new_tokens=max_new_tokens, before=before)
    edited = check_edits(model.config, edits, [before + len(row) + max_new_tokens for row in rows], before)
    count, longest = len(rows) * num_return_sequences, max(map(len, rows), default=0)
    key = check_key(key, temperature, count)
    tokens = np.full((count, max_new_tokens), pad_token_id, np.int32)
    logprobs = np.zeros((count, max_new_tokens), np.float32)
    logits = np.zeros((count, max_new_tokens, model.config.vocab_size), np.float32) if return_logits else None
    decoded, endless = 0, max_new_tokens + 1
    until_ends = np.full(count, endless)  # how many tokens a row has that `until` ended

    def result(unfinished: str) -> GenerateResult:
        ends = np.isin(tokens[:, :decoded], params.eos_token_ids)
        stopped = np.any(ends, axis=1) | (until_ends < endless)
        lengths = np.where(np.any(ends, axis=1), np.argmax(ends, axis=1) + 1, decoded) if decoded else until_ends * 0
        reasons = ["stop" if stop else unfinished for stop in stopped.tolist()]
        return GenerateResult(tokens, np.minimum(lengths, until_ends), reasons, logprobs, logits)

    def end_of(row: int, here: slice, until: Callable[[int, list[int]], bool]) -> int:
        for n in range(here.start, here.stop):
            if tokens[row, n] in params.eos_token_ids or until(row, tokens[row, : n + 1].tolist()):
                return n + 1
        return endless

    if not rows or not max_new_tokens:
        return result("length")
    chunk = decode_bucket(DECODE_CHUNK, max_new_tokens)
    try:
        with progress_bar(longest + max_new_tokens, progress) as shown:
            room = before + longest + min(chunk, max_new_tokens)
            state = new_state(
                model, prefix, (len(rows), num_return_sequences), room, edited, params, key, chunk=chunk,
                with_logits=return_logits, processors=processors,
            )  # fmt: skip
            state = prefill_prompts(model, state, rows, before, shown)
            if num_return_sequences > 1:
                with held_interrupts():
                    state = repeat_and_resize(state, num_return_sequences, cache_bucket(model.config, room, count))
            for output in decode_tokens(
                model, state, params.of_rows(count), key, length=before + longest, max_new_tokens=max_new_tokens,
                chunk=chunk, with_logits=return_logits, processors=processors,
            ):  # fmt: skip
                here = slice(decoded, decoded + len(output.tokens))
                tokens[:, here] = output.tokens.T
                logprobs[:, here] = output.logprobs.T
                if logits is not None and output.logits is not None:
                    logits[:, here] = np.swapaxes(output.logits, 0, 1)
                decoded = here.stop
                shown.update(len(output.tokens))
                if until is not None:
                    for row in np.flatnonzero(until_ends == endless).tolist():
                        until_ends[row] = end_of(row, here, until)
                    beyond = np.arange(max_new_tokens) >= until_ends[:, None]
                    tokens[beyond], logprobs[beyond] = pad_token_id, 0
                    if logits is not None:
                        logits[beyond] = 0
                    if (until_ends < endless).all():
                        break
    except KeyboardInterrupt:
        raise Interrupted(result("interrupted")) from None
    decoded = max_new_tokens  # where all rows ended early, the rest is padding
    return result("length")


@check_same_arguments
def stream(
    model: MPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    chunk_size: int = DECODE_CHUNK,
    key: PRNGKeyArray | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    edits: Mapping[str, Any] | None = None,
    prefix: Prefix | None = None,
    **options: Unpack[SamplingOptions],
) -> Iterator[int]:
    """Returns an iterator over the tokens that `generate` returns for one prompt, as they are decoded.

    Arguments are checked at the call, not at the first token. The iterator ends after an end-of-sequence token;
    pad_token_id is taken so that both functions take the same options.

    Args:
        model: the model.
        prompt: token ids.
        max_new_tokens: as in `generate`, like the arguments below.
        chunk_size: decode steps between two host syncs, ≥ 1: a small number has less latency, a large one less
            overhead.
        key: randomness.
        logits_processors: functions of the logits.
        edits: of activations.
        prefix: what stands before the prompt.
        **options: how tokens are chosen.

    Raises:
        GenerationError: as in `generate`.
    """
    check_one_prompt(prompt)
    check_count("chunk_size", chunk_size)
    model = check_model(model)
    params = check_options(model.config, max_new_tokens, options, caller="stream", least=0)
    processors = check_processors(logits_processors, model.config.vocab_size)
    key = check_key(key, float(params.temperature))
    max_new_tokens = int(max_new_tokens)
    chunk = decode_bucket(int(chunk_size), max_new_tokens)
    before = prefix_length(prefix)
    (row,) = check_prompts(model.config, [prompt], max_new_tokens=max_new_tokens, before=before)
    edited = check_edits(model.config, edits, [before + len(row) + max_new_tokens], before)
    length, eos = before + len(row), set(params.eos_token_ids.tolist())

    def tokens() -> Iterator[int]:
        if not max_new_tokens:
            return
        with progress_bar(len(row), False) as hidden:
            state = new_state(
                model, prefix, (1, 1), length + min(chunk, max_new_tokens), edited, params, key, chunk=chunk,
                with_logits=False, processors=processors,
            )  # fmt: skip
            state = prefill_prompts(model, state, [row], before, hidden)
        for output in decode_tokens(
            model, state, params.of_rows(1), key, length=length, max_new_tokens=max_new_tokens, chunk=chunk,
            processors=processors,
        ):  # fmt: skip
            for token in output.tokens[:, 0].tolist():
                yield token
                if token in eos:
                    return

    return each_in_host_context(tokens())


def new_state(
    model: MPT,
    prefix: Prefix | None,
    rows: tuple[int, int],
    room: int,
    edited: Sequence[Mapping[str, tuple[Edit, ...]]],
    params: SamplingParams,
    key: PRNGKeyArray,
    *,
    chunk: int,
    with_logits: bool,
    processors: tuple[LogitsProcessor, ...],
) -> DecodeState:
    """Returns the state before the prompts, with room for tokens; before a large cache is made, decoding is compiled.

    What compiling takes is free again by then. Of the rows the first number is of prompts, the second how many rows
    each becomes after it; `compile_decode` tells of the other arguments.
    """
    count = math.prod(rows)
    capacity = cache_bucket(model.config, room, count)
    if is_large(model, count, capacity) and model.layout is None and not any(edited):
        with held_interrupts():
            compile_decode(
                model, like_rows(model, prefix, *rows, capacity), params.of_rows(count), key, chunk=chunk,
                with_logits=with_logits, processors=processors,
            )  # fmt: skip
    return with_edits(model, initial_state(model, prefix, rows[0], room), edited)
