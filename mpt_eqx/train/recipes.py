"""The published recipes that MPT models were trained by: their numbers, and the optimizer that they make."""

import dataclasses
from typing import Literal

import optax

from mpt_eqx.errors import MPTError
from mpt_eqx.train.optimizers import decoupled_adamw, decoupled_lionw
from mpt_eqx.train.schedules import cosine_with_warmup, linear_with_warmup


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run as its yaml describes it: a decoupled optimizer, in bfloat16 over float32 weights.

    Attributes:
        learning_rate: the highest.
        b2: of the optimizer; b1 is 0.9.
        schedule: "cosine" or "linear", after a warm-up.
        warmup_steps: of the schedule.
        floor: where the schedule ends, as a part of `learning_rate`.
        batch_size: rows of a step.
        length: tokens of a row.
        steps: of the run; None where it is counted in epochs.
        epochs: of the run; None where it is counted in steps.
        source: the yaml, in github.com/mosaicml/llm-foundry.
        weight_decay: of the optimizer.
        max_grad_norm: for `make_train_step`.
        rule: "adamw", with eps 1e-8, or "lionw".
    """

    learning_rate: float
    b2: float
    schedule: Literal["cosine", "linear"]
    warmup_steps: int
    floor: float
    batch_size: int
    length: int
    steps: int | None
    epochs: int | None
    source: str
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    rule: Literal["adamw", "lionw"] = "adamw"

    def optimizer(self, total_steps: int | None = None) -> optax.GradientTransformation:
        """Returns the optimizer with its schedule.

        Args:
            total_steps: of the run, more than `warmup_steps`; None for `steps`.

        Raises:
            MPTError: neither says how many steps there are, or they are too few.
        """
        total = self.steps if total_steps is None else total_steps
        if total is None:
            raise MPTError(
                f"total_steps: expected a number of steps, because the recipe counts {self.epochs} epochs, found None; "
                f"it is epochs · rows // {self.batch_size}"
            )
        schedule = {"cosine": cosine_with_warmup, "linear": linear_with_warmup}[self.schedule]
        rate = schedule(self.learning_rate, total, warmup_steps=self.warmup_steps, floor=self.floor)
        make = {"adamw": decoupled_adamw, "lionw": decoupled_lionw}[self.rule]
        return make(rate, b1=0.9, b2=self.b2, weight_decay=self.weight_decay, peak=self.learning_rate)


def _pretrained(name: str, learning_rate: float, batch_size: int, steps: int) -> Recipe:
    source = f"scripts/train/yamls/pretrain/{name}.yaml"
    return Recipe(learning_rate, 0.95, "cosine", 100, 0.1, batch_size, 2048, steps, None, source)


def _finetuned(name: str, learning_rate: float, b2: float, batch_size: int, length: int, epochs: int) -> Recipe:
    source = f"scripts/train/yamls/finetune/{name}.yaml"
    return Recipe(learning_rate, b2, "linear", 50, 0.0, batch_size, length, None, epochs, source)


RECIPES = {
    "mpt-125m": _pretrained("mpt-125m", 6e-4, 256, 4_800),
    "mpt-7b": _pretrained("mpt-7b", 1.2e-4, 1024, 63_900),
    "mpt-30b": _pretrained("mpt-30b", 1e-4, 2048, 143_100),
    "mpt-7b-dolly-sft": _finetuned("mpt-7b_dolly_sft", 5e-6, 0.999, 48, 2048, 2),
    "mpt-30b-instruct": _finetuned("mpt-30b-instruct", 9.65e-6, 0.95, 72, 8192, 8),
}
"""The recipes by the name of their model."""
