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
from pathlib import Path

import equinox as eqx
import jax  # noqa: F401  imported here, once, for all the processes to come
import numpy as np

from mpt_eqx import MPTError, from_pretrained, save_pretrained
from mpt_eqx.checkpoint.names import named_leaves

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
    os.truncate(Path(path) / "model.safetensors", 64)
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


def boxed(request):
    receive, send = os.pipe()
    if not (child := os.fork()):
        limit = status("VmData") + MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(SECONDS)
        try:
            result = attempt(**request)
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
    for line in sys.stdin:
        print(boxed(json.loads(line)), flush=True)
