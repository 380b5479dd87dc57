"""Saves models in processes that do not come to their end; see test_saving.py.

Reads a line of JSON for each: where to save which models in files of which size; at which step, or after how many
seconds, to be killed, and how long to pause between saves until then. Answers with the wait status, 0 for a save that
came to its end.
"""

import io
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
from mpt_eqx.checkpoint import atomic
from mpt_eqx.checkpoint.formats import safetensors


def kill_at(moment):
    """Kills this process at the n-th write, sync, move, removal or new name."""
    count = 0

    def counting(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    class File(io.FileIO):
        write = counting(io.FileIO.write)

    for name in ("replace", "fsync", "unlink", "mkdir"):
        setattr(os, name, counting(getattr(os, name)))
    Path.touch = counting(Path.touch)
    for module in (atomic, safetensors):
        module.open = lambda path, mode: io.BufferedWriter(File(path, mode.replace("b", "")))


if __name__ == "__main__":
    # As numpy arrays, so that a child has no need of JAX, whose threads it does not have.
    models = {value: jax.tree.map(np.asarray, model_of(value)) for value in (1, 2, 3, 12)}
    for line in sys.stdin:
        order = json.loads(line)
        if not (child := os.fork()):
            kill_at(order.get("moment"))
            while True:
                for value in order["values"]:
                    save_pretrained(models[value], order["directory"], max_shard_size=order["size"])
                    time.sleep(order.get("pause", 0))
                if "seconds" not in order:
                    os._exit(0)
        if "seconds" in order:
            time.sleep(order["seconds"])
            os.kill(child, signal.SIGKILL)
        print(os.waitpid(child, 0)[1], flush=True)
