"""A run: steps over rows, with states, evaluations and a log, from the start or from where it was."""

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mpt_eqx.errors import MPTError
from mpt_eqx.model import MPT
from mpt_eqx.train.loss import IGNORED, counted_tokens, next_token_loss
from mpt_eqx.train.packing import Packed, Row, batches
from mpt_eqx.train.saved_states import has_states, restore_state, save_state
from mpt_eqx.train.state import TrainState
from mpt_eqx.train.step import Batch, Metrics
from mpt_eqx.train.stopping import check_finite, stop_on_signals

Record = dict[str, Any]
FLOATS = ("loss", "grad_norm", "learning_rate")


def run(
    start: Callable[[], TrainState],
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    rows: Callable[[Any], Packed],
    directory: str | Path,
    *,
    steps: int,
    batch_size: int,
    save_every: int | None = None,
    evaluate: Callable[[MPT], Mapping[str, Any]] | None = None,
    eval_every: int | None = None,
    log: Callable[[Record], None] | None = None,
    keep: int = 3,
) -> TrainState:
    """Returns the state after `steps` steps, or after fewer if Ctrl-C, SIGTERM or the end of the data stopped the run.

    It goes on from the newest readable state of `directory`, to the bit as if it had not been stopped, and saves the
    last state there. A run whose loss or gradient is not finite saves nothing more.

    A step begins before what the one before it returned is read, so that the device does not wait for the host.

    A model on a mesh is trained there. On several processes all call it with the same rows, of which each device gets
    those that it computes; the loss is divided once, by the tokens that count in all of them. Give `log` to one only.

    Args:
        start: returns the state before the first step; where a state is restored, only the shapes in it count.
        step: of `make_train_step`.
        rows: returns `pack(…, state=place)` of the place in the data where the run is; None for the start.
        directory: of the states of this run only.
        steps: of the whole run, those of earlier calls included.
        batch_size: rows of a step.
        save_every: steps between two saved states; None for the last state only.
        evaluate: returns what is added to the log, such as {"eval_loss": 3.0}, from the model as it is.
        eval_every: steps between two evaluations; None for one after the last step.
        log: called after each step with `step`, the metrics as numbers, `tokens_per_s`, and what `evaluate` returned.
        keep: how many states stay.

    Raises:
        MPTError: a number is not positive; a loss or gradient is not finite; what `save_state` raises.
        CheckpointError: there are states, and none can be read.
    """
    for name, value in {"batch_size": batch_size, "save_every": save_every, "eval_every": eval_every}.items():
        if value is not None and value < 1:
            raise MPTError(f"{name}: expected a whole number ≥ 1, found {value!r}")
    state, place = _begin(start, directory)
    source = rows(place)
    done = int(state.step)
    saved = -1 if place is None else done
    running: tuple[int, Metrics] | None = None  # a step that was begun and is not in the log
    began = time.perf_counter()

    def ended(more: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Waits for the step, raises unless it is finite, and logs it with what is measured after it."""
        nonlocal running, began
        if running is None:
            return
        number, metrics = running
        running = None
        check_finite(metrics, number)
        record: Record = {"step": number, **{name: float(metrics[name]) for name in FLOATS}}
        record["tokens"] = int(metrics["tokens"])
        record["tokens_per_s"] = record["tokens"] / (time.perf_counter() - began)
        record |= more()
        if log is not None:
            log(record)
        began = time.perf_counter()

    def save() -> None:
        nonlocal saved, began
        save_state(state, directory, data=source.state, keep=keep)
        saved, began = done, time.perf_counter()

    with stop_on_signals() as has_come:
        for batch in batches(source, batch_size) if done < steps else ():
            state, metrics = step(state, batch)
            done += 1
            ended()  # that before, while this one is computed
            running = done, metrics
            stopped = done == steps or has_come()
            measures = evaluate is not None and (done == steps or (eval_every is not None and done % eval_every == 0))
            if evaluate is not None and measures:
                ended(functools.partial(evaluate, state.model))
            if stopped or (save_every is not None and done % save_every == 0):
                ended()
                save()
            if stopped:
                break
        ended()
    if saved != done:
        save()
    return state


def _begin(start: Callable[[], TrainState], directory: str | Path) -> tuple[TrainState, Any]:
    """Returns the newest state and its place in the data, without holding another beside it; or the first and None."""
    state = start()
    if not has_states(directory):
        return state, None

    def shape(x: Any) -> Any:
        # What is committed to no device, such as the step, goes where the rest is.
        where = x.sharding if isinstance(x, jax.Array) and x.committed else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) if isinstance(x, jax.Array) else x

    like = jax.tree.map(shape, state)
    del state
    found = restore_state(directory, like)
    return (start(), None) if found is None else found


def mean_loss(model: MPT, rows: Iterable[Row], batch_size: int, *, compute_dtype: Any = None) -> float:
    """Returns the mean cross-entropy, in nats, of all tokens of all rows that count, without dropout.

    Args:
        model: the model.
        rows: such as `pack` makes; each has the same names.
        batch_size: rows that are computed together.
        compute_dtype: as in `make_train_step`.

    Raises:
        MPTError: no token counts.
    """
    rows = list(rows)
    if rows:
        fill = {"tokens": 0, "labels": IGNORED, "sequence_ids": -1}
        empty = {name: np.full_like(row, fill[name]) for name, row in rows[0].items()}
        rows += [empty] * (-len(rows) % batch_size)
    total, count = 0.0, 0
    model = eqx.nn.inference_mode(model)
    for batch in batches(rows, batch_size):
        loss, tokens = _loss_and_count(model, batch, compute_dtype)
        total, count = total + float(loss) * int(tokens), count + int(tokens)
    if not count:
        raise MPTError("rows: expected tokens that count, found none; labels are −100 at those that do not")
    return total / count


@eqx.filter_jit
def _loss_and_count(model: MPT, batch: Batch, compute_dtype: Any) -> tuple[Array, Array]:
    if compute_dtype is not None:
        model = jax.tree.map(lambda x: x.astype(compute_dtype) if eqx.is_inexact_array(x) else x, model)
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    return next_token_loss(model, **batch, moe_loss_weight=0.0), jnp.sum(counted_tokens(**batch))
