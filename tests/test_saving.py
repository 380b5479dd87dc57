"""A save that ends early leaves the old checkpoint or the new one, never a mixture, and never fewer tensors."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

SAVE = """
import sys, os, jax, jax.numpy as jnp
sys.path.insert(0, {tests!r})
from test_saving import model_of
from mpt_eqx import save_pretrained
{before}
save_pretrained(model_of({value}), {directory!r}, max_shard_size={size})
"""


def model_of(value):
    """A model whose weights and whose configuration both say which one it is."""
    from mpt_eqx import MPT, AttnConfig, MPTConfig

    config = MPTConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=61, no_bias=True, max_seq_len=100 + value,
        attn_config=AttnConfig(alibi=True),
    )  # fmt: skip
    model = MPT(config, key=jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), model)


def value_of(directory):
    """Which model a directory holds, after looking that all of it is that one."""
    from mpt_eqx import from_pretrained

    model = from_pretrained(directory, mmap=False)
    values = {float(np.unique(leaf)[0]) for leaf in jax.tree.leaves(model) if np.unique(leaf).size == 1}
    assert len(values) == 1 and values == {float(model.config.max_seq_len - 100)}
    return int(values.pop())


def run(directory, value, *, size=20_000, before="", **kwargs):
    script = SAVE.format(
        tests=str(Path(__file__).parent), before=before, value=value, directory=str(directory), size=size
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, **kwargs)


KILL_AT = """
import os, signal
count = 0
def killing(original):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == {moment}:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call
for name in ("replace", "fsync", "unlink"):
    setattr(os, name, killing(getattr(os, name)))
"""


@pytest.mark.parametrize(("old_size", "new_size"), [(20_000, 10**9), (10**9, 20_000), (20_000, 20_000)])
def test_killed_between_any_two_steps(tmp_path, old_size, new_size):
    """At every sync, move and removal in turn; the next save makes good what was left."""
    from mpt_eqx import save_pretrained

    save_pretrained(model_of(1), tmp_path / "old", max_shard_size=old_size)
    (tmp_path / "old" / "notes.txt").write_text("mine")
    outcomes = []
    moments = [*range(1, 40, 4), *range(3, 40, 4)] if new_size == old_size else range(1, 40, 3)
    for moment in sorted(moments):
        directory = tmp_path / str(moment)
        shutil.copytree(tmp_path / "old", directory)
        done = run(directory, 2, size=new_size, before=KILL_AT.format(moment=moment))
        outcomes.append(value_of(directory))
        assert (directory / "notes.txt").read_text() == "mine"
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        save_pretrained(model_of(3), directory, max_shard_size=new_size)
        assert value_of(directory) == 3
        assert not [path for path in directory.iterdir() if path.suffix == ".new" or "save" in path.name]
    assert outcomes[0] == 1 and outcomes[-1] == 2 and outcomes == sorted(outcomes)


def test_killed_at_any_time(tmp_path):
    """A process that saves one model after the other is killed at random moments."""
    before = "import mpt_eqx, itertools\n" + SAVE.split("{before}")[0].split("\n", 2)[2]
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_saving import model_of\nfrom mpt_eqx import save_pretrained\n"
        "models = [model_of(i) for i in range(3)]\n"
        f"save_pretrained(models[0], {str(tmp_path / 'm')!r}, max_shard_size=20_000)\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        f"    for model in models: save_pretrained(model, {str(tmp_path / 'm')!r}, max_shard_size=20_000)\n"
    )
    assert before
    rng = np.random.default_rng(0)
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
        assert value_of(tmp_path / "m") in (0, 1, 2)


def test_a_full_disk(tmp_path):
    """Simulated by a limit on the size of files: the error is ours, the old checkpoint stays, nothing is left over."""
    from mpt_eqx import save_pretrained

    save_pretrained(model_of(1), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    before = (
        "import signal, resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
    )
    done = run(tmp_path, 2, size=10**9, before=before)
    assert f"CheckpointError: {tmp_path}: cannot be written ([Errno 27] File too large)" in done.stderr
    assert value_of(tmp_path) == 1 and sorted(path.name for path in tmp_path.iterdir()) == names
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 50_000


def test_an_error_in_the_middle_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    from mpt_eqx import save_pretrained
    from mpt_eqx.checkpoint import save

    save_pretrained(model_of(1), tmp_path)
    monkeypatch.setattr(save, "_write_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(model_of(2), tmp_path)
    monkeypatch.undo()
    assert value_of(tmp_path) == 1 and len(list(tmp_path.iterdir())) == 2


def test_weights_that_are_views(tmp_path):
    """A transposed array is written in its own order, not in that of its memory."""
    from mpt_eqx import from_pretrained, save_pretrained

    model = model_of(1)
    weight = np.arange(61 * 32, dtype=np.float32).reshape(32, 61).T
    assert not weight.flags.c_contiguous
    save_pretrained(eqx.tree_at(lambda m: m.wte.weight, model, weight), tmp_path)
    np.testing.assert_array_equal(from_pretrained(tmp_path).wte.weight, weight)


def test_a_journal_that_is_wrong(tmp_path):
    from mpt_eqx import CheckpointError, from_pretrained, save_pretrained

    save_pretrained(model_of(1), tmp_path)
    for content in ({}, {"written": ["../x"], "removed": []}, {"written": [3], "removed": []}):
        (tmp_path / "mpt_eqx-save.json").write_text(json.dumps(content))
        with pytest.raises(
            CheckpointError, match="mpt_eqx-save.json: expected lists of file names, found .*; delete it"
        ):
            from_pretrained(tmp_path)
    (tmp_path / "mpt_eqx-save.json").write_text("x")
    with pytest.raises(CheckpointError, match="mpt_eqx-save.json: expected JSON"):
        from_pretrained(tmp_path)
    assert os.path.exists(tmp_path)
