"""The engine: one thread that owns the device, and runs the requests of all others on a fixed number of slots."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from mpt_eqx.model import MPT
from mpt_eqx.serve.requests import Request, Send, Ticket

Health = Literal["starting", "ready", "draining", "stopped", "dead", "stuck"]


@dataclasses.dataclass(frozen=True)
class Stats:
    """What the engine has done so far, and what it does now.

    Attributes:
        slots: how many sequences are decoded at a time.
        active: sequences that have a slot, or are being prefilled.
        queued: sequences that wait for one.
        prompt_tokens: of all requests so far.
        cached_tokens: of these, taken from the cache of prefixes.
        new_tokens: decoded so far.
        ended: sequences by how they ended: "stop", "length", and the kinds of `Failure`.
        rebuilds: how often the state was made anew, after a step had failed.
        weight_bytes: of all models; arrays that they share count once.
        cache_bytes: of the KV caches of all slots.
        prefix_bytes: of the cache of prefixes now.
        peak_bytes: the most that the process has had (on a CPU) or the device (elsewhere), None where unknown.
    """

    slots: int
    active: int
    queued: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    ended: Mapping[str, int]
    rebuilds: int
    weight_bytes: int
    cache_bytes: int
    prefix_bytes: int
    peak_bytes: int | None


class Engine:
    """Continuous batching: requests join and leave a running batch between chunks of its scan.

    A request's tokens are those of `generate` with the same options and seed, whoever else is in the batch.
    """

    def __init__(
        self,
        models: Mapping[str, MPT],
        *,
        slots: int = 8,
        context: int | None = None,
        cache_bytes: int | None = None,
        prefix_bytes: int = 512 * 2**20,
        max_queue: int = 64,
        edits: bool = False,
        stuck_after: float = 300.0,
    ):
        """Makes the state; nothing runs before `start`.

        Args:
            models: by name. Each has slots of its own.
            slots: how many sequences of a model are decoded at a time, ≥ 1.
            context: the most tokens of a prompt and its answer, from 2 to max_seq_len; None for max_seq_len.
            cache_bytes: the most that the KV caches of all slots may take; None for no limit.
            prefix_bytes: the most that kept prefixes may take; 0 keeps none.
            max_queue: how many sequences may wait, ≥ 0, beside those that have a slot.
            edits: whether requests may have `edits`: `interp.Add` with one vector at "blocks.N.hook_resid_post".
            stuck_after: seconds after which a step that has not ended counts as stuck.

        Raises:
            GenerationError: an argument is not valid, or the slots do not fit cache_bytes.
        """
        raise NotImplementedError

    def start(self) -> None:
        """Starts the thread, which compiles ahead and is "ready" then."""
        raise NotImplementedError

    def context(self, model: str) -> int:
        """Returns the most tokens of a prompt and its answer."""
        raise NotImplementedError

    def submit(self, requests: Sequence[tuple[Request, Send]]) -> Ticket:
        """Puts requests in the queue, all or none.

        Raises:
            GenerationError: a request is not valid.
            QueueFullError: more would wait than may.
            UnavailableError: the engine is not ready.
        """
        raise NotImplementedError

    def drain(self) -> None:
        """Takes no more requests, and lets those that it has end."""
        raise NotImplementedError

    def stop(self, timeout: float = 10.0) -> None:
        """Ends the thread after the chunk that runs; what has not ended fails as "unavailable"."""
        raise NotImplementedError

    def health(self) -> Health:
        """Returns what the engine can do now."""
        raise NotImplementedError

    def stats(self) -> Stats:
        """Returns figures for metrics."""
        raise NotImplementedError
