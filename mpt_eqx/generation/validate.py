"""Checks of prompts, keys and numbers, on the host and before anything is traced; each has a message of its own."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PRNGKeyArray

from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import GenerationError, MPTError
from mpt_eqx.generation.buckets import MIN_CACHE
from mpt_eqx.interp.edits import resolve_edits
from mpt_eqx.model import MPT
from mpt_eqx.model.agreement import check_agreement
from mpt_eqx.model.leaves import with_fields
from mpt_eqx.model.mpt import max_len_hint
from mpt_eqx.model.stacked import unstack
from mpt_eqx.model.taps import Edit

MAX_INT = 2**31 - 1


def check_model(model: MPT) -> MPT:
    """Returns the model as it generates: with single blocks, and as it was before `remat`.

    Raises:
        GenerationError: its sizes are not those of its configuration.
    """
    check_agreement(model, GenerationError)
    return with_fields(unstack(model), remat="none")


def check_key(key: PRNGKeyArray | None, temperature: float, rows: int | None = None) -> Key[Array, "*B"]:
    """Returns the key as a typed one, also of `jax.random.PRNGKey`; any key where none is needed.

    Args:
        key: what was given.
        temperature: keys are needed above 0.
        rows: there may be so many keys, one for each row; None: there must be one.

    Raises:
        GenerationError: it is no key, or tokens are to be drawn and there is none.
    """
    if key is None and temperature > 0:
        given = round(temperature, 6)  # it was a float32
        raise GenerationError(f"key: expected a key, such as jax.random.key(0), with temperature={given}")
    # Not by jax.random.key(0), which compiles two programs.
    like = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    if key is None:
        numbers: Any = np.zeros(like.shape, like.dtype)
        return jax.random.wrap_key_data(numbers)
    if isinstance(key, jax.Array):
        if key.dtype == like.dtype and key.shape in (like.shape, (rows, *like.shape)):
            key = jax.random.wrap_key_data(key)
        if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape in ((), (rows,)):
            return key
    each = "" if rows is None else f", or {rows}, one for each row"
    raise GenerationError(f"key: expected one key, such as jax.random.key(0){each}, found {_kind(key)}")


def check_eos(ids: Iterable[int], vocab_size: int | None = None) -> tuple[int, ...]:
    """Returns the end-of-sequence tokens, which may come in any collection.

    Raises:
        GenerationError: it is no collection, or something in it is not a token id.
    """
    try:
        eos = np.asarray(list(ids)).tolist()
    except TypeError:
        raise GenerationError(f"eos_token_ids: expected a list of token ids, found {ids!r}") from None
    check_ids("eos_token_ids", eos, vocab_size)
    return tuple(eos)


def check_processors(processors: Sequence[Callable[..., Any]], vocab_size: int) -> tuple[Callable[..., Any], ...]:
    """Returns the functions of `logits_processors`.

    Raises:
        GenerationError: it is no sequence of functions, or one does not return logits for a row of logits.
    """
    if not isinstance(processors, Sequence) or isinstance(processors, str):
        raise GenerationError(f"logits_processors: expected a list of functions, found {_kind(processors)}")
    logits = jax.ShapeDtypeStruct((vocab_size,), np.float32)
    tokens, length = jax.ShapeDtypeStruct((MIN_CACHE,), np.int32), jax.ShapeDtypeStruct((), np.int32)
    for number, processor in enumerate(processors):
        name = f"logits_processors[{number}]"
        if not callable(processor):
            raise GenerationError(f"{name}: expected a function of logits, tokens and length, found {_kind(processor)}")
        # Traces a function only at its first call, as jit does.
        found = jax.eval_shape(processor, logits, tokens, length)
        shape, dtype = getattr(found, "shape", None), getattr(found, "dtype", None)
        if shape != logits.shape or not jax.dtypes.issubdtype(dtype, np.floating):
            what = _kind(found) if dtype is None else f"an array of shape {shape} and type {dtype}"
            raise GenerationError(
                f"{name}: expected logits of shape {logits.shape} in floating point, as it was given, found {what}"
            )
    return tuple(processors)


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


def check_sequences(config: MPTConfig, sequences: Sequence[Sequence[int]] | Sequence[int]) -> list[np.ndarray]:
    """Returns the token ids of each sequence that is to be scored.

    Raises:
        GenerationError: one is not valid, has less than two tokens, or reads more than max_seq_len.
    """
    rows = _as_rows(sequences, "sequences")
    for number, row in enumerate(rows):
        name = f"sequences[{number}]"
        if len(row) < 2:
            raise GenerationError(
                f"{name}: expected at least two tokens, the first of which is given, found {len(row)}; put the token "
                "that begins or ends texts before it"
            )
        check_ids(name, row.tolist(), config.vocab_size)
        if len(row) > config.max_seq_len + 1:
            raise GenerationError(
                f"{name}: expected at most max_seq_len={config.max_seq_len} tokens before the last, found "
                f"{len(row) - 1}; {max_len_hint(config, len(row) - 1)}"
            )
    return rows


def check_prefix_lengths(prefix_lengths: Sequence[int] | None, rows: Sequence[np.ndarray]) -> list[int]:
    """Returns how many tokens of each sequence are given, one for None.

    Raises:
        GenerationError: there is not one number for each, or one leaves nothing to score.
    """
    if prefix_lengths is None:
        return [1] * len(rows)
    if not _is_list(prefix_lengths) or len(prefix_lengths) != len(rows):
        found = len(prefix_lengths) if _is_list(prefix_lengths) else _kind(prefix_lengths)
        raise GenerationError(f"prefix_lengths: expected {len(rows)} numbers, one for each sequence, found {found}")
    lengths = np.asarray(prefix_lengths).tolist()
    for number, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length < len(row):
            raise GenerationError(
                f"prefix_lengths[{number}]: expected a whole number from 1 to {len(row) - 1}, because the sequence has "
                f"{len(row)} tokens, found {length!r}"
            )
    return lengths


def check_sequence(config: MPTConfig, tokens: Any, length: Any, *, max_new_tokens: int) -> tuple[Array, Array]:
    """Returns the token ids of one sequence, padded on the right, and how many are real; neither is checked if traced.

    Raises:
        GenerationError: they are no such arrays, an id is not valid, or it would be longer than max_seq_len at the end.
    """
    ids, real = check_whole("tokens", tokens, 1), check_whole("length", length, 0)
    if not len(ids):
        raise GenerationError("tokens: expected at least one token, found none")
    shortest = 1
    if not isinstance(real, jax.core.Tracer):
        shortest = int(real)
        if not 1 <= shortest <= len(ids):
            raise GenerationError(
                f"length: expected how many of the {len(ids)} tokens are real, from 1 on, found {shortest}"
            )
        if not isinstance(ids, jax.core.Tracer):
            check_ids("tokens", np.asarray(ids)[:shortest].tolist(), config.vocab_size)
    if (total := shortest + max_new_tokens) > config.max_seq_len:
        raise GenerationError(
            f"length: {shortest} tokens and max_new_tokens={max_new_tokens} exceed max_seq_len={config.max_seq_len}; "
            f"{max_len_hint(config, total)}"
        )
    return jnp.asarray(ids, jnp.int32), jnp.asarray(real, jnp.int32)


def check_whole(name: str, value: Any, rank: int) -> Array | np.ndarray:
    """Returns whole numbers, traced or not, as an array of this rank: one number, or those of one sequence.

    Raises:
        GenerationError: they are something else.
    """
    try:
        array = value if isinstance(value, jax.Array) else np.asarray(value)
    except ValueError:  # lists of several lengths in it
        array = np.asarray(None)
    if array.ndim != rank or not jax.dtypes.issubdtype(array.dtype, np.integer):
        expected = "the ids of one sequence, whole numbers" if rank else "a whole number"
        found = f"an array of shape {array.shape} and type {array.dtype}" if array.ndim else _kind(value)
        many = "; use jax.vmap for a batch" if array.ndim > rank else ""
        raise GenerationError(f"{name}: expected {expected}, found {found}{many}")
    return array


def check_one_prompt(prompt: Sequence[int]) -> None:
    """Raises unless it is one prompt."""
    if not _is_list(prompt):
        raise GenerationError(f"prompt: expected a list of token ids, found {_kind(prompt)}")
    if len(prompt) and not isinstance(prompt, str) and np.ndim(prompt[0]) > 0:
        raise GenerationError(f"prompt: expected the token ids of one prompt, found {_kind(prompt[0])} in it")


def check_ids(name: str, ids: Sequence[int], vocab_size: int | None) -> None:
    """Raises unless all are valid token ids; without a vocab_size, unless they are whole numbers ≥ 0."""
    bound = MAX_INT if vocab_size is None else vocab_size
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < bound:
            valid = "≥ 0" if vocab_size is None else f"from 0 to {vocab_size - 1}"
            raise GenerationError(f"{name}: expected token ids {valid}, found {token!r}")


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """Raises unless the value is a whole number ≥ `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise GenerationError(f"{name}: expected a whole number ≥ {least}, found {value!r}")


def check_number(name: str, value: Any, expected: str, valid: Callable[[Any], bool]) -> None:
    """Raises unless the value is a number, and a valid one."""
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


def _as_rows(prompts: Sequence[Sequence[int]] | Sequence[int], name: str = "prompts") -> list[np.ndarray]:
    if not _is_list(prompts):
        raise GenerationError(f"{name}: expected a list of token ids for each {name[:-1]}, found {_kind(prompts)}")
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise GenerationError(f"{name}: expected token ids, found text; encode it with mpt_eqx.text.load_tokenizer")
    single = len(prompts) > 0 and not _is_list(prompts[0])
    rows = []
    for number, prompt in enumerate([prompts] if single else prompts):
        try:
            row = np.asarray(prompt)
        except ValueError:  # lists of several lengths in it
            raise GenerationError(f"{name}[{number}]: expected a list of whole numbers, found lists in it") from None
        rows.append(row)
        if row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)):
            raise GenerationError(f"{name}[{number}]: expected a list of whole numbers, found {_kind(row)}")
    return rows


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) or (isinstance(value, np.ndarray | jax.Array) and value.ndim > 0)


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray | jax.Array):
        return f"an array of shape {value.shape} and type {value.dtype}"
    return type(value).__name__


def check_edits(
    config: MPTConfig, edits: Any, lengths: Sequence[int], before: int = 0
) -> list[dict[str, tuple[Edit, ...]]]:
    """Returns the edits of each row by place.

    Args:
        config: the model's.
        edits: as in `generate`.
        lengths: tokens of each row at the end.
        before: of them in a prefix.

    Raises:
        GenerationError: they are not valid, or there is not one mapping for each row.
    """
    rows = list(edits) if _is_list(edits) else [edits] * len(lengths)
    if len(rows) != len(lengths):
        raise GenerationError(
            f"edits: expected one mapping, or a list of one for each of {len(lengths)} prompts, found {len(rows)}"
        )
    try:
        found = [resolve_edits(config, row, n, in_parts=True) for row, n in zip(rows, lengths, strict=True)]
    except MPTError as error:
        raise GenerationError(str(error)) from None
    for name, edit in ((name, edit) for row in found for name, several in row.items() for edit in several):
        if isinstance(edit.positions, np.ndarray) and edit.positions.size and edit.positions.min() < before:
            raise GenerationError(
                f"edits: {name}: expected positions from {before} on, which are not in the prefix, found "
                f"{edit.positions.min()}"
            )
    return found
