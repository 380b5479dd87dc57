"""One of two processes with two devices each, which save and restore a sharded state; answers in JSON.

Arguments: a port, which process this is, a directory. See test_states.py.
"""

import json
import signal
import sys
import warnings
from pathlib import Path

import jax
import numpy as np

from mpt_eqx import MPT, MPTConfig, MPTError, sharding, train
from mpt_eqx.checkpoint.host_arrays import gather_to_host

PORT, RANK, DIRECTORY = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{PORT}", 2, RANK, initialization_timeout=60)
OPTIMIZER = train.decoupled_lionw(1e-3)
CONFIG = MPTConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=64, max_seq_len=16)


def state_of(seed):
    model = sharding.shard(MPT(CONFIG, key=jax.random.key(seed)), sharding.make_mesh(fsdp=4), sharding.FSDP)
    return train.TrainState.create(model, OPTIMIZER, key=jax.random.key(seed))


def bits(state):
    return [gather_to_host(x).tobytes() for x in jax.tree.leaves((state.model, state.opt_state, state.step))]


step = train.make_train_step(OPTIMIZER)
tokens = np.arange(4 * 16).reshape(4, 16) % 50
said = {"none": train.restore_state(DIRECTORY, state_of(0)) is None}
state, _ = step(state_of(0), {"tokens": tokens})
train.save_state(state, DIRECTORY, data={"rank": RANK})
found, data = train.restore_state(DIRECTORY, state_of(1))
said |= {"equal": bits(found) == bits(state), "data": data == {"rank": RANK}}
following, _ = step(found, {"tokens": tokens})
newest = train.save_state(following, DIRECTORY, data={"rank": RANK})
sharding.assert_same_across_processes(newest=newest.name)
if not RANK:
    (newest / "arrays.safetensors").write_bytes(b"")
sharding.assert_same_across_processes(torn=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    said["torn"] = int(gather_to_host(train.restore_state(DIRECTORY, state_of(1))[0].step))
try:
    train.save_state(following, Path("/proc/nowhere"))
except MPTError as error:
    said["refused"] = type(error).__name__
with train.stop_on_signals() as has_come:
    before = has_come()
    if RANK:
        signal.raise_signal(signal.SIGTERM)
    said["signal"] = [before, has_come()]


def learned(model):
    """The metrics of three steps of two micro-batches with masks, and the weights after them, on the host."""
    optimizer = train.decoupled_adamw(1e-3, eps=1e-4)
    step, metrics = train.make_train_step(optimizer, accumulate=2, max_grad_norm=0.5), []
    state = train.TrainState.create(model, optimizer)
    mask = tokens % 3 > 0
    mask[1] = False
    for _ in range(3):
        state, found = step(state, {"tokens": tokens, "mask": mask})
        metrics.append([float(gather_to_host(found[name])) for name in ("loss", "grad_norm", "tokens")])
    return np.concatenate([np.ravel(metrics), *(gather_to_host(x).ravel() for x in jax.tree.leaves(state.model))])


alone = MPT(CONFIG, key=jax.random.key(7))
both = sharding.shard(alone, sharding.make_mesh(fsdp=4), sharding.FSDP)
said["one device"] = float(np.abs(learned(both) - learned(alone)).max()) < 1e-5
print(json.dumps(said), flush=True)
