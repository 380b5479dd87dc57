"""Speed and peak memory of a training step on a CPU, beside transformers on torch, or beside another checkout.

    python benchmarks/training.py --torch PYTHON        a Python that has torch and transformers (default: this one)
    python benchmarks/training.py --package ../before   another checkout of this library as well
    python benchmarks/training.py --lora 8 --lengths 256 --rows 8    LoRA on the shipped model, beside PEFT

A step is forward, loss, backward and AdamW on random tokens and weights: in float32, and with bfloat16 compute over
float32 weights (`torch.autocast` in torch). Each (implementation, type, length) is a process; those of a type and a
length take turns, step by step, so that what else the machine does slows all of them. Speed is that of the median
step of each. Memory is the peak of the whole process, compiling included; Linux only. The results go to stdout as JSON,
progress to stderr.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LEARNING_RATE = 1e-4
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""The environment in which glibc gives no memory back to the system."""


def open_transformers(sizes: dict[str, int], dtype: str, rows: int, length: int) -> Callable[[], float]:
    """Returns a function that takes a step and returns its loss."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.MptForCausalLM(transformers.MptConfig(**sizes, no_bias=True, use_cache=False)).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    tokens = torch.randint(1, sizes["vocab_size"], (rows, length))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def open_peft(directory: str, rank: int, rows: int, length: int, **_: Any) -> Callable[[], float]:
    """Returns a function that takes a step of LoRA on Wqkv and returns its loss."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, use_cache=False)
    model = peft.get_peft_model(base, peft.LoraConfig(r=rank, target_modules=["Wqkv"])).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), LEARNING_RATE)
    tokens = torch.randint(1, base.config.vocab_size, (rows, length))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def open_mpt_eqx(
    dtype: str, rows: int, length: int, sizes: dict[str, int] | None = None, directory: str = "", rank: int = 0
) -> Callable[[], float]:
    """Returns a function that takes a step and returns its loss: of all weights, or of LoRA on Wqkv."""
    import jax
    import numpy as np
    import optax

    from mpt_eqx import MPT, AttnConfig, MPTConfig, from_pretrained, lora, train

    optimizer = optax.adamw(LEARNING_RATE)
    if sizes is None:
        model = lora.add(from_pretrained(directory, dtype="float32"), rank=rank, key=jax.random.key(0))
        state, update = (
            train.TrainState.create(model, optimizer, trainable=lora.trainable),
            train.make_train_step(optimizer),
        )
    else:
        model = MPT(MPTConfig(**sizes, no_bias=True, attn_config=AttnConfig(alibi=True)), key=jax.random.key(0))
        state, update = (
            train.TrainState.create(model, optimizer),
            train.make_train_step(optimizer, compute_dtype=None if dtype == "float32" else dtype),
        )
    tokens = np.random.default_rng(1).integers(1, model.config.vocab_size, (rows, length)).astype(np.int32)
    kept = [state]
    del model, state

    def step() -> float:
        kept[0], metrics = update(kept[0], {"tokens": tokens})
        return float(metrics["loss"])

    return step


OPEN = {"transformers": open_transformers, "PEFT": open_peft}


def child(which: str, request: str) -> None:
    """Takes a step for each line on stdin; answers with its seconds, its loss and the peak memory so far."""
    step = OPEN.get(which, open_mpt_eqx)(**json.loads(request))
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - started
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak}), flush=True)


class Child:
    """A process of `child`."""

    def __init__(self, python: str, which: str, package: Path, request: dict[str, Any], memory: dict[str, str]):
        self.process = subprocess.Popen(
            [python, __file__, "--child", which, json.dumps(request)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, cwd=package, env={**os.environ, **memory, "PYTHONPATH": str(package)},
        )  # fmt: skip

    def step(self) -> dict[str, float]:
        """Takes a step."""
        print(file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def device(rivals: dict[str, tuple[str, Path]]) -> dict[str, Any]:
    """Returns the processor, and the versions of what is measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    found = {"cpu": name, "cores": os.cpu_count(), "time": time.strftime("%Y-%m-%d")}
    ask = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    asked = {"jax": "mpt_eqx", "torch": "transformers", "transformers": "transformers", "peft": "PEFT"}
    for package, name in asked.items():
        rival = rivals.get(name, rivals.get("PEFT") if name == "transformers" else None)
        if rival is not None:
            found[package] = subprocess.check_output([rival[0], "-c", ask, package], text=True).strip()
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="has torch and transformers")
    parser.add_argument("--package", type=Path, help="another checkout, measured as well")
    parser.add_argument("--no-torch", action="store_true", help="leave transformers out")
    for flag, default in (("layers", 12), ("width", 768), ("heads", 12), ("vocab", 50368), ("rows", 2), ("rounds", 5)):
        parser.add_argument(f"--{flag}", type=int, default=default, metavar="N")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters on the shipped model")
    parser.add_argument("--lengths", default="512", metavar="T,…", help="tokens in a row")
    parser.add_argument("--dtypes", default="float32,bfloat16", metavar="TYPE,…")
    parser.add_argument("--keep-memory", action="store_true", help="no process gives freed memory back")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)

    if args.lora:
        args.dtypes = "float32"
    sizes = {"d_model": args.width, "n_layers": args.layers, "n_heads": args.heads, "vocab_size": args.vocab}
    rivals = {"mpt_eqx": (sys.executable, ROOT)}
    if not args.no_torch:
        rivals["PEFT" if args.lora else "transformers"] = (args.torch, ROOT)
    if args.package:
        rivals["other checkout"] = (sys.executable, args.package.absolute())
    results, memory = [], KEEP_MEMORY if args.keep_memory else {}
    for length in map(int, args.lengths.split(",")):
        for dtype in args.dtypes.split(","):
            request = {"dtype": dtype, "rows": args.rows, "length": length}
            if args.lora:
                request |= {"directory": str(ROOT / "mpt_eqx" / "pydoc-3m"), "rank": args.lora}
            else:
                request["sizes"] = {**sizes, "max_seq_len": length}
            children = {
                name: Child(python, name, package, request, memory) for name, (python, package) in rivals.items()
            }
            found = {name: [one.step()] for name, one in children.items()}  # compiles
            for number in range(args.rounds):
                for name in list(children)[:: -1 if number % 2 else 1]:
                    found[name].append(children[name].step())
                print(dtype, length, {n: round(steps[-1]["seconds"], 2) for n, steps in found.items()}, file=sys.stderr)
            for one in children.values():
                one.close()
            tokens = args.rows * length
            seconds = {name: [one["seconds"] for one in steps[1:]] for name, steps in found.items()}
            rates = {name: tokens / statistics.median(each) for name, each in seconds.items()}
            peaks = {name: steps[-1]["peak"] for name, steps in found.items()}
            results.append({
                "dtype": dtype, "rows": args.rows, "length": length,
                "tokens per second": {name: round(rate, 1) for name, rate in rates.items()},
                "seconds of each step": {name: [round(one, 2) for one in each] for name, each in seconds.items()},
                "peak GB": {name: round(peak / 1e9, 2) for name, peak in peaks.items()},
                "first and last loss": {n: [round(s[0]["loss"], 3), round(s[-1]["loss"], 3)] for n, s in found.items()},
                "times as fast as": {n: round(rates["mpt_eqx"] / rate, 2) for n, rate in rates.items()},
                "part of the memory of": {n: round(peaks["mpt_eqx"] / peak, 2) for n, peak in peaks.items()},
            })  # fmt: skip
            print(results[-1], file=sys.stderr)
    model = f"pydoc-3m, LoRA of rank {args.lora} on Wqkv" if args.lora else sizes
    how = {"device": device(rivals), "model": model, "rounds": args.rounds, "freed memory is kept": bool(memory)}
    print(json.dumps({**how, "results": results}, indent=1))


if __name__ == "__main__":
    main()
