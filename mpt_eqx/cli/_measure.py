"""Measurements of one model in one dtype, made in a process of its own; `benchmarks/speed` uses them as well."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mpt_eqx.checkpoint import from_pretrained
from mpt_eqx.checkpoint.names import named_leaves
from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import MPTError
from mpt_eqx.generation import generate, prefill
from mpt_eqx.model import MPT, KVCache
from mpt_eqx.ops import cpu
from mpt_eqx.surgery.quantization import quantization_of, quantize

EXTRA_TOKENS = 8
"""Tokens generated besides those that count: a call for these alone costs everything but the steps."""

ARRAY_SIZE = 2**28
"""Float32 numbers in the array that bandwidth is measured with: more than any processor's cache holds."""


def load_model(place: str | Path, dtype: str) -> MPT:
    """Returns a checkpoint's model: as stored, cast, or quantised (embedding included, computed in bfloat16).

    Raises:
        MPTError: it is quantised already, and another dtype than "stored" is asked for.
    """
    scheme = dtype if dtype in ("int8", "int4") else None
    target = None if dtype == "stored" else "bfloat16" if scheme else dtype
    model = from_pretrained(place, dtype=target, progress=False)
    if dtype != "stored" and (found := quantization_of(model)) is not None:
        raise MPTError(
            f"{place}: expected weights that are not quantised, found {found.scheme}; measure it with --dtypes stored, "
            f"or give the checkpoint that it was made from"
        )
    model = quantize(model, scheme, embeddings=True) if scheme else model
    return jax.block_until_ready(model)


def make_prompts(vocab_size: int, rows: int, length: int) -> list[list[int]]:
    """Returns prompts of random tokens, the same at every call."""
    return np.random.default_rng(0).integers(vocab_size, size=(rows, length)).tolist()


@eqx.filter_jit
def next_logits(model: MPT, hidden: Array) -> Array:
    """Returns the logits [B, V] of each row's next token, from its last hidden state [B, D]."""
    return jax.vmap(lambda x: model.unembed(x[None])[0])(hidden)


def prefill_run(model: MPT, prompt: list[int]) -> Callable[[], float]:
    """Returns a function that reads the prompt until its next token is known, and returns the seconds."""

    def run() -> float:
        started = time.perf_counter()
        hidden = prefill(model, prompt, progress=False).state.hidden
        np.asarray(next_logits(model, hidden)).argmax()
        return time.perf_counter() - started

    return run


def decode_run(model: MPT, prompt: list[int], rows: int, steps: int) -> Callable[[], tuple[float, list[int]]]:
    """Returns a function that decodes `steps` greedy tokens in each row after the prompt, a multiple of 8.

    It returns the seconds of these steps, and the first row's tokens. The prompt is read once, here; what a call costs
    besides its steps (checks, the copy of the cache) is measured with a short call and subtracted.
    """
    prefix = prefill(model, prompt, progress=False)

    def timed(count: int) -> tuple[float, list[int]]:
        started = time.perf_counter()
        result = generate(model, [[]] * rows, prefix=prefix, max_new_tokens=count, progress=False)
        return time.perf_counter() - started, result.tokens[0].tolist()

    def run() -> tuple[float, list[int]]:
        seconds, tokens = timed(steps + EXTRA_TOKENS)  # first, so that the first run includes compilation
        overhead, _ = timed(EXTRA_TOKENS)
        return (seconds - overhead if overhead < seconds else seconds), tokens[:steps]

    return run


@eqx.filter_jit(donate="all-except-first")
def decode_step(model: MPT, cache: KVCache, tokens: Array) -> tuple[Array, KVCache]:
    """Returns the logits [B, V] after one more token [B] in each row, and its cache, as a step of `generate` does."""
    hidden, cache = jax.vmap(lambda cache, token: model.extend(token[None], cache))(cache, tokens)
    return next_logits(model, hidden[:, 0]), cache


def one_row(model: MPT, capacity: int) -> KVCache:
    """Returns an empty cache with a leading axis of one row."""
    cache = KVCache.empty(model.config, capacity, model.dtype, as_bits=True)
    return jax.tree.map(lambda x: x[None], cache)


def model_facts(model: MPT) -> dict[str, Any]:
    """Returns bytes of the weights, of those that a step reads, and of a compiled step's temporary memory."""
    sizes = {name: leaf.nbytes for name, leaf in named_leaves(model).items()}
    step: Any = decode_step
    memory = step.lower(model, one_row(model, 512), jnp.zeros(1, jnp.int32)).compile().compiled.memory_analysis()
    return {
        "weight_bytes": sum(sizes.values()),
        "step_bytes": step_bytes(model.config, sizes),
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "kernel": bool(cpu.available()),
    }


def step_bytes(config: MPTConfig, sizes: dict[str, int]) -> int:
    """Returns the bytes of weights that a decode step of one row reads: all but the rows of other tokens' embeddings.

    Args:
        config: the model's.
        sizes: bytes of each weight, by its canonical name.
    """
    looked_up = ("transformer.wpe.",) if config.tie_word_embeddings else ("transformer.wpe.", "transformer.wte.")
    return sum(size for name, size in sizes.items() if not name.startswith(looked_up))


def num_threads() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes(process: int | str = "self") -> int | None:
    """Returns a process's peak memory, mapped files included; None where the system does not say (no /proc)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def best_seconds(function: Callable[[], object], times: int = 5) -> float:
    """Returns the least seconds of several calls, after one that does not count."""
    function()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def memory_bandwidth(size: int = ARRAY_SIZE) -> float:
    """Returns how many bytes per second JAX reads of an array of `size` float32 numbers."""
    rows = num_threads() * 8
    x = jax.block_until_ready(jnp.ones((rows, size // rows), jnp.float32))
    largest = jax.jit(lambda x: jnp.max(x, axis=1))
    return x.nbytes / best_seconds(lambda: jax.block_until_ready(largest(x)))


def seconds_of(run: Callable[[], tuple[float, list[int]]]) -> Callable[[], float]:
    """Returns a run of `decode_run` without its tokens."""
    return lambda: run()[0]


def measure(
    place: str, dtype: str, *, prompt: int, new_tokens: int, batch_sizes: Sequence[int], prefill_lengths: Sequence[int],
    rounds: int, array_size: int = ARRAY_SIZE,
) -> dict[str, Any]:  # fmt: skip
    """Returns what is measured of one model in one dtype; `mpt-eqx bench --help` explains the arguments."""
    firsts, compiling = [], 0.0

    def rate(run: Callable[[], float], tokens: int) -> float:
        nonlocal compiling
        firsts.append(run())
        median = statistics.median(run() for _ in range(rounds))
        compiling += max(firsts[-1] - median, 0.0)
        return tokens / median

    started = time.perf_counter()
    model = load_model(place, dtype)
    load_seconds = time.perf_counter() - started
    tokens = make_prompts(model.config.vocab_size, 1, max([prompt, *prefill_lengths]))[0]
    prefills = {n: rate(prefill_run(model, tokens[:n]), n) for n in prefill_lengths}
    decodes = {}
    for rows in batch_sizes:
        decodes[rows] = rate(seconds_of(decode_run(model, tokens[:prompt], rows, new_tokens)), rows * new_tokens)
    peak, quantization, facts = peak_bytes(), quantization_of(model), model_facts(model)
    used = facts["step_bytes"] * decodes[batch_sizes[0]] / batch_sizes[0]
    return {
        "dtype": model.dtype.name if quantization is None else quantization.scheme,
        "prefill_tokens_per_s": prefills, "decode_tokens_per_s": decodes,
        "bandwidth_share": used / memory_bandwidth(array_size),
        "load_seconds": load_seconds, "first_token_seconds": firsts[0], "compile_seconds": compiling,
        "peak_bytes": peak, **facts,
    }  # fmt: skip


if __name__ == "__main__":  # the question on stdin, the answer as the last line of stdout
    try:
        answer = measure(**json.load(sys.stdin))
    except Exception as error:
        text = " ".join(str(error).split())
        answer = {"error": text if isinstance(error, MPTError) else f"{type(error).__name__}: {text}"}
    print(json.dumps(answer))
