"""Tracing and lowering in less time, for all processes that compile many programs."""

import gc
import threading
from collections.abc import Callable


def collect_rarely() -> None:
    """What is imported stays: the collector need not look through it, and tracing makes many objects and few cycles."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def contexts(make: Callable) -> Callable:
    """Returns a function that makes an MLIR context for every 64th program of a thread, and else returns the last.

    To make one for each program is half of the time to lower. A context keeps all constants that were lowered in it, so
    it lasts for some programs only.
    """
    made = threading.local()

    def context():
        if getattr(made, "uses", 0) % 64 == 0:
            made.context, made.uses = make(), 0
        made.uses += 1
        return made.context

    return context
