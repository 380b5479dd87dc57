"""Logit lens: what the model would say if it stopped after each layer.

    python examples/logit_lens.py                                      the model that ships with mpt_eqx
    python examples/logit_lens.py --model ./mpt-7b --text "The capital of France is" --output lens.svg

The residual stream after each block goes through the final norm and the unembedding (nostalgebraist, 2020). The picture
has the likeliest next token at each position and layer. Needs the extras `text` and `plot`.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from mpt_eqx import SHIPPED_MODEL, from_pretrained, interp
from mpt_eqx.text import load_tokenizer


@eqx.filter_jit
def lens(model, tokens):
    """Returns the probabilities of the next token [layers + 1, T, V]: after the embedding and after each block."""
    places = ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(model.config.n_layers))]
    activations = interp.run(model, tokens, capture=places).activations
    return jnp.stack([jax.nn.softmax(model.unembed(model.norm_f(activations[place]))) for place in places])


def main() -> None:
    """Prints how the model's answer forms at the last position, and draws all positions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id")
    parser.add_argument("--text", default="set_name(self, name)\n\nSet the", help="what is read")
    parser.add_argument("--output", type=Path, default=Path("logit_lens.png"), help="a picture, .png or .svg")
    args = parser.parse_args()

    model, tokenizer = from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)
    tokens = [*tokenizer.eos_token_ids[:1], *tokenizer.encode(args.text)]
    probabilities = lens(model, jnp.array(tokens))
    best, confidence = probabilities.argmax(-1), probabilities.max(-1)

    def shown(token):
        return repr(tokenizer.decode([int(token)]))[1:-1]  # a line break as \n

    answer = best[-1, -1]
    rank = (probabilities[:, -1] > probabilities[:, -1, answer, None]).sum(-1) + 1
    print(f"after {args.text!r} the model says {tokenizer.decode([int(answer)])!r}")
    for layer, probability in enumerate(probabilities[:, -1, answer]):
        name = f"block {layer - 1}" if layer else "embedding"
        print(f"{name:<9}  probability {probability:.3f}, rank {rank[layer]:4}; first: {shown(best[layer, -1])!r}")

    figure = Figure(figsize=(0.75 * len(tokens) + 1.5, 0.42 * len(best) + 1.3), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(confidence, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto", origin="lower")
    for layer in range(len(best)):
        for place in range(len(tokens)):
            colour = "white" if confidence[layer, place] > 0.6 else "black"
            text = shown(best[layer, place]).replace("$", r"\$") or "(end)"
            axes.text(place, layer, text, ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(tokens)), [shown(token).replace("$", r"\$") or "(end)" for token in tokens])
    axes.set_yticks(range(len(best)), ["embedding", *(f"block {i}" for i in range(len(best) - 1))])
    axes.set_title("the likeliest next token after each layer")
    figure.colorbar(image, label="probability")
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
