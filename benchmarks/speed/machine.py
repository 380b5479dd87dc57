"""What this machine can do, and what share of it a model's speed is."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_eqx import MPTConfig
from mpt_eqx.cli._measure import ARRAY_SIZE, memory_bandwidth

ROOT = Path(__file__).parents[2]
SIZES = {"small": 2**22, "large": ARRAY_SIZE}
"""Float32 numbers in the array that bandwidth is measured with; "small" is for tests, its figures mean nothing."""


def num_threads() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_seconds(function: Callable[[], object], times: int = 5) -> float:
    """Returns the least seconds of several calls, after one that does not count."""
    function()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def hardware() -> dict[str, Any]:
    """Returns this machine's processor, cores and memory."""
    name = platform.processor() or platform.machine()
    memory = None
    try:
        cpu = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in cpu if line.startswith("model name")), name)
        total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
        memory = round(int(total.split()[1]) * 1024 / 1e9, 1)
    except (OSError, StopIteration):
        pass
    system = f"{platform.system()} {platform.release()}"
    return {"cpu": name, "cores": num_threads(), "memory_GB": memory, "system": system}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that take part and are installed."""
    names = ("mpt_eqx", "jax", "jaxlib", "equinox", "numpy", "torch", "transformers", "llama_cpp_python", "gguf")
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Returns this checkout's commit, with "+" where files of the package differ from it; None outside git."""
    try:
        head, changed = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "mpt_eqx"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+" if changed.strip() else "")


def measure_machine(size: str, *, with_torch: bool = False) -> dict[str, Any]:
    """Returns memory bandwidth and the speed of matrix products, each measured in several ways.

    Args:
        size: "large", or "small" for figures that mean nothing.
        with_torch: whether torch multiplies as well.
    """
    on_cpu = jax.default_backend() == "cpu"
    read = {"jax": memory_bandwidth(SIZES[size]) / 1e9}
    if on_cpu:
        read["numpy"] = _numpy_bandwidth(SIZES[size]) / 1e9
    width = {"small": 128, "large": 2048 if on_cpu else 8192}[size]
    product, flops = jax.jit(jnp.matmul), {}
    for dtype in ("float32", "bfloat16"):
        x = jnp.ones((width, width), dtype)
        seconds = best_seconds(lambda x=x: jax.block_until_ready(product(x, x)), 3)
        flops[dtype] = {"jax": 2 * width**3 / seconds / 1e9}
        if with_torch:
            flops[dtype]["torch"] = _torch_flops(width, dtype) / 1e9
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "read_GB_per_s": read,
        "matmul_GFLOP_per_s": flops,
        "matmul_width": width,
    }


def _numpy_bandwidth(size: int) -> float:
    """Each thread reads its own part; numpy releases the lock meanwhile."""
    threads = num_threads()
    parts = np.split(np.ones(size // threads * threads, np.float32), threads)

    def read() -> None:
        workers = [threading.Thread(target=np.max, args=(part,)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return sum(part.nbytes for part in parts) / best_seconds(read)


def _torch_flops(width: int, dtype: str) -> float:
    import torch

    torch.set_num_threads(num_threads())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.ones((width, width), dtype=getattr(torch, dtype), device=device)

    def run() -> None:
        torch.matmul(x, x)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * width**3 / best_seconds(run, 3)


def prefill_flops(config: MPTConfig, length: int) -> int | None:
    """Returns the operations of a prefill with the logits of its last token; None for mixtures of experts.

    2 · weights of the blocks · tokens + 2 · weights of the output matrix + those of attention to the tokens so far.
    """
    if config.ffn_config.moe_num_experts > 1:
        return None
    head = config.vocab_size * config.d_model
    blocks = config.num_parameters() - head * (1 if config.tie_word_embeddings else 2)
    attention = 2 * config.n_layers * config.n_heads * config.head_size * length * (length + 1)
    return 2 * blocks * length + 2 * head + attention


def add_shares(result: dict[str, Any], machine: dict[str, Any], config: MPTConfig) -> None:
    """Adds to a result what share of the machine's speed it reached."""
    bandwidth = max(machine["read_GB_per_s"].values())
    kind = "float32" if result["dtype"] == "float32" else "bfloat16"
    peak = max(machine["matmul_GFLOP_per_s"][kind].values())
    for size, run in result["decode"].items():
        if "step_bytes" in result and "tokens_per_s" in run:
            run["weights_GB_per_s"] = result["step_bytes"] * run["tokens_per_s"] / int(size) / 1e9
            run["share_of_bandwidth"] = run["weights_GB_per_s"] / bandwidth
    for size, run in result["prefill"].items():
        if (flops := prefill_flops(config, int(size))) and "median_seconds" in run:
            run["GFLOP_per_s"] = flops / run["median_seconds"] / 1e9
            run["share_of_peak"] = run["GFLOP_per_s"] / peak
    if "temporary_bytes" in result:
        result["temporary_over_weights"] = result["temporary_bytes"] / result["weight_bytes"]
