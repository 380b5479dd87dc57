"""A run that saves after each step and goes on where it was; after some steps it may kill itself. See test_states.py.

Arguments: its directory, how many steps it has, and after which it is killed (0 for none). It prints a digest of what
it has at the end.
"""

import hashlib
import os
import signal
import sys

import equinox as eqx
import jax
import numpy as np

from mpt_eqx import MPT, AttnConfig, MPTConfig, train

DIRECTORY, STEPS, KILLED = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
CONFIG = MPTConfig(
    d_model=16, n_heads=2, n_layers=1, vocab_size=61, max_seq_len=16, emb_pdrop=0.1,
    attn_config=AttnConfig(alibi=True, attn_uses_sequence_id=True),
)  # fmt: skip
OPTIMIZER = train.decoupled_lionw(train.cosine_with_warmup(1e-3, 20, warmup_steps=3), weight_decay=1e-4, peak=1e-3)
DOCUMENTS = [np.random.default_rng(n).integers(1, 61, size=5 + 3 * n % 17).tolist() for n in range(23)]


def fresh():
    return train.TrainState.create(MPT(CONFIG, key=jax.random.key(0)), OPTIMIZER, key=jax.random.key(1))


if __name__ == "__main__":
    step = train.make_train_step(OPTIMIZER, accumulate=2, max_grad_norm=1.0)
    found = train.restore_state(DIRECTORY, eqx.filter_eval_shape(fresh))
    state, place = (fresh(), None) if found is None else found
    rows = train.pack(train.Sampler(DOCUMENTS, seed=3), 8, eos=0, state=place)
    for batch in train.batches(rows, 4):
        state, metrics = step(state, batch)
        train.check_finite(metrics, int(state.step))
        if int(state.step) % 7 == 0:
            train.save_state(state, DIRECTORY, data=rows.state)
        if int(state.step) == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        if int(state.step) == STEPS:
            break
    saved = jax.tree.map(lambda x: jax.random.key_data(x) if x is state.key else x, state)
    content = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(saved))
    print(hashlib.sha256(content).hexdigest(), rows.state, float(metrics["loss"]))
