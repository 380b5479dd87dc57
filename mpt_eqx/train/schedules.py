"""Learning rates over the steps of a run, as Composer has them."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float32

from mpt_eqx.errors import MPTError


def cosine_with_warmup(peak: float, total_steps: int, *, warmup_steps: int = 0, floor: float = 0.0) -> optax.Schedule:
    """Returns a schedule that rises in a line from 0 to `peak`, and falls along half a cosine to floor · peak.

    Args:
        peak: the highest learning rate, > 0, at step `warmup_steps`.
        total_steps: the step from which on it is floor · peak, counted from 0.
        warmup_steps: how many steps it rises, the first of which has a rate of 0; fewer than `total_steps`.
        floor: 0 to 1; the recipes of MPT have 0.1.

    Raises:
        MPTError: an argument is not in its range.

    Source: Composer 0.32, composer/optim/scheduler.py, CosineAnnealingWithWarmupScheduler.
    """
    return _with_warmup(
        lambda passed: floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * passed)),
        peak,
        total_steps,
        warmup_steps,
        floor,
    )


def linear_with_warmup(peak: float, total_steps: int, *, warmup_steps: int = 0, floor: float = 0.0) -> optax.Schedule:
    """Returns a schedule that rises in a line from 0 to `peak`, and falls in a line to floor · peak.

    Arguments and errors as in `cosine_with_warmup`; MPT's instruction models have a floor of 0.

    Source: Composer 0.32, composer/optim/scheduler.py, LinearWithWarmupScheduler.
    """
    return _with_warmup(lambda passed: 1 + (floor - 1) * passed, peak, total_steps, warmup_steps, floor)


def _with_warmup(
    falling: Callable[[Float32[Array, ""]], Float32[Array, ""]],
    peak: float,
    total_steps: int,
    warmup_steps: int,
    floor: float,
) -> optax.Schedule:
    if not peak > 0:
        raise MPTError(f"peak: expected a number > 0, found {peak!r}")
    if not 0 <= floor <= 1:
        raise MPTError(f"floor: expected a number from 0 to 1, found {floor!r}")
    if not 0 <= warmup_steps < total_steps:
        raise MPTError(
            f"warmup_steps: expected a whole number from 0 to total_steps − 1 = {total_steps - 1}, "
            f"found {warmup_steps!r}"
        )

    def rate(step: ArrayLike) -> Float32[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        passed = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0, 1)
        return peak * jnp.where(step < warmup_steps, step / max(warmup_steps, 1), falling(passed))

    return rate
