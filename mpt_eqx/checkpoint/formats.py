"""Which format a file has, by its content, and the tensors in it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpt_eqx.checkpoint.gguf_file import read_gguf
from mpt_eqx.checkpoint.safetensors_file import read_safetensors
from mpt_eqx.checkpoint.tensors import MAX_RANK, TensorInfo
from mpt_eqx.checkpoint.torch_file import read_torch
from mpt_eqx.errors import CheckpointError, printable

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
MAX_TENSORS = 50_000
MAX_NAME = 200


class WeightFile(NamedTuple):
    """What one file holds.

    Attributes:
        format: "safetensors", "torch" or "GGUF" with its types.
        tensors: what is in it, in its order.
        config: the content of a config.json, where the format carries one.
    """

    format: str
    tensors: list[TensorInfo]
    config: dict[str, Any] | None


def read_weight_file(file: Path) -> WeightFile:
    """Returns the tensors of a file of any supported format, from its headers.

    Raises:
        CheckpointError: the file has another format, or is damaged.
    """
    try:
        with open(file, "rb") as f:
            start = f.read(512)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
    if start[:4] == b"GGUF":
        tensors, config, types = read_gguf(file)
        return WeightFile(f"GGUF ({types})", _plain(file, tensors), config)
    if start[:2] == b"PK" or start[257:262] == b"ustar" or (start[:1] == b"\x80" and start[8:9] != b"{"):
        return WeightFile("torch", _plain(file, read_torch(file)), None)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file}: expected weights, found a git-lfs pointer to them; run `git lfs pull`")
    if start[8:9] == b"{" or file.suffix == ".safetensors":
        return WeightFile("safetensors", _plain(file, read_safetensors(file)), None)
    raise CheckpointError(
        f"{file}: expected safetensors, a torch file or GGUF, found something else that begins with {start[:8]!r}"
    )


def _plain(file: Path, tensors: list[TensorInfo]) -> list[TensorInfo]:
    """Returns the tensors, when there is nothing in their description that would make a message long or strange.

    Raises:
        CheckpointError: there are too many, or a name or shape is none of a weight.
    """
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(f"{file}: expected at most {MAX_TENSORS} tensors, found {len(tensors)}")
    for tensor in tensors:
        if len(tensor.name) > MAX_NAME or not tensor.name.isprintable():
            raise CheckpointError(
                f"{file}: expected names of at most {MAX_NAME} printable characters for tensors, "
                f"found '{printable(tensor.name)}' of {len(tensor.name)}"
            )
        if len(tensor.shape) > MAX_RANK:
            raise CheckpointError(
                f"{file}: {tensor.name}: expected at most {MAX_RANK} dimensions, found {len(tensor.shape)}"
            )
    return [dataclasses.replace(tensor, read=_guarded(file, tensor)) for tensor in tensors]


def _guarded(file: Path, tensor: TensorInfo) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        try:
            return tensor.read()
        except Exception as error:
            # A header may pass every check and still not fit what a library makes of it.
            text = printable(" ".join(str(error).split()) or type(error).__name__, limit=200)
            raise CheckpointError(f"{file}: {tensor.name} cannot be read ({text})") from None

    return read
