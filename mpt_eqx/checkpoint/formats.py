"""Which format a file has, by its content, and the tensors in it."""

from pathlib import Path
from typing import Any, NamedTuple

from mpt_eqx.checkpoint.gguf_file import read_gguf
from mpt_eqx.checkpoint.safetensors_file import read_safetensors
from mpt_eqx.checkpoint.tensors import TensorInfo
from mpt_eqx.checkpoint.torch_file import read_torch
from mpt_eqx.errors import CheckpointError

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


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
        return WeightFile(f"GGUF ({types})", tensors, config)
    if start[:2] == b"PK" or start[257:262] == b"ustar" or (start[:1] == b"\x80" and start[8:9] != b"{"):
        return WeightFile("torch", read_torch(file), None)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file}: expected weights, found a git-lfs pointer to them; run `git lfs pull`")
    if start[8:9] == b"{" or file.suffix == ".safetensors":
        return WeightFile("safetensors", read_safetensors(file), None)
    raise CheckpointError(
        f"{file}: expected safetensors, a torch file or GGUF, found something else that begins with {start[:8]!r}"
    )
