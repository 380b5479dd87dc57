"""generate and stream: the calls people make."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from mpt_eqx.errors import GenerationError, Interrupted
from mpt_eqx.generation.decode import spread
from mpt_eqx.generation.loop import CHUNK, agree_on_arguments, bar, chunk_for, make_tokens, read_prompts
from mpt_eqx.generation.prefix import Prefix, length_of, state_after
from mpt_eqx.generation.validate import (
    check_count,
    check_ends,
    check_key,
    check_one_prompt,
    check_options,
    check_prompts,
)
from mpt_eqx.model import MPT


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """What `generate` wrote, for B prompts and N = max_new_tokens.

    Attributes:
        tokens: the new tokens; pad_token_id after the end of a row.
        lengths: how many tokens each row has; the end-of-sequence token counts.
        finish_reasons: "stop" where a row ended by itself, "length" where max_new_tokens ended it; "interrupted" in
            what an interrupted call leaves.
        logprobs: the model's log-probability of each token, in nats, before any warping; 0 after the end.
        logits: the unwarped logits each token was chosen from; 0 after the end; None unless asked for.
        scores: from `beam_search`, the sum of the log-probabilities that the search went by over length to the power of
            length_penalty; None otherwise.
    """

    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, " B"]
    finish_reasons: list[str]
    logprobs: Float[np.ndarray, "B N"]
    logits: Float[np.ndarray, "B N V"] | None = None
    scores: Float[np.ndarray, " B"] | None = None


def generate(
    model: MPT,
    prompts: Sequence[Sequence[int]] | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    min_new_tokens: int = 0,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    vocab_size: int | None = None,
    num_return_sequences: int = 1,
    key: PRNGKeyArray | None = None,
    return_logits: bool = False,
    prefix: Prefix | None = None,
    progress: bool | None = None,
) -> GenerateResult:
    """Continues prompts of any lengths; a row's result does not depend on the rows beside it.

    Work is compiled for each batch size and each of a few sizes of the cache (512, 2048 tokens, and on in powers of
    two), whatever the lengths of the prompts; besides, for max_new_tokens below 5, with return_logits, for another
    num_return_sequences and with a prefix. How tokens are chosen never compiles again. It ends within eight tokens of
    the last row's end.

    On CPU a row of bfloat16 is the same in every bit whatever stands beside it. In float32 and float16 the reading of
    a prompt differs in the last digit with the number of rows, which shows only where two tokens are equally likely to
    that digit.

    Args:
        model: the model.
        prompts: token ids of each prompt, or of one prompt.
        max_new_tokens: how many tokens to write at most, ≥ 1.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn with a key, and the next four count.
        top_k: draw from the k likeliest tokens only, ≥ 1.
        top_p: draw from the fewest likeliest tokens with this probability together only, 0 < top_p ≤ 1.
        min_p: draw only from tokens at least min_p times as likely as the likeliest, 0 ≤ min_p ≤ 1.
        typical_p: draw from the most typical tokens with this probability together only, 0 < typical_p ≤ 1.
        repetition_penalty: above 1, tokens that the prompt or the row has already are less likely, below 1 more; > 0.
        no_repeat_ngram_size: no sequence of so many tokens comes twice in prompt and row, ≥ 1.
        min_new_tokens: before so many tokens a row does not end, ≥ 0.
        eos_token_ids: tokens that end a row.
        pad_token_id: what `tokens` holds after the end.
        vocab_size: how many ids the tokenizer has, where the model has more: those are never chosen.
        num_return_sequences: how many rows to write for each prompt, ≥ 1; more than one need temperature > 0. The rows
            of the first prompt come first.
        key: randomness; row i draws its n-th token with fold_in(fold_in(key, i), n). Needed when temperature > 0.
        return_logits: keep the logits of every step, B·N·V float32 numbers.
        prefix: what stands before every prompt, from `prefill` with this model; prompts may then be empty.
        progress: whether to show a bar on stderr when it takes over two seconds; None: where that is a terminal.

    Raises:
        GenerationError: an argument or a prompt is not valid, prompt and new tokens exceed max_seq_len, the model
            gave NaN or infinite logits, or the arguments leave no token to choose.
        Interrupted: Ctrl-C; its `result` holds what was written until then.
    """
    agree_on_arguments(locals())
    eos = check_ends(eos_token_ids, model.config.vocab_size)
    options = check_options(
        model.config,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        min_new_tokens=min_new_tokens,
        eos_token_ids=eos,
        pad_token_id=pad_token_id,
        vocab_size=vocab_size,
    )
    key = check_key(key, temperature)
    check_count("num_return_sequences", num_return_sequences)
    max_new_tokens, num_return_sequences = int(max_new_tokens), int(num_return_sequences)  # numpy's are welcome
    if num_return_sequences > 1 and temperature == 0:
        raise GenerationError(
            f"num_return_sequences: expected 1 with temperature=0, found {num_return_sequences}; all of them would be "
            "the same, so draw with temperature > 0 or use beam_search"
        )
    before = length_of(prefix)
    texts = check_prompts(model.config, prompts, max_new_tokens=max_new_tokens, before=before)
    rows, longest = len(texts) * num_return_sequences, max(map(len, texts), default=0)
    tokens = np.full((rows, max_new_tokens), pad_token_id, np.int32)
    logprobs = np.zeros((rows, max_new_tokens), np.float32)
    logits = np.zeros((rows, max_new_tokens, model.config.vocab_size), np.float32) if return_logits else None
    made = 0

    def result(unfinished: str) -> GenerateResult:
        ends = np.isin(tokens[:, :made], eos)
        stopped = np.any(ends, axis=1)
        lengths = np.where(stopped, np.argmax(ends, axis=1) + 1, made) if made else np.zeros(rows, np.int64)
        reasons = ["stop" if stop else unfinished for stop in stopped.tolist()]
        return GenerateResult(tokens, lengths, reasons, logprobs, logits)

    if not rows:
        return result("length")
    chunk = chunk_for(CHUNK, max_new_tokens)
    try:
        with bar(longest + max_new_tokens, progress) as shown:
            state = state_after(model, prefix, len(texts), before + longest + min(chunk, max_new_tokens))
            state = read_prompts(model, state, texts, before, shown)
            if num_return_sequences > 1:
                state = spread(state, num_return_sequences, state.cache.capacity)
            for decoded in make_tokens(
                model, state, options, key, length=before + longest, max_new_tokens=max_new_tokens, chunk=chunk,
                with_logits=return_logits,
            ):  # fmt: skip
                here = slice(made, made + len(decoded.tokens))
                tokens[:, here] = decoded.tokens.T
                logprobs[:, here] = decoded.logprobs.T
                if logits is not None and decoded.logits is not None:
                    logits[:, here] = np.swapaxes(decoded.logits, 0, 1)
                made = here.stop
                shown.update(len(decoded.tokens))
    except KeyboardInterrupt:
        raise Interrupted(result("interrupted")) from None
    made = max_new_tokens  # what rows that ended early were not given is padding
    return result("length")


def stream(
    model: MPT,
    prompt: Sequence[int],
    *,
    chunk_size: int = CHUNK,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    min_new_tokens: int = 0,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    vocab_size: int | None = None,
    key: PRNGKeyArray | None = None,
    prefix: Prefix | None = None,
) -> Iterator[int]:
    """Returns an iterator over the tokens that `generate` would write for one prompt, as they are made.

    Arguments are checked at once, not at the first token.

    Args:
        model: the model.
        prompt: token ids.
        chunk_size: how many tokens are made between looks at them, ≥ 1: fewer come sooner, more come faster.
        max_new_tokens: as in `generate`.
        temperature: as in `generate`.
        top_k: as in `generate`.
        top_p: as in `generate`.
        min_p: as in `generate`.
        typical_p: as in `generate`.
        repetition_penalty: as in `generate`.
        no_repeat_ngram_size: as in `generate`.
        min_new_tokens: as in `generate`.
        eos_token_ids: as in `generate`.
        pad_token_id: taken so that both can be given the same options; a stream ends instead.
        vocab_size: as in `generate`.
        key: as in `generate`.
        prefix: as in `generate`.

    Raises:
        GenerationError: as in `generate`.
    """
    agree_on_arguments(locals())
    check_one_prompt(prompt)
    check_count("chunk_size", chunk_size)
    ends = check_ends(eos_token_ids, model.config.vocab_size)
    options = check_options(
        model.config,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        min_new_tokens=min_new_tokens,
        eos_token_ids=ends,
        pad_token_id=pad_token_id,
        vocab_size=vocab_size,
    )
    key = check_key(key, temperature)
    max_new_tokens = int(max_new_tokens)
    chunk = chunk_for(int(chunk_size), max_new_tokens)
    before = length_of(prefix)
    (text,) = check_prompts(model.config, [prompt], max_new_tokens=max_new_tokens, before=before)
    length = before + len(text)

    def tokens() -> Iterator[int]:
        with bar(len(text), False) as hidden:
            state = state_after(model, prefix, 1, length + min(chunk, max_new_tokens))
            state = read_prompts(model, state, [text], before, hidden)
        for decoded in make_tokens(
            model, state, options, key, length=length, max_new_tokens=max_new_tokens, chunk=chunk
        ):
            for token in decoded.tokens[:, 0].tolist():
                yield token
                if token in ends:
                    return

    return tokens()
