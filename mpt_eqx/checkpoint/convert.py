"""Converting: any readable checkpoint to safetensors that load in place, one tensor at a time."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import DTypeLike

from mpt_eqx.checkpoint.files import files_of
from mpt_eqx.checkpoint.info import CheckpointInfo, read_checkpoint
from mpt_eqx.checkpoint.load import byte_bar, finite, refuse_problems, target_dtype, weights
from mpt_eqx.checkpoint.names import stored_name
from mpt_eqx.checkpoint.safetensors_file import Outgoing
from mpt_eqx.checkpoint.save import parse_size, write_checkpoint
from mpt_eqx.checkpoint.tensors import TensorInfo
from mpt_eqx.errors import CheckpointError

COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "tokenizer.model"),
)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = "5GB",
    config_overrides: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    **hub: Any,
) -> CheckpointInfo:
    """Writes a checkpoint of any readable format as aligned safetensors, with its tokenizer; returns what was read.

    Tensors are read, checked for NaN and infinity, converted and written one by one, so memory is needed for one.

    Args:
        source: as in `from_pretrained`.
        destination: directory to write to, as in `save_pretrained`; not the source.
        dtype: as in `from_pretrained`.
        max_shard_size: as in `save_pretrained`.
        config_overrides: as in `from_pretrained`.
        progress: a bar on stderr; None means if stderr is a terminal.
        **hub: revision, subfolder, cache_dir, token and local_files_only, as in `from_pretrained`.

    Raises:
        CheckpointError: the source cannot be loaded or holds NaN or infinity, or the destination cannot be written.
        ConfigError: its config.json is not one of a supported MPT.
    """
    limit = parse_size(max_shard_size)
    info = read_checkpoint(source, config_overrides=config_overrides, progress=progress, **hub)
    refuse_problems(info)
    target = target_dtype(info, dtype) if dtype is not None or not _has_float64(info) else np.dtype(np.float64)
    directory = Path(destination)
    if directory.exists() and directory.samefile(info.directory):
        raise CheckpointError(f"{directory}: expected another directory than the source")
    named = weights(info)
    shown = sys.stderr.isatty() if progress is None else progress
    total = sum(tensor.size for tensor in named.values()) * target.itemsize

    def outgoing(name: str, tensor: TensorInfo) -> Outgoing:
        def read() -> np.ndarray:
            view = tensor.read()
            if not finite(view):
                raise CheckpointError(f"{info.directory / tensor.file}: {tensor.name} holds NaN or infinity")
            with np.errstate(over="ignore"):  # looked for in the next line
                array = view.astype(target, copy=False)
            if array is not view and not finite(array):
                raise CheckpointError(f"{info.directory / tensor.file}: {tensor.name} does not fit into {target.name}")
            return array

        return Outgoing(stored_name(name, info.config), tensor.shape, target, read)

    companions = [path for name, path in files_of(info.directory).items() if name in COMPANIONS]
    with byte_bar(f"converting {info.directory.name}", total, shown) as bar:
        write_checkpoint(
            directory,
            info.config,
            [outgoing(name, tensor) for name, tensor in named.items()],
            limit,
            companions=companions,
            progress=bar.update,
        )
    return info


def _has_float64(info: CheckpointInfo) -> bool:
    """Tells whether the tensors are float64, which is copied without JAX and so needs none of its settings."""
    return {tensor.dtype for tensor in info.tensors} == {"float64"}
