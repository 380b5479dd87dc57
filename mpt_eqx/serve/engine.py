"""The engine: one thread that owns the device, and runs the requests of all others on a fixed number of slots."""

import dataclasses
import functools
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import numpy as np

from mpt_eqx.errors import GenerationError
from mpt_eqx.generation.buckets import cache_bucket
from mpt_eqx.generation.sampling_params import check_params
from mpt_eqx.generation.state import state_shapes
from mpt_eqx.generation.validate import check_count, check_ids, check_model
from mpt_eqx.model import MPT
from mpt_eqx.ops.switches import host_context
from mpt_eqx.serve.jobs import FairQueue, Job
from mpt_eqx.serve.lane import LOGGER, Lane
from mpt_eqx.serve.requests import TOP, Failure, QueueFullError, Request, Send, Ticket, UnavailableError
from mpt_eqx.serve.slots import MAX_EOS, check_vectors

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
        warm: bool = True,
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
            warm: whether every program is compiled before the engine is ready.
            stuck_after: seconds after which a step that has not ended counts as stuck.

        Raises:
            GenerationError: an argument is not valid, or the slots do not fit cache_bytes.
        """
        for name, count, least in (("slots", slots, 1), ("prefix_bytes", prefix_bytes, 0), ("max_queue", max_queue, 0)):
            check_count(name, count, least=least)
        self._models = {name: check_model(model) for name, model in models.items()}
        self._lanes: dict[str, Lane] = {}
        self._contexts = {name: _context(model, context) for name, model in self._models.items()}
        weights = {id(x): x.nbytes for model in self._models.values() for x in jax.tree.leaves(model) if _is_array(x)}
        # Once, because figures are asked for in other threads, and shapes are found by tracing.
        self._weight_bytes = sum(weights.values())
        self._cache_bytes = needed = sum(
            _cache_bytes(model, slots, self._contexts[name]) for name, model in self._models.items()
        )
        if cache_bytes is not None and needed > cache_bytes:
            raise GenerationError(
                f"cache_bytes: expected at least {needed} for {slots} slots of {max(self._contexts.values())} tokens"
                f"{f' for each of {len(models)} models' if len(models) > 1 else ''}, found {cache_bytes}; give fewer "
                "slots, a smaller context, or more memory"
            )
        self._prefix_bytes = prefix_bytes // max(len(models), 1)
        self._warm, self._slots, self._max_queue, self._stuck_after = warm, slots, max_queue, stuck_after
        self._edits = edits
        self._changed = threading.Condition()
        self._queue = FairQueue()
        self._ended: Counter[str] = Counter()
        self._rebuilds = 0
        self._phase: Health = "starting"
        self._stepping_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="mpt_eqx engine", daemon=True)

    def start(self) -> None:
        """Starts the thread, which makes the slots and compiles ahead; the engine is "ready" then."""
        self._thread.start()

    def wait_until_ready(self, timeout: float | None = None) -> Health:
        """Waits until the engine is not "starting" any more, at most so many seconds, and returns its health."""
        with self._changed:
            self._changed.wait_for(lambda: self._phase != "starting", timeout)
        return self.health()

    def context(self, model: str) -> int:
        """Returns the most tokens of a prompt and its answer."""
        return self._contexts[model]

    def submit(self, requests: Sequence[tuple[Request, Send]]) -> Ticket:
        """Puts requests in the queue, all or none.

        Raises:
            GenerationError: a request is not valid, or there are more of them than slots and places in the queue.
            QueueFullError: more would wait than may.
            UnavailableError: the engine is not ready.
        """
        for request, _ in requests:
            self._check(request)
        if len(requests) > (most := self._max_queue + self._slots):
            raise GenerationError(f"requests: expected at most {most} together, as have room, found {len(requests)}")
        ticket = Ticket()
        with self._changed:
            if (health := self.health()) != "ready":
                raise UnavailableError(f"the server takes no requests: it is {health}")
            # What finds a free slot does not wait.
            free = sum(max(self._slots - len(lane.jobs), 0) for lane in self._lanes.values())
            if len(self._queue) + len(requests) > self._max_queue + free:
                raise QueueFullError(f"{len(self._queue)} requests wait, of at most {self._max_queue}; try again later")
            for request, send in requests:
                self._queue.put(Job(request, send, ticket))
            self._changed.notify_all()
        return ticket

    def drain(self) -> None:
        """Takes no more requests, lets those that it has end, and stops then."""
        self._turn("draining")

    def stop(self, timeout: float = 10.0) -> None:
        """Ends the thread after the chunk that runs; what has not ended fails as "unavailable"."""
        self._turn("stopped")
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def health(self) -> Health:
        """Returns what the engine can do now."""
        if self._phase in ("starting", "ready", "draining") and self._thread.ident is not None:
            if not self._thread.is_alive():
                return "stopped" if self._phase == "draining" else "dead"
            since = self._stepping_since
            if since is not None and time.monotonic() - since > self._stuck_after:
                return "stuck"
        return self._phase

    def stats(self) -> Stats:
        """Returns figures for metrics."""
        lanes = list(self._lanes.values())
        return Stats(
            slots=self._slots * len(self._models),
            active=sum(len(lane.jobs) for lane in lanes),
            queued=len(self._queue),
            prompt_tokens=sum(lane.prompt_tokens for lane in lanes),
            cached_tokens=sum(lane.cached_tokens for lane in lanes),
            new_tokens=sum(lane.new_tokens for lane in lanes),
            ended=dict(self._ended),
            rebuilds=self._rebuilds,
            weight_bytes=self._weight_bytes,
            cache_bytes=self._cache_bytes,
            prefix_bytes=sum(lane.prefixes.size for lane in lanes),
            peak_bytes=_peak_bytes(),
        )

    def _check(self, request: Request) -> None:
        """Raises GenerationError unless the request is valid."""
        if request.model not in self._models:
            raise GenerationError(f"model: expected one of {', '.join(self._models)}, found {request.model!r}")
        config, context = self._models[request.model].config, self._contexts[request.model]
        check_count("max_new_tokens", request.max_new_tokens, least=0)
        if not request.prompt:
            raise GenerationError("prompt: expected at least one token, found none")
        check_ids("prompt", request.prompt, config.vocab_size)
        check_ids("bias", list(request.bias), config.vocab_size)
        check_params(config, request.sampling, max(request.max_new_tokens, int(request.sampling.min_new_tokens)))
        if (total := len(request.prompt) + request.max_new_tokens) > context:
            raise GenerationError(
                f"prompt: {len(request.prompt)} tokens and max_new_tokens={request.max_new_tokens} are {total}, of at "
                f"most {context}"
            )
        if len(request.sampling.eos_token_ids) > MAX_EOS:
            raise GenerationError(f"eos_token_ids: expected at most {MAX_EOS}, found more")
        if not 0 <= request.top_logprobs <= TOP:
            raise GenerationError(f"top_logprobs: expected 0 to {TOP}, found {request.top_logprobs}")
        if request.edits and not self._edits:
            raise GenerationError("edits: expected none, because this engine was made without edits=True")
        if request.edits:
            check_vectors(config, request.edits, context)

    def _turn(self, phase: Health) -> None:
        with self._changed:
            if self._phase != "stopped":
                self._phase = phase
            self._changed.notify_all()

    def _run(self) -> None:
        """Runs in the thread: steps until it is told to stop. Whatever ends it, everybody who waits is told."""
        try:
            with host_context():
                self._lanes = {
                    name: Lane(
                        model,
                        slots=self._slots,
                        context=self._contexts[name],
                        edits=self._edits,
                        prefix_bytes=self._prefix_bytes,
                    )
                    for name, model in self._models.items()
                }
                for lane in self._lanes.values() if self._warm else ():
                    lane.compile_ahead()
                with self._changed:
                    if self._phase == "starting":
                        self._phase = "ready"
                    self._changed.notify_all()
                while self._wait():
                    self._step()
        except BaseException:
            LOGGER.exception("the engine's thread ends")
        finally:
            with self._changed:
                left = [*self._queue, *self._jobs()]
                self._queue.remove(lambda _: True)
                self._phase = "stopped" if self._phase in ("draining", "stopped") else "dead"
                self._changed.notify_all()
            for job in left:
                job.tell(Failure("unavailable", "the server stopped before the answer was complete"))

    def _wait(self) -> bool:
        """Waits until there is something to do, and returns whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._queue) or self._jobs() or self._phase != "ready")
            busy = bool(len(self._queue) or self._jobs())
            return self._phase == "ready" or (self._phase == "draining" and busy)

    def _step(self) -> None:
        """Lets each lane read and decode a chunk; where that fails, its requests fail, and its slots are made anew."""
        with self._changed:
            late = [(job, failure) for job in self._queue if (failure := job.given_up()) is not None]
            self._queue.remove(lambda job: any(job is one for one, _ in late))
        for job, failure in late:
            self._tell(job, failure)
        for name, lane in self._lanes.items():
            before = lane.jobs
            self._stepping_since = time.monotonic()
            try:
                lane.step(functools.partial(self._take, name, before))
            except BaseException as error:
                LOGGER.exception("a step failed; its requests fail, and its state is made anew")
                for job in before:
                    job.tell(Failure("internal", "a step of the computation failed"))
                if not isinstance(error, Exception):
                    raise
                lane.rebuild()
                self._rebuilds += 1
            finally:
                self._stepping_since = None
                self._ended.update(job.ended for job in before if job.ended is not None)

    def _tell(self, job: Job, failure: Failure) -> None:
        job.tell(failure)
        self._ended[failure.kind] += 1

    def _take(self, name: str, begun: list[Job]) -> Job | None:
        """Returns the next job of a model that can begin, which is added to those that have begun."""
        lane = self._lanes[name]
        with self._changed:
            job = self._queue.take(lambda one: one.request.model == name and lane.has_room(one))
        if job is not None:
            begun.append(job)
        return job

    def _jobs(self) -> list[Job]:
        return [job for lane in self._lanes.values() for job in lane.jobs]


def _context(model: MPT, context: int | None) -> int:
    most = model.config.max_seq_len
    if context is None:
        return most
    check_count("context", context, least=2)
    if context > most:
        raise GenerationError(f"context: expected at most max_seq_len={most}, found {context}")
    return int(context)


def _cache_bytes(model: MPT, slots: int, context: int) -> int:
    shapes = state_shapes(model, slots, cache_bucket(model.config, context))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes.cache))


def _is_array(leaf: object) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _peak_bytes() -> int | None:
    """Returns the most memory that was in use: the device's, and on a CPU the process's."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        try:
            import resource
        except ImportError:  # Windows
            return None
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return None if found is None else int(found)
