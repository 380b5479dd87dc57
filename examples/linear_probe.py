"""A linear probe: does the residual stream know that a position is inside parentheses?

    python examples/linear_probe.py                                    the model that ships with mpt_eqx
    python examples/linear_probe.py --model ./mpt-1b --documents 40 --length 64

For each layer a ridge regression from the residual stream to ±1, fitted on one half of the pages of Python's reference
and measured on the other; both classes weigh the same, so guessing gives 0.5. The embedding is the baseline: it knows
the token at the position, and nothing of those before it. Needs the extras `text` and `plot`.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from matplotlib.figure import Figure

from mpt_eqx import SHIPPED_MODEL, from_pretrained, interp
from mpt_eqx.text import load_tokenizer


def inside_parentheses(pieces: list[str]) -> list[bool]:
    """Returns for each token whether a parenthesis is open after it."""
    depth, inside = 0, []
    for piece in pieces:
        for character in piece:
            depth = max(depth + {"(": 1, ")": -1}.get(character, 0), 0)
        inside.append(depth > 0)
    return inside


@eqx.filter_jit
def activations(model, tokens):
    """Returns the residual stream [layers + 1, documents, T, D]: the embedding, and what each block gives."""
    places = ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(model.config.n_layers))]
    runs = jax.vmap(lambda row: interp.run(model, row, capture=places).activations)(tokens)
    return jnp.stack([runs[place] for place in places])


def probe(x: Float[Array, "N D"], y: Bool[Array, " N"], ridge: float) -> Float[Array, " D+1"]:
    """Returns the weights and the bias that minimise Σ c (w·x + b − (±1))² + ridge · |w|², c the class's weight."""
    x = jnp.pad(x, ((0, 0), (0, 1)), constant_values=1)
    weight = jnp.where(y, 0.5 / y.mean(), 0.5 / (1 - y.mean()))[:, None]
    return jnp.linalg.solve(x.T @ (weight * x) + ridge * jnp.eye(x.shape[1]), (weight * x).T @ jnp.where(y, 1.0, -1.0))


def accuracy(weights: Float[Array, " D+1"], x: Float[Array, "N D"], y: Bool[Array, " N"]) -> Float[Array, ""]:
    """Returns the mean of the accuracies on both classes."""
    right = (x @ weights[:-1] + weights[-1] > 0) == y
    return (right[y].mean() + right[~y].mean()) / 2


def main() -> None:
    """Prints and draws the accuracy of each layer's probe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id")
    parser.add_argument("--documents", type=int, default=60, help="how many pages (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: %(default)s)")
    parser.add_argument("--ridge", type=float, default=30.0, help="strength of the penalty (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("linear_probe.png"), help="a picture, .png or .svg")
    args = parser.parse_args()

    model, tokenizer = from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)
    pages = (tokenizer.encode(topics[name])[: args.length] for name in sorted(topics))
    rows = [row for row in pages if len(row) == args.length][: args.documents]
    labels = jnp.array([inside_parentheses([tokenizer.decode([token]) for token in row]) for row in rows])
    streams = activations(model, jnp.array(rows))
    streams = (streams - streams.mean((1, 2), keepdims=True)) / streams.std((1, 2), keepdims=True)

    half = len(rows) // 2
    print(
        f"{labels[:half].size} tokens for fitting, {labels[half:].size} for measuring; {labels.mean():.0%} are inside"
    )
    names, figures = ["embedding", *(f"block {i}" for i in range(model.config.n_layers))], []
    for name, stream in zip(names, streams, strict=True):
        fitted, measured = (
            (stream[part].reshape(-1, stream.shape[-1]), labels[part].reshape(-1))
            for part in (slice(half), slice(half, None))
        )
        weights = probe(*fitted, args.ridge)
        figures.append([float(accuracy(weights, *fitted)), float(accuracy(weights, *measured))])
        print(f"{name:<9}  accuracy {figures[-1][1]:.3f} (where it was fitted {figures[-1][0]:.3f})")

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for label, style, values in zip(("fitted on", "held out"), ("o:", "o-"), zip(*figures, strict=True), strict=True):
        axes.plot(names, values, style, label=label)
    axes.axhline(0.5, color="gray", linestyle="--", label="guessing")
    axes.set(ylabel="accuracy, classes balanced", title="inside parentheses? a linear probe of each layer")
    axes.legend()
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
