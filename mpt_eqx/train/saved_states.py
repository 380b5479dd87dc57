"""States of training on the disk, of which the newest readable one is never lost.

A state is a directory, such as step-00000020, with

* arrays.safetensors: the arrays that every device holds whole;
* sharded/: the others, written by orbax (see sharded_arrays.py);
* state.json: the version of this format, what the state's leaves are, size and SHA-256 of all files, the run's data.

It is written under another name, which begins with a dot, and renamed when all of it is on the disk. So a directory of
its name was whole once. One that no longer is was damaged, and counts as a state that cannot be read.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mpt_eqx.checkpoint.atomic import locked, make_directory, sync_directory, write_synced
from mpt_eqx.checkpoint.formats.safetensors import STATE_DTYPES, TensorToWrite, read_safetensors, write_safetensors
from mpt_eqx.checkpoint.host_arrays import gather_to_host
from mpt_eqx.config.json_file import read_json_object
from mpt_eqx.errors import CheckpointError, MPTError, first_of
from mpt_eqx.sharding.multihost import run_or_raise_everywhere, texts_of_all
from mpt_eqx.train.sharded_arrays import read_sharded, write_sharded
from mpt_eqx.train.state_leaves import as_saved, fits, named_leaves, placed, raise_unless_alike, spec_of

S = TypeVar("S")

FORMAT, VERSION = "mpt_eqx training state", 1
MANIFEST, ARRAYS, SHARDED = "state.json", "arrays.safetensors", "sharded"
NAME = re.compile(r"step-(\d{8,18})(?:\.(\d{1,9}))?")
UNFINISHED = re.compile(r"\.step-[\d.]+\.mpt_eqx-[0-9a-f]{8}")
MAX_MANIFEST = 2**28


class _Place(NamedTuple):
    """The directory of a state. Of several of one step the latest has the highest number."""

    step: int
    number: int
    path: Path


def save_state(state: Any, directory: str | Path, *, data: Any = None, keep: int = 3) -> Path:
    """Writes the state of a run, so that `restore_state` gives it back to the bit, and returns where.

    Saving is crash-safe: all states that were there stay until the new one is on the disk, and the last `keep` that can
    be read stay after it. One that cannot be read does not count among them.

    On several processes all must call it, and see the same files. Arrays that are sharded over several devices need
    orbax (`pip install 'mpt_eqx[train]'`).

    Args:
        state: a `TrainState`, or another pytree with `model` and an array `step`.
        directory: of this run only; made if it does not exist.
        data: where the run is in its data, such as the `state` of `pack`: what JSON can hold; each process its own.
        keep: how many states stay, ≥ 1.

    Raises:
        MPTError: `data` or `keep` is not valid; or a weight is NaN or infinite, so that the states before it stay.
        CheckpointError: the directory has a readable state of a later step, which this run does not come from; it
            cannot be written; another save into it is in progress; or orbax is needed and is not there.
        ShardingError: it failed in another process.
    """
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise MPTError(f"keep: expected a whole number ≥ 1, found {keep!r}")
    directory, text = Path(directory), _as_json(data)
    texts = [text] if jax.process_count() == 1 else texts_of_all(text)
    step = int(gather_to_host(state.step))
    leaves = named_leaves(state)
    manifest = {"step": step, "leaves": {name: spec_of(name, leaf) for name, leaf in leaves.items()}, "data": texts}
    arrays = {name: as_saved(leaf) for name, leaf in leaves.items() if hasattr(leaf, "shape")}
    _raise_unless_finite(state.model, step)
    sharded = {n: array for n, array in arrays.items() if isinstance(array, jax.Array) and not _is_whole(array)}
    whole = [_to_write(name, array) for name, array in arrays.items() if name not in sharded]
    with contextlib.ExitStack() as stack:
        begun = directory / _in_first_process(directory, lambda: _begin(directory, step, stack))
        if sharded:
            write_sharded(begun / SHARDED, sharded)
        return directory / _in_first_process(directory, lambda: _finish(directory, begun, whole, manifest, keep))


def restore_state(directory: str | Path, like: S) -> tuple[S, Any] | None:
    """Returns the newest readable state of a directory and its `data`; None if the directory has no state at all.

    A state that is damaged is passed over with a warning. If all are, this is an error, so that no run starts anew
    where there is something to save. Files are compared with their SHA-256, and hold no code.

    Args:
        directory: where `save_state` wrote.
        like: a state of the same structure, such as `TrainState.create` returns, or `eqx.filter_eval_shape` of it. Its
            arrays say where those that are read are placed, also on a mesh of another shape.

    Raises:
        CheckpointError: there are states and none can be read; or the newest readable one is not like `like`; or it is
            sharded, and orbax is not there.
        ShardingError: it failed in another process.
    """
    directory = Path(directory)
    chosen = _in_first_process(directory, lambda: _choose(directory))
    if not chosen:
        return None
    name, *damaged = json.loads(chosen)
    if damaged:
        warnings.warn(
            f"restore_state: goes back to {directory / name}, because {len(damaged)} newer cannot be read: "
            f"{first_of(damaged, limit=3)}",
            stacklevel=2,
        )
    manifest = _read_manifest(directory / name)
    leaves, texts = named_leaves(like), manifest["data"]
    raise_unless_alike(directory / name, manifest["leaves"], leaves)
    if len(texts) != jax.process_count() and len(set(texts)) > 1:
        raise CheckpointError(
            f"{directory / name}: expected {len(texts)} processes, each of which has data of its own, found "
            f"{jax.process_count()}; resume with as many"
        )
    tensors = {tensor.name: tensor for tensor in read_safetensors(directory / name / ARRAYS, STATE_DTYPES)}
    if wrong := [n for n, tensor in tensors.items() if n not in leaves or not fits(tensor, leaves[n])]:
        raise CheckpointError(
            f"{directory / name / ARRAYS}: expected the arrays that state.json names, found {wrong[0]}"
        )
    found = {n: placed(tensor.read(), leaves[n]) for n, tensor in tensors.items()}
    if sharded := {n: leaf for n, leaf in leaves.items() if hasattr(leaf, "shape") and n not in found}:
        found |= read_sharded(directory / name / SHARDED, sharded)
    state = jax.tree.unflatten(jax.tree.structure(like), [found.get(name, leaf) for name, leaf in leaves.items()])
    return state, json.loads(texts[jax.process_index() % len(texts)])


def has_states(directory: str | Path) -> bool:
    """Tells whether a directory has a state, readable or not."""
    return bool(_in_first_process(Path(directory), lambda: "yes" if _places(Path(directory)) else ""))


def _begin(directory: Path, step: int, stack: contextlib.ExitStack) -> str:
    """Returns the name of a new directory for a state; no other save can begin until the stack is closed."""
    make_directory(directory)
    stack.enter_context(locked(directory))
    if later := [place.path.name for place in _places(directory) if place.step > step and not _damage(place.path)]:
        raise CheckpointError(
            f"{directory}: expected no state of a later step than {step}, which is to be saved, found {later[0]}; "
            "go on from it with restore_state, save to another directory, or move it away"
        )
    for path in directory.iterdir():
        if UNFINISHED.fullmatch(path.name):  # of a process that was killed
            shutil.rmtree(path)
    begun = _unfinished(directory, f"step-{step:08}")
    begun.mkdir()
    stack.callback(lambda: shutil.rmtree(begun, ignore_errors=True))
    return begun.name


def _finish(directory: Path, begun: Path, whole: list[TensorToWrite], manifest: Mapping[str, Any], keep: int) -> str:
    """Returns the name of the state whose directory was begun, after it was completed and older ones were removed."""
    write_safetensors(begun / ARRAYS, whole)
    read_safetensors(begun / ARRAYS, STATE_DTYPES)  # what cannot be read takes nobody's place
    content = {"format": FORMAT, "version": VERSION, **manifest, "files": _checksums(begun)}
    write_synced(begun / MANIFEST, json.dumps({"sha256": _sha256(content), **content}, indent=1).encode())
    sync_directory(begun)
    step = manifest["step"]
    number = 1 + max((place.number for place in _places(directory) if place.step == step), default=0)
    place = directory / (f"step-{step:08}" if number == 1 else f"step-{step:08}.{number}")
    os.replace(begun, place)
    sync_directory(directory)
    older = [other.path for other in _places(directory) if other.step <= step and other.path != place]
    kept = 1
    while older and kept < keep and len(older) > keep - kept:
        kept += not _damage(older.pop(0))
    for path in older if kept == keep else ():
        if _is_ours(path):
            gone = _unfinished(directory, path.name)
            os.replace(path, gone)
            shutil.rmtree(gone)
    return place.name


def _choose(directory: Path) -> str:
    """Returns the name of the newest readable state, then what is wrong with those newer, as JSON; "" for no state."""
    damaged: list[str] = []
    for place in _places(directory):
        damage = _damage(place.path)
        if not damage:
            return json.dumps([place.path.name, *damaged])
        damaged.append(damage)
    if damaged:
        raise CheckpointError(
            f"{directory}: expected a state that can be read, found {len(damaged)} that cannot: "
            f"{first_of(damaged, limit=3)}; put a copy in their place, or move them away to start anew"
        )
    return ""


def _places(directory: Path) -> list[_Place]:
    """Returns the states of a directory, whether they can be read or not, the newest first."""
    if not directory.exists():
        return []
    found = [(NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted((_Place(int(name[1]), int(name[2] or 1), path) for name, path in found if name), reverse=True)


def _damage(path: Path) -> str | None:
    """Returns what is wrong with a state; None if it can be read."""
    try:
        files = _read_manifest(path)["files"]
        there = _checksums(path)
    except (CheckpointError, OSError) as error:
        return str(error)
    wrong = [name for name in {**files, **there} if files.get(name) != there.get(name)]
    return f"{path / wrong[0]}: expected the file that was saved, found another or a part" if wrong else None


def _read_manifest(path: Path) -> dict[str, Any]:
    """Returns the content of state.json."""
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path / MANIFEST}: expected the description of a state, found no file")
    try:
        content = read_json_object(path / MANIFEST, max_bytes=MAX_MANIFEST)
    except MPTError as error:
        raise CheckpointError(str(error)) from None
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise CheckpointError(
            f"{path / MANIFEST}: expected a {FORMAT} of version {VERSION}, found "
            f"{content.get('format')!r:.40} of version {content.get('version')!r:.40}"
        )
    if content.pop("sha256", None) != _sha256(content):
        raise CheckpointError(f"{path / MANIFEST}: expected the file that was saved, found another")
    leaves, files, data = content.get("leaves"), content.get("files"), content.get("data")
    texts = isinstance(data, list) and data and all(isinstance(text, str) for text in data)
    if not texts or not isinstance(leaves, dict) or not isinstance(files, dict):
        raise CheckpointError(f"{path / MANIFEST}: expected leaves, files and data, found others")
    return content


def _checksums(path: Path) -> dict[str, list[Any]]:
    """Returns size and SHA-256 of all files of a state but state.json, by name."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file != path / MANIFEST)

    def checksum(file: Path) -> list[Any]:
        with open(file, "rb") as f:
            return [os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest()]

    with ThreadPoolExecutor(4) as pool:
        return dict(zip((file.relative_to(path).as_posix() for file in files), pool.map(checksum, files), strict=True))


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_ours(path: Path) -> bool:
    """Tells whether a directory holds nothing but what `save_state` writes."""
    return path.is_dir() and {file.name for file in path.iterdir()} <= {MANIFEST, ARRAYS, SHARDED}


def _unfinished(directory: Path, name: str) -> Path:
    return directory / f".{name}.mpt_eqx-{secrets.token_hex(4)}"


def _in_first_process(directory: Path, function: Callable[[], str]) -> str:
    """Returns in all processes what a function returns in the first, or raises in all of them."""

    def run() -> str:
        if jax.process_index():
            return ""
        try:
            return function()
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot be read or written ({error})") from error

    if jax.process_count() == 1:
        return run()
    return texts_of_all(run_or_raise_everywhere(run))[0]


def _is_whole(array: jax.Array) -> bool:
    return array.is_fully_replicated


def _to_write(name: str, array: Any) -> TensorToWrite:
    return TensorToWrite(name, array.shape, np.dtype(array.dtype), lambda: gather_to_host(array))


def _as_json(data: Any) -> str:
    try:
        text = json.dumps(data, allow_nan=False)
        same = json.loads(text) == data
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise MPTError(f"data: expected what JSON gives back as it is, with texts as keys and no tuple, found {data!r}")
    return text


def _raise_unless_finite(model: Any, step: int) -> None:
    for name, leaf in named_leaves(model).items():
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact) and not jnp.isfinite(leaf).all():
            raise MPTError(
                f"{name}: expected finite weights after step {step}, found NaN or infinity; the state is not saved, "
                "and those before it stay"
            )
