"""Measurements of one model in one dtype, made in a process of its own; `benchmarks/speed` uses them as well."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
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
from mpt_eqx.model import MPT
from mpt_eqx.model.flat import Flat, flat
from mpt_eqx.ops import cpu
from mpt_eqx.ops.platform import is_default
from mpt_eqx.surgery.quantization import quantization_of, quantize

EXTRA_TOKENS = 8  # generated besides those that count: a call for these alone costs everything but the steps
ARRAY_SIZE = 2**28  # float32 numbers that bandwidth is measured with: more than any processor's cache holds


def load_model(place: str | Path, dtype: str, overrides: dict[str, Any] | None = None) -> MPT:
    """Returns a checkpoint's model: as stored, cast, or quantised (embedding included, computed in bfloat16).

    Raises:
        MPTError: it is quantised already, and another dtype than "stored" is asked for.
    """
    scheme = dtype if dtype in ("int8", "int4") else None
    target = None if dtype == "stored" else "bfloat16" if scheme else dtype
    model = from_pretrained(place, dtype=target, config_overrides=overrides, progress=False)
    if dtype != "stored" and (found := quantization_of(model)) is not None:
        raise MPTError(
            f"{place}: expected weights that are not quantised, found {found.scheme}; measure it with --dtypes stored"
        )
    return jax.block_until_ready(quantize(model, scheme, embeddings=True) if scheme else model)


@eqx.filter_jit
def next_logits(model: Flat, hidden: Array) -> Array:
    """Returns the logits [B, V] of each row's next token, from its last hidden state [B, D]."""
    return jax.vmap(lambda x: model.whole().unembed(x[None])[0])(hidden)


def prefill_run(model: MPT, prompt: list[int]) -> Callable[[], float]:
    """Returns a function that reads the prompt until its next token is known, and returns the seconds."""
    apart = flat(model)

    def run() -> float:
        started = time.perf_counter()
        np.asarray(next_logits(apart, prefill(model, prompt, progress=False).state.hidden)).argmax()
        return time.perf_counter() - started

    return run


def decode_run(model: MPT, prompt: list[int], rows: int, steps: int) -> Callable[[], tuple[float, list[int]]]:
    """Returns a function that decodes `steps` greedy tokens in each row after the prompt, a multiple of 8.

    It returns their seconds and the first row's tokens; what a call costs besides is subtracted, by a short call.
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


def model_facts(model: MPT) -> dict[str, Any]:
    """Returns bytes of the weights and of those that a step reads, and whether the CPU kernel runs."""
    sizes = {name: leaf.nbytes for name, leaf in named_leaves(model).items()}
    read = step_bytes(model.config, sizes)
    return {"weight_bytes": sum(sizes.values()), "step_bytes": read, "kernel": cpu.available()}


def step_bytes(config: MPTConfig, sizes: dict[str, int]) -> int:
    """Returns the bytes that a decode step of one row reads, given those of each weight by its canonical name."""
    # The rows of other tokens' embeddings are not read.
    looked_up = ("transformer.wpe.",) if config.tie_word_embeddings else ("transformer.wpe.", "transformer.wte.")
    return sum(size for name, size in sizes.items() if not name.startswith(looked_up))


def peak_bytes(process: int | str = "self") -> int | None:
    """Returns a process's peak memory, mapped files included; None where the system does not say (no /proc)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def memory_bandwidth(size: int = ARRAY_SIZE) -> float:
    """Returns the bytes per second that JAX reads of `size` float32 numbers, best of five; on GPUs by queued calls."""
    x = jnp.ones((64, size // 64), jnp.float32)  # threads share the rows
    largest, calls, seconds = jax.jit(lambda x: jnp.max(x, axis=1)), 1 if is_default("cpu") else 8, []
    jax.block_until_ready(largest(x))
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready([largest(x) for _ in range(calls)])
        seconds.append((time.perf_counter() - started) / calls)
    return x.nbytes / min(seconds)


def measure(
    place: str, dtype: str, *, prompt: int, new_tokens: int, batch_sizes: Sequence[int], prefill_lengths: Sequence[int],
    rounds: int, overrides: dict[str, Any] | None = None, array_size: int = ARRAY_SIZE,
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
    model = load_model(place, dtype, overrides)
    load_seconds, length = time.perf_counter() - started, max([prompt, *prefill_lengths])
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=length).tolist()
    prefills = {n: rate(prefill_run(model, tokens[:n]), n) for n in prefill_lengths}
    runs = {rows: decode_run(model, tokens[:prompt], rows, new_tokens) for rows in batch_sizes}
    decodes = {rows: rate(partial(lambda run: run()[0], run), rows * new_tokens) for rows, run in runs.items()}
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
