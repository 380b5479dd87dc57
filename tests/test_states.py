"""States of training that are never lost: to the bit, at any moment of saving, and whatever is damaged."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command import python
from conftest import Killed, failing
from jaxtyping import Array

from mpt_eqx import CheckpointError, MPTError, train


class State(eqx.Module):
    """As small as a state can be."""

    model: dict
    step: Array


def state_of(step, value=None):
    weight = np.full((3, 4), step if value is None else value, np.float32)
    return State({"weight": weight, "frozen": True}, np.asarray(step, np.int32))


LIKE = state_of(0)


def saved_in(directory, *steps, **kwargs):
    for step in steps:
        train.save_state(state_of(step), directory, data={"at": step}, **kwargs)
    return directory


def steps_in(directory):
    return [int(path.name.split("-")[1].split(".")[0]) for path in sorted(directory.glob("step-*"))]


def restored(directory):
    state, data = train.restore_state(directory, LIKE)
    assert (state.model["weight"] == state.step).all() and data == {"at": int(state.step)}
    return int(state.step)


@pytest.fixture(scope="module")
def run(tiny_config):
    """Makes the state and the step of a small run, its rows where a state of them says, and trains for some steps."""
    from mpt_eqx import MPT, AttnConfig

    config = tiny_config(
        n_layers=1, d_model=16, n_heads=2, emb_pdrop=0.1,
        attn_config=AttnConfig(alibi=True, attn_uses_sequence_id=True),
    )  # fmt: skip
    optimizer = train.decoupled_lionw(1e-3, weight_decay=1e-4)
    step = train.make_train_step(optimizer, accumulate=2, max_grad_norm=1.0)
    documents = [np.random.default_rng(n).integers(1, 61, size=5 + 3 * n % 17).tolist() for n in range(7)]

    def fresh():
        return train.TrainState.create(MPT(config, key=jax.random.key(0)), optimizer, key=jax.random.key(1, impl="rbg"))

    def trained(state, place, steps):
        rows = train.pack(train.Sampler(documents, seed=3), 8, eos=0, state=place)
        losses = []
        for _, batch in zip(range(steps), train.batches(rows, 4), strict=False):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        return state, rows.state, losses

    return fresh, trained


def test_a_run_that_is_taken_up_again_is_the_same_to_the_bit(run, tmp_path):
    """With packing, micro-batches, dropout, Lion's momentum and a key of another kind."""
    fresh, trained = run
    whole, place, losses = trained(fresh(), None, 8)
    state, at, first = trained(fresh(), None, 3)
    train.save_state(state, tmp_path, data=at)
    del state
    state, at = train.restore_state(tmp_path, eqx.filter_eval_shape(fresh))
    state, at, rest = trained(state, at, 5)
    assert first + rest == losses and at == place
    assert eqx.tree_equal(state, whole)


@pytest.mark.slow
def test_a_run_that_was_killed_is_the_same_to_the_bit(tmp_path):
    script = Path(__file__).parent / "resumed.py"
    whole = python(f"import runpy, sys; sys.argv = ['', {str(tmp_path / 'whole')!r}, '20', '0']; "
                   f"runpy.run_path({str(script)!r}, run_name='__main__')")  # fmt: skip
    code = (
        "import subprocess, sys\n"
        f"command = [sys.executable, '-W', 'ignore', {str(script)!r}, {str(tmp_path / 'cut')!r}, '20']\n"
        "print(subprocess.run([*command, '7']).returncode)\n"
        "print(subprocess.run([*command, '0'], capture_output=True, text=True, check=True).stdout)"
    )
    killed, *lines = python(code).split("\n")
    assert killed == str(-signal.SIGKILL)
    assert "\n".join(lines).strip() == whole.strip() != ""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "uint8", "int32", "uint32", "bool"])
def test_types_are_kept(tmp_path, dtype):
    bits = np.random.default_rng(0).integers(0, 256, 64).astype(np.uint8)
    array = bits > 99 if dtype == "bool" else bits.view(jnp.dtype(dtype))
    state = (array, jnp.asarray(array), array[:1].reshape(()), array[:0])

    class Tree(eqx.Module):
        model: None
        step: Array
        leaves: tuple

    train.save_state(Tree(None, LIKE.step, state), tmp_path)
    like = Tree(None, LIKE.step, jax.tree.map(lambda x: (jnp if isinstance(x, jax.Array) else np).zeros_like(x), state))
    (found, _) = train.restore_state(tmp_path, like)
    for one, other in zip(found.leaves, state, strict=True):
        assert type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_number_that_is_weakly_typed_stays_so(tmp_path):
    state = State({}, jnp.asarray(3))
    train.save_state(state, tmp_path)
    assert train.restore_state(tmp_path, State({}, jnp.asarray(0)))[0].step.weak_type
    assert state.step.weak_type


def save_until(moment, directory, step, error):
    """Saves, and from the given write, sync, move, removal or new directory on fails; returns whether it did not."""
    try:
        with failing(moment, error):
            saved_in(directory, step, keep=2)
    except Killed:
        return False
    except CheckpointError as said:
        assert "cannot be read or written ([Errno 28] No space left on device" in str(said)
        return False
    return True


@pytest.mark.parametrize("error", [Killed, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))], ids=["killed", "full"])
def test_saving_that_ends_early_at_any_step(tmp_path, error):
    """The old state or the new one is there, then and after the next save, and nothing unfinished stays."""
    old = saved_in(tmp_path / "old", 1, 2)
    for moment in range(1, 99):
        directory = tmp_path / str(moment)
        shutil.copytree(old, directory)
        whole = save_until(moment, directory, 3, error)
        assert restored(directory) in ((3,) if whole else (2, 3))
        saved_in(directory, 4, keep=2)
        assert restored(directory) == 4 and len(steps_in(directory)) == len(list(directory.iterdir())) == 2
        if whole:
            break
    assert 12 < moment < 40


def test_a_first_save_that_ended_early_leaves_no_state(tmp_path):
    assert train.restore_state(tmp_path / "none", LIKE) is None
    assert not save_until(4, tmp_path, 1, Killed)
    assert [path.name[:6] for path in tmp_path.iterdir()] == [".step-"]
    assert train.restore_state(tmp_path, LIKE) is None


def cut(place):
    path = place / "arrays.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def flip(place):
    path = place / "arrays.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_position(place):
    path = place / "state.json"
    path.write_text(path.read_text().replace('at\\": ', 'at\\": 1'))


def described(place, **changes):
    """Changes what is said of a state, as somebody can who wants to."""
    from mpt_eqx.train import saved_states

    content = {**json.loads((place / "state.json").read_text()), **changes}
    del content["sha256"]
    (place / "state.json").write_text(json.dumps({"sha256": saved_states._sha256(content), **content}))


DAMAGES = {
    "cut": (cut, "arrays.safetensors: expected the file that was saved, found another or a part"),
    "flipped": (flip, "arrays.safetensors: expected the file that was saved, found another or a part"),
    "gone": (lambda p: (p / "arrays.safetensors").unlink(), "arrays.safetensors: expected the file that was saved"),
    "no json": (
        lambda p: (p / "state.json").unlink(),
        "state.json: expected the description of a state, found no file",
    ),
    "other json": (other_position, "state.json: expected the file that was saved, found another"),
    "half json": (lambda p: (p / "state.json").write_text('{"a'), "state.json: expected JSON"),
    "list": (lambda p: (p / "state.json").write_text("[]"), "state.json: expected a JSON object"),
    "no files": (lambda p: described(p, files=[]), "state.json: expected leaves, files and data, found others"),
    "no data": (lambda p: described(p, data=[]), "state.json: expected leaves, files and data, found others"),
    "version": (lambda p: (p / "state.json").write_text('{"version": 2}'), "expected a mpt_eqx training state of"),
    "more": (lambda p: (p / "more.pkl").write_bytes(b""), "more.pkl: expected the file that was saved"),
    "empty": (
        lambda p: shutil.rmtree(p) or p.mkdir(),
        "state.json: expected the description of a state, found no file",
    ),
    "a file": (
        lambda p: shutil.rmtree(p) or p.touch(),
        "state.json: expected the description of a state, found no file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_passed_over_and_said(tmp_path, damage):
    """And where none can be read, this is said, instead of None; both leave all files as they are."""
    harm, message = DAMAGES[damage]
    directory = saved_in(tmp_path / "run", 1, 2)
    harm(directory / "step-00000002")
    with pytest.warns(UserWarning, match="goes back to .*step-00000001, because 1 newer cannot be read: .*") as said:
        assert restored(directory) == 1
    assert message in str(said[0].message)
    harm(directory / "step-00000001")
    with pytest.raises(CheckpointError, match="expected a state that can be read, found 2 that cannot") as raised:
        train.restore_state(directory, LIKE)
    assert message in str(raised.value) and "move them away to start anew" in str(raised.value)
    assert steps_in(directory) == [1, 2]


def test_a_state_that_cannot_be_read_does_not_count_among_those_kept(tmp_path):
    directory = saved_in(tmp_path, 1, 2, 3)
    cut(directory / "step-00000003")
    saved_in(directory, 2, keep=2)  # as a run that went back to 1 or 2 does
    assert sorted(path.name for path in directory.iterdir()) == ["step-00000002", "step-00000002.2", "step-00000003"]
    saved_in(directory, 4, keep=3)
    assert steps_in(directory) == [2, 2, 3, 4]
    saved_in(directory, 5, 6, keep=2)
    assert steps_in(directory) == [5, 6]
    (directory / "step-00000005" / "notes.txt").touch()
    saved_in(directory, 7, keep=1)
    assert steps_in(directory) == [5, 7]  # what holds somebody's files is nobody else's to remove


def test_another_run_does_not_save_among_these(tmp_path):
    saved_in(tmp_path, 5)
    with pytest.raises(CheckpointError, match="no state of a later step than 4, .* found step-00000005; go on from it"):
        saved_in(tmp_path, 4)
    saved_in(tmp_path, 5)
    assert restored(shutil.copytree(tmp_path, tmp_path.parent / "copy")) == 5


def test_what_is_no_state_like_it(tmp_path):
    saved_in(tmp_path, 1)
    for like, message in [
        (State({"weight": np.zeros((3, 5), np.float32), "frozen": True}, LIKE.step),
         r"found 1 leaves that differ: model.weight \(float32\[3, 4\], in like float32\[3, 5\]\); create `like` with"),
        (State({"weight": np.zeros((3, 4), jnp.bfloat16), "frozen": True}, LIKE.step), "in like bfloat16"),
        (State({"weight": LIKE.model["weight"], "frozen": False}, LIKE.step), r"model.frozen \(True, in like False\)"),
        (State({"weight": LIKE.model["weight"]}, LIKE.step), r"model.frozen \(True, in like none\)"),
    ]:  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            train.restore_state(tmp_path, like)


def test_arrays_that_are_not_those_described(tmp_path):
    """As somebody can make them who wants to."""
    from mpt_eqx.train import saved_states

    saved_in(tmp_path, 1)
    place = tmp_path / "step-00000001"
    for state in (state_of(1), State({"other": LIKE.model["weight"]}, LIKE.step)):
        model = {name: x.reshape(-1) if state.step else x for name, x in state.model.items() if name != "frozen"}
        train.save_state(State(model, state.step), tmp_path / "other")
        shutil.copy(next((tmp_path / "other").iterdir()) / "arrays.safetensors", place)
        shutil.rmtree(tmp_path / "other")
        described(place, files=saved_states._checksums(place))
        with pytest.raises(
            CheckpointError, match="arrays.safetensors: expected the arrays that state.json names, found"
        ):
            train.restore_state(tmp_path, LIKE)


def test_what_cannot_be_saved(tmp_path):
    for state, kwargs, message in [
        (state_of(1), {"keep": 0}, "keep: expected a whole number ≥ 1, found 0"),
        (state_of(1), {"data": (1, 2)}, r"data: expected what JSON gives back as it is, .* found \(1, 2\)"),
        (state_of(1), {"data": {1: 2}}, "data: expected what JSON gives back"),
        (state_of(1), {"data": float("nan")}, "data: expected what JSON gives back"),
        (state_of(1), {"data": np.ones(1)}, "data: expected what JSON gives back"),
        (state_of(7, np.nan), {}, "weight: expected finite weights after step 7, found NaN or infinity; the state is"),
        (State({"x": np.zeros(1, np.complex64)}, LIKE.step), {}, "model.x: expected a type that safetensors has"),
    ]:
        with pytest.raises(MPTError, match=message):
            train.save_state(state, tmp_path / "run", **kwargs)
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file: cannot be read or written \(\[Errno 20\]"):
        saved_in(tmp_path / "file", 1)


def test_sharded_states_need_orbax(tmp_path, monkeypatch):
    from mpt_eqx.train import sharded_arrays

    monkeypatch.setitem(sys.modules, "orbax", None)
    for call in (sharded_arrays.write_sharded, sharded_arrays.read_sharded):
        with pytest.raises(CheckpointError, match=r"need orbax; install it with pip install 'mpt_eqx\[train\]'"):
            call(tmp_path, {})


@pytest.mark.slow
def test_a_sharded_state_goes_to_meshes_of_other_shapes(tmp_path):
    """Of 8 devices to 4 and 1, and back; damage is found in it, too."""
    pytest.importorskip("orbax.checkpoint")
    script = Path(__file__).parent / "resharded.py"
    said = python(f"import runpy, sys; sys.argv = ['', {str(tmp_path)!r}]; runpy.run_path({str(script)!r})")
    assert json.loads(said.strip().split("\n")[-1]) == {"8": True, "4": True, "1": True, "of 1 to 8": True, "torn": 1}


@pytest.mark.slow
def test_two_processes_save_and_restore_together(tmp_path):
    """Each has its data; damage, an error and a signal that one of them sees are told to the other.

    What they train together is what one device trains.
    """
    pytest.importorskip("orbax.checkpoint")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", Path(__file__).parent / "together.py", str(port)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), tmp_path / "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    answers = [process.communicate(timeout=240) for process in processes]
    for (answer, error), refused in zip(answers, ("CheckpointError", "ShardingError"), strict=True):
        said = next((line for line in answer.split("\n") if line.startswith("{")), None)
        assert said, error
        expected = {"none": True, "equal": True, "data": True, "torn": 1, "refused": refused, "signal": [False, True]}
        assert json.loads(said) == {**expected, "one device": True}


def test_a_signal_lets_the_step_end_and_a_second_one_does_not():
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.signal(number, signal.default_int_handler)
        try:
            with train.stop_on_signals() as has_come:
                assert not has_come()
                signal.raise_signal(number)
                assert has_come()
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(number)
            with train.stop_on_signals() as has_come:
                pass
            assert signal.getsignal(number) is signal.default_int_handler
        finally:
            signal.signal(number, before)


def test_in_another_thread_signals_stay_as_they_are():
    said = []

    def ask():
        with train.stop_on_signals() as has_come:
            said.append(has_come())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert said == [False]


def test_a_loss_that_is_not_finite_stops_with_its_step(run, tmp_path):
    train.check_finite({"loss": jnp.ones(()), "grad_norm": np.ones(())}, 1)
    for metrics, message in [
        (
            {"loss": jnp.nan, "grad_norm": 1.0},
            "loss: expected a finite number at step 3, found nan; go back to the last",
        ),
        ({"loss": 1.0, "grad_norm": np.inf}, "grad_norm: expected a finite number at step 3, found inf"),
    ]:
        with pytest.raises(MPTError, match=message):
            train.check_finite(metrics, 3)


def test_another_optimizer_is_refused(run, tmp_path):
    fresh, _ = run
    train.save_state(fresh(), tmp_path)
    like = eqx.filter_eval_shape(lambda: train.TrainState.create(fresh().model, optax.adam(1e-3)))
    with pytest.raises(
        CheckpointError, match=r"leaves that differ: opt_state\.step .*with the same configuration, opt"
    ):
        train.restore_state(tmp_path, like)
