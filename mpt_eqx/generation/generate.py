"""generate and stream: checks on the host, then prefill and chunks of the decode loop."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from mpt_eqx.errors import GenerationError
from mpt_eqx.generation.choose import SamplingOptions
from mpt_eqx.generation.decode import Decoded, decode, prefill
from mpt_eqx.model import MPT
from mpt_eqx.model.mpt import longer

CHUNK = 16


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """What `generate` wrote, for B prompts and N = max_new_tokens.

    Attributes:
        tokens: the new tokens; pad_token_id after the end of a row.
        lengths: how many tokens each row has; the end-of-sequence token counts.
        finish_reasons: "stop" where a row ended by itself, "length" where max_new_tokens ended it.
        logprobs: the model's log-probability of each token, in nats, before any warping; 0 after the end.
        logits: the unwarped logits each token was chosen from; 0 after the end; None unless asked for.
    """

    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, " B"]
    finish_reasons: list[str]
    logprobs: Float[np.ndarray, "B N"]
    logits: Float[np.ndarray, "B N V"] | None


def generate(
    model: MPT,
    prompts: Sequence[Sequence[int]] | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    key: PRNGKeyArray | None = None,
    return_logits: bool = False,
) -> GenerateResult:
    """Continues prompts of any lengths; a row's result does not depend on the rows beside it.

    Compiled once for each batch size, power of two above the longest prompt, and power of two above prompt plus
    max_new_tokens; no other argument compiles again.

    Args:
        model: the model.
        prompts: token ids of each prompt, or of one prompt.
        max_new_tokens: how many tokens to write at most, ≥ 1.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn with a key.
        top_k: draw from the k likeliest tokens only, ≥ 1.
        top_p: draw from the fewest likeliest tokens with this probability together only, 0 < top_p ≤ 1.
        eos_token_ids: tokens that end a row.
        pad_token_id: what `tokens` holds after the end.
        key: randomness; row i draws from fold_in(key, i). Needed when temperature > 0.
        return_logits: keep the logits of every step, B·N·V float32 numbers.

    Raises:
        GenerationError: an argument or a prompt is not valid, prompt and new tokens exceed max_seq_len, or the model
            gave NaN or infinite logits.
    """
    run = _Run(model, prompts, max_new_tokens, temperature, top_k, top_p, eos_token_ids, pad_token_id, key)
    rows, v = len(run.prompts), model.config.vocab_size
    tokens = np.full((rows, max_new_tokens), pad_token_id, np.int32)
    logprobs = np.zeros((rows, max_new_tokens), np.float32)
    logits = np.zeros((rows, max_new_tokens, v), np.float32) if return_logits else None
    start = 0
    for chunk in run.chunks(min(CHUNK, _power_of_two(max_new_tokens)), return_logits):
        n = min(len(chunk.tokens), max_new_tokens - start)
        tokens[:, start : start + n] = np.asarray(chunk.tokens)[:n].T
        logprobs[:, start : start + n] = np.asarray(chunk.logprobs)[:n].T
        if logits is not None:
            logits[:, start : start + n] = np.swapaxes(np.asarray(chunk.logits)[:n], 0, 1)
        start += n
    ends = np.isin(tokens, run.eos_token_ids)
    stopped = np.any(ends, axis=1)
    lengths = np.where(stopped, np.argmax(ends, axis=1) + 1, max_new_tokens)
    return GenerateResult(
        tokens=tokens,
        lengths=lengths,
        finish_reasons=["stop" if stop else "length" for stop in stopped.tolist()],
        logprobs=logprobs,
        logits=logits,
    )


def stream(
    model: MPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    chunk_size: int = 8,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_ids: Sequence[int] = (),
    key: PRNGKeyArray | None = None,
) -> Iterator[int]:
    """Returns an iterator over the tokens that `generate` would write for one prompt, as they are made.

    Arguments are checked at once, not at the first token.

    Args:
        model: the model.
        prompt: token ids.
        max_new_tokens: as in `generate`, like the following.
        chunk_size: how many tokens are made between looks at them, ≥ 1: fewer come sooner, more come faster.
        temperature: as in `generate`.
        top_k: as in `generate`.
        top_p: as in `generate`.
        eos_token_ids: as in `generate`.
        key: as in `generate`.

    Raises:
        GenerationError: as in `generate`.
    """
    if len(prompt) and not isinstance(prompt[0], int | np.integer):
        raise GenerationError(f"prompt: expected the token ids of one prompt, found {_kind(prompt[0])} in it")
    _check_count("chunk_size", chunk_size)
    run = _Run(model, [prompt], max_new_tokens, temperature, top_k, top_p, eos_token_ids, 0, key)

    def tokens() -> Iterator[int]:
        left = max_new_tokens
        for chunk in run.chunks(chunk_size, False):
            for token in np.asarray(chunk.tokens)[:left, 0].tolist():
                yield token
                if token in run.eos_token_ids:
                    return
            left -= chunk_size

    return tokens()


class _Run:
    """One call's checked arguments, and the loop over chunks that generate and stream share."""

    def __init__(
        self,
        model: MPT,
        prompts: Sequence[Sequence[int]] | Sequence[int],
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        key: PRNGKeyArray | None,
    ):
        v = model.config.vocab_size
        _check_count("max_new_tokens", max_new_tokens)
        _check_number("temperature", temperature, "a finite number ≥ 0", lambda t: 0 <= t < math.inf)
        if top_k is not None:
            _check_count("top_k", top_k)
        if top_p is not None:
            _check_number("top_p", top_p, "a number with 0 < top_p ≤ 1", lambda p: 0 < p <= 1)
        _check_ids("pad_token_id", [pad_token_id], v)
        _check_ids("eos_token_ids", eos_token_ids, v)
        if temperature > 0 and key is None:
            raise GenerationError(f"key: expected a key, such as jax.random.key(0), with temperature={temperature}")
        self.model = model
        self.prompts = _as_rows(prompts)
        self.max_new_tokens = max_new_tokens
        self.eos_token_ids = [int(token) for token in eos_token_ids]
        for number, prompt in enumerate(self.prompts):
            name = f"prompts[{number}]"
            if not len(prompt):
                raise GenerationError(f"{name}: expected at least one token, found an empty prompt")
            _check_ids(name, prompt.tolist(), v)
            if len(prompt) + max_new_tokens > model.config.max_seq_len:
                raise GenerationError(
                    f"{name}: {len(prompt)} tokens and max_new_tokens={max_new_tokens} exceed "
                    f"max_seq_len={model.config.max_seq_len}; {longer(model.config, len(prompt) + max_new_tokens)}"
                )
        # One shape for up to eight ends, so that their number does not compile again.
        places = max(8, _power_of_two(len(self.eos_token_ids)))
        ends = [*self.eos_token_ids, *[-1] * (places - len(self.eos_token_ids))]
        self.options = SamplingOptions(
            temperature=jnp.asarray(np.float32(temperature)),
            top_k=jnp.asarray(np.int32(v if top_k is None else min(top_k, v))),
            top_p=jnp.asarray(np.float32(1.0 if top_p is None else top_p)),
            eos_token_ids=jnp.asarray(np.asarray(ends, np.int32)),
            pad_token_id=jnp.asarray(np.int32(pad_token_id)),
        )
        self.key = jax.random.key(0) if key is None else key
        if not jax.dtypes.issubdtype(self.key.dtype, jax.dtypes.prng_key):  # from jax.random.PRNGKey
            self.key = jax.random.wrap_key_data(self.key)

    def chunks(self, size: int, with_logits: bool) -> Iterator[Decoded]:
        """Yields the tokens of `size` steps at a time until every row has ended."""
        if not self.prompts:
            return
        longest = max(map(len, self.prompts))
        capacity = _bucket(longest + self.max_new_tokens)
        tokens = np.zeros((len(self.prompts), _bucket(longest)), np.int32)
        for row, prompt in zip(tokens, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        lengths = np.asarray([len(prompt) for prompt in self.prompts], np.int32)
        keys = _row_keys(self.key, jnp.asarray(np.arange(len(self.prompts))))
        state = prefill(self.model, jnp.asarray(tokens), jnp.asarray(lengths), capacity)
        fixed = (self.model, self.options, keys, jnp.asarray(np.int32(self.max_new_tokens)))
        while True:
            state, decoded = decode(fixed, state, size, with_logits)
            if (bad := int(state.first_bad_step)) >= 0:
                raise GenerationError(
                    f"the logits of new token {bad} are not finite; look for NaN or infinity in the weights with "
                    f"from_pretrained(…, check_finite=True), or use a wider dtype"
                )
            yield decoded
            if np.asarray(state.done).all():
                return


@jax.jit
def _row_keys(key: Key[Array, ""], rows: Int[Array, " B"]) -> Key[Array, " B"]:
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _bucket(n: int) -> int:
    """Returns the size that n tokens are padded to."""
    return max(32, _power_of_two(n))


def _as_rows(prompts: Sequence[Sequence[int]] | Sequence[int]) -> list[np.ndarray]:
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise GenerationError("prompts: expected token ids, found text; encode it with mpt_eqx.text.load_tokenizer")
    single = len(prompts) > 0 and np.ndim(prompts[0]) == 0
    rows = [np.asarray(row) for row in ([prompts] if single else prompts)]
    for number, row in enumerate(rows):
        if row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)):
            raise GenerationError(f"prompts[{number}]: expected a list of whole numbers, found {_kind(row)}")
    return rows


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < vocab_size:
            raise GenerationError(f"{name}: expected token ids from 0 to {vocab_size - 1}, found {token!r}")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise GenerationError(f"{name}: expected a whole number ≥ 1, found {value!r}")


def _check_number(name: str, value: object, expected: str, valid) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not valid(value):
        raise GenerationError(f"{name}: expected {expected}, found {value!r}")


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}"
    return type(value).__name__
