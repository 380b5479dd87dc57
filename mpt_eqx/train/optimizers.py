"""The optimizers of the MPT recipes, as gradient transformations of optax, and masks by name."""

import fnmatch
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int

from mpt_eqx.errors import MPTError
from mpt_eqx.model.leaves import is_array, leaf_name

LearningRate = float | Callable[[Any], Any]


class DecoupledState(NamedTuple):
    """The state of both optimizers.

    Attributes:
        step: steps so far.
        learning_rate: of the last step.
        momentum: the running mean of the gradients, of each weight.
        square: that of their squares; None for Lion.
    """

    step: Int[Array, ""]
    learning_rate: Float32[Array, ""]
    momentum: Any
    square: Any


def decoupled_adamw(
    learning_rate: LearningRate,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 1e-5,
    peak: float | None = None,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Returns AdamW whose weight decay is not multiplied by the learning rate, only by its schedule.

    A step is w ← w · (1 − weight_decay · rate / peak) − rate · m̂ / (√v̂ + eps). optax.adamw multiplies weight_decay by
    the rate; with a constant rate it does the same with weight_decay / rate.

    Args:
        learning_rate: a number > 0, or a schedule of them.
        b1: decay of the running mean of gradients, 0 ≤ b1 < 1.
        b2: decay of that of their squares.
        eps: added to the root.
        weight_decay: ≥ 0.
        peak: the learning rate before its schedule, needed with a schedule and weight decay.
        mask: a tree of booleans, or a function of the weights that returns one: False where nothing decays, as
            `named("*norm*", "*bias")` inverted; None for all.

    Raises:
        MPTError: an argument is not in its range.

    Source: Composer 0.32, composer/optim/decoupled_weight_decay.py, DecoupledAdamW.
    """
    _check(b1=b1, b2=b2)

    def direction(gradient: Any, state: DecoupledState) -> tuple[Any, Any, Any]:
        momentum = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.momentum, gradient)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.square, gradient)

        def one(m: Array, v: Array) -> Array:
            count = (state.step + 1).astype(m.dtype)
            return m / (1 - b1**count) / (jnp.sqrt(v) / jnp.sqrt(1 - b2**count) + eps)

        return jax.tree.map(one, momentum, square), momentum, square

    return _decoupled(direction, learning_rate, weight_decay, peak, mask, squares=True)


def decoupled_lionw(
    learning_rate: LearningRate,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    peak: float | None = None,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Returns Lion with decoupled weight decay: a step is w ← w · (1 − weight_decay · rate / peak) − rate · sign(c).

    c is b1 · momentum + (1 − b1) · gradient. Arguments and errors as in `decoupled_adamw`.

    Source: llm-foundry 0.22, llmfoundry/optim/lion.py, DecoupledLionW; Chen et al. 2023, arXiv:2302.06675.
    """
    _check(b1=b1, b2=b2)

    def direction(gradient: Any, state: DecoupledState) -> tuple[Any, Any, Any]:
        signs = jax.tree.map(lambda m, g: jnp.sign(b1 * m + (1 - b1) * g), state.momentum, gradient)
        return signs, jax.tree.map(lambda m, g: b2 * m + (1 - b2) * g, state.momentum, gradient), None

    return _decoupled(direction, learning_rate, weight_decay, peak, mask, squares=False)


def named(*patterns: str) -> Callable[[Any], Any]:
    """Returns a function of a tree: of each array, whether its name matches one of the patterns, such as "*.norm_*".

    Names are those of a checkpoint without "transformer.", such as "blocks.0.attn.Wqkv.weight". The function serves as
    `mask` of optimizers and as `trainable` of `TrainState.create`; it raises MPTError where a pattern matches nothing.
    """

    def of_tree(tree: Any) -> Any:
        names = [leaf_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if is_array(leaf)]
        if unused := [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]:
            raise MPTError(f"named: expected patterns that match a weight, found {unused[0]!r}; there is {names[0]!r}")
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: is_array(leaf) and any(fnmatch.fnmatchcase(leaf_name(path), p) for p in patterns), tree
        )

    return of_tree


def not_named(*patterns: str) -> Callable[[Any], Any]:
    """Returns the opposite of `named`: what decays, if these do not."""
    return lambda tree: jax.tree.map(lambda matches, leaf: is_array(leaf) and not matches, named(*patterns)(tree), tree)


def choice(of: Any, tree: Any) -> Any:
    """Returns a tree of booleans, or what a function that returns one makes of a tree."""
    # A model is a function, too.
    return of(tree) if callable(of) and not isinstance(of, eqx.Module) else of


def _decoupled(
    direction: Callable[[Any, DecoupledState], tuple[Any, Any, Any]],
    learning_rate: LearningRate,
    weight_decay: float,
    peak: float | None,
    mask: Any,
    *,
    squares: bool,
) -> optax.GradientTransformation:
    """Returns an optimizer that steps along a direction, and shrinks the weights by themselves."""
    if not callable(learning_rate):
        peak = learning_rate if peak is None else peak
    elif weight_decay and peak is None:
        raise MPTError(
            "peak: expected the learning rate before its schedule, which weight_decay is relative to, found None; it "
            "is the first argument of cosine_with_warmup and linear_with_warmup"
        )
    if peak is not None and not peak > 0:
        raise MPTError(f"learning_rate: expected a number > 0, or a schedule with a peak > 0, found {peak!r}")
    if not weight_decay >= 0:
        raise MPTError(f"weight_decay: expected a number ≥ 0, found {weight_decay!r}")

    def rate_at(count: Int[Array, ""]) -> Float32[Array, ""]:
        return jnp.asarray(learning_rate(count) if callable(learning_rate) else learning_rate, jnp.float32)

    def init(weights: Any) -> DecoupledState:
        zeros = jax.tree.map(jnp.zeros_like, weights)
        square = jax.tree.map(jnp.copy, zeros) if squares else None
        return DecoupledState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), zeros, square)

    def update(gradient: Any, state: DecoupledState, weights: Any = None) -> tuple[Any, DecoupledState]:
        rate = rate_at(state.step)
        steps, momentum, square = direction(gradient, state)
        updates = jax.tree.map(lambda step: -rate.astype(step.dtype) * step, steps)
        if weight_decay and peak is not None:
            if weights is None:
                raise MPTError(
                    "update: expected the weights as the third argument, found None; weight_decay needs them"
                )
            decays = jax.tree.map(lambda _: True, weights) if mask is None else choice(mask, weights)
            share = rate / peak * weight_decay
            updates = jax.tree.map(
                lambda update, weight, there: update - share.astype(weight.dtype) * weight if there else update,
                updates, weights, decays,
            )  # fmt: skip
        return updates, DecoupledState(state.step + 1, rate, momentum, square)

    return optax.GradientTransformation(init, update)


def _check(**betas: float) -> None:
    for name, beta in betas.items():
        if not 0 <= beta < 1:
            raise MPTError(f"{name}: expected a number with 0 ≤ {name} < 1, found {beta!r}")
