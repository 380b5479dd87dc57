"""What a checkpoint holds and what is wrong with it, from its headers alone."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpt_eqx.checkpoint.diagnose import differences, type_choices
from mpt_eqx.checkpoint.files import CONFIG, files_of, unchanged, weight_files
from mpt_eqx.checkpoint.formats.detect import WeightFile, read_weight_file, refuse_strange
from mpt_eqx.checkpoint.formats.tensors import TensorInfo
from mpt_eqx.checkpoint.hub import fetch_headers, find_checkpoint
from mpt_eqx.config import MPTConfig
from mpt_eqx.config.dialects import override
from mpt_eqx.config.json_file import read_json_object
from mpt_eqx.config.mpt_config import read_config
from mpt_eqx.config.quantization import Quantization
from mpt_eqx.errors import CheckpointError, ConfigError, MPTError, first_of


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds.

    Attributes:
        directory: where it is.
        format: "safetensors", "torch", or "GGUF" with its types.
        config: its configuration.
        quantization: which of its weights are quantised as by `mpt_eqx.quantize`, and how; None if none.
        tensors: every tensor of every file.
        parameters: how many numbers the model has.
        bytes: size of the weight files on disk.
        problems: what keeps it from being loaded, a line each; empty when nothing does.
        unsettled: those of the problems that `dtype=` does not settle.
    """

    directory: Path
    format: str
    config: MPTConfig
    quantization: Quantization | None
    tensors: tuple[TensorInfo, ...]
    parameters: int
    bytes: int
    problems: tuple[str, ...]
    unsettled: tuple[str, ...]


def checkpoint_info(
    source: str | Path, *, config_overrides: Mapping[str, Any] | None = None, **hub: Any
) -> CheckpointInfo:
    """Returns what a checkpoint holds and what is wrong with it, reading no weights.

    Of a Hub repository's safetensors only the headers are fetched, and its small files. The headers of other formats
    are not apart from the weights, so there the weights are fetched, as by `from_pretrained`.

    Args:
        source: a directory, a weight file with a config.json beside it (a GGUF file needs none), or a Hub repository.
        config_overrides: keys of config.json to replace, nested as there.
        **hub: revision, subfolder, cache_dir, token and local_files_only, as in `from_pretrained`.

    Raises:
        CheckpointError: no checkpoint is there, or a file of it cannot be read.
        ConfigError: its config.json is not one of a supported MPT.
    """
    if (remote := fetch_headers(source, **hub)) is None:
        return read_checkpoint(source, config_overrides=config_overrides, **hub)
    config = _config(remote.directory)
    return _described(remote.directory, config, remote.files, remote.weight_map, remote.bytes, config_overrides)


def read_checkpoint(
    source: str | Path, *, config_overrides: Mapping[str, Any] | None = None, **hub: Any
) -> CheckpointInfo:
    """Returns the same as `checkpoint_info`, with all weights on the disk and their files open.

    Whatever becomes of the names of the files, the tensors stay those that were described.
    """
    place = find_checkpoint(source, **hub)
    directory = place.parent if place.is_file() else place

    def read() -> tuple[dict[str, Any] | None, list[WeightFile], dict[str, str], int]:
        config = _config(directory)
        paths, index = ([place], {}) if place.is_file() else weight_files(directory, files_of(directory))
        files = [read_weight_file(file) for file in paths]
        return config, files, index, sum(path.stat().st_size for path in paths)

    return _described(directory, *unchanged(place, read), config_overrides)


def _config(directory: Path) -> dict[str, Any] | None:
    """Returns the content of config.json, None without one."""
    path = files_of(directory).get(CONFIG)
    return None if path is None else read_json_object(path)


def _described(
    directory: Path,
    content: dict[str, Any] | None,
    files: Sequence[WeightFile],
    index: Mapping[str, str],
    size: int,
    config_overrides: Mapping[str, Any] | None,
) -> CheckpointInfo:
    path = directory / CONFIG
    if content is None and (content := files[0].config):
        # Without a file of its own the configuration may stand in the weights.
        path = directory / files[0].tensors[0].file
    elif content is None:
        content = read_json_object(path)  # which says what is missing
    formats = sorted({file.format for file in files})
    if len(formats) > 1:
        raise CheckpointError(f"{directory}: expected shards of one format, found {first_of(formats)}")
    if not isinstance(config_overrides, Mapping | None):
        raise ConfigError(f"config_overrides: expected a dict of keys of config.json, found {config_overrides!r:.80}")
    try:
        content = override(content, config_overrides or {})
        config, quantization = read_config(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    tensors = tuple(tensor for file in files for tensor in file.tensors)
    refuse_strange(directory, tensors)
    held = {(tensor.name, tensor.file) for tensor in tensors}
    lost = [f"{name} ({file})" for name, file in index.items() if (name, file) not in held]
    lines = [f"{len(lost)} tensors not in the file that the index names: {first_of(lost)}"] if lost else []
    try:
        problems = (*lines, *differences(config, quantization, tensors))
    except MPTError as error:
        raise ConfigError(f"{path}: {error}") from None
    return CheckpointInfo(
        directory=directory,
        format=formats[0],
        config=config,
        quantization=quantization,
        tensors=tensors,
        parameters=config.num_parameters(),
        bytes=size,
        problems=(*problems, *type_choices(formats[0], tensors)),
        unsettled=problems,
    )
