"""Sequences on their way through the engine, and the queue in which they wait for a slot."""

import dataclasses
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from mpt_eqx.serve.requests import Chunk, End, Event, Failure, Prompt, Request, Send, Ticket


@dataclasses.dataclass(eq=False)
class Job:
    """One request on its way through the engine; its events end with one `End` or `Failure`.

    Attributes:
        request: what was asked for.
        send: takes the events.
        ticket: tells whether it was cancelled.
        tokens: the new tokens so far.
        ended: how it ended; None while it has not.
        since: when it was submitted, by time.monotonic().
        waited: seconds in the queue.
    """

    request: Request
    send: Send
    ticket: Ticket
    tokens: list[int] = dataclasses.field(default_factory=list)
    ended: str | None = None
    since: float = dataclasses.field(default_factory=time.monotonic)
    waited: float = 0.0

    def tell(self, event: Event) -> None:
        """Sends an event, unless the job has ended."""
        if self.ended is None:
            if isinstance(event, End | Failure):
                self.ended = event.reason if isinstance(event, End) else event.kind
            elif isinstance(event, Chunk):
                self.tokens += event.tokens
            elif isinstance(event, Prompt):
                event = dataclasses.replace(event, waited=self.waited)
            try:
                self.send(event)
            except Exception:  # such as a closed event loop: nobody listens
                self.ticket.cancel()

    def given_up(self) -> Failure | None:
        """Returns why it ends before it is complete, if it was cancelled or is late."""
        if self.ticket.cancelled.is_set():
            return Failure("cancelled", "the request was cancelled")
        deadline = self.request.deadline
        if deadline is not None and time.monotonic() >= deadline:
            return Failure("deadline", "the request took longer than it may")
        return None


class FairQueue:
    """Sequences that wait. Clients take turns, so that one with many of them does not keep the others waiting.

    It is not locked.
    """

    def __init__(self) -> None:
        """Holds nothing."""
        self._clients: OrderedDict[str, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        """Returns how many wait."""
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Job]:
        """Returns an iterator over all, in no order that counts."""
        return (job for waiting in self._clients.values() for job in waiting)

    def put(self, job: Job) -> None:
        """Adds a job after those of its client."""
        self._clients.setdefault(job.request.client, deque()).append(job)

    def take(self, fits: Callable[[Job], bool]) -> Job | None:
        """Returns the first job of the first client in turn that fits, which has had its turn then; or None."""
        for client, waiting in self._clients.items():
            if fits(waiting[0]):
                job = waiting.popleft()
                job.waited = time.monotonic() - job.since
                self._clients.move_to_end(client)
                if not waiting:
                    del self._clients[client]
                return job
        return None

    def remove(self, which: Callable[[Job], bool]) -> None:
        """Takes out the jobs of which `which` is true."""
        for client, waiting in list(self._clients.items()):
            kept = deque(job for job in waiting if not which(job))
            if kept:
                self._clients[client] = kept
            else:
                del self._clients[client]
