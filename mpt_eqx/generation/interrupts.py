"""Ctrl-C between two programs and never within one.

Python raises KeyboardInterrupt wherever it happens to be: while JAX traces or compiles, or in a callback of JAX's,
where it is printed and forgotten, or comes out of C++ code that is not made for it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Holds back the KeyboardInterrupt of Ctrl-C until the block has ended; a second Ctrl-C raises it at once.

    Where somebody else handles SIGINT, or outside of the main thread, nothing changes.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if pressed:
            raise KeyboardInterrupt
