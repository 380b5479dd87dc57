"""Loads checkpoints in a box: each in a process of its own with a limit on memory and time.

Reads requests from stdin, a line of JSON each, with a path, arguments of from_pretrained, and perhaps what to do with
the model then. Answers with a line of JSON: what came of it, and the message or a digest of the tensors.
"""

import hashlib
import json
import os
import resource
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

# Some are imported here for all the processes to come, so that none does it again.
import equinox as eqx
import gguf  # noqa: F401
import jax  # noqa: F401
import numpy as np
import safetensors.numpy  # noqa: F401

from mpt_eqx import MPTError, checkpoint_info, from_pretrained, save_pretrained
from mpt_eqx.checkpoint.names import named_leaves
from mpt_eqx.cli import main

MEMORY = 2**30
SECONDS = 10


def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


def save_transposed(model, path):
    """Saves a model whose embedding lies column by column in memory, and loads that."""
    weight = np.asfortranarray(np.asarray(model.wte.weight))
    save_pretrained(eqx.tree_at(lambda m: m.wte.weight, model, weight), Path(path) / "again")
    return from_pretrained(Path(path) / "again")


def cut_file(model, path):
    """Cuts the file that a model is loaded from."""
    (weights,) = Path(path).glob("*.safetensors")
    os.truncate(weights, 64)
    return model


THEN = {None: lambda model, path: model, "save transposed": save_transposed, "cut file": cut_file}


def attempt(path, then=None, **arguments):
    try:
        leaves = named_leaves(THEN[then](from_pretrained(path, **arguments), path))
    except MPTError as error:
        return {"outcome": "refused", "message": str(error)}
    digest = hashlib.sha256()
    for name, leaf in sorted(leaves.items()):
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return {"outcome": "loaded", "digest": digest.hexdigest()}


def inspect(path):
    """Runs the command, whose exit code is the outcome."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main(["inspect", path])
    (out.getvalue() + err.getvalue()).encode()  # as a terminal would have it
    return {"outcome": code, "out": out.getvalue(), "message": err.getvalue()}


def boxed(request):
    receive, send = os.pipe()
    if not (child := os.fork()):
        limit = status("VmData") + MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Seconds of this process, so that a busy machine changes nothing; more of them by the clock.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(10 * SECONDS)
        try:
            result = inspect(**request) if request.pop("inspect", False) else attempt(**request)
        except BaseException as error:
            result = {"outcome": "escaped", "message": f"{type(error).__name__}: {error}"}
        os.write(send, json.dumps(result).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as f:
        answer = f.read()
    killed = os.waitpid(child, 0)[1]
    return answer or json.dumps({"outcome": "killed", "message": f"wait status {killed}"})


if __name__ == "__main__":
    # The shapes of the model that most files are made for are traced once; no thread is started for it.
    checkpoint_info(Path(__file__).parent / "golden" / "hf_default")
    for line in sys.stdin:
        print(boxed(json.loads(line)), flush=True)
