"""Loads checkpoints in a box: each in a process of its own with a limit on memory and time.

Reads paths from stdin, a line each, and answers with a line of JSON: what came of it, the message or a digest of the
tensors, and how much memory was used at most.
"""

import hashlib
import json
import os
import resource
import signal
import sys

import jax  # noqa: F401  imported here, once, for all the processes to come
import numpy as np

from mpt_eqx import MPTError, from_pretrained
from mpt_eqx.checkpoint.names import named_leaves

MEMORY = 2**30
SECONDS = 10


def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


def attempt(path):
    try:
        leaves = named_leaves(from_pretrained(path))
    except MPTError as error:
        return {"outcome": "refused", "message": str(error)}
    digest = hashlib.sha256()
    for name, leaf in sorted(leaves.items()):
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return {"outcome": "loaded", "digest": digest.hexdigest()}


def boxed(path):
    receive, send = os.pipe()
    if not (child := os.fork()):
        limit = status("VmData") + MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        signal.alarm(SECONDS)
        try:
            result = attempt(path)
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
        print(boxed(line.rstrip("\n")), flush=True)
