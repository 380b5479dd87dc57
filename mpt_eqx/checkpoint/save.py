"""Saving: config.json and safetensors that llm-foundry, transformers and `from_pretrained` read."""

import contextlib
import fcntl
import functools
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mpt_eqx.checkpoint.arrays import gathered
from mpt_eqx.checkpoint.files import CONFIG, INDEX, SHARD, WAITING, WEIGHTS, index_start
from mpt_eqx.checkpoint.formats.detect import SUFFIXES
from mpt_eqx.checkpoint.formats.safetensors import Outgoing, file_order, write_safetensors
from mpt_eqx.checkpoint.names import is_quantised, named_leaves, stored_name
from mpt_eqx.config import MPTConfig
from mpt_eqx.config.quantization import KEY, Quantization
from mpt_eqx.errors import CheckpointError
from mpt_eqx.model import MPT
from mpt_eqx.sharding.multihost import run_or_raise_everywhere
from mpt_eqx.sharding.qkv import is_qkv_slice, qkv_slice_of
from mpt_eqx.surgery.quantization import quantization_of

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def save_pretrained(model: MPT, directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """Writes config.json and model.safetensors, or shards and an index, under llm-foundry's tensor names.

    At whatever moment the writing ends, by an error, a full disk or the process being killed, the directory holds the
    checkpoint that was there before or the new one, as `from_pretrained` sees it; so it does for whoever loads while it
    is written. To other programs the weights change in one moment, too, and config.json in the next, if it is another.

    Shards that replace others get other names, such as model-1a2b3c4d-00001-of-00002.safetensors. Weights that an
    earlier save left are removed; other files stay.

    A model that `mpt_eqx.quantize` made is written as it is, and config.json says so. Only this library reads that;
    transformers refuses it.

    Args:
        model: the model.
        directory: where to write; made if it does not exist.
        max_shard_size: largest size of a weight file, in bytes or as "200MB"; a larger tensor gets its own file.

    Raises:
        CheckpointError: `max_shard_size` is not a size, the directory cannot be written, or another process is saving
            there.
        MPTError: only some of the model's matrices are quantised.
        ShardingError: the first process, which writes what is shared by several, could not.
    """
    limit, quantization = parse_size(max_shard_size), quantization_of(model)
    tensors = [_outgoing(stored_name(name, model.config), leaves) for name, leaves in _whole_tensors(model).items()]
    if model.layout is not None and model.layout.several_processes:
        run_or_raise_everywhere(lambda: _by_the_first(Path(directory), model.config, tensors, limit, quantization))
    else:
        write_checkpoint(Path(directory), model.config, tensors, limit, quantization=quantization)


def write_checkpoint(
    directory: Path,
    config: MPTConfig,
    tensors: Sequence[Outgoing],
    limit: int,
    *,
    quantization: Quantization | None = None,
    companions: Sequence[Path] = (),
    progress: Callable[[int], object] = lambda written: None,
) -> None:
    """Writes a checkpoint as `save_pretrained` promises it.

    Args:
        directory: where to write; made if it does not exist.
        config: the model's configuration.
        tensors: the weights; each is asked for when it is its turn.
        limit: largest size of a weight file in bytes.
        quantization: which of the weights are quantised, and how; None for none.
        companions: files that belong to the checkpoint, to be copied beside it.
        progress: is told how many bytes were written, after each tensor.

    Raises:
        CheckpointError: the directory cannot be written, or another process is saving there.
    """
    shards = _shards({tensor.name: tensor.nbytes for tensor in tensors}, limit)
    by_name = {tensor.name: tensor for tensor in tensors}
    dtype = next(tensor.dtype.name for tensor in tensors if not is_quantised(tensor.name))
    keys = {"dtype": dtype, "torch_dtype": dtype} | ({KEY: quantization.to_dict()} if quantization else {})
    try:
        small = {path.name: path.read_bytes() for path in companions}
        small[CONFIG] = _json({**config.to_dict(), **keys})
        _make(directory)
        with _alone(directory):
            save = _begin(directory, len(shards), small)
            try:
                for file, names in zip(save.shards, shards, strict=True):
                    write_safetensors(_create(save, file), [by_name[name] for name in names], progress)
                weight_map = {name: file for file, names in zip(save.shards, shards, strict=True) for name in names}
                total = sum(tensor.nbytes for tensor in tensors)
                _finish(save, _json({"metadata": {"total_size": total}, "weight_map": weight_map}))
            except BaseException:
                _undo(save)
                raise
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written ({error})") from error


def parse_size(size: int | str) -> int:
    """Returns the bytes of a size such as "200MB".

    Raises:
        CheckpointError: it is not a size.
    """
    match = re.fullmatch(r"(\d+) ?(KB|MB|GB|)", str(size))
    if not match or not int(match[1]):
        raise CheckpointError(f"max_shard_size: expected bytes or a size such as '200MB' or '5GB', found {size!r}")
    return int(match[1]) * UNITS[match[2]]


def _whole_tensors(model: MPT) -> dict[str, list[jax.Array | np.ndarray]]:
    """Returns the weights by the canonical names of the tensors, a Wqkv perhaps as its three sections."""
    tensors: dict[str, list[jax.Array | np.ndarray]] = {}
    for name, leaf in named_leaves(model).items():
        fused = model.layout is not None and is_qkv_slice(name, model.config)
        tensors.setdefault(qkv_slice_of(name, model.config)[0] if fused else name, []).append(leaf)
    return tensors


def _outgoing(name: str, sections: Sequence[jax.Array | np.ndarray]) -> Outgoing:
    first = sections[0]
    shape = (sum(len(section) for section in sections), *first.shape[1:]) if len(sections) > 1 else first.shape

    def read() -> np.ndarray:
        parts = [gathered(section) for section in sections]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return Outgoing(name, shape, np.dtype(first.dtype), read)


def _by_the_first(
    directory: Path, config: MPTConfig, tensors: Sequence[Outgoing], limit: int, quantization: Quantization | None
) -> None:
    """Writes a checkpoint in the first process; each tensor is asked for by all at once, also after writing failed."""
    by_name = {tensor.name: tensor for tensor in tensors}
    files = _shards({tensor.name: tensor.nbytes for tensor in tensors}, limit)
    order = [tensor.name for names in files for tensor in file_order([by_name[name] for name in names])]
    left = {name: by_name[name].read for name in order}

    def once(name: str) -> np.ndarray:
        return left.pop(name)()

    asked = [tensor._replace(read=functools.partial(once, tensor.name)) for tensor in tensors]
    try:
        if jax.process_index() == 0:
            write_checkpoint(directory, config, asked, limit, quantization=quantization)
    finally:
        for name in order:
            if name in left:
                once(name)


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Returns the names in files of at most `limit` bytes, in order."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


class _Save(NamedTuple):
    """A save on its way.

    Attributes:
        directory: where to.
        fresh: whether no checkpoint was there.
        mark: what no other save has in its names.
        stem: how the names of its shards begin.
        shards: those names.
        small: the other files that it changes.
        made: the files that it has made, under names that nothing had.
    """

    directory: Path
    fresh: bool
    mark: str
    stem: str
    shards: list[str]
    small: dict[str, bytes]
    made: list[Path]

    def waiting(self, name: str) -> str:
        """The name under which a file waits for its place."""
        return f"{name}.mpt_eqx-{self.mark}"


def _begin(directory: Path, count: int, small: Mapping[str, bytes]) -> _Save:
    """Returns a save of so many shards, after a look at what is in the directory."""
    there = [directory / name for name in (WEIGHTS, INDEX, *small)]
    if wrong := [path for path in there if path.exists() and not path.is_file()]:
        raise CheckpointError(f"{wrong[0]}: expected a file to replace, or nothing, found a directory; move it away")
    names = {path.name for path in directory.iterdir()}
    fresh = not names & {CONFIG, INDEX} and not any(Path(name).suffix in SUFFIXES for name in names)
    mark = secrets.token_hex(4)
    stem = "model" if fresh else f"model-{mark}"
    shards = [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    changed = {
        name: content for name, content in small.items() if name not in names or content != _content(directory / name)
    }
    return _Save(directory, fresh, mark, stem, shards, changed, [])


def _finish(save: _Save, index: bytes) -> None:
    """Puts the files of a save in the place of those of the last."""
    directory, (first, *others) = save.directory, save.shards
    for name, content in save.small.items():
        _write(_create(save, save.waiting(name)), content)
    if save.fresh:  # then it belongs to nothing else meanwhile
        _move_small(save)
        save = save._replace(small={})
    _sync(directory)
    if not others and not save.small:
        os.replace(directory / first, directory / WEIGHTS)
    else:
        # Also a single file goes by an index first: as long as that names it, files_of knows the waiting ones.
        _write(_create(save, save.waiting(INDEX)), index)
        os.replace(directory / save.waiting(INDEX), directory / INDEX)  # this is the moment, where there was an index,
        _sync(directory)
        (directory / WEIGHTS).unlink(missing_ok=True)  # or this, because it would be read before the index
        _sync(directory)
        _move_small(save)
        _sync(directory)
        if not others:
            os.replace(directory / first, directory / WEIGHTS)
    _sync(directory)
    if not others:
        (directory / INDEX).unlink(missing_ok=True)
    for path in directory.iterdir():
        old_shard = re.fullmatch(SHARD, path.name) and path.name not in save.shards
        if (old_shard or re.fullmatch(WAITING, path.name)) and path.is_file():
            path.unlink()
    _sync(directory)


def _undo(save: _Save) -> None:
    """Removes what a save has made, unless that is what is read by now."""
    index = save.directory / INDEX
    indexed = index.is_file() and f'"{save.stem}-' in index_start(index)
    moved = bool(save.made) and not save.made[0].exists()
    if moved or (indexed and not (save.directory / WEIGHTS).exists()):
        return
    for path in (*save.made, *([index] if indexed else [])):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _move_small(save: _Save) -> None:
    for name in save.small:
        path = save.directory / name
        if not path.exists():
            save.made.append(path)
        os.replace(save.directory / save.waiting(name), path)


def _make(directory: Path) -> None:
    """Makes a directory, and sees to it that its name and those of the directories above it are on the disk."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    if new:
        directory.mkdir(parents=True, exist_ok=True)
    for path in new:
        _sync(path.parent)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keeps other saves out of a directory, whose files would be taken for leftovers; ends with the process."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(
            f"{directory}: expected no other save, found one that is not at its end; "
            f"wait for it, or save to another directory"
        ) from None
    except OSError:
        pass  # a file system that has no locks
    try:
        yield
    finally:
        os.close(descriptor)


def _create(save: _Save, name: str) -> Path:
    """Makes an empty file; one that exists, be it a link, is an error."""
    path = save.directory / name
    path.touch(exist_ok=False)
    save.made.append(path)
    return path


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _sync(directory: Path) -> None:
    """Waits until the names in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
