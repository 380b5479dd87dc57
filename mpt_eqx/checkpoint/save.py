"""Saving: config.json and safetensors that llm-foundry, transformers and `from_pretrained` read."""

import json
import os
import re
from pathlib import Path

import numpy as np

from mpt_eqx.checkpoint.info import INDEX, WEIGHTS
from mpt_eqx.checkpoint.names import named_leaves, stored_name
from mpt_eqx.errors import CheckpointError
from mpt_eqx.model import MPT

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def save_pretrained(model: MPT, directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """Writes config.json and model.safetensors, or shards and an index, under llm-foundry's tensor names.

    Files are written beside their final names and moved there when all are complete, config.json last. Weights that
    an earlier save left in the directory are removed; other files stay.

    Args:
        model: the model.
        directory: where to write; made if it does not exist.
        max_shard_size: largest size of a weight file, in bytes or as "200MB"; a larger tensor gets its own file.

    Raises:
        CheckpointError: `max_shard_size` is not a size, or the directory cannot be written.
    """
    from safetensors.numpy import save_file

    limit = _parse_size(max_shard_size)
    directory = Path(directory)
    leaves = {stored_name(name, model.config): leaf for name, leaf in named_leaves(model).items()}
    shards = _shards({name: leaf.size * leaf.dtype.itemsize for name, leaf in leaves.items()}, limit)
    files = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    )
    dtype = next(iter(leaves.values())).dtype.name
    written: list[str] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, names in zip(files, shards, strict=True):
            # safetensors writes the wrong bytes of an array that is not contiguous, without a word (0.8.0).
            arrays = {name: np.ascontiguousarray(np.asarray(leaves[name])) for name in names}
            written.append(file)
            save_file(arrays, directory / f"{file}.tmp", metadata={"format": "pt"})
        if len(shards) > 1:
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
            written.append(INDEX)
            _write_json(directory / f"{INDEX}.tmp", {"metadata": {"total_size": total}, "weight_map": weight_map})
        written.append("config.json")
        config = {**model.config.to_dict(), "dtype": dtype, "torch_dtype": dtype}
        _write_json(directory / "config.json.tmp", config)
        for file in written:
            # safetensors makes files that only their owner may read.
            os.chmod(directory / f"{file}.tmp", (directory / "config.json.tmp").stat().st_mode)
        for file in written:
            os.replace(directory / f"{file}.tmp", directory / file)
        for path in (*directory.glob("model*.safetensors"), directory / INDEX):
            if path.name not in written:
                path.unlink(missing_ok=True)
    except OSError as error:
        for file in written:
            (directory / f"{file}.tmp").unlink(missing_ok=True)
        raise CheckpointError(f"{directory}: cannot be written ({error})") from error


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


def _parse_size(size: int | str) -> int:
    match = re.fullmatch(r"(\d+) ?(KB|MB|GB|)", str(size))
    if not match or not int(match[1]):
        raise CheckpointError(f"max_shard_size: expected bytes or a size such as '200MB' or '5GB', found {size!r}")
    return int(match[1]) * UNITS[match[2]]


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
