"""Saves models in processes that are killed on the way; see test_saving.py.

Reads a line of JSON for each: where to save which model in files of which size, at which step to be killed (or never),
and after how many seconds. Answers with the wait status, 0 for a save that came to its end.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from test_saving import model_of

from mpt_eqx import save_pretrained


def kill_at(moment):
    """Kills this process at its n-th move, sync or removal."""
    count = 0

    def counting(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "unlink"):
        setattr(os, name, counting(getattr(os, name)))


if __name__ == "__main__":
    # As numpy arrays, so that a child has no need of JAX, whose threads it does not have.
    models = [jax.tree.map(np.asarray, model_of(value)) for value in range(4)]
    for line in sys.stdin:
        order = json.loads(line)
        if not (child := os.fork()):
            kill_at(order.get("moment"))
            while True:
                for value in order["values"]:
                    save_pretrained(models[value], order["directory"], max_shard_size=order["size"])
                if "seconds" not in order:
                    os._exit(0)
        if "seconds" in order:
            time.sleep(order["seconds"])
            os.kill(child, signal.SIGKILL)
        print(os.waitpid(child, 0)[1], flush=True)
