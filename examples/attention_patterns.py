"""Attention patterns, with what ALiBi alone would make of them.

    python examples/attention_patterns.py                              the model that ships with mpt_eqx, one layer
    python examples/attention_patterns.py --model ./mpt-7b --layer 12 --output patterns.svg

ALiBi lowers the score of a key by slope × distance, with a slope for each head. Above are the patterns of a layer's
heads; below, the attention that each distance gets on average, beside that of equal scores under the same slope. Needs
the extras `text` and `plot`.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from mpt_eqx import SHIPPED_MODEL, from_pretrained, interp
from mpt_eqx.model.alibi import alibi_slopes
from mpt_eqx.text import load_tokenizer


def by_distance(patterns):
    """Returns the mean attention [N, T/2] at each distance, over the queries that have a key so far back."""
    distances = range(patterns.shape[-1] // 2)
    return np.stack([patterns.diagonal(-distance, 1, 2).mean(-1) for distance in distances], axis=-1)


def main() -> None:
    """Prints how far back each head of the layer looks, and draws the patterns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id, of a model with ALiBi")
    parser.add_argument("--layer", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--text", default=topics["with"], help="what is read (default: a page of Python's reference)")
    parser.add_argument("--length", type=int, default=64, help="how many tokens of it (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("attention_patterns.png"), help="a picture, .png or .svg")
    args = parser.parse_args()

    model, tokenizer = from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)
    config = model.config
    tokens = jnp.array([*tokenizer.eos_token_ids[:1], *tokenizer.encode(args.text)][: args.length])
    place = f"blocks.{args.layer}.attn.hook_pattern"
    patterns = eqx.filter_jit(interp.run)(model, tokens, capture=(place,)).activations[place]

    slopes = alibi_slopes(config.n_heads, config.attn_config.alibi_bias_max)
    distance = jnp.arange(len(tokens))[:, None] - jnp.arange(len(tokens))
    flat = jax.nn.softmax(jnp.where(distance >= 0, -slopes[:, None, None] * distance, -jnp.inf))
    pairs = ((np.asarray(p), (p * distance).sum(-1).mean(-1)) for p in (patterns, flat))
    (patterns, reach), (flat, flat_reach) = pairs

    print(f"layer {args.layer}: mean distance of attention, in tokens, and what the first token gets")
    for head in range(config.n_heads):
        print(
            f"head {head}: slope 1/{1 / slopes[head]:<4.0f} distance {reach[head]:4.1f}, by ALiBi alone "
            f"{flat_reach[head]:4.1f}; first token {patterns[head, 1:, 0].mean():.0%}"
        )

    heads = np.argsort(-slopes)
    figure = Figure(figsize=(1.9 * len(heads) + 0.6, 4.2), layout="constrained")
    above, below = figure.subplots(2, len(heads), sharey="row", squeeze=False)
    for head, map_axes, curve_axes in zip(heads, above, below, strict=True):
        # The root shows small ones, too.
        map_axes.imshow(patterns[head] ** 0.5, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        map_axes.set(title=f"head {head}, slope 1/{1 / slopes[head]:.0f}", xticks=[], yticks=[])
        curve_axes.semilogy(by_distance(patterns)[head], label="attention")
        curve_axes.semilogy(by_distance(flat)[head], "k--", linewidth=1, label="ALiBi alone")
        curve_axes.set(xlabel="distance", ylim=(1e-4, 1))
    above[0].set_ylabel("query")
    below[0].set_ylabel("mean attention")
    below[0].legend(fontsize=8)
    figure.suptitle(f"layer {args.layer}: patterns (query down, key across), flattest slope on the right")
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
