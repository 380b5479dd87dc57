"""Generation on one GPU with MPT-7B's shape and random weights, beside transformers where torch is installed.

    python -m benchmarks.gpu_generation --output DIR               writes DIR/gpu_generation.json, about four minutes
    python -m benchmarks.gpu_generation --output DIR --tiny        small sizes, on a CPU, too

Decode: milliseconds of a step after a prompt of 128, and bytes of weights read per second over the memory's bandwidth,
which is measured. Prefill: tokens per second of one prompt, and operations per second over those of a product of
8192 × 8192 matrices in bfloat16. transformers runs in a process of its own, as it is and under torch.compile.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432, "max_seq_len": 2304}
TINY = {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 96, "max_seq_len": 256}
STEPS = 128


def fastest(run: Callable[[], float], times: int = 3) -> float:
    """Returns the least of what some calls return."""
    return min(run() for _ in range(times))


def machine(tiny: bool) -> dict[str, Any]:
    """Returns the device, its bandwidth when an array is read, and its speed of matrix products."""
    import jax
    import jax.numpy as jnp

    from mpt_eqx.cli._measure import memory_bandwidth

    width = 128 if tiny else 8192
    x = jax.random.normal(jax.random.key(0), (width, width), jnp.bfloat16)
    product = jax.jit(lambda x: [x := x @ x * 0.01 for _ in range(8)][-1])
    jax.block_until_ready(product(x))

    def run() -> float:
        started = time.perf_counter()
        jax.block_until_ready(product(x))
        return (time.perf_counter() - started) / 8

    return {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        "read_bytes_per_s": memory_bandwidth(2**20 if tiny else 2**30), "matmul_flops": 2 * width**3 / fastest(run),
    }  # fmt: skip


def ours(tiny: bool, seconds: float, note: Callable[[str, Any], None]) -> None:
    """Measures mpt_eqx in bfloat16, int8 and int4."""
    import equinox as eqx
    import jax

    from benchmarks.speed.machine import prefill_flops
    from mpt_eqx import MPT, AttnConfig, MPTConfig, quantize
    from mpt_eqx.cli._measure import decode_run, model_facts, prefill_run

    started, found = time.perf_counter(), machine(tiny)
    note("machine", found)
    config = MPTConfig(**(TINY if tiny else SIZES), no_bias=True, attn_config=AttnConfig(alibi=True))
    half = jax.tree.map(lambda x: x.astype("bfloat16") if eqx.is_array(x) else x, MPT(config, key=jax.random.key(0)))
    prompt = [1 + number % 89 for number in range(2048)]
    models = {"bfloat16": half, **{scheme: quantize(half, scheme, embeddings=True) for scheme in ("int8", "int4")}}

    def in_time(name: str) -> bool:
        if late := time.perf_counter() - started > seconds:
            note(name, {"left out": "no time"})
        return not late

    for rows in (1, 8, 32):
        for dtype, model in models.items():
            if not in_time(f"{dtype} decode {rows}"):
                continue
            begun = time.perf_counter()
            run = decode_run(model, prompt[:128], rows, 16 if tiny else STEPS)
            run()
            compiled = time.perf_counter() - begun
            step = fastest(lambda run=run: run()[0]) / (16 if tiny else STEPS)
            share = model_facts(model)["step_bytes"] / step / found["read_bytes_per_s"]
            note(f"{dtype} decode {rows}", {
                "step_ms": step * 1e3, "tokens_per_s": rows / step, "share_of_bandwidth": share, "first_run_s": compiled
            })  # fmt: skip
    for length in (32, 64) if tiny else (128, 512, 2048):
        for dtype, model in models.items():
            if not in_time(f"{dtype} prefill {length}"):
                continue
            run = prefill_run(model, prompt[:length])
            first = run()
            taken = fastest(run)
            flops = prefill_flops(config, length)
            note(f"{dtype} prefill {length}", {
                "tokens_per_s": length / taken, "share_of_peak": flops and flops / taken / found["matmul_flops"],
                "first_run_s": first,
            })  # fmt: skip


def theirs(tiny: bool, seconds: float, note: Callable[[str, Any], None]) -> None:
    """Measures transformers' MPT in bfloat16."""
    import torch
    import transformers

    started, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    sizes = TINY if tiny else SIZES
    names = {"n_layers": "n_layers", "n_heads": "n_heads", "d_model": "d_model", "vocab_size": "vocab_size"}
    config = transformers.MptConfig(**{names[k]: v for k, v in sizes.items() if k in names}, max_seq_len=2304)
    with torch.device("meta"):
        model = transformers.MptForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.02) if weight.ndim > 1 else weight.fill_(1)
    note("transformers", {"torch": torch.__version__, "transformers": transformers.__version__})

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def forward(called: Any, tokens: Any, cache: Any = None) -> Any:
        return called(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def timed(called: Any, length: int) -> Callable[[], float]:
        tokens = torch.arange(length, device=device)[None] % 89

        def run() -> float:
            wait()
            begun = time.perf_counter()
            forward(called, tokens).logits.argmax().item()
            return time.perf_counter() - begun

        return run

    lengths = (32, 64) if tiny else (128, 512, 2048)
    for name, called in (("eager", model), ("compiled", torch.compile(model, dynamic=False))):
        for length in lengths if name == "eager" else lengths[-1:]:
            if time.perf_counter() - started > seconds:
                note(f"transformers {name} prefill {length}", {"left out": "no time"})
                continue
            first = timed(called, length)()
            taken = fastest(timed(called, length))
            note(f"transformers {name} prefill {length}", {"tokens_per_s": length / taken, "first_run_s": first})
        if name == "eager":
            for rows in (1, 8, 32):
                out = forward(model, torch.ones((rows, 128), dtype=torch.long, device=device))
                token, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
                for count in (4, 16):  # the first do not count
                    wait()
                    begun = time.perf_counter()
                    for _ in range(count):
                        token = forward(model, token, cache).logits[:, -1].argmax(-1, keepdim=True)
                    wait()
                    step = (time.perf_counter() - begun) / count
                note(f"transformers decode {rows}", {"step_ms": step * 1e3, "tokens_per_s": rows / step})


def main() -> None:
    """Measures, and writes after each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--seconds", type=float, default=240, help="mpt_eqx begins nothing after them (default: 240)")
    parser.add_argument("--theirs", type=float, default=60, help="the same for transformers; 0 for none (default: 60)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    place = args.output / "gpu_generation.json"
    results: dict[str, Any] = json.loads(place.read_text()) if args.child else {}

    def note(name: str, value: Any) -> None:
        results[name] = value
        place.write_text(json.dumps(results, indent=1) + "\n")
        print(name, value, flush=True)

    if args.child:
        theirs(args.tiny, args.theirs, note)
        return
    ours(args.tiny, args.seconds, note)
    if args.theirs:
        options = ["--output", str(args.output), "--child", "--theirs", str(args.theirs)]
        # This process keeps the GPU's memory for itself.
        command = [sys.executable, "-m", "benchmarks.gpu_generation", *options, *(["--tiny"] if args.tiny else [])]
        subprocess.run(command, check=False)


if __name__ == "__main__":
    main()
