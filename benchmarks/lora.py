"""A step of LoRA on MPT-7B's shape with random weights, over a base in bfloat16 or 4 bits: speed, MFU and memory.

    python -m benchmarks.lora --output DIR                   writes DIR/lora.json; on a GPU five minutes
    python -m benchmarks.lora --output DIR --cpu             in 10 GB of memory, half an hour on two cores
    python -m benchmarks.lora --output DIR --layers 2        some of the layers
    python -m benchmarks.lora --output DIR --tiny            small sizes, on a CPU, too

A is on Wqkv, of rank 8. MFU counts what `train.count_step_flops` does: of the base, which stays as it is, the forward
pass and the gradient of inputs. Dequantising, and what is computed again, count nothing. Each case is a process, which
has its own peak of memory: of the device on a GPU, of the process on a CPU (Linux). The file is written after each
case, and a case that fails leaves its error.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432}
TINY = {"d_model": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 96}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Operations per second in bfloat16, dense."""

BASES = ("bfloat16", "int4")
RANK = 8
ROWS = 256
"""Rows of a weight that are drawn at a time."""


def random_model(config: Any, base: str) -> Any:
    """Returns a stacked model in bfloat16, or with matrices in 4 bits; numbers deviate by 0.02."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from mpt_eqx import MPT
    from mpt_eqx.config.quantization import Quantization
    from mpt_eqx.ops.quantized import QuantizedWeight
    from mpt_eqx.surgery import stack
    from mpt_eqx.surgery.quantization import with_zeros

    quantization = Quantization("int4", False) if base == "int4" else None
    half = jnp.dtype("bfloat16")
    shapes = eqx.filter_eval_shape(lambda: stack(with_zeros(MPT(config, key=jax.random.key(0)), quantization, half)))

    def drawn(shape: tuple[int, ...], number: int, one: Any) -> Any:
        rows = math.gcd(ROWS, shape[-2])

        def all_parts() -> Any:
            keys = jax.random.split(jax.random.key(number), math.prod(shape[:-1]) // rows)
            return jax.lax.map(lambda key: one(key, (rows, shape[-1])), keys).reshape(shape)

        return jax.block_until_ready(jax.jit(all_parts)())

    def leaf(path: Any, like: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if isinstance(like, QuantizedWeight):
            # Odd numbers from -7 to 7, which deviate by 4.6 and have no mean.
            values = drawn(like.values.shape, len(name), lambda key, shape: jax.random.bits(key, shape, "uint8") | 0x11)
            return QuantizedWeight(values, jnp.full(like.scale.shape, 0.0044, half), half)
        if len(like.shape) < 2 or "norm" in name:
            return jnp.ones(like.shape, half)
        return drawn(like.shape, len(name), lambda key, shape: jax.random.uniform(key, shape, half, -0.035, 0.035))

    return jax.tree_util.tree_map_with_path(leaf, shapes, is_leaf=lambda node: isinstance(node, QuantizedWeight))


def resident(name: str) -> float:
    """Returns GB of this process: VmRSS, VmHWM (its largest so far) or RssAnon, which is not of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(1024 * next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1e9, 2)


def child(case: dict[str, Any]) -> None:
    """Measures a case; prints what is known so far after each part."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax

    from mpt_eqx import AttnConfig, MPTConfig, lora
    from mpt_eqx.train import TrainState, count_step_flops, make_train_step

    found: dict[str, Any] = {}
    device = jax.devices()[0]

    def note(**more: Any) -> None:
        found.update(more)
        stats = device.memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            found["peak GB"] = round(stats["peak_bytes_in_use"] / 1e9, 2)
        else:
            found["peak GB"] = resident("VmHWM")
        print(json.dumps(found), flush=True)

    begun = time.perf_counter()
    rows, length = case["rows"], case["length"]
    config = MPTConfig(**case["sizes"], max_seq_len=length, no_bias=True, attn_config=AttnConfig(alibi=True))
    model = random_model(config, case["base"])
    weights = sum(x.nbytes for x in jax.tree.leaves(model))
    model = lora.add(model, rank=RANK, key=jax.random.key(1))
    optimizer = optax.adamw(1e-3)
    state = TrainState.create(model, optimizer, trainable=lora.trainable)
    adapters = sum(x.size for x in jax.tree.leaves(eqx.filter(model, lora.trainable(model))))
    del model
    operations = count_step_flops(state.model, length, trainable=state.trainable)
    step = make_train_step(optimizer, compute_dtype=case["compute"], remat=case["remat"], max_grad_norm=1.0)
    tokens = jax.random.randint(jax.random.key(2), (rows, length), 0, config.vocab_size)
    note(
        device=device.device_kind, jax=jax.__version__, **{"weights GB": round(weights / 1e9, 2), "adapters": adapters},
        **{"to make the model s": round(time.perf_counter() - begun, 1)},
    )  # fmt: skip
    losses, times = [], []
    while len(times) < 1 + case["steps"] or (sum(times[1:]) < case["seconds"] and len(times) < 20):
        begun = time.perf_counter()
        state, metrics = step(state, {"tokens": jnp.array(tokens)})
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - begun)
        seconds = min(times[1:], default=times[0])
        peak = next((p for name, p in PEAKS.items() if name in device.device_kind), None)
        rate = operations * rows / seconds
        note(
            **{"first call s": round(times[0], 1), "steps": len(times) - 1, "step s": round(seconds, 4)},
            **{"tokens/s": round(rows * length / seconds, 2), "TFLOP/s": round(rate / 1e12, 3)},
            MFU=peak and round(rate / peak, 4), loss=[round(losses[i], 3) for i in (0, -1)],
        )  # fmt: skip


def measured(case: dict[str, Any], limit: float) -> dict[str, Any]:
    """Returns what a process of its own finds, and how it failed if it did."""
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94", "JAX_COMPILATION_CACHE_DIR": "/tmp/mpt_eqx_lora"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.lora", "--child", json.dumps(case)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**environment, **os.environ},
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=limit)
        failure = None if process.returncode == 0 else f"ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        failure = f"not ended after {limit:.0f} s"
    lines = [line for line in out.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines else {}
    return found if failure is None else {**found, "failed": failure, "stderr": err[-1500:]}


def cases(kind: str, memory: float, layers: int | None) -> list[dict[str, Any]]:
    """Returns the cases of a GPU with GB of memory, of a CPU, or small ones."""
    sizes = TINY if kind == "tiny" else {**SIZES, **({"n_layers": layers} if layers else {})}

    def case(base: str, rows: int, length: int, remat: str, steps: int = 2, seconds: float = 4.0) -> dict[str, Any]:
        return {"base": base, "rows": rows, "length": length, "remat": remat, "sizes": sizes, "steps": steps,
                "seconds": seconds, "compute": "bfloat16"}  # fmt: skip

    if kind == "tiny":
        return [case(base, 2, 64, "dots", seconds=0) for base in BASES]
    if kind == "cpu":
        return [{**case("int4", 1, length, "dots", 2, 0), "compute": "float32"} for length in (256, 512)]
    many = 2 if memory > 70 else 1
    dots = [case(base, many * rows, length, "dots") for rows, length in ((4, 2048), (1, 8192)) for base in BASES]
    full = [case(base, many * rows, length, "full") for rows, length in ((4, 2048), (1, 8192)) for base in BASES]
    return [*dots, *full, case("int4", 16 * many, 2048, "full", 1, 0), case("int4", 8 * many, 2048, "dots", 1, 0)]


def main() -> None:
    """Measures each case in a process, writes after each, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--layers", type=int, metavar="N", help="how many of the 32 layers")
    parser.add_argument("--cpu", action="store_true", help="the cases of a CPU")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of the GPU; asked of nvidia-smi otherwise")
    parser.add_argument("--seconds", type=float, default=330, help="nothing is begun after them, on a GPU")
    parser.add_argument("--only", type=int, metavar="N", help="the first N cases")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    memory = args.gpu_memory
    if memory is None and not args.cpu and not args.tiny:
        asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        memory = float(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]) / 1000
    args.output.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    started = time.perf_counter()
    for case in cases("tiny" if args.tiny else "cpu" if args.cpu else "gpu", memory or 0, args.layers)[: args.only]:
        left = 3600.0 if args.cpu else args.seconds - (time.perf_counter() - started)
        begun = time.perf_counter()
        found = measured(case, min(left + 20, 3600 if args.cpu else 120)) if left > 0 else {"left out": "no time"}
        results.append({**case, **found, "took s": round(time.perf_counter() - begun, 1)})
        (args.output / "lora.json").write_text(json.dumps(results, indent=1) + "\n")
        shown = {key: value for key, value in results[-1].items() if key not in ("stderr", "sizes")}
        print(f"{time.perf_counter() - started:6.1f}", shown, found.get("stderr", "")[-600:], flush=True)


if __name__ == "__main__":
    main()
