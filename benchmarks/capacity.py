"""Time and memory of a decode step at position 200, by capacity of the KV cache.

    python benchmarks/capacity.py

A model of width 256 and 4 layers with random weights; medians go to benchmarks/results/capacity.json and .md.
"""

import json
import os
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from mpt_eqx import MPT, AttnConfig, MPTConfig
from mpt_eqx.generation import SamplingParams
from mpt_eqx.generation.prompts import prefill_chunk
from mpt_eqx.generation.state import empty_state
from mpt_eqx.generation.steps import decode_chunk

RESULTS = Path(__file__).parent / "results"
CAPACITIES = (512, 4096, 16_384)
STEPS, TIMES, POSITION = 16, 9, 200


def measured(model: MPT, rows: int, capacity: int) -> dict[str, float]:
    """Returns milliseconds per step, and MB of temporary memory and of the cache."""
    fixed = (model, SamplingParams(max_new_tokens=STEPS).of_rows(rows), jax.random.key(0), ())
    milliseconds = []
    for _ in range(TIMES + 1):
        state = empty_state(model, rows, capacity)
        piece, ends = np.ones((rows, POSITION), np.int32), np.full(rows, POSITION, np.int32)
        state = jax.block_until_ready(prefill_chunk(model, state, jax.device_put(piece), jax.device_put(ends)))
        started = time.perf_counter()
        state, _ = jax.block_until_ready(decode_chunk(fixed, state, STEPS, False))
        milliseconds.append((time.perf_counter() - started) / STEPS * 1e3)
    memory = decode_chunk.lower(fixed, state, STEPS, False).compile().memory_analysis()
    return {
        "milliseconds": round(statistics.median(milliseconds[1:]), 3),  # the first one compiles
        "temporary_MB": round(memory.temp_size_in_bytes / 1e6, 2),
        "cache_MB": round(sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache)) / 1e6, 1),
    }


def main() -> None:
    """Measures and writes."""
    config = MPTConfig(
        d_model=256, n_heads=8, n_layers=4, vocab_size=1000, max_seq_len=max(CAPACITIES), no_bias=True,
        attn_config=AttnConfig(alibi=True),
    )  # fmt: skip
    model = MPT(config, key=jax.random.key(0))
    figures = []
    for dtype in ("float32", "bfloat16"):
        cast = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), model)
        for rows in (1, 4):
            for capacity in CAPACITIES:
                figures.append({"dtype": dtype, "rows": rows, "capacity": capacity, **measured(cast, rows, capacity)})
                print(figures[-1])
    (RESULTS / "capacity.json").write_text(json.dumps({"jax": jax.__version__, "steps": figures}, indent=2) + "\n")
    lines = [
        "# Decode step at position 200, by capacity of the KV cache",
        "",
        f"`python benchmarks/capacity.py`: width 256, 4 layers, jax {jax.__version__}, {os.cpu_count()} cores",
        "",
        "| dtype | batch | capacity | ms per step | temporary MB | cache MB |",
        "|---|---|---|---|---|---|",
    ]
    for f in figures:
        lines.append(
            f"| {f['dtype']} | {f['rows']} | {f['capacity']:,} | {f['milliseconds']} | {f['temporary_MB']} | "
            f"{f['cache_MB']} |"
        )
    (RESULTS / "capacity.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
