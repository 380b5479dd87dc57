"""Quality of int8 and int4 weights: predictions of the shipped model on documents it was not trained on.

    python benchmarks/quality.py

The documents are the test documents of its card, from this Python installation (another version has others, of which
some were trained on). Writes benchmarks/results/quality.json and .md.
"""

import json
import math
import platform
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from mpt_eqx import MPT, SHIPPED_MODEL, from_pretrained, quantize
from mpt_eqx.text import load_tokenizer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "examples"))  # for the documents
LENGTH, BATCH = 256, 8  # tokens of a window, as in training; windows at once


@eqx.filter_jit
def compared(
    model: MPT, tokens: Int[Array, "B T"], reference: Float32[Array, "B T V"]
) -> tuple[Float32[Array, "B T"], Float32[Array, "B T-1"], Int[Array, "B T"]]:
    """Returns, in nats, KL(reference ‖ model) at each position and −log p of each token; and the greedy tokens."""
    log_probs = jax.nn.log_softmax(jax.vmap(model)(tokens).astype(jnp.float32))
    losses = -jnp.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jnp.exp(reference) * (reference - log_probs), axis=-1), losses, jnp.argmax(log_probs, axis=-1)


@eqx.filter_jit
def log_probabilities(model: MPT, tokens: Int[Array, "B T"]) -> Float32[Array, "B T V"]:
    """Returns log p of every token at each position."""
    return jax.nn.log_softmax(jax.vmap(model)(tokens))


def windows() -> np.ndarray:
    """Returns the test documents end to end, cut into windows [B, T]; the last part of one is left out."""
    from pretrain import documents, split

    tokenizer = load_tokenizer(SHIPPED_MODEL)
    stream = np.concatenate([[*tokenizer.encode(text), 0] for text in split(documents())[2]])
    return stream[: len(stream) // (LENGTH * BATCH) * LENGTH * BATCH].reshape(-1, BATCH, LENGTH).astype(np.int32)


def main() -> None:
    """Measures, and writes the results."""
    whole = from_pretrained(SHIPPED_MODEL, dtype="float32")
    models = {"float32": whole, "bfloat16": from_pretrained(SHIPPED_MODEL)}
    for scheme in ("int8", "int4"):
        models[scheme] = quantize(whole, scheme)
        models[f"{scheme}, the embedding too"] = quantize(whole, scheme, embeddings=True)
    batches = windows()
    found: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in models}
    for batch in batches:
        reference = log_probabilities(whole, batch)
        for name, model in models.items():
            found[name].append(tuple(map(np.asarray, compared(model, batch, reference))))
    rows = []
    for name, model in models.items():
        divergence, losses, greedy = map(np.stack, zip(*found[name], strict=True))
        same = greedy == np.stack([one[2] for one in found["float32"]])
        rows.append(
            {
                "weights": name,
                "MB": round(sum(leaf.nbytes for leaf in jax.tree.leaves(model)) / 1e6, 2),
                "KL": float(f"{max(divergence.mean(), 0):.2g}"),
                "perplexity": round(math.exp(losses.mean(dtype=np.float64)), 3),
                "same_likeliest_percent": round(100 * float(same.mean()), 2),
            }
        )
        print(rows[-1], file=sys.stderr)
    record = {"python": platform.python_version(), "tokens": batches.size, "weights": rows}
    (RESULTS / "quality.json").write_text(json.dumps(record, indent=2) + "\n")
    lines = [
        "# Quality of int8 and int4 weights",
        "",
        f"`python benchmarks/quality.py`: the shipped model on {batches.size:,} tokens of the test documents of",
        f"its card (Python {record['python']}), in windows of {LENGTH}. Computed in float32 but for bfloat16; what is",
        "not quantised is float32. KL divergence from the float32 predictions, in nats per token.",
        "",
        "| weights | MB | KL | perplexity | same greedy token, % |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(str(value) for value in row.values())} |" for row in rows),
    ]
    (RESULTS / "quality.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
