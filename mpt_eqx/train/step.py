"""A step of training: gradients of micro-batches, clipped, and what the optimizer makes of them."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, DTypeLike, Float32, Int, Key

from mpt_eqx.errors import MPTError
from mpt_eqx.model import MPT
from mpt_eqx.model.arguments import as_batch
from mpt_eqx.model.flat import async_jit
from mpt_eqx.ops.platform import trim_memory
from mpt_eqx.ops.switches import library_function
from mpt_eqx.surgery import remat as with_remat
from mpt_eqx.surgery.rematerialization import check_how
from mpt_eqx.train.loss import counted_tokens, next_token_loss
from mpt_eqx.train.state import TrainState

Batch = Mapping[str, Any]
Metrics = dict[str, Array]
KEYS = ("tokens", "mask", "labels", "sequence_ids")


def make_train_step(
    optimizer: optax.GradientTransformation,
    *,
    loss: Callable[..., Float32[Array, ""]] = next_token_loss,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
    compute_dtype: DTypeLike | None = None,
    remat: Literal["none", "full", "dots", "offload"] = "none",
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns a function (state, batch) -> (state, metrics) that does one step, compiled for each shape of batch.

    The state is donated: do not use the one that was passed in again. A batch is a mapping of arrays with an axis of
    rows first: `tokens`, and if wanted `mask`, `labels` and `sequence_ids`, as in `next_token_loss`. The metrics are
    arrays: `loss`, the mean over all counted tokens; `grad_norm`, of the gradient before it is clipped;
    `learning_rate`, NaN of an optimizer that does not keep it in its state; `tokens`, how many counted.

    Args:
        optimizer: the one that the state was created with.
        loss: a function (model, tokens, *, mask, labels, sequence_ids, key) of the mean over a batch's counted tokens.
        accumulate: micro-batches that a batch is split into, ≥ 1: memory is that of one. Each counts by its tokens, so
            that the result is that of the whole batch, however they are distributed. Only `balance_loss` is, as in
            megablocks, of the tokens that are computed together: each micro-batch is balanced by itself.
        max_grad_norm: gradients of a larger norm, over all weights, are scaled down to it; None: as they are.
        compute_dtype: the type that the forward and backward pass run in, such as "bfloat16", while the weights and
            the optimizer's state stay as they are; None: that of the weights.
        remat: what is kept for the gradient, as in `mpt_eqx.surgery.remat`; "none" leaves it to the model.

    Raises:
        MPTError: an argument is not valid; or, when the function is called, the batch is not.
    """
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise MPTError(f"accumulate: expected a whole number ≥ 1, found {accumulate!r}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise MPTError(f"max_grad_norm: expected a number > 0 or None, found {max_grad_norm!r}")
    check_how(remat)
    if compute_dtype is not None and not jnp.issubdtype(jnp.dtype(compute_dtype), jnp.floating):
        raise MPTError(f"compute_dtype: expected a floating type, found {jnp.dtype(compute_dtype)}")

    def mean_loss(trained: MPT, frozen: MPT, batch: Batch, key: Key[Array, ""]) -> Float32[Array, ""]:
        model = eqx.combine(trained, frozen)
        model = model if remat == "none" else with_remat(model, remat)
        if compute_dtype is not None:
            model = jax.tree.map(lambda x: x.astype(compute_dtype) if eqx.is_inexact_array(x) else x, model)
        return loss(model, **batch, key=key)

    @async_jit
    def one(batch: Batch, state: TrainState) -> tuple[TrainState, Metrics]:
        trained, frozen = eqx.partition(state.model, state.trainable)
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), accumulate)
        counts = counted_tokens(**batch)
        total = jnp.sum(counts)

        gradient_of = eqx.filter_value_and_grad(mean_loss)

        def micro(so_far: tuple[Array, MPT], this: tuple[Batch, Array, Key[Array, ""]]) -> tuple[Any, None]:
            batch, counts, key = this
            share = jnp.sum(counts).astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)
            weighted = jax.tree.map(lambda g: g * share.astype(g.dtype), gradient_of(trained, frozen, batch, key))
            return jax.tree.map(jnp.add, so_far, weighted), None

        if accumulate == 1:
            value, gradient = gradient_of(trained, frozen, batch, keys[0])
        else:
            zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trained))
            split = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), (batch, counts))
            (value, gradient), _ = jax.lax.scan(micro, zeros, (*split, keys))
        norm = optax.tree.norm(gradient)
        if max_grad_norm is not None:
            factor = max_grad_norm / jnp.maximum(norm, max_grad_norm)
            gradient = jax.tree.map(lambda g: g * factor.astype(g.dtype), gradient)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
        metrics = {
            "loss": value,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(optax.tree.get(opt_state, "learning_rate", jnp.nan), jnp.float32),
            "tokens": total,
        }
        model = eqx.combine(eqx.apply_updates(trained, updates), frozen)
        return TrainState(model, opt_state, state.step + 1, state.key, state.trainable), metrics

    compiled: set[tuple[Any, ...]] = set()

    @library_function
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = _checked(batch, accumulate)
        batch = batch if state.model.layout is None else state.model.layout.spread(batch)
        shapes = tuple((name, x.shape) for name, x in batch.items())
        if shapes not in compiled and not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((state, batch))):
            # Some hundred MB that compiling has freed go back to the system before the step takes its own.
            one.lower(batch, state).compile()  # type: ignore[attr-defined]
            trim_memory()
            compiled.add(shapes)
        return one(batch, state)

    return step


def _checked(batch: Batch, accumulate: int) -> dict[str, Int[Array, "B T"]]:
    """Returns the arrays of a batch."""
    if not isinstance(batch, Mapping) or "tokens" not in batch or not set(batch) <= set(KEYS):
        found = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise MPTError(
            f"batch: expected a mapping with tokens, and with {', '.join(KEYS[1:])} if wanted, found {found}"
        )
    tokens = as_batch("tokens", batch["tokens"])
    if tokens.shape[0] % accumulate:
        raise MPTError(f"tokens: expected a multiple of accumulate={accumulate} rows, found {tokens.shape[0]}")
    rest = {key: as_batch(key, batch[key], tokens.shape) for key in KEYS[1:] if batch.get(key) is not None}
    return {"tokens": tokens, **rest}
