"""What every implementation that is measured can do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

SINGLE_STEPS = 4
"""Tokens at the end of a prompt that `Implementation.logits` decodes one by one."""


class Implementation(NamedTuple):
    """A loaded model.

    Attributes:
        first: from a prompt, a function that returns the seconds until its next token is there, as a user waits for it.
        prefill: from a prompt, a function that reads it from the start until the next token is known, and returns the
            seconds.
        decode: from the prompts of some rows and a number of steps, a function that decodes as many greedy tokens in
            each row, and returns the seconds and the first row's tokens. The prompts are read once; every call
            continues from there.
        score: from sequences of one length, a function that computes the log-likelihood of each, and returns the
            seconds and these; None where there is nothing for it.
        logits: the logits of the token after a prompt, whose last SINGLE_STEPS tokens are decoded one by one.
        facts: what is known without measuring.
        generate: from a prompt and a number of steps, a function that reads it and decodes in one call, and returns the
            seconds; None where `decode` does so, and keeps nothing besides.
    """

    first: Callable[[list[int]], Callable[[], float]]
    prefill: Callable[[list[int]], Callable[[], float]]
    decode: Callable[[list[list[int]], int], Callable[[], tuple[float, list[int]]]]
    score: Callable[[list[list[int]]], Callable[[], tuple[float, list[float]]]] | None
    logits: Callable[[list[int]], np.ndarray]
    facts: Callable[[], dict[str, Any]]
    generate: Callable[[list[int], int], Callable[[], float]] | None = None
