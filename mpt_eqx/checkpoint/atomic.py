"""Replacing the checkpoint in a directory in one step, so that saving is crash-safe.

What holds at every moment, also after the process was killed, the disk was full or the power failed:

1. The directory holds the old checkpoint or the new one, as `from_pretrained` sees it, never a mixture.
2. A reader who loads meanwhile gets all of the one or all of the other (`checkpoint_files.read_consistently`).
3. Other programs, too, read weights of one checkpoint; config.json follows a moment later, if it is another.
4. Files of other names are not touched.

How: new files get names that no file had, with a random mark (model-1a2b3c4d-00001-of-00002.safetensors), and are on
disk before anything refers to them. The index alone says which shards count, so the step from the old checkpoint to the
new one is the renaming of the new index to its place (or, where there is a model.safetensors, which is read before an
index, its removal). config.json cannot be renamed in the same step. It waits as config.json.mpt_eqx-1a2b3c4d, and while
one waits whose mark is that of the shards in the index, it is the one that counts.

One save at a time: a lock on the directory keeps others out, and ends with the process.
"""

import contextlib
import glob
import importlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mpt_eqx.checkpoint.checkpoint_files import CONFIG, INDEX, PENDING, SHARD, WEIGHTS, index_start
from mpt_eqx.checkpoint.formats.detect import SUFFIXES
from mpt_eqx.errors import CheckpointError

LOCK = ".mpt_eqx-lock"


def replace_checkpoint(
    directory: Path,
    shards: Sequence[Callable[[Path], None]],
    small_files: Mapping[str, bytes],
    make_index: Callable[[Sequence[str]], bytes],
) -> None:
    """Writes a checkpoint in the place of the one in a directory, in one step.

    Args:
        directory: where to write; made if it does not exist.
        shards: writes a weight file to a path, and syncs it, for each of the files.
        small_files: config.json and other small files, by name; one may be in a directory beneath.
        make_index: returns the index, given the names of the weight files.

    Raises:
        CheckpointError: another save is in progress, or a directory stands in the place of a file.
        OSError: a file cannot be written.
    """
    make_directory(directory)
    with locked(directory):
        save = _begin(directory, len(shards), small_files)
        try:
            for name, write in zip(save.shards, shards, strict=True):
                write(_create(save, name))
            _finish(save, make_index(save.shards))
        except BaseException:
            _undo(save)
            raise


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file in the place of the one at a path, in one step.

    Args:
        path: the file; its directory is made if it does not exist.
        write: writes the new one to a path, and syncs it.

    Raises:
        CheckpointError: another save into the directory is in progress, or a directory stands in the file's place.
        OSError: it cannot be written.
    """
    make_directory(path.parent)
    if path.is_dir():
        raise CheckpointError(f"{path}: expected a file to replace, or nothing, found a directory; move it away")
    with locked(path.parent):
        for left in path.parent.glob(f"{glob.escape(path.name)}.mpt_eqx-*"):  # by a save that was killed
            left.unlink()
        new = path.with_name(f"{path.name}.mpt_eqx-{secrets.token_hex(4)}")
        try:
            write(new)
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


class _Save(NamedTuple):
    """A save in progress.

    Attributes:
        directory: where to.
        is_fresh: whether no checkpoint was there.
        mark: random, in the names of the new files.
        stem: how the names of its shards begin.
        shards: the names of the weight files.
        small_files: the other files that it changes.
        made: the files that it has created, under names that nothing had.
    """

    directory: Path
    is_fresh: bool
    mark: str
    stem: str
    shards: list[str]
    small_files: dict[str, bytes]
    made: list[Path]

    def pending(self, name: str) -> Path:
        """Where a file waits for its place."""
        return self.directory / f"{name}.mpt_eqx-{self.mark}"


def _begin(directory: Path, count: int, small_files: Mapping[str, bytes]) -> _Save:
    """Returns a save of `count` weight files."""
    there = [directory / name for name in (WEIGHTS, INDEX, *small_files)]
    if wrong := [path for path in there if path.exists() and not path.is_file()]:
        raise CheckpointError(f"{wrong[0]}: expected a file to replace, or nothing, found a directory; move it away")
    names = {path.name for path in directory.iterdir()}
    is_fresh = not names & {CONFIG, INDEX} and not any(Path(name).suffix in SUFFIXES for name in names)
    mark = secrets.token_hex(4)
    stem = "model" if is_fresh else f"model-{mark}"
    shards = [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    changed = {
        name: content
        for name, content in small_files.items()
        if not (directory / name).is_file() or content != (directory / name).read_bytes()
    }
    return _Save(directory, is_fresh, mark, stem, shards, changed, [])


def _finish(save: _Save, index: bytes) -> None:
    """Puts the files of a save in the place of those of the last."""
    directory, (first, *others) = save.directory, save.shards
    names = [name for name in save.small_files if "/" in name]
    for name, content in save.small_files.items():
        save.pending(name).parent.mkdir(exist_ok=True)
        write_synced(_create(save, save.pending(name).relative_to(directory).as_posix()), content)
    if save.is_fresh:  # then it belongs to nothing else meanwhile
        _move_small_files(save)
        save = save._replace(small_files={})
    sync_directory(directory)
    if not others and not save.small_files:
        os.replace(directory / first, directory / WEIGHTS)  # the step, of a single file without another config.json
    else:
        # Also a single file goes by an index first: as long as that names it, pending files are known to count.
        write_synced(_create(save, save.pending(INDEX).name), index)
        os.replace(save.pending(INDEX), directory / INDEX)  # the step, where an index was read,
        sync_directory(directory)
        (directory / WEIGHTS).unlink(missing_ok=True)  # or this, where a single file was
        sync_directory(directory)
        _move_small_files(save)
        sync_directory(directory)
        if not others:
            os.replace(directory / first, directory / WEIGHTS)
    sync_directory(directory)
    if not others:
        (directory / INDEX).unlink(missing_ok=True)
    for path in (*directory.iterdir(), *(path for name in names for path in (directory / name).parent.iterdir())):
        old_shard = re.fullmatch(SHARD, path.name) and path.name not in save.shards
        if (old_shard or re.fullmatch(PENDING, path.name)) and path.is_file():
            with contextlib.suppress(PermissionError):  # on Windows, of a file in use; the next save removes it
                path.unlink()
    sync_directory(directory)


def _undo(save: _Save) -> None:
    """Removes the files of a save, unless they are what is read by now."""
    index = save.directory / INDEX
    indexed = index.is_file() and f'"{save.stem}-' in index_start(index)
    moved = bool(save.made) and not save.made[0].exists()
    if moved or (indexed and not (save.directory / WEIGHTS).exists()):
        return
    for path in (*save.made, *([index] if indexed else [])):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _move_small_files(save: _Save) -> None:
    for name in save.small_files:
        path = save.directory / name
        if not path.exists():
            save.made.append(path)
        os.replace(save.pending(name), path)


def make_directory(directory: Path) -> None:
    """Makes a directory; it and the new ones above it are on the disk afterwards."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    if new:
        directory.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync_directory(path.parent)


def _create(save: _Save, name: str) -> Path:
    """Returns the path of a new empty file. A file of this name, be it a link, is an error."""
    path = save.directory / name
    path.touch(exist_ok=False)
    save.made.append(path)
    return path


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file, and waits until it is on the disk."""
    with open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def sync_directory(directory: Path) -> None:
    """Waits until the names in a directory are on the disk, where the system lets a directory be opened."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except PermissionError:  # Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other saves out of a directory, which would remove the files of this one as leftovers."""
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:
        with _locked_by_file(directory / LOCK):
            yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_progress(directory) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked_by_file(path: Path) -> Iterator[None]:
    """Does the same on Windows, where a directory cannot be opened, by a file in it."""
    try:
        msvcrt = importlib.import_module("msvcrt")
    except ImportError:  # a system without locks
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            raise _in_progress(path.parent) from None
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):  # another process has it open
            path.unlink()


def _in_progress(directory: Path) -> CheckpointError:
    return CheckpointError(
        f"{directory}: another save into this directory is in progress; wait for its end, or save to another directory"
    )
