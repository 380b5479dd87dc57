"""Attention and training on one GPU: whether they are right, how fast, and with how much memory.

    python -m benchmarks.gpu_training --output DIR      writes DIR/gpu_training.json and prints it; about two minutes
    python -m benchmarks.gpu_training --output DIR --tiny     small sizes, on a CPU, too

Each measurement is recorded by itself, also one that fails, with its error. MFU follows llm-foundry: `count_flops`,
which counts attention in full, and nothing that is computed again, by the card's dense bfloat16 peak.
"""

import argparse
import gc
import json
import os
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import mpt_eqx.ops.attend as attend_module
from mpt_eqx import MPT, AttnConfig, MPTConfig, count_flops
from mpt_eqx.model.alibi import alibi_slopes
from mpt_eqx.ops.attend import attend
from mpt_eqx.ops.attention import alibi_bias, attention, visible
from mpt_eqx.ops.flash_attention import flash_attention
from mpt_eqx.ops.layer_cache import KeysValues
from mpt_eqx.surgery import stack
from mpt_eqx.train import TrainState, make_train_step

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
GPU = jax.default_backend() == "gpu"
CHOSEN: list[bool] = []
supports = attend_module.supports_flash_attention


def by_flash(q: Any, k: Any, v: Any, alibi: bool, window: int | None) -> Any:
    """Attention of one row by cuDNN; elsewhere by XLA's implementation of the same function."""
    slopes = alibi_slopes(q.shape[0], 8) if alibi else None
    return flash_attention(q, k, v, slopes, q.shape[-1] ** -0.5, window, implementation="cudnn" if GPU else "xla")


def by_blocks(q: Any, k: Any, v: Any, alibi: bool, window: int | None) -> Any:
    """Attention of one row in blocks of queries."""
    slopes, where = alibi_slopes(q.shape[0], 8) if alibi else None, jnp.arange(q.shape[1])
    attend_module.supports_flash_attention = lambda *_: False
    try:
        return attend(q, KeysValues(k, v), where, scale=q.shape[-1] ** -0.5, slopes=slopes, window=window)
    finally:
        attend_module.supports_flash_attention = supports


def by_formula(q: Any, k: Any, v: Any, alibi: bool, window: int | None) -> Any:
    """Attention of one row as it is defined, in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    where, groups = jnp.arange(q.shape[1]), q.shape[0] // k.shape[0]
    bias = alibi_bias(alibi_slopes(q.shape[0], 8), where, where) if alibi else None
    k, v = jnp.repeat(k, groups, 0), jnp.repeat(v, groups, 0)
    with jax.default_matmul_precision("highest"):
        return attention(q, k, v, bias, visible(where, where, window), q.shape[-1] ** -0.5)


def drawn(rows: int, n: int, k: int, t: int, h: int) -> tuple[Any, ...]:
    """Returns queries, keys, values and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, heads, t, h) for heads in (n, k, k, n)]
    return tuple(jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=True))


def both_ways(way: Callable[..., Any], alibi: bool, window: int | None, *arrays: Any) -> tuple[Any, ...]:
    """Returns the value and its three derivatives."""
    *inputs, cotangent = arrays
    value, back = jax.vjp(jax.vmap(partial(way, alibi=alibi, window=window)), *inputs)
    return value, *back(cotangent.astype(value.dtype))


def errors(n: int, k: int, t: int, h: int, window: int | None, alibi: bool) -> dict[str, Any]:
    """Returns the largest error of value, dq, dk and dv, as a part of the largest number, in either way."""
    arrays = drawn(2, n, k, t, h)
    found = {w.__name__: jax.jit(partial(both_ways, w, alibi, window))(*arrays) for w in (by_flash, by_blocks)}
    with jax.default_matmul_precision("highest"):
        right = jax.jit(partial(both_ways, by_formula, alibi, window))(*arrays)

    def error(x: Any, y: Any) -> float:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return round(float(jnp.abs(x - y).max() / jnp.abs(y).max()), 5)

    row = {name: [error(x, y) for x, y in zip(xs, right, strict=True)] for name, xs in found.items()}
    return {**row, "right": max(row["by_flash"]) < 0.03}


def speed(way: Callable[..., Any], n: int, t: int, h: int, alibi: bool, rows: int) -> dict[str, Any]:
    """Returns milliseconds, temporary memory and operations (causal, forward and backward) per second."""
    arrays = drawn(rows, n, n, t, h)
    compiled = jax.jit(partial(both_ways, way, alibi, None)).lower(*arrays).compile()
    seconds = fastest(lambda: compiled(*arrays))
    temporary = compiled.memory_analysis().temp_size_in_bytes
    done = 3.5 * 2 * rows * n * t**2 * h / seconds
    return {"ms": round(seconds * 1e3, 3), "temporary MB": round(temporary / 1e6, 1), "TFLOP/s": round(done / 1e12, 1)}


def fastest(run: Callable[[], Any], limit: float = 1.5) -> float:
    """Returns the seconds of the fastest call, among as many as fit into a time, after one that does not count."""
    jax.block_until_ready(run())
    times: list[float] = []
    while len(times) < 2 or (sum(times) < limit and len(times) < 20):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return min(times)


def training(sizes: dict[str, int], rows: int, t: int, remat: Any, flash: bool) -> dict[str, Any]:
    """Returns seconds, tokens per second and MFU of a step: bfloat16 compute over float32 weights, AdamW, clipping."""
    config = MPTConfig(**sizes, max_seq_len=t, no_bias=True, attn_config=AttnConfig(alibi=True))

    def leaf(path: Any, like: Any) -> Any:
        small = 0.02 * jax.random.normal(jax.random.key(len(str(path))), like.shape, like.dtype)
        return jnp.ones_like(small) if "norm" in str(path) else small

    shapes = eqx.filter_eval_shape(lambda: stack(MPT(config, key=jax.random.key(0))))
    model = jax.jit(lambda: jax.tree_util.tree_map_with_path(leaf, shapes))()
    optimizer = optax.adamw(1e-4)
    state = TrainState.create(model, optimizer)
    del model
    CHOSEN.clear()
    attend_module.supports_flash_attention = lambda *args: CHOSEN.append(flash and supports(*args)) or CHOSEN[-1]
    step = make_train_step(optimizer, compute_dtype="bfloat16", remat=remat, max_grad_norm=1.0)
    batch = {"tokens": jax.random.randint(jax.random.key(1), (rows, t), 0, config.vocab_size)}
    kept, losses = [state], []
    del state

    def run() -> Any:
        kept[0], metrics = step(kept[0], batch)
        losses.append(metrics["loss"])
        return metrics

    started = time.perf_counter()
    try:
        jax.block_until_ready(run())
        compiling = time.perf_counter() - started
        seconds = fastest(run, 4)
    finally:
        attend_module.supports_flash_attention = supports
    peak = next((p for name, p in PEAKS.items() if name in jax.devices()[0].device_kind), None)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "first call s": round(compiling, 1), "step s": round(seconds, 4), "tokens/s": round(rows * t / seconds),
        "MFU": peak and round(count_flops(config, t) * rows / seconds / peak, 4), "by cuDNN": all(CHOSEN),
        "loss": [round(float(losses[i]), 3) for i in (0, -1)],
        "peak GB so far": round(stats.get("peak_bytes_in_use", 0) / 1e9, 2),
    }  # fmt: skip


def main() -> None:
    """Measures, writes after each measurement, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--seconds", type=float, default=150, help="nothing is begun after them")
    args = parser.parse_args()
    device, started = jax.devices()[0], time.perf_counter()
    results: dict[str, Any] = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
    args.output.mkdir(parents=True, exist_ok=True)

    def note(name: str, measure: Callable[..., dict[str, Any]], *how: Any) -> bool:
        begun = time.perf_counter()
        if begun - started > args.seconds:
            results[name] = {"left out": "no time"}
            return False
        try:
            results[name] = measure(*how)
        except Exception as error:
            results[name] = {"failed": f"{type(error).__name__}: {error}"[:1500], "at": traceback.format_exc()[-700:]}
        gc.collect()
        results[name]["took s"] = round(time.perf_counter() - begun, 1)
        (args.output / "gpu_training.json").write_text(json.dumps(results, indent=1) + "\n")
        shown = {key: value for key, value in results[name].items() if key != "at"}
        print(f"{time.perf_counter() - started:6.1f}", name, shown, flush=True)
        return "failed" not in results[name]

    tiny = args.tiny
    checks = [(12, 12, 512, 64, None, True), (16, 4, 513, 128, 100, True), (16, 16, 2048, 128, None, True),
              (8, 1, 2048, 64, None, False)]  # fmt: skip
    for n, k, t, h, window, alibi in [(4, 2, 300, 16, 40, True)] if tiny else checks:
        note(f"errors N={n} K={k} T={t} H={h} window={window} alibi={alibi}", errors, n, k, t, h, window, alibi)
    sizes = {"d_model": 2048, "n_layers": 24, "n_heads": 16, "vocab_size": 50368}
    if tiny:
        sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 96}

    def train(t: int, tokens: int, flash: bool, *kept: str) -> None:
        name = f"training step T={t} by {'cuDNN' if flash else 'blocks'}"
        any(note(f"{name} remat={how}", training, sizes, tokens // t, t, how, flash) for how in kept)

    short, long = (64, 128) if tiny else (2048, 8192)
    train(short, 256 if tiny else 16384, True, "dots", "full")
    train(long, 256 if tiny else 16384, True, "dots", "full")
    n, h = (2, 16) if tiny else (16, 128)
    for t in (64, 512) if tiny else (2048, 8192, 32768):
        rows = 1 if tiny else max(1, 16384 // t)
        for way in (by_flash, by_blocks):
            note(f"attention T={t} rows={rows} N={n} H={h} {way.__name__}", speed, way, n, t, h, True, rows)
        note(f"attention T={t} rows={rows} N={n} H={h} by_flash without ALiBi", speed, by_flash, n, t, h, False, rows)
    train(short, 256 if tiny else 16384, False, "dots", "full")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
