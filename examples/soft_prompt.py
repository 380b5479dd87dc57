"""Soft prompts: how many vectors does it take to make the model say a sentence?

    python examples/soft_prompt.py                                     the model that ships with mpt_eqx
    python examples/soft_prompt.py --model ./mpt-1b --vectors 1 2 --text "It was a pleasure to burn." --output soft.svg

The weights stay as they are; vectors before the text, given as `embeddings=`, are trained to make it likely (Kuratov et
al., 2025, fill single vectors with whole pages). Prompts of several lengths are trained at once, under one vmap, the
shorter ones behind padding. Needs the extras `text` and `plot`.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

from mpt_eqx import SHIPPED_MODEL, from_pretrained, stack
from mpt_eqx.text import load_tokenizer


@eqx.filter_jit
def train(model, prompts, masks, target, *, steps, learning_rate):
    """Trains prompts [P, n, D] on a target [T], each with the vectors that its mask [P, n] leaves.

    Returns the losses [P, steps], in nats per token, and the likeliest token at each place of the target [P, T].
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    real = jnp.ones(len(target), bool)

    def logits(prompt, mask):
        embeddings = jnp.concatenate([prompt, model.wte.weight[target]])
        return model(None, embeddings=embeddings, mask=jnp.concatenate([mask, real]))[len(prompt) - 1 : -1]

    def loss(prompt, mask):
        return optax.softmax_cross_entropy_with_integer_labels(logits(prompt, mask), target).mean()

    def train_one(prompt, mask):
        def step(carry, _):
            prompt, state = carry
            value, grad = jax.value_and_grad(loss)(prompt, mask)
            updates, state = optimizer.update(grad, state)
            return (prompt + updates, state), value

        (prompt, _), losses = jax.lax.scan(step, (prompt, optimizer.init(prompt)), None, length=steps)
        return losses, logits(prompt, mask).argmax(-1)

    return jax.vmap(train_one)(prompts, masks)


def main() -> None:
    """Prints what the model says after each prompt, and draws the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id")
    parser.add_argument("--text", default="The dead parrot is no more. It has ceased to be.", help="what is to be said")
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 2, 4, 8], help="lengths of the prompts")
    parser.add_argument("--steps", type=int, default=200, help="of Adam (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.05, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("soft_prompt.png"), help="a picture, .png or .svg")
    args = parser.parse_args()

    model, tokenizer = from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)
    target = jnp.array(tokenizer.encode(args.text))
    counts, longest = jnp.array(args.vectors), max(args.vectors)
    masks = jnp.arange(longest) >= longest - counts[:, None]  # padding on the left
    start = model.wte.weight[tokenizer.eos_token_ids[0]]  # all start as the end of the text before
    prompts = jnp.broadcast_to(start, (len(counts), longest, model.config.d_model))
    losses, said = train(stack(model), prompts, masks, target, steps=args.steps, learning_rate=args.learning_rate)

    print(f"{len(target)} tokens; before training {losses[0, 0]:.2f} nats per token after one vector")
    for count, curve, tokens in zip(args.vectors, losses, said, strict=True):
        right = (tokens == target).mean()
        print(f"{count} vectors: {curve[-1]:.2f} nats per token, {right:.0%} right: {tokenizer.decode(tokens)!r}")

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for count, curve in zip(args.vectors, losses, strict=True):
        axes.plot(curve, label=f"{count} vector{'s' * (count > 1)}")
    axes.set(
        xlabel="step", ylabel="nats per token", ylim=(0, None), title=f"prompts trained to say {len(target)} tokens"
    )
    axes.legend()
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
