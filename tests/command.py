"""The command line in this process, or in one of its own where the process is what is tested."""

import contextlib
import io
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock


def run(*args, stdin=""):
    """Calls `main` with its output captured; the Hub is offline."""
    from mpt_eqx.cli import main

    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as stop:  # argparse ends --help and invalid usage so
            code = stop.code
    return SimpleNamespace(returncode=code or 0, stdout=out.getvalue(), stderr=err.getvalue())


def run_process(*args, stdin=""):
    """Runs `python -m mpt_eqx`."""
    command = [sys.executable, "-m", "mpt_eqx", *map(str, args)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=240, env=environment())


def environment():
    """Returns the environment of a process that finds what these tests have compiled."""
    import jax

    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def python(script):
    """Runs a script in a Python of its own, and returns what it prints."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout
