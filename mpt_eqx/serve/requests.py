"""What goes into the engine and what comes out of it: plain values, which any thread may make and read."""

import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Bool

from mpt_eqx.errors import MPTError
from mpt_eqx.generation import SamplingParams
from mpt_eqx.model.taps import Edit


class QueueFullError(MPTError):
    """As many requests wait as may."""


class UnavailableError(MPTError):
    """The engine takes no requests: it is starting, draining, stopped or dead."""


class Constraint(Protocol):
    """What an answer must be, token by token: a grammar with its state. Only the engine's thread calls it."""

    def mask(self) -> Bool[np.ndarray, " V"]:
        """Returns which tokens may come next; at least one."""

    def accept(self, token: int) -> None:
        """Takes note of the token that came."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to continue.

    Attributes:
        model: the name of one of the engine's models.
        prompt: token ids, at least one.
        max_new_tokens: at most so many new tokens, ≥ 0; none where only the prompt's log-probabilities are wanted.
        sampling: how tokens are chosen; its max_new_tokens is not looked at.
        seed: of the randomness: the n-th token is drawn with fold_in(fold_in(key(seed), choice), n), as in row
            `choice` of `generate(…, key=jax.random.key(seed))`.
        choice: as above.
        bias: what is added to the logits of some tokens.
        top_logprobs: how many of the likeliest tokens to tell at each place, 0 to `TOP`.
        prompt_logprobs: whether to tell the log-probabilities of the prompt's tokens, too.
        until: a function of all new tokens, called after each; True ends the sequence there. Another thread calls it.
        constraint: what the answer must be.
        edits: of activations by place; see `Engine`.
        deadline: when it fails if it has not ended, by time.monotonic(); None for never.
        client: who asks: the queue takes requests of clients in turn.
    """

    model: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams
    seed: int = 0
    choice: int = 0
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    until: Callable[[list[int]], bool] | None = None
    constraint: Constraint | None = None
    edits: Mapping[str, Edit] = dataclasses.field(default_factory=dict)
    deadline: float | None = None
    client: str = ""


TOP = 20
"""The most of `top_logprobs`."""

Top = list[tuple[int, float]]
"""The likeliest tokens at one place with their log-probabilities, the likeliest first."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The prompt has been read. This is the first event of each sequence that does not fail before.

    Attributes:
        cached: how many of its tokens were in the cache of prefixes.
        logprobs: of each token after the first, in nats, if they were asked for.
        top: the likeliest tokens in the place of each after the first, if they were asked for.
        waited: seconds in the queue.
    """

    cached: int
    logprobs: list[float]
    top: list[Top]
    waited: float = 0.0


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some new tokens.

    Attributes:
        tokens: at least one. An end-of-sequence token is among them.
        logprobs: the model's log-probability of each, in nats, before any processing.
        top: the likeliest tokens in the place of each, if they were asked for.
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[Top]


@dataclasses.dataclass(frozen=True)
class End:
    """The sequence is complete: "stop" where an end-of-sequence token or `until` ended it, else "length"."""

    reason: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Failure:
    """The sequence will not be completed; nothing comes after it, as after `End`.

    Attributes:
        kind: "invalid": what the request asks for cannot be computed; "deadline"; "cancelled"; "internal": a step
            failed; "unavailable": the engine stopped.
        message: what was wrong, for the one who asked.
    """

    kind: Literal["invalid", "deadline", "cancelled", "internal", "unavailable"]
    message: str


Event = Prompt | Chunk | End | Failure

Send = Callable[[Event], None]
"""Takes the events of one sequence, in the engine's thread: it must return at once, and raise nothing."""


@dataclasses.dataclass(frozen=True)
class Ticket:
    """Stands for requests that were submitted together."""

    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Ends them: their slots are free after at most one more chunk. Those that have ended stay as they are."""
        self.cancelled.set()
