"""Generates from what `mpt_eqx.export_model` wrote, without mpt_eqx: needs jax, numpy, safetensors and flatbuffers.

    python examples/run_exported.py ./exported 5 6 7
    python examples/run_exported.py ./exported 5 6 7 --seed 3 --set temperature=0.8 --set top_k=40

Prompts and new tokens are ids; card.json in the directory says what the programs take.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file


def main() -> None:
    """Prints the new tokens of one prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("prompt", type=int, nargs="+", help="token ids")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="one of card.json's options")
    args = parser.parse_args()
    card = json.loads((args.directory / "card.json").read_text())
    weights = jax.device_put(load_file(args.directory / "weights.safetensors"))
    options = {name: option["value"] for name, option in card["options"].items()}
    options.update((name, json.loads(value)) for name, value in (one.split("=") for one in args.set))
    options = {name: np.asarray(value, card["options"][name]["dtype"]) for name, value in options.items()}
    prefill, decode = (export.deserialize((args.directory / f"{name}.jax").read_bytes()) for name in card["programs"])

    # Every row gets the prompt; each draws tokens of its own.
    tokens = np.zeros((card["batch_size"], card["prompt_length"]), np.int32)
    tokens[:, : len(args.prompt)] = args.prompt
    state = jax.jit(prefill.call)(weights, tokens, np.full(len(tokens), len(args.prompt), np.int32))
    rows = [[] for _ in tokens]
    step = jax.jit(decode.call, donate_argnums=3)
    key = jax.random.key_data(jax.random.key(args.seed, impl="threefry2x32"))
    while not np.all(state["done"]):
        state, output = step(weights, options, key, state)
        for row, new, count in zip(rows, *jax.device_get((output["tokens"], output["counts"])), strict=True):
            row += new[:count].tolist()
    for row in rows:
        print(*row)


if __name__ == "__main__":
    main()
