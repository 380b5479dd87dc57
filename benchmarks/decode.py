"""Decode speed of mpt_eqx by dtype, batch size and kernel, alone or beside another checkout of it.

    python benchmarks/decode.py                                   random weights of the reference size
    python benchmarks/decode.py --layers 8 --batch-sizes 1,4      a smaller model
    python benchmarks/decode.py --package ../before               A = this checkout, B = that one, with ratios A/B

Each (checkout, kernel) is a process; they take turns, round by round, so that what else the machine does slows all of
them. A round times two calls of `generate` that differ by --new-tokens tokens, after the same prefix. JSON goes to
stdout, a table and progress to stderr.
"""

import argparse
import itertools
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
WARM_UP = 8  # tokens that both calls generate


def child() -> None:
    """Answers lines of JSON on stdin: builds a model, then times its decode steps."""
    import jax

    from mpt_eqx import MPT, AttnConfig, MPTConfig, generate, prefill

    runs: dict[tuple[str, int], Callable[[int], Any]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if sizes := request.get("model"):
            config = MPTConfig(**sizes, max_seq_len=4096, no_bias=True, attn_config=AttnConfig(alibi=True))
            model = MPT(config, key=jax.random.key(0))
            for dtype in request["dtypes"]:
                cast = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), model)
                prefix = prefill(cast, [1 + i % 999 for i in range(request["prompt"])], progress=False)
                for rows in request["batch_sizes"]:

                    def run(count: int, model: Any = cast, prefix: Any = prefix, rows: int = rows) -> None:
                        generate(model, [[]] * rows, prefix=prefix, max_new_tokens=count, progress=False)

                    run(WARM_UP)  # compiles
                    runs[dtype, rows] = run
            print("{}", flush=True)
            continue
        run, seconds = runs[request["dtype"], request["rows"]], []
        for count in (request["new_tokens"] + WARM_UP, WARM_UP):
            started = time.perf_counter()
            run(count)
            seconds.append(time.perf_counter() - started)
        print(json.dumps({"seconds": seconds[0] - seconds[1]}), flush=True)


class Child:
    """One checkout with or without the kernel, in a process."""

    def __init__(self, package: Path, kernel: str):
        environment = {**os.environ, "PYTHONPATH": str(package), "MPT_EQX_KERNEL": kernel}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, cwd=package,
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, Any]:
        """Returns the answer to one request."""
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("layers", 24), ("width", 1024), ("heads", 16), ("vocab", 50368), ("prompt", 128),
                          ("new-tokens", 64), ("rounds", 5)):  # fmt: skip
        parser.add_argument(f"--{flag}", type=int, default=default, metavar="N", help=f"(default: {default})")
    for flag, default in (("batch-sizes", "1,4,16"), ("dtypes", "float32,bfloat16"), ("kernel", "1,0")):
        parser.add_argument(f"--{flag}", default=default, metavar="A,B", help=f"(default: {default})")
    parser.add_argument("--package", type=Path, metavar="PATH", help="another checkout's root (default: none)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child()
    dtypes, kernels = args.dtypes.split(","), args.kernel.split(",")
    batches = [int(text) for text in args.batch_sizes.split(",")]
    sizes = {"n_layers": args.layers, "d_model": args.width, "n_heads": args.heads, "vocab_size": args.vocab}
    places = {"A": ROOT} | ({"B": args.package.resolve()} if args.package else {})
    children = {(name, kernel): Child(places[name], kernel) for name in places for kernel in kernels}
    for key, one in children.items():
        print("compiling", *key, file=sys.stderr)
        one.ask(model=sizes, dtypes=dtypes, batch_sizes=batches, prompt=args.prompt)
    cases = list(itertools.product(kernels, dtypes, batches))
    rates: dict[tuple, list[float]] = {(name, *case): [] for name in places for case in cases}
    for number, (kernel, dtype, rows) in itertools.product(range(args.rounds), cases):
        # B begins every second round, so that neither is always the one that finds the caches warm.
        for name in list(places)[:: -1 if number % 2 else 1]:
            answer = children[name, kernel].ask(dtype=dtype, rows=rows, new_tokens=args.new_tokens)
            rates[name, kernel, dtype, rows].append(rows * args.new_tokens / answer["seconds"])
    results = []
    for kernel, dtype, rows in cases:
        found = {name: statistics.median(rates[name, kernel, dtype, rows]) for name in places}
        results.append({"kernel": kernel == "1", "dtype": dtype, "rows": rows, **found})
        ratio = ""
        if "B" in found:
            results[-1]["ratio"] = found["A"] / found["B"]
            ratio = f"  B {found['B']:8.1f}  A/B {results[-1]['ratio']:.3f}"
        where = f"kernel {'on ' if kernel == '1' else 'off'}  {dtype:9} batch {rows:3}"
        print(f"{where}  tokens/s  A {found['A']:8.1f}{ratio}", file=sys.stderr)
    print(json.dumps({"model": sizes, "prompt": args.prompt, "new_tokens": args.new_tokens, "results": results}))
    for one in children.values():
        one.process.stdin.close()


if __name__ == "__main__":
    main()
