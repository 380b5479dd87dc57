"""Activation patching: where the model keeps what distinguishes two prompts.

    python examples/activation_patching.py                             the model that ships with mpt_eqx
    python examples/activation_patching.py --model ./mpt-7b --clean "…" --corrupted "…" --answers " Paris" " Rome"

Two prompts differ in a token or two. The residual stream of the clean one is put into the run of the corrupted one, at
one layer and position at a time; the picture has the share of the difference between the logits of the two answers
that comes back (Meng et al., 2022: "causal tracing"). Needs the extras `text` and `plot`.
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
def patch_everywhere(model, clean, corrupted, answers):
    """Returns the recovered share of the logit difference [layers + 1, T], and the difference of both runs."""
    length, n_layers = len(clean), model.config.n_layers
    places = [*(f"blocks.{i}.hook_resid_pre" for i in range(n_layers)), f"blocks.{n_layers - 1}.hook_resid_post"]
    source = interp.run(model, clean, capture=places)

    def difference(logits):
        return logits[-1, answers[0]] - logits[-1, answers[1]]

    def patched(layer, position):
        """One program for all: position T, which does not exist, patches nothing."""
        edits = {}
        for i, place in enumerate(places):
            value = source.activations[place][position][None]
            edits[place] = interp.Replace(value, positions=jnp.where(layer == i, position, length)[None])
        return difference(interp.run(model, corrupted, edits=edits).logits)

    grid = jax.vmap(jax.vmap(patched, (None, 0)), (0, None))(jnp.arange(len(places)), jnp.arange(length))
    good, bad = difference(source.logits), difference(model(corrupted))
    return (grid - bad) / (good - bad), good, bad


def main() -> None:
    """Prints the best position of each layer, and draws all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id")
    parser.add_argument("--clean", default="set(self, name)\n\nSet the", help="a prompt")
    parser.add_argument("--corrupted", default="set(self, key)\n\nSet the", help="another one, with as many tokens")
    parser.add_argument("--answers", nargs=2, default=[" name", " key"], help="what follows the one and the other")
    parser.add_argument("--output", type=Path, default=Path("activation_patching.png"), help="a picture, .png or .svg")
    args = parser.parse_args()

    model, tokenizer = from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)
    start = tokenizer.eos_token_ids[:1]
    clean, corrupted = ([*start, *tokenizer.encode(prompt)] for prompt in (args.clean, args.corrupted))
    if len(clean) != len(corrupted):
        parser.error(f"the prompts have {len(clean)} and {len(corrupted)} tokens; choose others")
    answers = jnp.array([tokenizer.encode(answer)[0] for answer in args.answers])
    share, good, bad = patch_everywhere(model, jnp.array(clean), jnp.array(corrupted), answers)

    shown = [[repr(tokenizer.decode([token]))[1:-1] or "(end)" for token in row] for row in (clean, corrupted)]
    print(f"logit of {args.answers[0]!r} − logit of {args.answers[1]!r}: clean {good:.2f}, corrupted {bad:.2f}")
    layers = [*(f"before block {i}" for i in range(model.config.n_layers)), "after the last"]
    for name, row in zip(layers, share, strict=True):
        print(f"{name:<14}  recovered: " + " ".join(f"{x:5.2f}" for x in row))

    figure = Figure(figsize=(0.7 * len(clean) + 2, 0.4 * len(layers) + 1.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", origin="lower")
    names = [f"{a}\n({b})" if a != b else a for a, b in zip(*shown, strict=True)]
    axes.set_xticks(range(len(clean)), names)
    axes.set_yticks(range(len(layers)), layers)
    axes.set_title(
        f"“{args.answers[0].strip()}” against “{args.answers[1].strip()}”: the residual stream patched at one place"
    )
    figure.colorbar(image, label="share of the logit difference")
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
