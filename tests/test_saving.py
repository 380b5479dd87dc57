"""A save that ends early leaves the old checkpoint or the new one, never a mixture, and never fewer tensors."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import environment
from conftest import GOLDEN, Killed, asked_by_line, failing, is_long, one_in
from safetensors.numpy import load_file

WAITING = ".mpt_eqx-"
ONE, SHARDS = 10**9, 50_000  # sizes of files, for a single one and for several


def model_of(value):
    """A model whose weights say which one it is; its configuration says the tens of that."""
    from mpt_eqx import MPT, AttnConfig, MPTConfig

    config = MPTConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=61, no_bias=True, max_seq_len=100 + value // 10,
        attn_config=AttnConfig(alibi=True),
    )  # fmt: skip
    shapes = eqx.filter_eval_shape(lambda: MPT(config, key=jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), shapes)


def value_of(directory):
    """Which model a directory holds, after looking that all of it is that one."""
    from mpt_eqx import from_pretrained

    model = from_pretrained(directory, mmap=False)
    (value,) = set(np.concatenate([np.unique(leaf) for leaf in jax.tree.leaves(model)]))
    assert model.config.max_seq_len == 100 + value // 10
    return int(value)


def value_to_others(directory):
    """Which weights a program reads that knows no more than transformers does, all of them being of one model."""
    path = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    files = [path.name] if path.exists() else set(json.loads(index.read_text())["weight_map"].values())
    (value,) = set(np.concatenate([np.unique(a) for file in files for a in load_file(directory / file).values()]))
    return int(value)


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def saver():
    """Saves in a process that is killed; see saver.py."""
    with asked_by_line("saver.py") as ask:

        def save(directory, *values, size=SHARDS, **when):
            return int(ask(json.dumps({"directory": str(directory), "values": values, "size": size, **when})))

        yield save


@pytest.fixture(scope="module")
def saved():
    """Saves, and at the n-th write, sync, move, removal or new name fails; returns whether the save came to its end."""
    from mpt_eqx import CheckpointError, save_pretrained

    models = {value: model_of(value) for value in (1, 2, 3, 12)}

    def save(directory, value, size=SHARDS, moment=None, full=False):
        try:
            with failing(moment, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else Killed):
                save_pretrained(models[value], directory, max_shard_size=size)
        except Killed:
            return False
        except CheckpointError as error:
            assert full and "cannot be written ([Errno 28] No space left on device)" in str(error)
            return False
        return True

    return save


TURNS = [
    (SHARDS, ONE),
    *(pytest.param(*turn, marks=pytest.mark.slow) for turn in ((ONE, SHARDS), (SHARDS, SHARDS), (ONE, ONE))),
]


def moments(old, tmp_path):
    """Yields 1, 2, … each with a new copy of a directory; the last one is not kept."""
    for moment in range(1, 99):
        directory = tmp_path / str(moment)
        shutil.copytree(old, directory)
        yield moment, directory
        shutil.rmtree(directory)


@pytest.mark.slow
@pytest.mark.parametrize("new", [pytest.param(2, marks=pytest.mark.slow), 12], ids=["same config", "other config"])
@pytest.mark.parametrize(("old_size", "new_size"), TURNS)
def test_killed_at_any_step(saved, tmp_path, old_size, new_size, new):
    """At every write, sync, move, removal and new name in turn; the next save makes good what was left."""
    assert saved(tmp_path / "old", 1, size=old_size)
    (tmp_path / "old" / "notes.txt").write_text("mine")
    outcomes = []
    for moment, directory in moments(tmp_path / "old", tmp_path):
        complete = saved(directory, new, size=new_size, moment=moment)
        outcomes.append(value_of(directory))
        assert value_to_others(directory) == outcomes[-1]
        assert (directory / "notes.txt").read_text() == "mine"
        if complete:
            break
        if moment % 5 == 0 or outcomes[-1] == new:
            assert saved(directory, 3, size=old_size) and value_of(directory) == 3
            files = ["model.safetensors"] if old_size == ONE else [f for f in names_in(directory) if "-of-" in f]
            assert set(names_in(directory)) - {"model.safetensors.index.json"} == {"config.json", "notes.txt", *files}
            assert old_size == ONE or len(files) == int(files[0][-17:-12])
    assert complete and outcomes[0] == 1 and outcomes[-1] == new and outcomes == sorted(outcomes)
    assert len(outcomes) >= 15


@pytest.mark.parametrize("moment", [9, 20, 26])
def test_a_process_killed_at_a_step(saver, tmp_path, moment):
    """The same with a real process, from shards to shards with another config: early, about the step, and late."""
    assert saver(tmp_path, 1) == 0
    assert saver(tmp_path, 12, moment=moment) == signal.SIGKILL
    value = value_of(tmp_path)
    assert value in (1, 12) and value_to_others(tmp_path) == value
    assert saver(tmp_path, 3) == 0 and value_of(tmp_path) == 3


@pytest.mark.parametrize(("old_size", "new_size"), TURNS)
def test_no_space_left_at_any_step(saved, tmp_path, old_size, new_size):
    """The error is ours, the old checkpoint or the new one is there, and of the old one's directory nothing differs."""
    saved(tmp_path / "old", 1, size=old_size)
    outcomes = []
    for moment, directory in moments(tmp_path / "old", tmp_path):
        complete = saved(directory, 12, size=new_size, moment=moment, full=True)
        outcomes.append(value_to_others(directory))
        assert outcomes[-1] == 12 or names_in(directory) == names_in(tmp_path / "old")
        if complete:
            break
        if moment % 5 == 0 or outcomes[-1] == 12:
            assert value_of(directory) == outcomes[-1]
    assert complete and outcomes[0] == 1 and outcomes[-1] == 12 and outcomes == sorted(outcomes)


@pytest.mark.parametrize("size", [ONE, SHARDS])
def test_no_space_left_in_an_empty_directory(saved, tmp_path, size):
    """What was empty is empty again, or holds all."""
    for moment in range(1, 99):
        if saved(tmp_path / str(moment), 1, size=size, moment=moment, full=True):
            break
        if (tmp_path / str(moment)).exists() and names_in(tmp_path / str(moment)):
            assert value_of(tmp_path / str(moment)) == 1
    assert moment > 10


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """A small file system in a mount namespace of its own, with less and less room beside the old checkpoint."""
    inside = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"', tmp_path]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    done = subprocess.run(
        [*inside, sys.executable, "-W", "ignore", "-c", FULL, tmp_path, Path(__file__).parent],
        capture_output=True, text=True, timeout=120, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes[0] == 12 and outcomes[-1] == 1 and outcomes == sorted(outcomes, reverse=True)
    assert 2 <= outcomes.count(1) < len(outcomes) - 1


FULL = """
import json, os, sys
from pathlib import Path
directory = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from test_saving import model_of, names_in, value_of
from mpt_eqx import CheckpointError, save_pretrained
old, new, outcomes = model_of(1), model_of(12), []
for room in range(160_000, 0, -15_000):
    save_pretrained(old, directory, max_shard_size=20_000)
    before = names_in(directory)
    free = os.statvfs(directory)
    with open(directory / "filler", "wb") as f:
        f.write(bytes(max(0, free.f_bavail * free.f_bsize - room)))
    try:
        save_pretrained(new, directory, max_shard_size=20_000)
    except CheckpointError as error:
        assert f"{directory}: cannot be written ([Errno 28] No space left on device" in str(error), error
        assert value_of(directory) == 12 or names_in(directory) == sorted([*before, "filler"])
    (directory / "filler").unlink()
    outcomes.append(value_of(directory))
print(json.dumps(outcomes))
"""


def test_killed_at_any_time(saver, tmp_path):
    rng = np.random.default_rng(0)
    saver(tmp_path, 3)
    for _ in range(5):
        assert saver(tmp_path, 3, 1, 12, seconds=rng.uniform(0, 0.3)) == signal.SIGKILL
        assert value_of(tmp_path) in (3, 1, 12)
        assert value_to_others(tmp_path) in (3, 1, 12)


@pytest.mark.parametrize(("old_size", "new_size"), TURNS)
def test_saved_between_any_two_steps_of_loading(tmp_path, monkeypatch, old_size, new_size):
    """What is loaded is all of one save, the old one or the new one."""
    from mpt_eqx import save_pretrained
    from mpt_eqx.checkpoint import checkpoint_files, info

    old, new, values, left = model_of(1), model_of(12), [], [0]

    def step(original):
        def call(*args):
            left[0] -= 1
            if left[0] == 0:
                save_pretrained(new, tmp_path, max_shard_size=new_size)
            return original(*args)

        return call

    for module, names in (
        (checkpoint_files, ("files_of", "find_files", "read_index", "_stamp")),
        (info, ("read_weight_file", "read_json_object")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, step(getattr(module, name)))
    for moment in range(1, 99):
        save_pretrained(old, tmp_path, max_shard_size=old_size)
        left[0] = moment
        values.append(value_of(tmp_path))
        if left[0] > 0:
            break
    assert values == [12] * (moment - 1) + [1] and moment >= 5


@pytest.mark.parametrize("size", [ONE, SHARDS])
def test_loading_while_another_process_saves(saver, tmp_path, size):
    """The same at any time; the pause leaves room for a whole load between two saves."""
    saver(tmp_path, 3, size=size)
    with ThreadPoolExecutor(1) as pool:
        seconds = 2 if is_long() else 0.7
        saving = pool.submit(saver, tmp_path, 3, 1, 12, size=size, seconds=seconds, pause=0.05)
        values = []
        while not saving.done():
            values.append(value_of(tmp_path))
    assert values and set(values) <= {3, 1, 12}


def test_files_that_do_not_come_to_rest(tmp_path):
    from mpt_eqx import CheckpointError, save_pretrained
    from mpt_eqx.checkpoint.checkpoint_files import read_consistently

    save_pretrained(model_of(1), tmp_path)
    path = tmp_path / "config.json"
    times = iter(range(1000))

    def read(files):
        os.utime(path, (0, next(times)))
        raise CheckpointError("half")

    with pytest.raises(
        CheckpointError, match=f"{tmp_path}: expected files that stay as they are .* replaced 200 times"
    ):
        read_consistently(tmp_path, read)


def test_an_error_in_the_middle_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    from mpt_eqx import save_pretrained
    from mpt_eqx.checkpoint import atomic

    save_pretrained(model_of(1), tmp_path)
    monkeypatch.setattr(atomic, "write_synced", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(model_of(12), tmp_path)
    monkeypatch.undo()
    assert value_of(tmp_path) == 1 and len(list(tmp_path.iterdir())) == 2


def test_somebody_elses_files(tmp_path, monkeypatch):
    """No file of another name is written to or removed, whatever the checkpoint that is replaced says."""
    from mpt_eqx import CheckpointError, save_pretrained

    directory, mine = tmp_path / "m", tmp_path / "mine.txt"
    save_pretrained(model_of(1), directory, max_shard_size=SHARDS)
    kept = ["config.json.new", "model.safetensors.new", "notes.txt", "model-of.safetensors", "x.mpt_eqx-new"]
    for path in (mine, *(directory / name for name in kept)):
        path.write_text("mine")
    index = directory / "model.safetensors.index.json"
    weight_map = {"a": "notes.txt", "b": "../mine.txt", "c": "a\0b", "d": ".."}
    index.write_text(json.dumps({"weight_map": weight_map}))
    (directory / "mpt_eqx-save.json").write_text(json.dumps({"written": ["a\0b"], "removed": ["notes.txt", ".."]}))
    save_pretrained(model_of(2), directory, max_shard_size=SHARDS)
    assert value_of(directory) == 2
    assert all(path.read_text() == "mine" for path in (mine, *(directory / name for name in kept)))

    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    for name in (f"config.json{WAITING}00000000", "model-00000000-00001-of-00001.safetensors"):
        (directory / name).symlink_to(mine)
        with pytest.raises(CheckpointError, match=f"m: cannot be written .*File exists: .*{name}"):
            save_pretrained(model_of(12), directory)
        assert (directory / name).is_symlink() and mine.read_text() == "mine" and value_of(directory) == 2
        (directory / name).unlink()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_directory_in_the_place_of_a_file(tmp_path, name):
    from mpt_eqx import CheckpointError, save_pretrained

    save_pretrained(model_of(1), tmp_path, max_shard_size=SHARDS if name == "model.safetensors" else ONE)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    before = names_in(tmp_path)
    with pytest.raises(
        CheckpointError, match=f"{name}: expected a file to replace, or nothing, found a directory; mov"
    ):
        save_pretrained(model_of(2), tmp_path)
    assert names_in(tmp_path) == before
    (tmp_path / name).rmdir()
    if name != "config.json":
        assert value_of(tmp_path) == 1
    save_pretrained(model_of(2), tmp_path)
    assert value_of(tmp_path) == 2


def test_one_save_at_a_time(tmp_path):
    import fcntl

    from mpt_eqx import CheckpointError, save_pretrained

    save_pretrained(model_of(1), tmp_path)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another save into this directory is in progress; wait for its end"):
        save_pretrained(model_of(2), tmp_path)
    os.close(descriptor)
    save_pretrained(model_of(2), tmp_path)
    assert value_of(tmp_path) == 2


def test_one_save_at_a_time_on_windows(tmp_path, monkeypatch):
    """Without fcntl a file in the directory is locked, by msvcrt."""
    from mpt_eqx import CheckpointError, save_pretrained

    taken = []

    def locking(descriptor, mode, count):
        assert mode == "non-blocking" and count == 1 and os.fstat(descriptor).st_size == 0
        if taken:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK="non-blocking"))
    save_pretrained(model_of(1), tmp_path)
    taken.append(True)
    with pytest.raises(CheckpointError, match="another save into this directory is in progress; wait for its end"):
        save_pretrained(model_of(2), tmp_path)
    taken.clear()
    assert value_of(tmp_path) == 1
    save_pretrained(model_of(2), tmp_path)
    assert value_of(tmp_path) == 2 and names_in(tmp_path) == ["config.json", "model.safetensors"]


def test_a_directory_that_cannot_be_opened_is_not_synced(tmp_path, monkeypatch):
    """As on Windows; files are synced all the same."""
    from mpt_eqx import save_pretrained

    original, refused = os.open, []

    def open(path, flags, *rest, **kwargs):
        if Path(path).is_dir():
            refused.append(path)
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(path, flags, *rest, **kwargs)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(os, "open", open)
    for value in (1, 12):
        save_pretrained(model_of(value), tmp_path / "m")
        assert value_of(tmp_path / "m") == value
    assert refused


def test_a_file_in_use_that_cannot_be_removed_is_left(tmp_path, monkeypatch):
    """On Windows, where one that is mapped cannot be removed; the next save does it."""
    from mpt_eqx import save_pretrained

    save_pretrained(model_of(1), tmp_path, max_shard_size=SHARDS)
    old = {name for name in names_in(tmp_path) if "-of-" in name}
    original = os.unlink

    def unlink(path, **kwargs):
        if Path(path).name in old:
            raise PermissionError(errno.EACCES, "Permission denied")
        original(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        save_pretrained(model_of(12), tmp_path, max_shard_size=SHARDS)
    assert value_of(tmp_path) == 12 and old <= set(names_in(tmp_path))
    save_pretrained(model_of(2), tmp_path, max_shard_size=SHARDS)
    assert value_of(tmp_path) == 2 and not old & set(names_in(tmp_path))


@pytest.mark.slow
def test_without_the_modules_of_posix(tmp_path):
    """Imports, loads and saves, in a process where fcntl, resource and msvcrt are hidden."""
    script = (
        "import sys\n"
        "for name in ('fcntl', 'resource', 'msvcrt'): sys.modules[name] = None\n"
        "from mpt_eqx import from_pretrained, save_pretrained\n"
        f"model = from_pretrained({str(GOLDEN / 'hf_default')!r}, progress=True)\n"
        "save_pretrained(model, 'm')\n"
        "save_pretrained(from_pretrained('m'), 'm', max_shard_size='30KB')\n"
        "print(from_pretrained('m').config == model.config)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.stdout == "True\n", run.stderr
    assert "loaded hf_default: 27,840 parameters" in run.stderr and "peak memory" not in run.stderr


def test_new_directories_are_on_the_disk_with_those_above_them(tmp_path, monkeypatch):
    from mpt_eqx import save_pretrained
    from mpt_eqx.checkpoint import atomic

    synced = []
    monkeypatch.setattr(atomic, "sync_directory", synced.append)
    save_pretrained(model_of(1), tmp_path / "a" / "b")
    assert synced[:2] == [tmp_path / "a", tmp_path] and set(synced[2:]) == {tmp_path / "a" / "b"}


def test_names_of_shards(tmp_path):
    """The usual ones where nothing was; names that none had before where they replace others."""
    from mpt_eqx import save_pretrained

    (tmp_path / "tokenizer.json").write_text("{}")
    save_pretrained(model_of(1), tmp_path, max_shard_size=SHARDS)
    first = {name for name in names_in(tmp_path) if "-of-" in name}
    assert first == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    save_pretrained(model_of(1), tmp_path, max_shard_size=SHARDS)
    second = {name for name in names_in(tmp_path) if "-of-" in name}
    assert len(second) == 3 and not first & second
    assert all(re.fullmatch(r"model-[0-9a-f]{8}-0000[123]-of-00003.safetensors", name) for name in second)


def test_weights_that_are_views(tmp_path):
    """A transposed array is written in its own order, not in that of its memory."""
    from mpt_eqx import from_pretrained, save_pretrained

    model = model_of(1)
    weight = np.arange(61 * 32, dtype=np.float32).reshape(32, 61).T
    assert not weight.flags.c_contiguous
    save_pretrained(eqx.tree_at(lambda m: m.wte.weight, model, weight), tmp_path)
    np.testing.assert_array_equal(from_pretrained(tmp_path).wte.weight, weight)


def changed(where, replace):
    return lambda model: eqx.tree_at(where, model, replace(where(model)), is_leaf=lambda node: node is None)


class Lora(eqx.Module):
    """As libraries for adapters wrap a linear map: with its own name for it."""

    base: eqx.Module
    a: jax.Array

    def __call__(self, x):
        return self.base(x) + x @ self.a.T


def wte(m):
    return m.wte.weight


def qkv(m):
    return m.blocks[1].attn.Wqkv


KEPT_IN_TYPE = {
    "norms in float32": lambda m: [m.norm_f.weight, *[b.norm_1.weight for b in m.blocks]],
    "head in float32": lambda m: [m.lm_head.weight],
    "one matrix": lambda m: [m.blocks[0].ffn.up_proj.weight],
    "embedding": lambda m: [m.wte.weight],
}


@pytest.mark.parametrize(
    ("kept", "scheme"),
    one_in(2, [*((kept, None) for kept in KEPT_IN_TYPE), ("norms in float32", "int8"), ("embedding", "int4")]),
)
def test_weights_of_several_types_load_back_in_theirs(tmp_path, kept, scheme):
    from mpt_eqx import MPT, checkpoint_info, from_pretrained, quantize, save_pretrained
    from mpt_eqx.checkpoint import convert

    config = dataclasses.replace(model_of(1).config, tie_word_embeddings=False, n_layers=1)
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), MPT(config, key=jax.random.key(0)))
    model = eqx.tree_at(KEPT_IN_TYPE[kept], model, replace_fn=lambda leaf: leaf.astype(jnp.float32))
    model = model if scheme is None else quantize(model, scheme)
    save_pretrained(model, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "converted")
    for name in ("m", "converted"):
        assert checkpoint_info(tmp_path / name).problems == ()
        assert eqx.tree_equal(from_pretrained(tmp_path / name), model)
    assert from_pretrained(tmp_path / "m", dtype="float16").norm_f.weight.dtype == jnp.float16
    # Once they are of one type again, nothing is left of the note.
    save_pretrained(from_pretrained(tmp_path / "m", dtype="float16"), tmp_path / "m")
    assert "dtypes_as_stored" not in json.loads((tmp_path / "m" / "config.json").read_text())


def test_what_is_noted_about_types_is_checked(tmp_path):
    from mpt_eqx import ConfigError, from_pretrained, save_pretrained

    save_pretrained(model_of(1), tmp_path)
    with pytest.raises(ConfigError, match="dtypes_as_stored: expected 'float64' or .* or null, found 'int8'"):
        from_pretrained(tmp_path, config_overrides={"dtypes_as_stored": "int8"})


def test_weights_of_several_types_one_of_which_jax_has_switched_off(tmp_path):
    from mpt_eqx import CheckpointError, checkpoint_info, from_pretrained, save_pretrained

    model = changed(wte, lambda leaf: np.asarray(leaf, np.float64))(model_of(1))
    with jax.enable_x64(True):
        save_pretrained(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match="transformer.wte.weight would be float64, which JAX has switched off"):
        from_pretrained(tmp_path / "m")
    assert any("float64" in problem for problem in checkpoint_info(tmp_path / "m").problems)
    with pytest.raises(CheckpointError, match="wte.weight: found float64, which JAX has switched off; cast it"):
        save_pretrained(model, tmp_path / "n")


def donated(leaf):
    copy = jnp.copy(leaf)
    copy.delete()
    return copy


REFUSED = {
    "more rows": (
        changed(wte, lambda leaf: jnp.zeros((64, 32))),
        r"wte.weight: expected an array of shape \[61, 32\], .*, found \[64, 32\]; mpt_eqx.surgery.resize_vocab",
    ),
    "fewer blocks": (changed(lambda m: m.blocks, lambda blocks: blocks[:1]), "blocks: expected 2, .* found 1 of them"),
    "pruned heads": (
        changed(lambda m: m.blocks[1].attn.out_proj.weight, lambda leaf: leaf[:, :16]),
        r"blocks.1.attn.out_proj.weight: expected an array of shape \[32, 32\].*found \[32, 16\]; make",
    ),
    "LoRA": (
        changed(qkv, lambda linear: Lora(linear, jnp.zeros((96, 32)))),
        "blocks.1.attn.Wqkv: expected a Linear, .* found test_saving.Lora; .*of a LoRA its merged weight",
    ),
    "checkpointed block": (
        changed(lambda m: m.blocks[1], eqx.filter_checkpoint),
        "blocks.1: expected a Block, .* found .*Wrapper; .*of a wrapper what it wraps",
    ),
    "frozen": (changed(lambda m: m.norm_f.weight, lambda leaf: None), "norm_f.weight: expected an array .* found None"),
    "number": (changed(lambda m: m.norm_f.weight, lambda leaf: 1.0), "norm_f.weight: expected an array .* found 1.0"),
    "bias": (changed(lambda m: qkv(m).bias, lambda leaf: jnp.zeros(96)), "Wqkv.bias: expected nothing there"),
    "untied": (changed(lambda m: m.lm_head, lambda leaf: qkv(model_of(1))), "lm_head: expected nothing there"),
    "integers": (
        changed(lambda m: m.norm_f.weight, lambda leaf: leaf.astype(int)), "norm_f.weight: expected float64 or .* int32"
    ),
    "shapes": (
        lambda model: eqx.filter_eval_shape(lambda: model), r"wte.weight: expected an array .* found an array of shape"
    ),
    "donated": (changed(lambda m: m.norm_f.weight, donated), "norm_f.weight: .* donated; save the model"),
    "other norm": (
        changed(lambda m: m.norm_f, lambda norm: norm_of(eps=0.1)), "norm_f.eps: expected 1e-05, .* found 0.1"
    ),
}  # fmt: skip


def norm_of(eps):
    from mpt_eqx.model.norms import LayerNorm

    return LayerNorm(32, eps, bias=False)


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_would_not_load_back_is_refused_before_anything_is_written(tmp_path, case):
    from mpt_eqx import CheckpointError, save_pretrained

    change, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message) as error:
        save_pretrained(change(model_of(1)), tmp_path / "m")
    assert "\n" not in str(error.value) and not (tmp_path / "m").exists()


def test_what_else_cannot_be_saved(tmp_path):
    from mpt_eqx import CheckpointError, MPTError, quantize, save_pretrained
    from mpt_eqx.checkpoint.savable import check_savable

    model = model_of(1)
    with pytest.raises(CheckpointError, match="model: expected an MPT, found equinox.*Wrapper; pass the MPT inside"):
        check_savable(eqx.filter_checkpoint(model))
    with pytest.raises(CheckpointError, match="wte.weight: expected an array, found a value that is being traced"):
        jax.jit(lambda m: save_pretrained(m, tmp_path / "m"))(model)
    int8 = quantize(model, "int8")
    half = changed(lambda m: m.blocks[1].ffn.up_proj, lambda linear: model.blocks[1].ffn.up_proj)(int8)
    with pytest.raises(MPTError, match="matrices quantised alike.*; blocks.1.ffn.up_proj.weight: expected a Q"):
        save_pretrained(half, tmp_path / "m")
    cast = changed(lambda m: qkv(m).weight.scale, lambda leaf: leaf.astype(jnp.bfloat16))(int8)
    with pytest.raises(
        CheckpointError, match="blocks.1.attn.Wqkv.weight.scale: expected float32, found bfloat16; cast"
    ):
        save_pretrained(cast, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_training_leaves_nothing_that_is_not_saved(tmp_path):
    """Dropout on or off, and numpy's arrays of either byte order, load back equal."""
    from mpt_eqx import MPT, from_pretrained, save_pretrained

    model = MPT(dataclasses.replace(model_of(1).config, resid_pdrop=0.1), key=jax.random.key(0))
    save_pretrained(eqx.nn.inference_mode(model), tmp_path)
    assert eqx.tree_equal(from_pretrained(tmp_path), model)
    save_pretrained(jax.tree.map(lambda a: np.asarray(a, ">f4") if eqx.is_array(a) else a, model), tmp_path)
    assert eqx.tree_equal(from_pretrained(tmp_path), model)


@pytest.mark.parametrize("stderr", ["None", pytest.param("open('/dev/null', 'w')", marks=pytest.mark.slow)])
def test_without_a_console(tmp_path, stderr):
    """As in a program without a window, where stderr is None or closed; and no posix module is there, as on Windows."""
    script = (
        "import sys\n"
        "for name in ('fcntl', 'resource', 'msvcrt', 'termios', 'pwd'): sys.modules[name] = None\n"
        f"sys.stderr = {stderr}\n"
        "if sys.stderr: sys.stderr.close()\n"
        "try:\n"
        "    from mpt_eqx import from_pretrained, quantize, save_pretrained\n"
        "    from mpt_eqx.checkpoint import convert\n"
        "    from mpt_eqx.generation.prompts import progress_bar\n"
        f"    model = from_pretrained({str(GOLDEN / 'hf_default')!r})\n"
        "    save_pretrained(quantize(model, 'int8') if sys.stderr else model, 'm')\n"
        "    convert('m', 'n')\n"
        "    with progress_bar(1, None) as bar: bar.update(1)\n"
        "    print(from_pretrained('n').config == model.config)\n"
        "except BaseException as error: print(repr(error))\n"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "True\n"
