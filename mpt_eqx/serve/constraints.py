"""Answers of a given form: JSON schemas and regular expressions as masks of tokens, by llguidance (extra `grammar`)."""

import functools
import importlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from mpt_eqx.errors import GenerationError
from mpt_eqx.serve.errors import APIError
from mpt_eqx.serve.requests import Constraint
from mpt_eqx.serve.schemas import ResponseFormat
from mpt_eqx.serve.settings import ServedModel

Compile = Callable[[ResponseFormat, Sequence[int]], Callable[[], Constraint] | None]
"""From what an answer must be, and the tokens that end it, to a maker of constraints; None for no constraint."""


class GrammarConstraint:
    """A grammar and where an answer stands in it."""

    def __init__(self, matcher: Any, vocab_size: int):
        """Takes an LLMatcher of its own."""
        self._matcher, self._size = matcher, vocab_size

    def mask(self) -> Bool[np.ndarray, " V"]:
        """Returns which tokens may come next: at the end of the grammar those that end answers.

        Raises:
            GenerationError: the grammar has become too complex.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.zeros(self._size, bool)
        allowed = np.unpackbits(bits, bitorder="little", count=min(self._size, 8 * len(bits)))
        mask[: len(allowed)] = allowed
        return mask

    def accept(self, token: int) -> None:
        """Takes note of the token that came.

        Raises:
            GenerationError: the token was not allowed.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GenerationError(f"response_format: the grammar failed: {self._matcher.get_error():.300}")


def compiler(model: ServedModel) -> Compile:
    """Returns a function that compiles what answers of a model must be; it may be called in any thread.

    The function raises APIError where the grammar is not valid, or llguidance is not installed.
    """

    @functools.lru_cache(maxsize=4)
    def vocabulary(ends: tuple[int, ...]) -> Any:
        return _llguidance().LLTokenizer(
            model.tokenizer.to_json(), n_vocab=model.config.vocab_size, eos_token=list(ends)
        )

    def compile(asked: ResponseFormat, ends: Sequence[int]) -> Callable[[], Constraint] | None:
        if asked.type == "text":
            return None
        grammar = _grammar(asked)
        if not ends:
            raise APIError(400, "response_format: expected a model with a token that ends answers, found none")
        matcher = _llguidance().LLMatcher(vocabulary(tuple(ends)), grammar, log_level=0)
        if matcher.is_error():
            raise _invalid(matcher.get_error())
        return lambda: GrammarConstraint(matcher.deep_copy(), model.config.vocab_size)

    return compile


def _grammar(asked: ResponseFormat) -> str:
    """Returns the grammar as llguidance takes it.

    Raises:
        APIError: it is not valid, or llguidance is not installed.
    """
    make = _llguidance().LLMatcher
    if asked.type == "regex":
        if asked.regex is None:
            raise _missing("regex")
        return str(make.grammar_from_regex(asked.regex))
    if asked.type == "json_schema" and asked.json_schema is None:
        raise _missing("json_schema")
    schema = {"type": "object"} if asked.json_schema is None else asked.json_schema.schema_
    try:
        # White space between values could go on for ever.
        return str(make.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": "[ \\n]?"}))
    except (ValueError, RecursionError) as error:
        raise _invalid(str(error)) from None


def _missing(name: str) -> APIError:
    param = f"response_format.{name}"
    return APIError(400, f"{param}: expected a value with response_format.type={name!r}, found none", param=param)


def _invalid(message: str) -> APIError:
    text = " ".join(message.split())
    return APIError(400, f"response_format: expected a valid grammar, found: {text:.500}", param="response_format")


def _llguidance() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise APIError(
            400,
            "response_format: the llguidance library is needed on the server; install it there with "
            "pip install 'mpt_eqx[serve,grammar]'",
            param="response_format",
        ) from None
