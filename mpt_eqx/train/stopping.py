"""When a run stops: at a signal after the step in progress, or at once where numbers have gone wrong."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpt_eqx.errors import MPTError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed or SIGTERM came, which in the block end nothing.

    Ask it after each step, save, and leave the loop. A second signal does what it would do without the block: a run
    that hangs can be ended. On several processes all must ask, and all are told of a signal that came to one.

    Outside of the main thread, where Python lets nobody handle signals, and where a signal is ignored, nothing changes.
    """
    came = False
    before: dict[int, Any] = {}

    def put_back() -> None:
        while before:
            signal.signal(*before.popitem())

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        put_back()

    def has_come() -> bool:
        if jax.process_count() == 1:
            return came
        return bool(np.any(multihost_utils.process_allgather(np.asarray(came))))

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                before[number] = signal.signal(number, handle)
    try:
        yield has_come
    finally:
        put_back()


def check_finite(metrics: Mapping[str, Any], step: int) -> None:
    """Raises unless a step's loss and gradient are finite, so that nothing is saved after they are not.

    Call it before `save_state`. It waits for the step to be computed.

    Args:
        metrics: what a step returned.
        step: its number, for the message.

    Raises:
        MPTError: `loss` or `grad_norm` is NaN or infinite.
    """
    for name in ("loss", "grad_norm"):
        value = float(metrics.get(name, 0.0))
        if not np.isfinite(value):
            raise MPTError(
                f"{name}: expected a finite number at step {step}, found {value}; go back to the last state that was "
                "saved, with a lower learning rate, a max_grad_norm, or without the documents of this step"
            )
