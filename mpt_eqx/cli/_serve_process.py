"""The process of `mpt-eqx serve`: its socket, its signals, its log, and its end."""

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from mpt_eqx.errors import MPTError
from mpt_eqx.serve import Engine
from mpt_eqx.sharding.explain import readable_bytes

BACKLOG = 2048
CLOSE_TIMEOUT = 5.0
"""Seconds that connections have to take the end of their answers, after the engine has stopped."""
STOP_TIMEOUT = 2.0
"""Seconds that the engine's thread has to end the chunk that runs; what it compiles is not waited for."""
THREAD = "mpt_eqx engine"
LOOK = 0.05
"""Seconds between two looks at the engine."""


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that listens.

    Raises:
        MPTError: there is no such address, or its port is taken.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise MPTError(f"--host: expected an address of this machine, found {host!r:.100} ({error.strerror})") from None
    family, _, _, _, address = found[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise MPTError(
            f"--port: expected a free port, found {host}:{port} ({error.strerror}); give another one, or 0 for any"
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Returns the address that a listening socket has."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve_until_told(
    app: Any, engine: Engine, listener: socket.socket, *, drain_timeout: float, log: TextIO | None,
    say: Callable[[str], None],
) -> int:  # fmt: skip
    """Serves until a signal comes or the engine dies, and returns the exit code.

    HTTP runs in a thread of its own, so that this one has the signals: the first lets requests end, for at most
    `drain_timeout` seconds, and a second one ends the process at once.
    """
    import uvicorn

    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        date_header=True, timeout_graceful_shutdown=int(CLOSE_TIMEOUT), h11_max_incomplete_event_size=2**16,
    )  # fmt: skip
    server = uvicorn.Server(config)
    http = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="mpt_eqx http", daemon=True)
    started = time.monotonic()
    with _told() as told, _logged(log):
        http.start()
        while not server.started and http.is_alive():
            time.sleep(0.01)
        if not server.started:
            raise MPTError("HTTP did not start; its log above says why")
        say(f"listening on {url_of(listener)}")
        engine.start()
        while (health := engine.health()) == "starting" and not told.wait(LOOK):
            pass
        if health == "ready":
            peak = engine.stats().peak_bytes
            memory = "" if peak is None else f", peak memory {readable_bytes(peak)}"
            say(f"ready after {time.monotonic() - started:.1f} s{memory}")
        while http.is_alive() and engine.health() not in ("dead", "stopped") and not told.wait(LOOK * 4):
            pass
        failed, dead = not told.is_set(), engine.health() in ("dead", "stopped")
        if not failed:
            _drain(engine, drain_timeout, say)
        engine.stop(timeout=STOP_TIMEOUT)
        server.should_exit = True
        http.join(CLOSE_TIMEOUT + 5)
    if failed:
        what = "the engine" if dead else "HTTP"
        raise MPTError(f"{what} has ended, and so does the server; its log above says why")
    if any(thread.name == THREAD for thread in threading.enumerate()):  # compiling, which would crash Python's own end
        _end_now(0)
    return 0


def _drain(engine: Engine, timeout: float, say: Callable[[str], None]) -> None:
    """Lets the requests end that have begun."""
    if engine.health() != "ready":
        return
    engine.drain()
    stats, until = engine.stats(), time.monotonic() + timeout
    if stats.active + stats.queued:
        say(f"draining: {stats.active + stats.queued} sequences have {timeout:g} seconds to end")
    while engine.health() == "draining" and time.monotonic() < until:
        time.sleep(LOOK)
    left = engine.stats()
    if engine.health() == "draining" and left.active + left.queued:
        say(f"drained no further: {left.active + left.queued} sequences end with an error")


@contextlib.contextmanager
def _told() -> Iterator[threading.Event]:
    """Yields an event that the first signal sets; the second one ends the process."""
    told = threading.Event()

    def handle(number: int, _: Any) -> None:
        if told.is_set():
            _end_now(128 + number)
        told.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_now(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def _logged(stream: TextIO | None) -> Iterator[None]:
    """Writes the lines about requests to a stream, in a thread: a pipe that nobody reads keeps no request waiting."""
    if stream is None:
        yield
        return
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def write() -> None:
        while (line := lines.get()) is not None:
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                stream.write(f"{line}\n")
                if lines.empty():
                    stream.flush()

    handler = logging.Handler()
    handler.emit = lambda record: lines.put(record.getMessage())  # type: ignore[method-assign]
    logger, writer = logging.getLogger("mpt_eqx.serve.access"), threading.Thread(target=write, daemon=True)
    writer.start()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        lines.put(None)
        writer.join(1.0)
