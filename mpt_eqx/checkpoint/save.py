"""Saving: config.json and safetensors that llm-foundry, transformers and `from_pretrained` read."""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpt_eqx.checkpoint.files import CONFIG, INDEX, JOURNAL, NEW, WEIGHTS, finish_save, sync
from mpt_eqx.checkpoint.names import named_leaves, stored_name
from mpt_eqx.checkpoint.safetensors_file import Outgoing, write_safetensors
from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import CheckpointError
from mpt_eqx.model import MPT

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def save_pretrained(model: MPT, directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """Writes config.json and model.safetensors, or shards and an index, under llm-foundry's tensor names.

    At whatever moment the writing ends, by an error, a full disk or the process being killed, the directory holds the
    checkpoint that was there before or the new one, as `from_pretrained` sees it. Weights that an earlier save left are
    removed; other files stay.

    Args:
        model: the model.
        directory: where to write; made if it does not exist.
        max_shard_size: largest size of a weight file, in bytes or as "200MB"; a larger tensor gets its own file.

    Raises:
        CheckpointError: `max_shard_size` is not a size, or the directory cannot be written.
    """
    limit = parse_size(max_shard_size)
    tensors = [_outgoing(stored_name(name, model.config), leaf) for name, leaf in named_leaves(model).items()]
    write_checkpoint(Path(directory), model.config, tensors, limit)


def write_checkpoint(
    directory: Path,
    config: MPTConfig,
    tensors: Sequence[Outgoing],
    limit: int,
    *,
    companions: Sequence[Path] = (),
    progress: Callable[[int], object] = lambda written: None,
) -> None:
    """Writes a checkpoint as `save_pretrained` promises it.

    Args:
        directory: where to write; made if it does not exist.
        config: the model's configuration.
        tensors: the weights; each is asked for when it is its turn.
        limit: largest size of a weight file in bytes.
        companions: files that belong to the checkpoint, to be copied beside it.
        progress: is told how many bytes were written, after each tensor.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    shards = _shards({tensor.name: tensor.nbytes for tensor in tensors}, limit)
    one = len(shards) == 1
    files = [WEIGHTS] if one else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    by_name = {tensor.name: tensor for tensor in tensors}
    written: list[str] = []

    def path_of(name: str) -> Path:
        written.append(name)
        return directory / (name + NEW)

    try:
        directory.mkdir(parents=True, exist_ok=True)
        finish_save(directory)
        for file, names in zip(files, shards, strict=True):
            write_safetensors(path_of(file), [by_name[name] for name in names], progress)
        for companion in companions:
            shutil.copyfile(companion, path := path_of(companion.name))
            sync(path)
        if not one:
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            total = sum(tensor.nbytes for tensor in tensors)
            _write_json(path_of(INDEX), {"metadata": {"total_size": total}, "weight_map": weight_map})
        dtype = tensors[0].dtype.name
        _write_json(path_of(CONFIG), {**config.to_dict(), "dtype": dtype, "torch_dtype": dtype})
        # What would otherwise be found before the new weights, or is a shard of the old ones.
        stale = [WEIGHTS, INDEX, *(path.name for path in directory.glob("model-*-of-*.safetensors"))]
        removed = [name for name in stale if name not in written and (directory / name).exists()]
        sync(directory)
        _write_json(directory / (JOURNAL + NEW), {"written": written, "removed": removed})
        os.replace(directory / (JOURNAL + NEW), directory / JOURNAL)
        sync(directory)
        finish_save(directory)
    except BaseException as error:
        if directory.is_dir() and not (directory / JOURNAL).exists():
            for name in [*written, JOURNAL]:
                (directory / (name + NEW)).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{directory}: cannot be written ({error})") from error
        raise


def parse_size(size: int | str) -> int:
    """Returns the bytes of a size such as "200MB".

    Raises:
        CheckpointError: it is not a size.
    """
    match = re.fullmatch(r"(\d+) ?(KB|MB|GB|)", str(size))
    if not match or not int(match[1]):
        raise CheckpointError(f"max_shard_size: expected bytes or a size such as '200MB' or '5GB', found {size!r}")
    return int(match[1]) * UNITS[match[2]]


def _outgoing(name: str, leaf: jax.Array | np.ndarray) -> Outgoing:
    return Outgoing(name, leaf.shape, np.dtype(leaf.dtype), lambda: np.asarray(leaf))


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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sync(path)
