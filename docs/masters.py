"""Makes the picture of docs/training.md on weights of 16 bits: `python docs/masters.py` writes it and its numbers.

The shipped model as it is stored, in bfloat16, takes 50 steps of AdamW at 1e-5 on the licence of this repository: once
with the weights left in bfloat16, once with the float32 ones that `TrainState.create` makes of them.
"""

import json
import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpt_eqx import SHIPPED_MODEL, from_pretrained, train
from mpt_eqx.text import load_tokenizer

HERE = Path(__file__).parent
RESULT = HERE.parent / "benchmarks" / "results" / "masters.json"
STEPS, RATE = 50, 1e-5


def first_norm(model) -> np.ndarray:
    """Returns the weight of the first norm."""
    return np.asarray(model.blocks[0].norm_1.weight, np.float32)


def run(model, step) -> tuple[list[float], list[float]]:
    """Returns the loss before each step, and how far the first norm has moved after it (the largest change)."""
    begin, losses, moved = first_norm(model), [], []
    for _ in range(STEPS):
        loss, model = step()
        losses.append(float(loss))
        moved.append(float(np.abs(first_norm(model) - begin).max()))
    return losses, moved


def curves() -> dict[str, tuple[list[float], list[float]]]:
    """Returns losses and movements of both runs."""
    ids = load_tokenizer(SHIPPED_MODEL).encode((HERE.parent / "LICENSE").read_text())
    tokens = jnp.asarray(np.reshape(ids[: 4 * 128], (4, 128)))
    optimizer = optax.adamw(RATE)

    narrow = from_pretrained(SHIPPED_MODEL)
    kept = [narrow, optimizer.init(eqx.filter(narrow, eqx.is_inexact_array))]

    @eqx.filter_jit
    def update(model, opt_state):
        loss, gradient = eqx.filter_value_and_grad(train.next_token_loss)(model, tokens)
        updates, opt_state = optimizer.update(gradient, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return loss, eqx.apply_updates(model, updates), opt_state

    def in_bfloat16():
        loss, *kept[:] = update(*kept)
        return loss, kept[0]

    with warnings.catch_warnings(action="ignore"):  # that the weights become float32 is what this is about
        states = [train.TrainState.create(from_pretrained(SHIPPED_MODEL), optimizer)]
    step = train.make_train_step(optimizer, compute_dtype="bfloat16")

    def in_float32():
        states[0], metrics = step(states[0], {"tokens": tokens})
        return metrics["loss"], states[0].model

    return {"bfloat16 weights": run(narrow, in_bfloat16), "float32 weights": run(states[0].model, in_float32)}


def draw(curves: dict[str, tuple[list[float], list[float]]]) -> None:
    """Draws losses and movements."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), dpi=110, layout="constrained")
    for name, (losses, moved) in curves.items():
        left.plot(losses, label=name)
        right.plot([0, *moved], label=name)
    left.set(xlabel="step", ylabel="nats per token", title="loss, computed in bfloat16")
    right.set(xlabel="step", ylabel="largest change", title="weights of the first norm")
    left.legend()
    figure.savefig(HERE / "pictures" / "masters.png")


def main() -> None:
    """Trains both, and writes what they did."""
    found = curves()
    draw(found)
    content = {name: {"loss": losses, "moved": moved} for name, (losses, moved) in found.items()}
    RESULT.write_text(json.dumps(content) + "\n")
    for name, (losses, moved) in found.items():
        print(f"{name}: loss {losses[0]:.2f} to {losses[-1]:.2f}, the first norm moved by {moved[-1]:.1e}")


if __name__ == "__main__":
    with jax.numpy_dtype_promotion("standard"):
        main()
