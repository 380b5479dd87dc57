"""score: log-likelihoods of token sequences of any lengths."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int

from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import GenerationError
from mpt_eqx.evaluation.chunks import CHUNKS, MAX_LOGITS, Layers, read_chunk
from mpt_eqx.generation.buckets import cache_bucket, next_power_of_two
from mpt_eqx.generation.interrupts import held_interrupts
from mpt_eqx.generation.prompts import progress_bar
from mpt_eqx.generation.state import empty_state, replicate
from mpt_eqx.generation.validate import check_count, check_model, check_prefix_lengths, check_sequences
from mpt_eqx.model import MPT
from mpt_eqx.ops.layout import axes_size
from mpt_eqx.ops.platform import on_one_cpu
from mpt_eqx.sharding.multihost import check_same_arguments


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a sequence is: each of its n tokens after the first, or after its prefix.

    Attributes:
        logprobs: the model's log-probability of each token given all before it, in nats.
        is_greedy: whether no token is more likely than each, so that greedy decoding takes it.
    """

    logprobs: Float32[np.ndarray, " n"]
    is_greedy: Bool[np.ndarray, " n"]

    @property
    def total(self) -> float:
        """The log-likelihood in nats: the sum of logprobs."""
        return float(self.logprobs.sum(dtype=np.float64))


@dataclasses.dataclass(frozen=True)
class _Job:
    """A sequence: what is only read, then the tokens of which each predicts the one that follows it."""

    number: int
    given: Int[np.ndarray, " P"]
    inputs: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " n"]
    capacity: int


@check_same_arguments
def score(
    model: MPT,
    sequences: Sequence[Sequence[int]] | Sequence[int],
    *,
    prefix_lengths: Sequence[int] | None = None,
    batch_tokens: int = 8192,
    progress: bool | None = None,
) -> list[Score]:
    """Returns the log-probabilities of the tokens of sequences of any lengths.

    Memory is that of the cache and of 256 rows of logits, which are float32, so that log-probabilities of 16-bit models
    are not rounded. On one CPU each sequence is read by itself, in chunks of 256 or 32 tokens: its numbers do not
    depend on the others, nor on their order, to the bit. Elsewhere sequences of similar lengths are read together, and
    numbers differ by rounding. At most four programs are compiled for each cache size of `generate`, and elsewhere than
    on one CPU for each of a few numbers of rows.

    Args:
        model: the model.
        sequences: token ids of each sequence, or of one; at least two in each, and at most max_seq_len + 1, because
            the last is not read.
        prefix_lengths: how many tokens at the beginning of each are given and not scored, from 1 to its length − 1;
            None for 1. On one CPU a prefix that several sequences share, as answers do a question, is read once.
        batch_tokens: for how many tokens the cache has room, in all sequences that are read together, ≥ 1.
        progress: whether to show a bar on stderr when it takes over two seconds; None: where that is a terminal.

    Raises:
        GenerationError: a sequence or another argument is not valid, or logits are NaN or infinite.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(model)):
        raise GenerationError("model: expected arrays, found traced ones; call score outside of jit, vmap and grad")
    model = check_model(model)
    check_count("batch_tokens", batch_tokens)
    rows = check_sequences(model.config, sequences)
    prefixes = check_prefix_lengths(prefix_lengths, rows)
    jobs = [_job(model.config, *each) for each in zip(itertools.count(), rows, prefixes, strict=False)]
    # What shares a prefix comes together, and else what is alike in length.
    jobs.sort(key=lambda job: (job.capacity, len(job.given), job.given.tobytes(), len(job.inputs)))
    found: dict[int, Score] = {}
    with progress_bar(sum(map(len, rows)), progress, "scoring") as shown:
        for capacity, alike in itertools.groupby(jobs, lambda job: job.capacity):
            for job, result in _scores(model, list(alike), capacity, int(batch_tokens)):
                if not np.isfinite(result.logprobs).all():
                    raise GenerationError(
                        f"sequences[{job.number}]: logits are not finite; look for NaN or infinity in the weights with "
                        "from_pretrained(…, check_finite=True), or use a wider dtype"
                    )
                found[job.number] = result
                shown.update(len(rows[job.number]))
    return [found[number] for number in range(len(rows))]


def chunk_sizes(length: int) -> list[int]:
    """Returns the sizes of the chunks in which `length` tokens are read."""
    large, small = CHUNKS
    return [large] * (length // large) + [small] * (-(-(length % large) // small))


def _job(config: MPTConfig, number: int, row: np.ndarray, prefix: int) -> _Job:
    row = row.astype(np.int32)
    given, inputs, targets = row[: prefix - 1], row[prefix - 1 : -1], row[prefix:]
    room = max(sum(chunk_sizes(len(given))), len(given) + sum(chunk_sizes(len(inputs))))
    # Padding may go beyond the longest sequence: into one size of cache, not into one for each length.
    capacity = cache_bucket(config, room) if room <= config.max_seq_len else config.max_seq_len + CHUNKS[1]
    return _Job(number, given, inputs, targets, capacity)


def _scores(model: MPT, jobs: list[_Job], capacity: int, batch_tokens: int) -> Iterator[tuple[_Job, Score]]:
    """Yields each job and its score; all have the same capacity of the cache."""
    rows = _row_count(model, len(jobs), batch_tokens // capacity)
    with held_interrupts():
        layers = empty_state(model, rows, capacity).cache.layers
    before: list[bytes] = []
    for first in range(0, len(jobs), rows):
        batch = jobs[first : first + rows]
        padded = batch + batch[:1] * (rows - len(batch))
        # What stands in the cache from a row's length on is not seen, so that a prefix stays for the next sequences.
        if (prefixes := [job.given.tobytes() for job in padded]) != before:
            layers, _ = _read(model, layers, padded, scored=False)
            before = prefixes
        layers, outputs = _read(model, layers, padded, scored=True)
        logprobs, is_greedy = (np.concatenate(parts, axis=1) for parts in zip(*outputs, strict=True))
        for row, job in enumerate(batch):
            n = len(job.targets)
            yield job, Score(logprobs[row, :n].copy(), is_greedy[row, :n].copy())


def _read(model: MPT, layers: Layers, jobs: list[_Job], *, scored: bool) -> tuple[Layers, list[tuple[np.ndarray, ...]]]:
    """Returns the cache after the given tokens of each row, or after its inputs, and what `read_chunk` says of them."""
    tokens = [job.inputs if scored else job.given for job in jobs]
    lengths, outputs, done = np.asarray([len(row) for row in tokens]), [], 0
    begin = np.asarray([len(job.given) if scored else 0 for job in jobs])
    for size in chunk_sizes(max(lengths)):
        # A row is padded with a token of its own: one that it does not have could make NaN of it.
        chunk = np.stack([np.full(size, job.inputs[-1]) for job in jobs])
        targets = np.zeros_like(chunk) if scored else None
        for row, job in enumerate(jobs):
            here = tokens[row][done : done + size]
            chunk[row, : len(here)] = here
            if targets is not None:
                targets[row, : len(here)] = job.targets[done : done + size]
        starts = (begin + np.minimum(done, lengths)).astype(np.int32)
        with held_interrupts():
            layers, found = read_chunk(model, layers, *replicate(model, (chunk, targets, starts)))
            if found is not None:
                outputs.append(jax.device_get(found))
            else:
                # Otherwise the host would be done long before the device, with a copy of the cache for every chunk.
                jax.block_until_ready(layers)
        done += size
    return layers, outputs


def _row_count(model: MPT, jobs: int, most: int) -> int:
    """Returns how many rows are read together: one on a CPU, and on a mesh a multiple of what divides a batch."""
    array = next(leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array))
    if on_one_cpu(array):
        return 1
    rows = min(max(most, 1), next_power_of_two(jobs), MAX_LOGITS)
    parts = 1 if model.layout is None else axes_size(model.layout.mesh, model.layout.rules.axes("batch"))
    return -(-rows // parts) * parts
