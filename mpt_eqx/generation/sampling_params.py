"""The options of generation: what they are called, which values are valid, and their form as arrays of one row."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict, Unpack

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float32, Int

from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import GenerationError
from mpt_eqx.generation.buckets import eos_bucket
from mpt_eqx.generation.validate import MAX_INT, check_count, check_eos, check_ids, check_number

# For each option that is a number: the value that does nothing, what is expected, and whether a number is that.
NUMBERS: dict[str, tuple[float, str, Callable[[float], bool]]] = {
    "temperature": (0.0, "a finite number ≥ 0", lambda t: 0 <= t < math.inf),
    "top_p": (1.0, "a number with 0 < top_p ≤ 1", lambda p: 0 < p <= 1),
    "min_p": (0.0, "a number with 0 ≤ min_p ≤ 1", lambda p: 0 <= p <= 1),
    "typical_p": (1.0, "a number with 0 < typical_p ≤ 1", lambda p: 0 < p <= 1),
    "epsilon_cutoff": (0.0, "a number with 0 ≤ epsilon_cutoff < 1", lambda e: 0 <= e < 1),
    "eta_cutoff": (0.0, "a number with 0 ≤ eta_cutoff < 1", lambda e: 0 <= e < 1),
    "repetition_penalty": (1.0, "a finite number > 0", lambda r: 0 < r < math.inf),
}
# For each option that is a whole number: the value that does nothing, and the least one that may be given.
COUNTS = {
    "top_k": (MAX_INT, 1),
    "no_repeat_ngram_size": (0, 1),
    "min_new_tokens": (0, 0),
    "max_new_tokens": (MAX_INT, 1),
    "vocab_size": (MAX_INT, 1),
    "pad_token_id": (0, 0),
}


class ProcessorOptions(TypedDict, total=False):
    """The options that say which tokens may come next, as keyword arguments; `SamplingParams` says what they mean."""

    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    min_new_tokens: int
    eos_token_ids: Iterable[int]
    pad_token_id: int
    vocab_size: int | None


class SamplingOptions(ProcessorOptions, total=False):
    """All options that say how a token is chosen, as keyword arguments; `SamplingParams` says what they mean."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None


class SamplingParams(eqx.Module):
    """How the tokens of one row are chosen: the options of `generate`, as arrays.

    A batch has a leading axis on each array, so that rows may differ. Changing options never recompiles: no value
    changes a shape, up to eight `eos_token_ids`; `generate` on a GPU compiles for each set of options that are not
    their defaults. Traced values are not checked.

    Attributes:
        temperature: 0, the default, takes the token of the highest logit (greedy). Above 0, tokens are drawn from the
            softmax of logits / temperature, after the next six options have filtered it, in this order.
        top_k: keep the k tokens of the highest logits, ≥ 1.
        top_p: keep the fewest most probable tokens whose probabilities sum to top_p, 0 < top_p ≤ 1.
        min_p: keep tokens at least min_p times as probable as the most probable, 0 ≤ min_p ≤ 1.
        typical_p: keep the most typical tokens whose probabilities sum to typical_p, 0 < typical_p ≤ 1.
        epsilon_cutoff: keep tokens of at least this probability, 0 ≤ epsilon_cutoff < 1.
        eta_cutoff: keep tokens of at least the probability min(ε, √ε · exp(−entropy)), where ε is this option,
            0 ≤ eta_cutoff < 1.
        repetition_penalty: above 1, tokens that are in the prompt or were decoded become less likely, below 1 more
            likely; > 0.
        no_repeat_ngram_size: no n-gram of this size occurs twice in prompt and new tokens, ≥ 1.
        min_new_tokens: a row does not end before it has so many new tokens, ≥ 0 (default 0).
        max_new_tokens: a row ends after so many new tokens, ≥ 1.
        vocab_size: ids from this one on are never chosen; for a tokenizer with fewer ids than the model.
        eos_token_ids: tokens that end a row, in any collection (default none); −1 fills the array.
        pad_token_id: what follows the end of a row (default 0).

    An option whose default is None does nothing then.

    Raises:
        GenerationError: a value is not valid, or there is no option of that name.
    """

    temperature: Float32[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float32[Array, ""]
    min_p: Float32[Array, ""]
    typical_p: Float32[Array, ""]
    epsilon_cutoff: Float32[Array, ""]
    eta_cutoff: Float32[Array, ""]
    repetition_penalty: Float32[Array, ""]
    no_repeat_ngram_size: Int[Array, ""]
    min_new_tokens: Int[Array, ""]
    max_new_tokens: Int[Array, ""]
    vocab_size: Int[Array, ""]
    eos_token_ids: Int[Array, " E"]
    pad_token_id: Int[Array, ""]

    def __init__(self, *, max_new_tokens: int | None = None, **options: Unpack[SamplingOptions]):
        check_names(options, SamplingOptions, "SamplingParams")
        given: dict[str, Any] = {"max_new_tokens": max_new_tokens, **options}
        eos = check_eos(given.pop("eos_token_ids", ()))
        given = {name: value for name, value in given.items() if value is not None}
        # Leaves are numpy's until a program takes them: to make them starts no backend and compiles nothing.
        for name, (neutral, expected, valid) in NUMBERS.items():
            value = given.get(name, neutral)
            if name in given and not isinstance(value, jax.core.Tracer):
                check_number(name, value, expected, valid)
            setattr(self, name, _as_array(value, np.float32))
        for name, (neutral, least) in COUNTS.items():
            value = given.get(name, neutral)
            if name in given and not isinstance(value, jax.core.Tracer):
                check_count(name, value, least=least)
                value = min(value, MAX_INT)
            setattr(self, name, _as_array(value, np.int32))
        filled: Any = np.asarray(eos + (-1,) * (eos_bucket(len(eos)) - len(eos)), np.int32)
        self.eos_token_ids = filled

    def of_rows(self, rows: int) -> "SamplingParams":
        """Returns the same options for each of `rows` rows."""
        return jax.tree.map(lambda x: np.broadcast_to(x, (rows, *x.shape)), self)

    def asked(self, vocab_size: int) -> frozenset[str]:
        """Returns the names of the options that change which token some row takes, among `vocab_size` of them."""

        def changes(name: str, neutral: float) -> bool:
            values = np.asarray(getattr(self, name))
            return bool(np.any(values < vocab_size if name in ("top_k", "vocab_size") else values != neutral))

        neutral = {name: kind[0] for kinds in (NUMBERS, COUNTS) for name, kind in kinds.items()}
        others = ("max_new_tokens", "pad_token_id")
        return frozenset(name for name, value in neutral.items() if name not in others and changes(name, value))


def check_options(
    config: MPTConfig,
    max_new_tokens: int,
    options: Mapping[str, Any],
    *,
    known: type = SamplingOptions,
    caller: str = "generate",
    least: int = 1,
) -> SamplingParams:
    """Returns the options of a call as arrays, checked against each other and against the model.

    Args:
        config: the model's.
        max_new_tokens: as in `SamplingParams`, but needed.
        options: the other options by name.
        known: the names that are options.
        caller: what they are options of.
        least: the least max_new_tokens.

    Raises:
        GenerationError: an option is not valid, or not known.
    """
    check_names(options, known, caller)
    check_count("max_new_tokens", max_new_tokens, least=least)
    eos = check_eos(options.get("eos_token_ids", ()), config.vocab_size)
    check_ids("pad_token_id", [options.get("pad_token_id", 0)], config.vocab_size)
    # Without new tokens no row is ever decoded, and the number in the arrays does not matter.
    params = SamplingParams(max_new_tokens=max(max_new_tokens, 1), **{**options, "eos_token_ids": eos})
    check_params(config, params, max_new_tokens)
    return params


def check_params(config: MPTConfig, params: SamplingParams, max_new_tokens: int) -> None:
    """Checks the options of one row against each other and against the model; traced ones are not checked.

    Raises:
        GenerationError: they are no SamplingParams, or those of several rows, or a value is not valid.
    """
    if not isinstance(params, SamplingParams):
        raise GenerationError(f"sampling: expected SamplingParams(…), found {type(params).__name__}")
    if np.ndim(params.temperature):
        raise GenerationError(
            f"sampling: expected the options of one row, found those of {params.temperature.shape[0]}; use jax.vmap"
        )
    if not isinstance(params.eos_token_ids, jax.core.Tracer):
        check_ids("eos_token_ids", [t for t in params.eos_token_ids.tolist() if t != -1], config.vocab_size)
    if not isinstance(params.pad_token_id, jax.core.Tracer):
        check_ids("pad_token_id", [int(params.pad_token_id)], config.vocab_size)
    if not isinstance(params.min_new_tokens, jax.core.Tracer) and params.min_new_tokens > max_new_tokens:
        raise GenerationError(
            f"min_new_tokens: expected at most max_new_tokens={max_new_tokens}, found {params.min_new_tokens}"
        )
    vocab_size = params.vocab_size
    if not isinstance(vocab_size, jax.core.Tracer) and config.vocab_size < vocab_size < MAX_INT:
        raise GenerationError(
            f"vocab_size: expected at most the model's {config.vocab_size}, found {vocab_size}; the tokenizer "
            f"is not this model's"
        )


def check_names(options: Mapping[str, Any], known: type, caller: str) -> None:
    """Raises unless all options are known.

    Raises:
        GenerationError: one is not; the message has names near to it.
    """
    names = list(known.__annotations__)
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
            raise GenerationError(f"{name}: expected an option of {caller}, found an unknown name; {hint}")


def _as_array(value: Any, dtype: type) -> Array | np.ndarray:
    return value.astype(dtype) if isinstance(value, jax.core.Tracer) else np.asarray(value, dtype)
