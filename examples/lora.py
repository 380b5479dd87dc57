"""LoRA: an adapter for new text, over a base in 4 bits that stays as it is.

    python examples/lora.py                                            the model that ships with mpt_eqx
    python examples/lora.py --model ./mpt-7b --text notes.txt --targets Wqkv out_proj --output ./adapter

Trains on the text, and saves what PEFT reads; then loads it onto the base again, merges it, and prints how likely the
text is before and after. Needs the extra `text`.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import numpy as np

from mpt_eqx import SHIPPED_MODEL, from_pretrained, generate, lora, quantize, train
from mpt_eqx.text import load_tokenizer

TEXT = """The parrot is no more. It has ceased to be. It has expired and gone to meet its maker. This is a late parrot.
It is a stiff, bereft of life, it rests in peace. It has rung down the curtain and joined the choir invisible. """


def main() -> None:
    """Prints losses and text, and writes the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id")
    parser.add_argument("--text", type=Path, help="what to train on (default: some lines about a parrot)")
    parser.add_argument("--targets", nargs="+", default=["Wqkv", "down_proj"], help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="of training (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens per row (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("adapter"), help="directory of the adapter")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    ids = tokenizer.encode(TEXT if args.text is None else args.text.read_text(encoding="utf-8"))
    batch = {"tokens": np.resize(ids, (4, args.length))}  # over and over, from another place in each row

    def small():
        return quantize(from_pretrained(args.model, dtype="float32"), "int4")

    nats = eqx.filter_jit(lambda model: train.next_token_loss(model, batch["tokens"]))

    model = lora.add(small(), rank=args.rank, targets=args.targets, key=jax.random.key(0))
    before = nats(model)
    rate = train.linear_with_warmup(3e-3, args.steps, warmup_steps=min(5, args.steps - 1))
    optimizer = train.decoupled_adamw(rate, peak=3e-3, weight_decay=0.0)
    state = train.TrainState.create(model, optimizer, trainable=lora.trainable)
    step = train.make_train_step(optimizer, max_grad_norm=1.0)
    for _ in range(args.steps):
        state, metrics = step(state, batch)
    lora.save(state.model, args.output, base=str(args.model))
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"last loss {float(metrics['loss']):.2f}; wrote {args.output}, {size / 1e6:.2f} MB")

    base = small()
    adapted = lora.load(base, args.output)
    merged = lora.merge(adapted)
    print(f"nats per token: {before:.2f} before, {nats(adapted):.2f} with the adapter, {nats(merged):.2f} merged")
    prompt = ids[:4]
    for name, one in (("base", base), ("adapted", adapted)):
        print(f"{name}: {tokenizer.decode([*prompt, *generate(one, prompt, max_new_tokens=16).tokens[0].tolist()])!r}")


if __name__ == "__main__":
    main()
