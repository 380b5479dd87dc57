"""A save that ends early leaves the old checkpoint or the new one, never a mixture, and never fewer tensors."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import asked_by_line


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


@pytest.fixture(scope="module")
def saver():
    """Saves in a process that is killed on the way; see saver.py."""
    with asked_by_line("saver.py") as ask:

        def save(directory, *values, size=20_000, **when):
            return int(ask(json.dumps({"directory": str(directory), "values": values, "size": size, **when})))

        yield save


@pytest.mark.parametrize(("old_size", "new_size"), [(20_000, 10**9), (10**9, 20_000), (20_000, 20_000), (10**9, 10**9)])
def test_killed_between_any_two_steps(saver, tmp_path, old_size, new_size):
    """At every sync, move and removal in turn; the next save makes good what was left."""
    assert saver(tmp_path / "old", 1, size=old_size) == 0
    (tmp_path / "old" / "notes.txt").write_text("mine")
    outcomes = []
    for moment in range(1, 60):
        directory = tmp_path / str(moment)
        shutil.copytree(tmp_path / "old", directory)
        status = saver(directory, 2, size=new_size, moment=moment)
        outcomes.append(value_of(directory))
        assert (directory / "notes.txt").read_text() == "mine"
        if status == 0:
            break
        assert status == signal.SIGKILL
        assert saver(directory, 3, size=new_size) == 0 and value_of(directory) == 3
        assert not [path for path in directory.iterdir() if path.suffix == ".new" or "save" in path.name]
    assert status == 0 and outcomes[0] == 1 and outcomes[-1] == 2 and outcomes == sorted(outcomes)


def test_killed_at_any_time(saver, tmp_path):
    rng = np.random.default_rng(0)
    saver(tmp_path, 0)
    for _ in range(20):
        assert saver(tmp_path, 0, 1, 2, seconds=rng.uniform(0, 0.3)) == signal.SIGKILL
        assert value_of(tmp_path) in (0, 1, 2)


def test_a_full_disk(tmp_path):
    """Simulated by a limit on the size of files: the error is ours, the old checkpoint stays, nothing is left over."""
    from mpt_eqx import save_pretrained

    save_pretrained(model_of(1), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    script = (
        f"import sys, signal, resource; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_saving import model_of\nfrom mpt_eqx import save_pretrained\n"
        "model = model_of(2)\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        f"save_pretrained(model, {str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert f"CheckpointError: {tmp_path}: cannot be written ([Errno 27] File too large)" in done.stderr
    assert value_of(tmp_path) == 1 and sorted(path.name for path in tmp_path.iterdir()) == names


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
