"""What a checkpoint holds and what is wrong with it, from its headers alone."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpt_eqx.checkpoint.differences import differences, type_choices
from mpt_eqx.checkpoint.files import CONFIG, NEW, files_of, weight_files
from mpt_eqx.checkpoint.formats import read_weight_file, refuse_strange
from mpt_eqx.checkpoint.hub import find_checkpoint
from mpt_eqx.checkpoint.tensors import TensorInfo
from mpt_eqx.config import MPTConfig
from mpt_eqx.config_dialects import override, read_json_object
from mpt_eqx.errors import CheckpointError, ConfigError, first_of


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds.

    Attributes:
        directory: where it is.
        format: "safetensors", "torch", or "GGUF" with its types.
        config: its configuration.
        tensors: every tensor of every file.
        parameters: how many numbers the model has.
        bytes: size of the weight files on disk.
        problems: what keeps it from being loaded, a line each; empty when nothing does.
        unsettled: those of the problems that `dtype=` does not settle.
    """

    directory: Path
    format: str
    config: MPTConfig
    tensors: tuple[TensorInfo, ...]
    parameters: int
    bytes: int
    problems: tuple[str, ...]
    unsettled: tuple[str, ...]


def checkpoint_info(
    source: str | Path, *, config_overrides: Mapping[str, Any] | None = None, **hub: Any
) -> CheckpointInfo:
    """Returns what a checkpoint holds and what is wrong with it, reading no weights.

    Args:
        source: a directory, a weight file with a config.json beside it (a GGUF file needs none), or a Hub repository.
        config_overrides: keys of config.json to replace, nested as there.
        **hub: revision, subfolder, cache_dir, token and local_files_only, as in `from_pretrained`.

    Raises:
        CheckpointError: no checkpoint is there, or a file of it cannot be read.
        ConfigError: its config.json is not one of a supported MPT.
    """
    place = find_checkpoint(source, **hub)
    directory = place.parent if place.is_file() else place
    found = files_of(directory)
    path = found.get(CONFIG)
    content = None if path is None else read_json_object(path)
    paths, index = ([place], {}) if place.is_file() else weight_files(directory, found)
    files = [read_weight_file(file) for file in paths]
    formats = sorted({file.format for file in files})
    if len(formats) > 1:
        raise CheckpointError(f"{directory}: expected shards of one format, found {first_of(formats)}")
    if content is None:
        # Without a file of its own the configuration may stand in the weights; otherwise this says what is missing.
        content = files[0].config or read_json_object(directory / CONFIG)
    try:
        config = MPTConfig.from_dict(override(content, config_overrides or {}))
    except ConfigError as error:
        raise ConfigError(f"{path or paths[0]}: {error}") from None
    # Under its final name also where an interrupted save left a file beside it.
    tensors = tuple(
        dataclasses.replace(tensor, file=tensor.file.removesuffix(NEW)) for file in files for tensor in file.tensors
    )
    refuse_strange(directory, tensors)
    held = {(tensor.name, tensor.file) for tensor in tensors}
    lost = [f"{name} ({file})" for name, file in index.items() if (name, file) not in held]
    lines = [f"{len(lost)} tensors not in the file that the index names: {first_of(lost)}"] if lost else []
    problems = (*lines, *differences(config, tensors))
    return CheckpointInfo(
        directory=directory,
        format=formats[0],
        config=config,
        tensors=tensors,
        parameters=config.num_parameters(),
        bytes=sum(path.stat().st_size for path in paths),
        problems=(*problems, *type_choices(formats[0], tensors)),
        unsettled=problems,
    )
