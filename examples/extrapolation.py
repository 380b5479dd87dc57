"""Extrapolation: loss at each position, within the trained length and beyond, with ALiBi and with learned positions.

    python examples/extrapolation.py                                   the model that ships with mpt_eqx beside them
    python examples/extrapolation.py --steps 1000 --length 64 --output extrapolation.svg

Two small models of bytes, alike but for their positions, are trained on windows of one length and read windows four
times as long (Press et al., 2022). A table of learned positions ends where training did; it is continued in two ways:
with rows as they were drawn, never trained, and by starting over. Needs the extras `text` and `plot`.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from mpt_eqx import MPT, SHIPPED_MODEL, AttnConfig, MPTConfig, from_pretrained, stack
from mpt_eqx.text import load_tokenizer
from mpt_eqx.train import next_token_loss

BEYOND = 4


@eqx.filter_jit
def train(config, key, batches):
    """Returns a new model after one step of AdamW for each of the batches [steps, B, T]."""
    model, steps = stack(MPT(config, key=key)), len(batches)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 4e-3, steps // 20, steps))

    def step(carry, batch):
        model, state = carry
        grads = jax.grad(next_token_loss)(model, batch)
        updates, state = optimizer.update(grads, state, model)
        return (eqx.apply_updates(model, updates), state), None

    return jax.lax.scan(step, (model, optimizer.init(model)), batches)[0][0]


@eqx.filter_jit
def loss_by_position(model, windows):
    """Returns −log p, in nats, of the token after each position, averaged over windows [B, T]."""
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return jax.lax.map(lambda row: cross_entropy(model(row)[:-1], row[1:]), windows, batch_size=8).mean(0)


def smooth(curve, n):
    """Returns positions and means of each n losses, for drawing."""
    means = curve[: len(curve) // n * n].reshape(-1, n).mean(1)
    return np.arange(len(means)) * n + n / 2, means


def main() -> None:
    """Trains the models, prints the losses within and beyond the trained length, and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="a model that is trained, for the picture on the right")
    parser.add_argument("--trained-length", type=int, default=256, help="of that model (default: %(default)s)")
    parser.add_argument("--length", type=int, default=32, help="what the small ones train on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of training (default: %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="of the small models (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=24, help="that the model of --model reads")
    parser.add_argument("--output", type=Path, default=Path("extrapolation.png"), help="a picture, .png or .svg")
    args = parser.parse_args()

    pages = [topics[name] for name in sorted(topics)]
    stream = np.frombuffer("\n".join(pages).encode("ascii", "replace"), np.uint8).astype(np.int32)
    held_out, length = stream[-len(stream) // 10 :], args.length
    starts = np.random.default_rng(0).integers(len(stream) - len(held_out) - length, size=(args.steps, 32, 1))
    batches = jnp.array(stream[starts + np.arange(length)])
    windows = jnp.array(
        held_out[: len(held_out) // (BEYOND * length) * BEYOND * length].reshape(-1, BEYOND * length)[:256]
    )

    def small(learned):
        config = MPTConfig(
            d_model=args.width, n_heads=4, n_layers=2, vocab_size=128, max_seq_len=BEYOND * length, no_bias=True,
            learned_pos_emb=learned, attn_config=AttnConfig(alibi=not learned),
        )  # fmt: skip
        return train(config, jax.random.key(0), batches)

    learned = small(True)
    over_again = jnp.tile(learned.wpe.weight[:length], (BEYOND, 1))
    curves = {
        "learned, untrained rows": loss_by_position(learned, windows),
        "learned, starting over": loss_by_position(eqx.tree_at(lambda m: m.wpe.weight, learned, over_again), windows),
        "ALiBi": loss_by_position(small(False), windows),
    }
    print(f"small models, trained on {length} bytes: nats per byte in the second half of it, and beyond")
    for name, curve in curves.items():
        print(f"{name:<23}  {curve[length // 2 : length - 1].mean():.2f}  {curve[length:].mean():.2f}")

    model, tokenizer = from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)
    size = min(BEYOND * args.trained_length, model.config.max_seq_len)
    tokens = [token for page in pages for token in [*tokenizer.eos_token_ids[:1], *tokenizer.encode(page)]]
    rows = np.array(tokens[: len(tokens) // size * size]).reshape(-1, size)[: args.windows]
    large = loss_by_position(stack(model), jnp.array(rows, jnp.int32))
    edge = args.trained_length
    print(f"{Path(args.model).name}, trained on {edge} tokens: nats per token in the second half of it, and beyond")
    print(f"{'ALiBi':<23}  {large[edge // 2 : edge - 1].mean():.2f}  {large[edge:].mean():.2f}")

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, curve), style in zip(curves.items(), ("C3:", "C1--", "C0-"), strict=True):
        left.plot(*smooth(curve, max(length // 16, 1)), style, label=name)
    right.plot(*smooth(large, max(edge // 16, 1)), label="ALiBi")
    left.set(title=f"two small models, trained on {length} bytes", xlabel="position", ylabel="nats per byte")
    right.set(title=f"{Path(args.model).name}, trained on {edge} tokens", xlabel="position", ylabel="nats per token")
    for axes, end in ((left, length), (right, edge)):
        axes.set_ylim(0, None)
        axes.axvline(end, color="gray", linewidth=1, label="trained length")
        axes.legend(fontsize=8, loc="lower right")
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
