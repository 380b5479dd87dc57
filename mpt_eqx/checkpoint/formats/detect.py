"""Formats are detected from content: the tensors of a weight file of any format."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpt_eqx.checkpoint.formats.gguf import read_gguf
from mpt_eqx.checkpoint.formats.safetensors import read_safetensors
from mpt_eqx.checkpoint.formats.tensors import MAX_RANK, MAX_TENSORS, TensorInfo
from mpt_eqx.checkpoint.formats.torch_file import read_torch
from mpt_eqx.errors import CheckpointError, printable

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
MAX_NAME = 200
# What files of llama.cpp and its like begin with that are older than GGUF.
GGML = (b"lmgg", b"fmgg", b"tjgg", b"algg")


class WeightFile(NamedTuple):
    """What one weight file holds.

    Attributes:
        format: "safetensors", "torch" or "GGUF" with its types.
        tensors: its tensors, in the file's order.
        config: the content of a config.json, where the format has one.
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
        return WeightFile(f"GGUF ({types})", _guarded(file, tensors), config)
    if start[:2] == b"PK" or start[257:262] == b"ustar" or (start[:1] == b"\x80" and start[8:9] != b"{"):
        return WeightFile("torch", _guarded(file, read_torch(file)), None)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file}: expected weights, found a git-lfs pointer to them; run `git lfs pull`")
    if start[8:9] == b"{" or file.suffix == ".safetensors":
        return WeightFile("safetensors", _guarded(file, read_safetensors(file)), None)
    if start[:4] in GGML:
        raise CheckpointError(
            f"{file}: expected safetensors, a torch file or GGUF, found GGML, the format before GGUF; take the "
            f"checkpoint that it was made from"
        )
    raise CheckpointError(
        f"{file}: expected safetensors, a torch file or GGUF, found something else that begins with {start[:8]!r}"
    )


def check_tensor_infos(directory: Path, tensors: Sequence[TensorInfo]) -> None:
    """Raises unless names, shapes and number of tensors are within the bounds of an MPT's.

    Raises:
        CheckpointError: there are too many, or one has too long a name, unprintable characters or too many axes.
    """
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(f"{directory}: expected at most {MAX_TENSORS} tensors, found {len(tensors)}")
    for tensor in tensors:
        if len(tensor.name) > MAX_NAME or not tensor.name.isprintable():
            raise CheckpointError(
                f"{directory / tensor.file}: expected names of at most {MAX_NAME} printable characters for tensors, "
                f"found '{printable(tensor.name)}' of {len(tensor.name)}"
            )
        if len(tensor.shape) > MAX_RANK:
            raise CheckpointError(
                f"{directory / tensor.file}: {tensor.name}: expected at most {MAX_RANK} dimensions, "
                f"found {len(tensor.shape)}"
            )


def _guarded(file: Path, tensors: list[TensorInfo]) -> list[TensorInfo]:
    """Returns the tensors with any error in `read` turned into a CheckpointError."""

    def guarded(tensor: TensorInfo) -> np.ndarray:
        try:
            return tensor.read()
        except Exception as error:
            # A header may pass every check and still not fit what a library makes of it.
            text = printable(" ".join(str(error).split()) or type(error).__name__, limit=200)
            raise CheckpointError(f"{file}: {tensor.name} cannot be read ({text})") from None

    return [dataclasses.replace(tensor, read=functools.partial(guarded, tensor)) for tensor in tensors]
