"""Memory of a gradient by what is kept of each block: `python -m benchmarks.remat --output DIR` writes DIR/remat.json.

The temporary memory of the compiled gradient of `next_token_loss`, by XLA's analysis on a CPU: nothing is run.
"""

import argparse
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp

from mpt_eqx import MPT, AttnConfig, MPTConfig, stack, surgery
from mpt_eqx.train import next_token_loss

ROWS, LENGTH, WIDTH = 4, 512, 64


def temporary_bytes(how: str, n_layers: int) -> int:
    """Returns the memory beside weights, tokens and gradients."""
    config = MPTConfig(
        d_model=WIDTH, n_heads=4, n_layers=n_layers, vocab_size=256, max_seq_len=LENGTH, no_bias=True,
        attn_config=AttnConfig(alibi=True),
    )  # fmt: skip
    model = eqx.filter_eval_shape(lambda: surgery.remat(stack(MPT(config, key=jax.random.key(0))), how))
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
    compiled = jax.jit(jax.grad(lambda model: next_token_loss(model, tokens))).lower(model).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def main() -> None:
    """Compiles, and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.remat", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory for remat.json")
    args = parser.parse_args()
    found = {
        how: {layers: temporary_bytes(how, layers) for layers in (8, 16)} for how in ("none", "dots", "full", "offload")
    }
    args.output.mkdir(parents=True, exist_ok=True)
    sizes = {"rows": ROWS, "length": LENGTH, "d_model": WIDTH}
    (args.output / "remat.json").write_text(json.dumps({**sizes, "bytes": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
