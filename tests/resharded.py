"""A state of eight devices, restored on eight, four and one; argument: a directory. See test_states.py."""

import json
import sys
import warnings
from pathlib import Path

import jax
import numpy as np

from mpt_eqx import MPT, MPTConfig, sharding, train

jax.config.update("jax_num_cpu_devices", 8)
DIRECTORY = Path(sys.argv[1])
CONFIG = MPTConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=64, max_seq_len=16)
OPTIMIZER = train.decoupled_lionw(1e-3)


def state_on(devices, seed):
    model = MPT(CONFIG, key=jax.random.key(seed))
    if devices > 1:
        model = sharding.shard(model, sharding.make_mesh(fsdp=devices), sharding.FSDP)
    return train.TrainState.create(model, OPTIMIZER, key=jax.random.key(seed))


def bits(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((state.model, state.opt_state, state.step))]


def where(state):
    return [leaf.sharding for leaf in jax.tree.leaves((state.model, state.opt_state))]


step = train.make_train_step(OPTIMIZER)
tokens = np.arange(8 * 16).reshape(8, 16) % 50
state, _ = step(state_on(8, 0), {"tokens": tokens})
train.save_state(state, DIRECTORY / "8", data=[1])
assert (DIRECTORY / "8" / "step-00000001" / "sharded").is_dir()
said = {}
for devices in (8, 4, 1):
    like = state_on(devices, 1)
    found, data = train.restore_state(DIRECTORY / "8", like)
    said[str(devices)] = bits(found) == bits(state) and where(found) == where(like) and data == [1]
    step(found, {"tokens": tokens})
one, _ = train.restore_state(DIRECTORY / "8", state_on(1, 1))
train.save_state(one, DIRECTORY / "1")
assert not (DIRECTORY / "1" / "step-00000001" / "sharded").exists()
said["of 1 to 8"] = bits(train.restore_state(DIRECTORY / "1", state_on(8, 1))[0]) == bits(state)
following, _ = step(train.restore_state(DIRECTORY / "8", state_on(8, 1))[0], {"tokens": tokens})
newest = train.save_state(following, DIRECTORY / "8", data=[2])
largest = max(
    (path for path in (newest / "sharded").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
)
largest.write_bytes(largest.read_bytes()[:-1])
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    said["torn"] = int(train.restore_state(DIRECTORY / "8", state_on(8, 1))[0].step)
print(json.dumps(said))
