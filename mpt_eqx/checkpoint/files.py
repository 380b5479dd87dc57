"""The files of a checkpoint: which ones there are, in which order they are looked for, and when they are another's.

A save gives its shards names that no earlier one had, so the index alone says which of them count, and moving it to its
place is what makes the new checkpoint of the old one. config.json cannot move in the same moment. It waits beside its
place under a name with the mark of the shards: while one waits there, and the index names shards of its mark, it is
the one that counts.
"""

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from mpt_eqx.checkpoint.formats.detect import SUFFIXES
from mpt_eqx.config.json_file import read_json_object
from mpt_eqx.config.validation import shown
from mpt_eqx.errors import CheckpointError, ConfigError, first_of

T = TypeVar("T")

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_WEIGHTS = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
SHARD = r"model-(?:([0-9a-f]{8})-)?\d{5}-of-\d{5}\.safetensors"
WAITING = r"(.+)\.mpt_eqx-([0-9a-f]{8})"
MAX_INDEX = 4 * 2**20
ATTEMPTS = 200  # to read a checkpoint that is being replaced


def files_of(directory: Path) -> dict[str, Path]:
    """Returns the files of a directory by name, those that wait for their place included under their final names.

    Files with control characters or the like in their names are none of a checkpoint.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    try:
        found = {path.name: path for path in sorted(directory.iterdir()) if _is_plain(path)}
        waiting = [match for name in found if (match := re.fullmatch(WAITING, name))]
        if waiting and INDEX in found and WEIGHTS not in found:
            start = index_start(found[INDEX])
            found |= {match[1]: found[match[0]] for match in waiting if f'"model-{match[2]}-' in start}
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error})") from None
    return found


def index_start(path: Path) -> str:
    """Returns so much of an index that it names a shard."""
    with open(path, encoding="utf-8", errors="replace") as f:
        return f.read(2**16)


def _is_plain(path: Path) -> bool:
    return path.name.isprintable() and path.is_file()


def unchanged(place: Path, read: Callable[[], T]) -> T:
    """Returns what `read` does, once the files at `place` have been the same before and after it.

    So nothing is read half from a checkpoint and half from the one that another process puts in its place.

    Args:
        place: directory or weight file of the checkpoint.
        read: opens it; what is open stays as it is, whatever becomes of its name.

    Raises:
        CheckpointError: as `read`, or the files do not come to rest.
        ConfigError: as `read`.
    """
    for _ in range(ATTEMPTS):
        before = _state(place)
        try:
            result = read()
        except (CheckpointError, ConfigError, OSError):
            if _state(place) == before:
                raise
        else:
            if _state(place) == before:
                return result
    raise CheckpointError(
        f"{place}: expected files that stay as they are while they are read, found them replaced {ATTEMPTS} times; "
        f"wait until nothing writes there"
    )


def _state(place: Path) -> list[tuple[str, int, int]] | str:
    """Returns which files a checkpoint consists of, so that a replaced one is another; or why that cannot be told."""
    try:
        found = files_of(place if place.is_dir() else place.parent)
        paths = weight_files(place, found)[0] if place.is_dir() else [place]
        read = [*paths, *(found[name] for name in (CONFIG, INDEX) if name in found)]
        return [(str(path), path.stat().st_ino, path.stat().st_mtime_ns) for path in read]
    except (CheckpointError, OSError) as error:
        return str(error)


def weight_names(names: Collection[str]) -> list[str]:
    """Returns which of the files in a directory is the one with the weights, or the index of such files.

    Looked for in transformers' order; then any one file of a known format. None, or several, if that is not clear.
    """
    for name in (WEIGHTS, INDEX, TORCH_WEIGHTS, TORCH_INDEX):
        if name in names:
            return [name]
    others = sorted(name for name in names if Path(name).suffix in SUFFIXES and name != "training_args.bin")
    # Shards without an index are what a save left that was killed; unless there is nothing else.
    return [name for name in others if not re.fullmatch(SHARD, name)] or others


def weight_files(directory: Path, found: dict[str, Path]) -> tuple[list[Path], dict[str, str]]:
    """Returns the files that hold the weights, and the index (tensor → file name) if there is one.

    Raises:
        CheckpointError: there are no weights, several that could be meant, or an index that is wrong.
    """
    names = weight_names(found)
    if len(names) == 1:
        path = found[names[0]]
        return _indexed(directory, found, path) if path.name in (INDEX, TORCH_INDEX) else ([path], {})
    several = f"found several files and no index: {first_of(names)}; pass one of them"
    raise CheckpointError(
        f"{directory}: expected {WEIGHTS}, {TORCH_WEIGHTS}, an index of shards or one GGUF file, "
        f"{several if names else 'found no weights'}"
    )


def _indexed(directory: Path, found: dict[str, Path], path: Path) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_index(path)
    names = sorted(set(weight_map.values()))
    if absent := [name for name in names if name not in found]:
        raise CheckpointError(
            f"{directory}: expected the files that {path.name} names; missing: {first_of(absent)}; "
            f"if it was downloaded, the download is not complete"
        )
    return [found[name] for name in names], weight_map


def read_index(path: Path) -> dict[str, str]:
    """Returns which file holds each tensor.

    Raises:
        CheckpointError: it is no index, or names something else than files beside it.
    """
    try:
        weight_map = read_json_object(path, max_bytes=MAX_INDEX).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(
            f"{path}: expected a 'weight_map' from tensor names to file names, found {shown(weight_map)}"
        )
    # The name is checked, not where it leads: the Hub's cache is made of links.
    names = sorted(set(weight_map.values()))
    if strange := [n for n in names if n != Path(n).name or n in ("", ".", "..") or "\\" in n or not n.isprintable()]:
        raise CheckpointError(f"{path}: expected names of files beside it, found {first_of(strange)}")
    return weight_map
