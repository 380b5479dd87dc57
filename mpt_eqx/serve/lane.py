"""A lane: one model with its slots, and who has them. All of it runs in the engine's thread."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from mpt_eqx.errors import MPTError
from mpt_eqx.generation.buckets import DECODE_CHUNK, cache_bucket, prefill_buckets, prefill_chunks
from mpt_eqx.generation.sampling_params import SamplingParams
from mpt_eqx.generation.state import DecodeState, replicate, state_shapes, zeros_of
from mpt_eqx.generation.steps import StepOutput, nothing_left
from mpt_eqx.model import MPT
from mpt_eqx.model.taps import Edit
from mpt_eqx.serve.jobs import Job
from mpt_eqx.serve.prefixes import PrefixCache
from mpt_eqx.serve.requests import Chunk, End, Failure, Prompt, Request, Ticket, Top
from mpt_eqx.serve.slots import (
    Likeliest,
    continued,
    decode_slots,
    edits_of,
    empty_slots,
    join,
    next_likely,
    one_slot,
    prefill_outputs,
)

PREFILL_TOKENS = 256
"""Prompt tokens that are read between two chunks of decoding, or one chunk of a prompt where that is more."""

SLOW_READ = 0.5
"""Seconds after which no more of prompts is read while others wait for their next token. Chunks that would take longer
are smaller, if there are smaller ones."""

SLOW_STEP = 0.15
"""Seconds of a step above which steps are not decoded in chunks: a chunk would be more than a second of waiting. Below,
to tell all clients of every single token would take the cores that compute the next."""

LOGGER = logging.getLogger("mpt_eqx.serve")

NOT_FINITE = "the model's logits are not finite; look for NaN or infinity in its weights, or use a wider dtype"


@dataclasses.dataclass
class Reading:
    """A prompt that is being read.

    Attributes:
        job: whose prompt.
        row: the slot that is kept for it; None where it needs none.
        prompt: the tokens.
        state: of one row.
        start: how many of its tokens were read.
        cached: how many of these came from the cache of prefixes.
        scores: of the tokens so far, if they were asked for.
    """

    job: Job
    row: int | None
    prompt: Int[np.ndarray, " T"]
    state: DecodeState
    start: int
    cached: int
    scores: list[tuple[np.ndarray, Likeliest]] = dataclasses.field(default_factory=list)


class Lane:
    """One model with its slots."""

    def __init__(self, model: MPT, *, slots: int, context: int, edits: bool, prefix_bytes: int):
        """Makes the slots; arguments as in `Engine`, which has checked them."""
        self.model, self.context = model, context
        self.prefixes = PrefixCache(prefix_bytes)
        self.prompt_tokens = self.cached_tokens = self.new_tokens = 0
        self._edits, self._count = edits, slots
        self._capacity = cache_bucket(model.config, context)
        self._running: dict[int, Job] = {}
        self._reading: Reading | None = None
        self._slots = empty_slots(model, slots, self._capacity, edits=edits)
        self._off = edits_of(model, {}, context) if edits else {}
        self._shapes: dict[int, DecodeState] = {}
        self._step_seconds = self._token_seconds = 0.0

    @property
    def jobs(self) -> list[Job]:
        """Those that have a slot, or whose prompt is being read."""
        reading = [] if self._reading is None else [self._reading.job]
        return [*self._running.values(), *reading]

    def has_room(self, job: Job) -> bool:
        """Tells whether a job can begin: no other prompt is being read, and a slot is free if it needs one."""
        free = len(self._running) < self._count or job.request.max_new_tokens == 0
        return self._reading is None and free

    def step(self, take: Callable[[], Job | None]) -> None:
        """Reads some of the prompts of jobs that `take` returns, and decodes a chunk of those in slots."""
        self._drop_given_up()
        budget, began = PREFILL_TOKENS, time.monotonic()
        while budget > 0:
            if self._reading is None:
                if (job := take()) is None:
                    break
                self._begin(job)
            budget -= self._read()
            if self._running and time.monotonic() - began > SLOW_READ:
                break
        if self._running:
            self._decode()

    def rebuild(self) -> None:
        """Makes the slots anew, after a step has failed; who was in them is forgotten."""
        self._running.clear()
        self._reading = None
        self.prefixes.clear()
        self._slots = empty_slots(self.model, self._count, self._capacity, edits=self._edits)

    def compile_ahead(self) -> None:
        """Runs every program once, so that requests compile nothing."""
        model, one, read = self.model, np.ones(1, np.int32), list[DecodeState]()
        nobody = Job(Request("", (0,), 1, SamplingParams()), lambda _: None, Ticket())
        kinds: list[dict[str, tuple[Edit, ...]]] = [{}, self._off] if self._edits else [{}]
        capacities = sorted({cache_bucket(model.config, length) for length in range(1, self.context + 1)})
        for capacity in capacities:
            for edits in kinds:
                state = dataclasses.replace(self._empty(capacity), edits=jax.tree.map(jnp.copy, edits))
                for size in prefill_chunks(1):
                    tokens = np.zeros((1, size), np.int32)
                    state, x = prefill_outputs(model, state, *replicate(model, (tokens, one)))
                    next_likely(model, x, replicate(model, tokens[0]))
                read += [] if edits else [state]
        for state in read:
            for capacity in capacities if self.prefixes.limit else []:
                continued(state, np.asarray(1, np.int32), capacity)
            self._join(nobody, state, 0)
        active = np.zeros(self._count, bool)
        for mask in (None, np.ones((self._count, model.config.vocab_size), bool)):
            steps = DECODE_CHUNK if mask is None else 1
            on, allowed = replicate(model, (active, mask))
            self._slots, output = decode_slots(model, self._slots, on, allowed, steps)
            jax.block_until_ready(output)

    def _empty(self, capacity: int) -> DecodeState:
        """Returns a state of one row without tokens."""
        if capacity not in self._shapes:
            self._shapes[capacity] = state_shapes(self.model, 1, capacity)
        return zeros_of(self.model, self._shapes[capacity])

    def _drop_given_up(self) -> None:
        for row, job in list(self._running.items()):
            if (failure := job.given_up()) is not None:
                job.tell(failure)
                self._free_ended(row)
        if self._reading is not None and (failure := self._reading.job.given_up()) is not None:
            self._reading.job.tell(failure)
            self._reading = None

    def _begin(self, job: Job) -> None:
        """Starts to read a prompt."""
        request = job.request
        prompt = np.asarray(request.prompt, np.int32)
        capacity, start, state = cache_bucket(self.model.config, len(prompt)), 0, None
        if not request.edits and not request.prompt_logprobs:
            start, kept = self.prefixes.longest(prompt)
            state = None if kept is None else continued(kept, np.asarray(start, np.int32), capacity)
        if state is None:
            state = self._empty(capacity)
            if request.edits:
                state = dataclasses.replace(state, edits=edits_of(self.model, request.edits, self.context))
        free = (row for row in range(self._count) if row not in self._running)
        row = next(free) if request.max_new_tokens else None
        self._reading = Reading(job, row, prompt, state, start, start)

    def _read(self) -> int:
        """Reads one more chunk of the prompt, and returns how many tokens it has room for."""
        reading, model = self._reading, self.model
        assert reading is not None
        prompt, start, began = reading.prompt, reading.start, time.monotonic()
        size = self._chunk_size(len(prompt) - start)
        # Padded with its own last token: one that the prompt does not have could make NaN of it.
        chunk = np.full((1, size), prompt[-1], np.int32)
        here = prompt[start : start + size]
        chunk[0, : len(here)] = here
        ends = np.asarray([len(prompt)], np.int32)
        reading.state, x = prefill_outputs(model, reading.state, *replicate(model, (chunk, ends)))
        if reading.job.request.prompt_logprobs:
            targets = np.zeros(size, np.int32)
            follow = prompt[start + 1 : start + 1 + size]
            targets[: len(follow)] = follow
            found = jax.device_get(next_likely(model, x, replicate(model, targets)))
            reading.scores.append(jax.tree.map(lambda x: x[: len(follow)], found))
        jax.block_until_ready(x)
        self._token_seconds = (time.monotonic() - began) / size
        reading.start += len(here)
        if reading.start == len(prompt):
            self._reading = None
            self._begin_answer(reading)
        return size

    def _chunk_size(self, left: int) -> int:
        """Returns the size of the next chunk of a prompt of which so many tokens are left."""
        size = next(prefill_buckets(left, 1))
        if not self._running:
            return size
        sizes = [one for one in prefill_chunks(1) if one <= size]
        return next((one for one in sizes if one * self._token_seconds <= SLOW_READ), sizes[-1])

    def _begin_answer(self, reading: Reading) -> None:
        """Puts a prompt that was read into its slot."""
        job, request = reading.job, reading.job.request
        logprobs, top = list[float](), list[Top]()
        for picked, likeliest in reading.scores:
            logprobs += picked.tolist()
            top += top_of(likeliest, request.top_logprobs)
        if not np.isfinite(logprobs).all():
            job.tell(Failure("internal", NOT_FINITE))
            return
        self.prompt_tokens += len(request.prompt)
        self.cached_tokens += reading.cached
        if not request.edits:
            self.prefixes.keep(reading.prompt, reading.state)
        job.tell(Prompt(reading.cached, logprobs, top))
        if reading.row is None:
            job.tell(End("length"))
        else:
            self._running[reading.row] = job
            self._join(job, reading.state, reading.row)

    def _join(self, job: Job, state: DecodeState, row: int) -> None:
        request, model = job.request, self.model
        key = jax.random.fold_in(jax.random.key(request.seed), request.choice)
        most = np.asarray(request.max_new_tokens, np.int32)
        params = eqx.tree_at(lambda p: p.max_new_tokens, request.sampling, most)
        state = dataclasses.replace(state, edits=state.edits or self._off)
        one = one_slot(model, state, params, key, request.bias, request.top_logprobs > 0)
        self._slots = join((model, one), self._slots, replicate(model, np.asarray(row, np.int32)))

    def _decode(self) -> None:
        """Decodes a chunk of the running jobs, and tells each what it got.

        A chunk is one step where an answer is constrained, or where a step takes so long that people would see several
        tokens come at once.
        """
        mask = self._mask()
        if mask is None and self._step_seconds > SLOW_STEP:
            mask = np.ones((self._count, self.model.config.vocab_size), bool)
        steps = DECODE_CHUNK if mask is None else 1
        active = np.isin(np.arange(self._count), list(self._running))
        started = time.monotonic()
        on, allowed = replicate(self.model, (active, mask))
        self._slots, output = decode_slots(self.model, self._slots, on, allowed, steps)
        output = jax.device_get(output)
        bad, empty = output[0].not_finite[-1], output[0].nothing_left[-1]
        self._step_seconds = (time.monotonic() - started) / steps
        for row, job in list(self._running.items()):
            failed = [int(step) - len(job.tokens) for step in (bad[row], empty[row]) if step >= 0]
            with reported(job):
                end: End | Failure | None = self._tell(job, row, output, min(failed, default=steps))
                if end is None and bad[row] >= 0:
                    end = Failure("internal", NOT_FINITE)
                elif end is None and empty[row] >= 0:
                    end = Failure("invalid", nothing_left(empty[row : row + 1], ()))
                if end is not None:
                    job.tell(end)
            self._free_ended(row)

    def _mask(self) -> Bool[np.ndarray, "B V"] | None:
        """Returns which tokens may come next in each slot; None if no answer is constrained."""
        mask = None
        for row, job in list(self._running.items()):
            if (constraint := job.request.constraint) is not None:
                if mask is None:
                    mask = np.ones((self._count, self.model.config.vocab_size), bool)
                with reported(job):
                    mask[row] = constraint.mask()
                self._free_ended(row)
        return mask

    def _tell(self, job: Job, row: int, output: tuple[StepOutput, Likeliest], valid: int) -> End | None:
        """Sends a job the first `valid` of its new tokens, at most to its end, which is returned."""
        request, (steps, likeliest) = job.request, output
        ends, count, end = set(request.sampling.eos_token_ids.tolist()), 0, None
        tokens = steps.tokens[:valid, row].tolist()
        while end is None and count < len(tokens):
            count += 1
            if request.constraint is not None:
                request.constraint.accept(tokens[count - 1])
            if tokens[count - 1] in ends or (request.until is not None and request.until(job.tokens + tokens[:count])):
                end = End("stop")
            elif len(job.tokens) + count >= request.max_new_tokens:
                end = End("length")
        self.new_tokens += count
        if count:
            top = top_of(jax.tree.map(lambda x: x[:count, row], likeliest), request.top_logprobs)
            job.tell(Chunk(tokens[:count], steps.logprobs[:count, row].tolist(), top))
        return end

    def _free_ended(self, row: int) -> None:
        if self._running[row].ended is not None:
            del self._running[row]


@contextlib.contextmanager
def reported(job: Job) -> Iterator[None]:
    """Lets a job fail alone where its own functions raise."""
    try:
        yield
    except MPTError as error:
        job.tell(Failure("invalid", str(error)))
    except Exception:
        LOGGER.exception("a request's own function failed")
        job.tell(Failure("internal", "a function of this request failed"))


def top_of(likeliest: Likeliest, count: int) -> list[Top]:
    """Returns the `count` likeliest tokens of each place; nothing for 0."""
    if not count:
        return []
    pairs = zip(likeliest.tokens[:, :count].tolist(), likeliest.logprobs[:, :count].tolist(), strict=True)
    return [list(zip(*pair, strict=True)) for pair in pairs]
