"""A checkpoint of MPT-7B's shape: written as two torch shards, converted, loaded and decoded.

    python benchmarks/loading.py /path/with/30/GB

Each step runs in a process of its own; its seconds and its memory go to benchmarks/results/loading.json and .md.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "tests"))  # for the writer of torch files
PART = 2**24
TOKENS = 3


def memory() -> dict[str, float]:
    """Returns this process's memory in GB: the peak, mapped files included, and the anonymous part now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(fields[key].split()[0]) * 1024 / 1e9 for key in ("VmHWM", "RssAnon")}


def peak_anonymous(function: Callable[[], None]) -> float:
    """Runs the function; returns the peak of anonymous memory meanwhile, in GB, beyond what was there before."""
    before, most, stop = memory()["RssAnon"], [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            most[0] = max(most[0], memory()["RssAnon"])

    thread = threading.Thread(target=watch)
    thread.start()
    function()
    stop.set()
    thread.join()
    return most[0] - before


def numbers(count: int):
    """Yields random bfloat16 numbers of ±0.008 to ±0.016, as bytes."""
    rng = np.random.default_rng(count)
    for at in range(0, count, PART):
        bits = rng.integers(0, 2**16, min(PART, count - at), np.uint16)
        yield ((bits & 0x807F) | 0x3C00).tobytes()


def write(directory: Path, source: Path, name: str) -> None:
    """Writes the preset `name` as two torch shards with an index."""
    import equinox as eqx
    import jax
    import torch_bytes

    from mpt_eqx import MPT, MPTConfig
    from mpt_eqx.checkpoint.names import named_leaves

    config = MPTConfig.preset(name)
    skeleton = eqx.filter_eval_shape(MPT, config, key=jax.random.key(0))
    shapes = {tensor: leaf.shape for tensor, leaf in named_leaves(skeleton).items()}
    source.mkdir(parents=True, exist_ok=True)
    (source / "config.json").write_text(json.dumps(config.to_dict()))
    half, index = len(shapes) // 2, {}
    for number, names in enumerate((list(shapes)[:half], list(shapes)[half:]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        part = {tensor: shapes[tensor] for tensor in names}
        torch_bytes.write_zip(source / file, *torch_bytes.of_shapes(part, "bfloat16", numbers))
        index |= dict.fromkeys(names, file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


def convert(directory: Path, source: Path, name: str) -> None:
    """Rewrites it as aligned safetensors."""
    from mpt_eqx.checkpoint import convert

    convert(source, directory / "converted", max_shard_size="10GB")


def load(directory: Path, source: Path, name: str) -> None:
    """Loads the converted checkpoint in place (memory-mapped)."""
    from mpt_eqx import from_pretrained

    from_pretrained(directory / "converted")


def load_torch(directory: Path, source: Path, name: str) -> None:
    """Loads the torch shards themselves."""
    from mpt_eqx import from_pretrained

    from_pretrained(source)


def decode(directory: Path, source: Path, name: str) -> None:
    """Loads the converted checkpoint and decodes three tokens after a prompt of eight, one by one."""
    from mpt_eqx import from_pretrained, stream

    model, decoded = from_pretrained(directory / "converted"), []
    started = time.monotonic()
    for token in stream(model, list(range(8)), max_new_tokens=TOKENS, chunk_size=1):
        decoded.append((token, round(time.monotonic() - started, 2)))
        started = time.monotonic()
    print(json.dumps({"tokens": [token for token, _ in decoded], "seconds_per_token": [s for _, s in decoded]}))


STEPS = {"write": write, "convert": convert, "load": load, "load_torch": load_torch, "decode": decode}


def main() -> None:
    """Runs one step here (for the parent), or all of them in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="where to write 27 GB; its subdirectory mpt-7b is removed")
    parser.add_argument("--preset", default="mpt-7b", help="the shape (default: mpt-7b)")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    directory = args.directory / args.preset
    if args.step:
        started = time.monotonic()
        own = peak_anonymous(lambda: STEPS[args.step](directory, directory / "torch", args.preset))
        record = {
            "seconds": round(time.monotonic() - started, 1),
            "peak_GB": round(memory()["VmHWM"], 2),
            "anonymous_GB": round(own, 2),
        }
        print(json.dumps(record))
        return

    shutil.rmtree(directory, ignore_errors=True)
    record = {
        "preset": args.preset,
        "processor": platform.processor() or platform.machine(),
        "load_average": round(os.getloadavg()[0], 1),
        "steps": {},
    }
    for step in STEPS:
        command = [sys.executable, __file__, str(args.directory), "--preset", args.preset, "--step", step]
        print(f"{step} …", file=sys.stderr, flush=True)
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        record["steps"][step] = {key: value for line in lines for key, value in json.loads(line).items()}
        print(f"  {record['steps'][step]}", file=sys.stderr, flush=True)
    shutil.rmtree(directory)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "loading.json").write_text(json.dumps(record, indent=2) + "\n")
    rows = [
        f"| {step} | {STEPS[step].__doc__.splitlines()[0]} | {r['seconds']} | {r['peak_GB']} | {r['anonymous_GB']} |"
        for step, r in record["steps"].items()
    ]
    table = [
        f"# Loading {args.preset}'s shape in bfloat16",
        "",
        "`python benchmarks/loading.py DIRECTORY`, each step in a process of its own. The first peak includes mapped",
        "files; the second is the peak of anonymous memory, beyond what the process had before.",
        f"Load average before the first step: {record['load_average']}.",
        "",
        "| step | | seconds | peak, GB | peak anonymous, GB |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"Seconds per token: {record['steps']['decode']['seconds_per_token']}, the first includes compilation.",
    ]
    (RESULTS / "loading.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
