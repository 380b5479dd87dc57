"""Speed of `decode` beside `generate`, and speed and memory of `score` beside transformers and a loop over the model.

    python benchmarks/functions.py --torch PYTHON     a Python that has torch and transformers (default: this one)

Each is a process; they take turns, round by round, on the same random weights in float32. Ratios are of medians, above
1 where the first is faster. Memory is what a process grows by at its peak, of one sequence of 2,048 tokens. JSON goes
to stdout, progress to stderr.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SIZES = {"n_layers": 6, "d_model": 768, "n_heads": 12, "vocab_size": 50368, "max_seq_len": 2048}
NEW_TOKENS = 32


def ragged(count: int, shortest: int, longest: int, seed: int) -> list[list[int]]:
    """Returns random token sequences."""
    rng = random.Random(seed)
    return [[rng.randrange(1, 50000) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


def open_transformers(place: str) -> dict[str, Callable[..., Any]]:
    """Returns the forward pass of a padded batch with log_softmax."""
    import torch
    import transformers

    model = transformers.MptForCausalLM.from_pretrained(place, dtype=torch.float32).eval()

    @torch.inference_mode()
    def score(sequences: list[list[int]]) -> list[float]:
        longest = max(map(len, sequences))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in sequences])
        mask = torch.arange(longest) < torch.tensor([[len(row)] for row in sequences])
        logits = model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits
        log_probs = torch.log_softmax(logits[:, :-1].float(), -1)
        picked = log_probs.gather(-1, tokens[:, 1:, None])[..., 0]
        return (picked * mask[:, 1:]).sum(1).tolist()

    return {"score": score}


def open_mpt_eqx(place: str) -> dict[str, Callable[..., Any]]:
    """Returns score, a loop over the model, generate and decode."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from mpt_eqx import decode, from_pretrained, generate, score

    model = from_pretrained(place)

    @eqx.filter_jit
    def one(model: Any, tokens: Any) -> Any:
        log_probs = jax.nn.log_softmax(model(tokens)[:-1].astype(jnp.float32))
        return jnp.take_along_axis(log_probs, tokens[1:, None], axis=-1).sum()

    @eqx.filter_jit
    def rollouts(model: Any, tokens: Any, lengths: Any) -> Any:
        return jax.vmap(lambda t, n: decode(model, t, n, max_new_tokens=NEW_TOKENS).tokens)(tokens, lengths)

    @eqx.filter_jit
    def of_longest(model: Any, tokens: Any, length: Any) -> Any:
        log_probs = jax.nn.log_softmax(model(tokens)[:-1].astype(jnp.float32))
        picked = jnp.take_along_axis(log_probs, tokens[1:, None], axis=-1)[:, 0]
        return jnp.sum(picked, where=jnp.arange(1, len(tokens)) < length)

    def padded(rows: list[list[int]]) -> list[Any]:
        longest = max(map(len, rows))
        return [of_longest(model, jnp.asarray(row + [0] * (longest - len(row))), len(row)) for row in rows]

    def decoded(prompts: list[list[int]]) -> Any:
        longest = max(map(len, prompts))
        tokens = jnp.asarray([row + [0] * (longest - len(row)) for row in prompts])
        return rollouts(model, tokens, jnp.asarray([len(row) for row in prompts])).tolist()

    return {
        "score": lambda rows: [found.total for found in score(model, rows, progress=False)],
        "padded": lambda rows: [float(x) for x in padded(rows)],
        "loop": lambda rows: [float(one(model, jnp.asarray(row))) for row in rows],
        "generate": lambda rows: generate(model, rows, max_new_tokens=NEW_TOKENS, progress=False).tokens.tolist(),
        "decode": decoded,
    }


def child(which: str, place: str) -> None:
    """Answers lines of JSON on stdin: runs a function on sequences."""
    functions = open_transformers(place) if which == "transformers" else open_mpt_eqx(place)
    for line in sys.stdin:
        request = json.loads(line)
        before = resident("VmRSS")
        started = time.perf_counter()
        result = functions[request["do"]](request["sequences"])
        seconds = time.perf_counter() - started
        answer = {"seconds": seconds, "result": result, "grown": resident("VmHWM") - before}
        print(json.dumps(answer), flush=True)


def resident(field: str) -> int:
    """Returns the memory of this process now, or at its peak, in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


class Child:
    """A process of `child`."""

    def __init__(self, python: str, which: str, place: str):
        self.process = subprocess.Popen(
            [python, __file__, "--child", which, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=ROOT,
        )  # fmt: skip

    def ask(self, do: str, sequences: list[list[int]]) -> dict[str, Any]:
        """Returns the answer to one request."""
        print(json.dumps({"do": do, "sequences": sequences}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="has torch and transformers")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)

    import jax

    from mpt_eqx import MPT, AttnConfig, MPTConfig, save_pretrained

    with tempfile.TemporaryDirectory() as place:
        config = MPTConfig(**SIZES, no_bias=True, attn_config=AttnConfig(alibi=True))
        save_pretrained(MPT(config, key=jax.random.key(0)), place)
        pythons = {"mpt_eqx": sys.executable, "transformers": args.torch}
        grown = {}
        for which, python in pythons.items():
            one = Child(python, which, place)
            one.ask("score", ragged(1, 40, 40, 0))
            grown[which] = one.ask("score", ragged(1, 2048, 2048, 1))["grown"]
            one.close()
        print("memory", grown, file=sys.stderr)
        ours, theirs = (Child(python, which, place) for which, python in pythons.items())
        rows, prompts = ragged(8, 32, 512, 2), ragged(4, 60, 128, 3)
        tasks = [(ours, "score", rows), (theirs, "score", rows), (ours, "loop", rows), (ours, "padded", rows)]
        tasks += [(ours, "decode", prompts), (ours, "generate", prompts)]
        results = [one.ask(do, sequences)["result"] for one, do, sequences in tasks]  # compiles
        seconds: list[list[float]] = [[] for _ in tasks]
        for number in range(args.rounds):
            order = list(enumerate(tasks))
            for place_of, (one, do, sequences) in order[:: -1 if number % 2 else 1]:
                seconds[place_of].append(one.ask(do, sequences)["seconds"])
            print("round", number, [round(times[-1], 2) for times in seconds], file=sys.stderr)
        ours.close()
        theirs.close()
    medians = [statistics.median(times) for times in seconds]
    print(json.dumps({
        "model": SIZES, "dtype": "float32", "rounds": args.rounds,
        "score": {
            "lengths": [len(row) for row in rows], "seconds": medians[0], "transformers": medians[1],
            "loop over model, compiled for each length": medians[2], "loop over model, padded": medians[3],
            "times as fast as transformers": medians[1] / medians[0],
            "times as fast as a loop compiled for each length": medians[2] / medians[0],
            "times as fast as a padded loop": medians[3] / medians[0],
            "largest difference in nats": max(abs(a - b) for a, b in zip(*results[:2], strict=True)),
            "bytes at 2048 tokens": grown, "part of transformers' bytes": grown["mpt_eqx"] / grown["transformers"],
        },
        "decode": {
            "rows": len(prompts), "new tokens": NEW_TOKENS, "seconds": medians[4], "generate": medians[5],
            "times as fast as generate": medians[5] / medians[4], "same tokens": results[4] == results[5],
        },
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
