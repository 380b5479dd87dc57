"""Processes that measure, one for each implementation and dtype, and what they are asked."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mpt_eqx.errors import printable

ROOT = Path(__file__).parents[2]
NO_KERNEL = {"MPT_EQX_KERNEL": "0"}
"""The environment that switches the CPU kernel off."""


def keeping_programs(directory: Path) -> dict[str, str]:
    """Returns the environment in which JAX keeps every compiled program in a directory, and takes it from there."""
    times = {f"JAX_PERSISTENT_CACHE_MIN_{what}": "-1" for what in ("COMPILE_TIME_SECS", "ENTRY_SIZE_BYTES")}
    return {"JAX_COMPILATION_CACHE_DIR": str(directory), **times}


class Worker:
    """A process that measures; it ends with the block that it was made for."""

    def __init__(self, log: IO[str], environment: Mapping[str, str]):
        self.log = log
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=child_environment(environment),
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Returns the answer to one request; "error" in it where there is none."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if line:
            return json.loads(line)
        self.log.seek(0)
        last = self.log.read().strip().rpartition("\n")[2]
        return {"error": f"its process ended with code {self.process.wait()} ({printable(last, limit=200)})"}


@contextmanager
def worker(environment: Mapping[str, str] = {}) -> Iterator[Worker]:
    """Yields a process that measures, which ends with the block."""
    with tempfile.TemporaryFile("w+") as log, Worker(log, environment) as one:
        yield one


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a process that measures: nothing compiled earlier, and room for others on a GPU.

    Python finds modules as bytecode, as after an installation.
    """
    other = ("JAX_COMPILATION_CACHE", "PYTHONDONTWRITEBYTECODE")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(other)}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **changes}
