"""What is measured of one implementation, and of the machine that it runs on."""

import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpt_eqx.config import MPTConfig

FORMS = ("float32", "bfloat16", "int8", "int4")
"""The forms in which weights are measured, by our name."""

SIZES = {"small": 2**22, "large": 2**28}
"""Numbers in the array whose reading is timed: a test's, and one that no cache of a processor holds."""


class Implementation(NamedTuple):
    """A model that was loaded, and how to have it work.

    Attributes:
        prefill: from a prompt, a function that reads it from the start until the next token is known, and returns the
            seconds that took.
        decode: from the prompts of some rows and a number of steps, a function that makes so many tokens for each row
            and returns the seconds that took, and the first row's tokens. The prompts are read once; every call goes on
            from there.
        logits: the logits of the token after a prompt, of which the last few tokens are read one by one, as in
            generation.
        facts: what can be said without measuring.
    """

    prefill: Callable[[list[int]], Callable[[], float]]
    decode: Callable[[list[list[int]], int], Callable[[], tuple[float, list[int]]]]
    logits: Callable[[list[int]], np.ndarray]
    facts: Callable[[], dict[str, Any]]


ONE_BY_ONE = 4
"""Tokens that `logits` reads one by one."""


def make_prompts(vocab_size: int, rows: int, length: int) -> list[list[int]]:
    """Returns prompts of random tokens, the same ones every time; what they say costs no step more or less."""
    return np.random.default_rng(0).integers(vocab_size, size=(rows, length)).tolist()


def threads() -> int:
    """Returns how many threads everybody gets: as many as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes() -> int | None:
    """Returns the most memory this process has had, mapped files included; None where the system does not say.

    From /proc, because what getrusage says is inherited from the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def hardware() -> dict[str, Any]:
    """Returns what this machine is: its processor, cores and memory."""
    name = platform.processor() or platform.machine()
    memory = None
    try:
        cpu = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in cpu if line.startswith("model name")), name)
        total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
        memory = round(int(total.split()[1]) * 1024 / 1e9, 1)
    except (OSError, StopIteration):
        pass
    return {"cpu": name, "cores": threads(), "memory_GB": memory, "system": f"{platform.system()} {platform.release()}"}


def measure_machine(size: str) -> dict[str, Any]:
    """Returns how fast this machine reads memory and multiplies matrices, the best of several ways and times.

    Args:
        size: "large", or "small" for figures that mean nothing.
    """
    import jax

    read = {"jax": _read_by_jax(SIZES[size])}
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        read["numpy"] = _read_by_numpy(SIZES[size])
    width = {"small": 128, "large": 2048 if on_cpu else 8192}[size]
    flops = {dtype: {"jax": _multiply_by_jax(width, dtype)} for dtype in ("float32", "bfloat16")}
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "read_GB_per_s": read,
        "matmul_GFLOP_per_s": flops,
        "matmul_width": width,
    }


def best_seconds(function: Callable[[], object], times: int = 5) -> float:
    """Returns the least seconds of several calls, after one that does not count."""
    function()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _read_by_jax(count: int) -> float:
    import jax
    import jax.numpy as jnp

    x = jax.block_until_ready(jnp.ones((threads() * 8, count // (threads() * 8)), jnp.float32))
    function = jax.jit(lambda x: jnp.max(x, axis=1))
    return x.nbytes / best_seconds(lambda: jax.block_until_ready(function(x))) / 1e9


def _read_by_numpy(count: int) -> float:
    """Each thread reads its own part; numpy lets the others run meanwhile."""
    parts = np.split(np.ones(count // threads() * threads(), np.float32), threads())

    def read() -> None:
        workers = [threading.Thread(target=np.max, args=(part,)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return sum(part.nbytes for part in parts) / best_seconds(read) / 1e9


def _multiply_by_jax(width: int, dtype: str) -> float:
    import jax
    import jax.numpy as jnp

    x = jnp.ones((width, width), dtype)
    function = jax.jit(lambda x: jnp.matmul(x, x))
    return 2 * width**3 / best_seconds(lambda: jax.block_until_ready(function(x)), 3) / 1e9


def step_bytes(config: MPTConfig, sizes: dict[str, int]) -> int:
    """Returns the bytes of weights that a step of one row reads: all but the vectors of tokens that are not there.

    Args:
        config: the model's.
        sizes: bytes of each weight, by its canonical name.
    """
    looked_up = {"transformer.wpe"} | (set() if config.tie_word_embeddings else {"transformer.wte"})
    return sum(size for name, size in sizes.items() if not any(name.startswith(f"{stem}.") for stem in looked_up))


def prefill_flops(config: MPTConfig, length: int) -> int | None:
    """Returns the operations of reading a prompt and making the logits of its last token; None for mixtures.

    Two for every weight of the blocks and token, two for every weight of the output matrix, and those of attention to
    the tokens so far.
    """
    if config.ffn_config.moe_num_experts > 1:
        return None
    head = config.vocab_size * config.d_model
    blocks = config.num_parameters() - head * (1 if config.tie_word_embeddings else 2)
    attention = 2 * config.n_layers * config.n_heads * config.head_size * length * (length + 1)
    return 2 * blocks * length + 2 * head + attention
