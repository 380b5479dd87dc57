"""From the engine to the event loop: the events of a request in the order of their arrival, until it has ended."""

import asyncio
import contextlib
import dataclasses
import hashlib
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, Literal

from fastapi import Request as HTTPRequest

from mpt_eqx.serve.answers import Answer, Piece, read_event, start_answer
from mpt_eqx.serve.engine import Engine
from mpt_eqx.serve.errors import APIError, failure_error
from mpt_eqx.serve.metrics import Metrics
from mpt_eqx.serve.prepare import Asked
from mpt_eqx.serve.requests import Chunk, End, Event, Failure, Prompt, Ticket

LOOK_AFTER = 1.0
"""Seconds without an event after which the engine's health is looked at."""

GONE = APIError(499, "the client has gone away")
"""Nobody reads it."""


async def follow(
    http: HTTPRequest, engine: Engine, asked: Asked, answers: list[Answer], metrics: Metrics | None = None
) -> AsyncGenerator[tuple[int, Piece], None]:
    """Submits the requests and yields pieces of their answers with their numbers, as they come.

    Slots are free soon after the client goes away, after an error, and after this iterator is closed.

    Args:
        http: the client's request, whose body has been read.
        engine: what answers.
        asked: what for.
        answers: is filled with the state of each answer.
        metrics: takes note of the times of tokens.

    Raises:
        APIError: a sequence was not completed, the engine is dead, or the client has gone away.
        QueueFullError, UnavailableError, GenerationError: the engine does not take the requests.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event] | Literal["gone"]]()

    def sender(number: int) -> Callable[[Event], None]:
        def send(event: Event) -> None:
            # After the end of the loop nobody waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(arrived.put_nowait, (number, event))

        return send

    answers += [start_answer(asked, number) for number in range(len(asked.requests))]
    left, waits = len(answers), [Wait(asked.model.name, time.monotonic()) for _ in answers]
    ticket = engine.submit([(request, sender(number)) for number, request in enumerate(asked.requests)])
    watcher = asyncio.create_task(_tell_gone(http, ticket, arrived))
    try:
        while left:
            try:
                arrival = await asyncio.wait_for(arrived.get(), LOOK_AFTER)
            except TimeoutError:
                _check(engine, asked)
                continue
            if arrival == "gone" or ticket.cancelled.is_set():
                raise GONE
            await asyncio.sleep(0)  # others have their turn, also where much has arrived
            number, event = arrival
            if isinstance(event, Failure):
                raise failure_error(event)
            if metrics is not None:
                _observe(metrics, waits[number], event)
            piece = read_event(answers[number], event)
            left -= isinstance(event, End)
            if piece is not None:
                yield number, piece
    finally:
        ticket.cancel()
        watcher.cancel()
        http.state.completion_tokens = sum(answer.new_tokens for answer in answers)  # for the log


@dataclasses.dataclass
class Wait:
    """Since when the next token of a sequence is waited for.

    Attributes:
        model: its model.
        since: by time.monotonic().
        begun: whether there was a token before.
    """

    model: str
    since: float
    begun: bool = False


def _observe(metrics: Metrics, wait: Wait, event: Event) -> None:
    now = time.monotonic()
    if isinstance(event, Prompt):
        metrics.observe_queue(wait.model, event.waited)
    elif isinstance(event, Chunk):
        if wait.begun:
            metrics.observe_next_tokens(wait.model, len(event.tokens), now - wait.since)
        else:
            metrics.observe_first_token(wait.model, now - wait.since)
        wait.begun, wait.since = True, now


async def _tell_gone(http: HTTPRequest, ticket: Ticket, arrived: "asyncio.Queue[Any]") -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    ticket.cancel()  # at once, also while a piece is being sent
    arrived.put_nowait("gone")


def _check(engine: Engine, asked: Asked) -> None:
    """Raises APIError if there is nothing to wait for."""
    if (health := engine.health()) in ("stopped", "dead", "stuck"):
        raise APIError(503, f"the engine is {health}; the answer cannot be completed", code="unavailable")
    deadline = asked.requests[0].deadline
    if deadline is not None and time.monotonic() > deadline + LOOK_AFTER:
        raise APIError(504, "the answer took longer than the server allows", code="deadline")


def client_of(http: HTTPRequest) -> str:
    """Returns who asks: the key if there is one, not to be read from it, and the address."""
    key = http.headers.get("authorization", "")
    return f"{http.client.host if http.client else ''} {hashlib.sha256(key.encode()).hexdigest()[:16]}"
