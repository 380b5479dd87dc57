"""What callers may ask for: checks on the host, before anything is traced, each with a message of its own."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key, PRNGKeyArray

from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import GenerationError
from mpt_eqx.generation.choose import SamplingOptions
from mpt_eqx.model.mpt import max_len_hint


def check_options(
    config: MPTConfig,
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
) -> SamplingOptions:
    """Returns the options as arrays, None as what changes nothing; arguments as in `generate`.

    Raises:
        GenerationError: one of them is not valid.
    """
    v = config.vocab_size
    ends = check_ends(eos_token_ids, v)
    check_count("max_new_tokens", max_new_tokens)
    check_number("temperature", temperature, "a finite number ≥ 0", lambda t: 0 <= t < math.inf)
    for name, count in (("top_k", top_k), ("no_repeat_ngram_size", no_repeat_ngram_size), ("vocab_size", vocab_size)):
        if count is not None:
            check_count(name, count)
    for name, p in (("top_p", top_p), ("typical_p", typical_p)):
        if p is not None:
            check_number(name, p, f"a number with 0 < {name} ≤ 1", lambda p: 0 < p <= 1)
    if min_p is not None:
        check_number("min_p", min_p, "a number with 0 ≤ min_p ≤ 1", lambda p: 0 <= p <= 1)
    if repetition_penalty is not None:
        check_number("repetition_penalty", repetition_penalty, "a finite number > 0", lambda r: 0 < r < math.inf)
    check_count("min_new_tokens", min_new_tokens, least=0)
    if min_new_tokens > max_new_tokens:
        raise GenerationError(
            f"min_new_tokens: expected at most max_new_tokens={max_new_tokens}, found {min_new_tokens}"
        )
    if vocab_size is not None and vocab_size > v:
        raise GenerationError(
            f"vocab_size: expected at most the model's {v}, found {vocab_size}; the tokenizer is not this model's"
        )
    check_ids("pad_token_id", [pad_token_id], v)
    # One shape for up to eight ends, so that their number does not compile again.
    ends += (-1,) * (max(8, power_of_two(len(ends))) - len(ends))

    # By numpy and device_put, because jnp.asarray would compile something.
    def real(value: float | None, neutral: float) -> Array:
        return jax.device_put(np.float32(neutral if value is None else value))

    def whole(value: int | None, neutral: int) -> Array:
        return jax.device_put(np.int32(neutral if value is None else min(value, 2**31 - 1)))

    return SamplingOptions(
        temperature=real(temperature, 0),
        top_k=whole(top_k, v),
        top_p=real(top_p, 1),
        min_p=real(min_p, 0),
        typical_p=real(typical_p, 1),
        repetition_penalty=real(repetition_penalty, 1),
        no_repeat_ngram_size=whole(no_repeat_ngram_size, 0),
        min_new_tokens=whole(min_new_tokens, 0),
        max_new_tokens=whole(max_new_tokens, 1),
        vocab_size=whole(vocab_size, v),
        eos_token_ids=jax.device_put(np.asarray(ends, np.int32)),
        pad_token_id=whole(pad_token_id, 0),
    )


def check_key(key: PRNGKeyArray | None, temperature: float) -> Key[Array, ""]:
    """Returns the key, made typed if it is one of `jax.random.PRNGKey`; any key where none is needed.

    Raises:
        GenerationError: it is no key, or tokens are to be drawn and there is none.
    """
    if key is None and temperature > 0:
        raise GenerationError(f"key: expected a key, such as jax.random.key(0), with temperature={temperature}")
    if key is None:
        return jax.random.key(0)
    if isinstance(key, jax.Array):
        if key.dtype == np.uint32 and key.ndim == 1:
            key = jax.random.wrap_key_data(key)
        if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
            return key
    raise GenerationError(f"key: expected one key, such as jax.random.key(0), found {_kind(key)}")


def check_ends(ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Returns the tokens that end a row, which may come in any collection.

    Raises:
        GenerationError: there is no collection, or something else than token ids in it.
    """
    try:
        ends = np.asarray(list(ids)).tolist()
    except TypeError:
        raise GenerationError(f"eos_token_ids: expected a list of token ids, found {ids!r}") from None
    check_ids("eos_token_ids", ends, vocab_size)
    return tuple(ends)


def check_prompts(
    config: MPTConfig,
    prompts: Sequence[Sequence[int]] | Sequence[int],
    *,
    max_new_tokens: int,
    before: int = 0,
) -> list[np.ndarray]:
    """Returns the token ids of each prompt.

    Args:
        config: the model's.
        prompts: token ids of each prompt, or of one prompt.
        max_new_tokens: how many tokens are to follow.
        before: how many tokens stand before each prompt; without any, a prompt needs at least one.

    Raises:
        GenerationError: a prompt is not valid, or it would be longer than max_seq_len at the end.
    """
    rows = _as_rows(prompts)
    for number, row in enumerate(rows):
        name = f"prompts[{number}]"
        if not len(row) and not before:
            raise GenerationError(f"{name}: expected at least one token, found an empty prompt")
        check_ids(name, row.tolist(), config.vocab_size)
        if (total := before + len(row) + max_new_tokens) > config.max_seq_len:
            prefix = f"a prefix of {before} tokens, " if before else ""
            raise GenerationError(
                f"{name}: {prefix}{len(row)} tokens and max_new_tokens={max_new_tokens} exceed "
                f"max_seq_len={config.max_seq_len}; {max_len_hint(config, total)}"
            )
    return rows


def check_one_prompt(prompt: Sequence[int]) -> None:
    """Refuses what is not one prompt."""
    if not _is_list(prompt):
        raise GenerationError(f"prompt: expected a list of token ids, found {_kind(prompt)}")
    if len(prompt) and not isinstance(prompt, str) and np.ndim(prompt[0]) > 0:
        raise GenerationError(f"prompt: expected the token ids of one prompt, found {_kind(prompt[0])} in it")


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Refuses what is no token id."""
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < vocab_size:
            raise GenerationError(f"{name}: expected token ids from 0 to {vocab_size - 1}, found {token!r}")


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """Refuses what is no whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise GenerationError(f"{name}: expected a whole number ≥ {least}, found {value!r}")


def check_number(name: str, value: Any, expected: str, valid: Callable[[Any], bool]) -> None:
    """Refuses what is no number, or not a valid one."""
    array = isinstance(value, np.ndarray | jax.Array) and value.ndim == 0 and value.dtype.kind in "iuf"
    number = not isinstance(value, bool) and (array or isinstance(value, int | float | np.number))
    if not number or not valid(_single(value)):
        raise GenerationError(f"{name}: expected {expected}, found {value!r}")


def _single(value: Any) -> float:
    """Returns a number as float32 has it, which is what is computed with: there 1e39 is infinite."""
    try:
        with np.errstate(over="ignore"):
            return float(np.float32(value))
    except OverflowError:
        return math.inf


def power_of_two(n: int) -> int:
    """Returns the smallest power of two ≥ n."""
    return 1 << max(n - 1, 0).bit_length()


def _as_rows(prompts: Sequence[Sequence[int]] | Sequence[int]) -> list[np.ndarray]:
    if not _is_list(prompts):
        raise GenerationError(f"prompts: expected a list of token ids for each prompt, found {_kind(prompts)}")
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise GenerationError("prompts: expected token ids, found text; encode it with mpt_eqx.text.load_tokenizer")
    single = len(prompts) > 0 and not _is_list(prompts[0])
    rows = []
    for number, prompt in enumerate([prompts] if single else prompts):
        try:
            row = np.asarray(prompt)
        except ValueError:  # lists of several lengths in it
            raise GenerationError(f"prompts[{number}]: expected a list of whole numbers, found lists in it") from None
        rows.append(row)
        if row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)):
            raise GenerationError(f"prompts[{number}]: expected a list of whole numbers, found {_kind(row)}")
    return rows


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) or (isinstance(value, np.ndarray | jax.Array) and value.ndim > 0)


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}"
    return type(value).__name__
