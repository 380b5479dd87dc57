"""The files of a checkpoint: which ones there are, in which order they are looked for, and how a save replaces them.

A save writes every file beside its final name, then a journal that lists them, then moves each to its place. From the
moment the journal is there the new checkpoint counts, even if the moves were never made: whoever reads takes a listed
file from beside its name, and the next save makes the moves. Before that moment the old one counts.
"""

import os
from pathlib import Path

from mpt_eqx.checkpoint.formats import SUFFIXES
from mpt_eqx.config_checks import shown
from mpt_eqx.config_dialects import read_json_object
from mpt_eqx.errors import CheckpointError, ConfigError, first_of

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_WEIGHTS = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
JOURNAL = "mpt_eqx-save.json"
NEW = ".new"
MAX_INDEX = 4 * 2**20


def files_of(directory: Path) -> dict[str, Path]:
    """Returns the files of a directory by name, as an interrupted save meant them.

    Raises:
        CheckpointError: the directory or its journal cannot be read.
    """
    try:
        found = {path.name: path for path in sorted(directory.iterdir()) if _is_plain(path)}
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error})") from None
    if JOURNAL in found:
        written, removed = _read_journal(found[JOURNAL])
        for name in removed:
            found.pop(name, None)
        for name in written:
            found[name] = found.pop(name + NEW, found.get(name, directory / name))
    return found


def _is_plain(path: Path) -> bool:
    return path.name.isprintable() and path.is_file()


def finish_save(directory: Path) -> None:
    """Makes the moves of a save that was interrupted after its journal was written."""
    if not (directory / JOURNAL).is_file():
        return
    written, removed = _read_journal(directory / JOURNAL)
    for name in written:
        if (directory / (name + NEW)).exists():
            os.replace(directory / (name + NEW), directory / name)
    for name in removed:
        (directory / name).unlink(missing_ok=True)
    sync(directory)
    (directory / JOURNAL).unlink()
    sync(directory)


def sync(path: Path) -> None:
    """Waits until a file or the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def weight_files(directory: Path, found: dict[str, Path]) -> tuple[list[Path], dict[str, str]]:
    """Returns the files that hold the weights, and the index (tensor → file name) if there is one.

    Looked for in transformers' order; then any one file of a known format.

    Raises:
        CheckpointError: there are no weights, several that could be meant, or an index that is wrong.
    """
    for single, index in ((WEIGHTS, INDEX), (TORCH_WEIGHTS, TORCH_INDEX)):
        if single in found:
            return [found[single]], {}
        if index in found:
            return _indexed(directory, found, found[index])
    others = [path for name, path in found.items() if path.suffix in SUFFIXES and name != "training_args.bin"]
    if len(others) == 1:
        return others, {}
    several = f"found several files and no index: {first_of([path.name for path in others])}; pass one of them"
    raise CheckpointError(
        f"{directory}: expected {WEIGHTS}, {TORCH_WEIGHTS}, an index of shards or one GGUF file, "
        f"{several if others else 'found no weights'}"
    )


def _indexed(directory: Path, found: dict[str, Path], path: Path) -> tuple[list[Path], dict[str, str]]:
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
    names = sorted(set(weight_map.values()))
    # The name is checked, not where it leads: the Hub's cache is made of links.
    if strange := [n for n in names if n != Path(n).name or n in ("", ".", "..") or "\\" in n or not n.isprintable()]:
        raise CheckpointError(f"{path}: expected names of files beside it, found {first_of(strange)}")
    if absent := [name for name in names if name not in found]:
        raise CheckpointError(
            f"{directory}: expected the files that {path.name} names; missing: {first_of(absent)}; "
            f"if it was downloaded, the download is not complete"
        )
    return [found[name] for name in names], weight_map


def _read_journal(path: Path) -> tuple[list[str], list[str]]:
    try:
        journal = read_json_object(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    written, removed = journal.get("written"), journal.get("removed")
    if not isinstance(written, list) or not isinstance(removed, list):
        raise CheckpointError(f"{path}: expected lists of file names, found {journal!r:.120}; delete it")
    if any(not isinstance(name, str) or name != Path(name).name or not name for name in (*written, *removed)):
        raise CheckpointError(f"{path}: expected lists of file names, found {journal!r:.120}; delete it")
    return written, removed
