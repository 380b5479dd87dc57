"""What a checkpoint holds and what is wrong with it, from its headers alone."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpt_eqx.checkpoint.checkpoint_files import CONFIG, CheckpointFiles, files_of, read_consistently
from mpt_eqx.checkpoint.diagnose import diagnose, type_choices
from mpt_eqx.checkpoint.formats.detect import WeightFile, check_tensor_infos, read_weight_file
from mpt_eqx.checkpoint.formats.tensors import FLOAT_NAMES, TensorInfo
from mpt_eqx.checkpoint.hub import fetch_headers, find_checkpoint
from mpt_eqx.checkpoint.names import canonical_name
from mpt_eqx.config import MPTConfig
from mpt_eqx.config.dialects import override
from mpt_eqx.config.json_file import read_json_object
from mpt_eqx.config.keys import STORED_TYPES
from mpt_eqx.config.mpt_config import read_config
from mpt_eqx.config.programs import Difference
from mpt_eqx.config.quantization import Quantization
from mpt_eqx.config.validation import NULL, check, choice, either
from mpt_eqx.errors import CheckpointError, ConfigError, MPTError, first_of


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds.

    Attributes:
        directory: where it is.
        format: "safetensors", "torch", or "GGUF" with its types.
        config: its configuration.
        quantization: how `mpt_eqx.quantize` has quantised its weights; None if it has not.
        tensors: the tensors of all files.
        parameters: number of parameters of the model.
        bytes: size of the weight files on disk.
        problems: why it cannot be loaded, a line each; empty if it can.
        blocking_problems: those of the problems that `dtype=` does not solve.
        weight_dtype: the type of the model's weights, where its tensors have several types and `save_pretrained` noted
            that each is to be loaded in its own; None otherwise.
        lost: what the program that `convert` wrote it for ignores or computes otherwise; empty in other places.
    """

    directory: Path
    format: str
    config: MPTConfig
    quantization: Quantization | None
    tensors: tuple[TensorInfo, ...]
    parameters: int
    bytes: int
    problems: tuple[str, ...]
    blocking_problems: tuple[str, ...]
    weight_dtype: np.dtype | None = None
    lost: tuple[Difference, ...] = ()


def checkpoint_info(
    source: str | Path,
    *,
    config_overrides: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    **hub: Any,
) -> CheckpointInfo:
    """Returns what a checkpoint holds and what is wrong with it, without reading weights.

    Of a repository on the Hub only the small files and the headers of safetensors are fetched. Other formats have to be
    downloaded whole, as by `from_pretrained`.

    Args:
        source: a directory, a weight file with a config.json beside it (a GGUF file needs none), or a Hub repository.
        config_overrides: keys of config.json to replace, nested as there.
        ignore: names of tensors to leave out, as in `from_pretrained`.
        **hub: revision, subfolder, cache_dir, token and local_files_only, as in `from_pretrained`.

    Raises:
        CheckpointError: no checkpoint is there, or one of its files cannot be read.
        ConfigError: its config.json is not one of a supported MPT.
    """
    if (remote := fetch_headers(source, **hub)) is None:
        return read_checkpoint(find_checkpoint(source, **hub), config_overrides, ignore)
    files = CheckpointFiles(remote.directory, files_of(remote.directory).get(CONFIG), [], remote.weight_map)
    return _describe(files, _read_config(files), remote.files, remote.bytes, config_overrides, ignore)


def read_checkpoint(
    place: Path, config_overrides: Mapping[str, Any] | None = None, ignore: Sequence[str] = ()
) -> CheckpointInfo:
    """Returns what a checkpoint on the disk holds, with its files open.

    The tensors stay those that are described, also when the files are replaced later.

    Args:
        place: directory or weight file.
        config_overrides: as in `checkpoint_info`.
        ignore: as in `checkpoint_info`.

    Raises:
        CheckpointError: as `checkpoint_info`.
        ConfigError: as `checkpoint_info`.
    """

    def read(files: CheckpointFiles) -> tuple[CheckpointFiles, dict[str, Any] | None, list[WeightFile], int]:
        config = _read_config(files)
        size = sum(path.stat().st_size for path in files.weights)
        return files, config, [read_weight_file(path) for path in files.weights], size

    return _describe(*read_consistently(place, read), config_overrides, ignore)


def raise_if_blocked(info: CheckpointInfo) -> None:
    """Raises a CheckpointError if the checkpoint cannot be loaded, whatever the type."""
    if info.blocking_problems:
        raise CheckpointError(
            f"{info.directory}: config.json and the tensors disagree: {'; '.join(info.blocking_problems)}"
        )


def _read_config(files: CheckpointFiles) -> dict[str, Any] | None:
    """Returns the content of config.json, None without one."""
    return None if files.config is None else read_json_object(files.config)


def _describe(
    files: CheckpointFiles,
    content: dict[str, Any] | None,
    weights: Sequence[WeightFile],
    size: int,
    config_overrides: Mapping[str, Any] | None,
    ignore: Sequence[str],
) -> CheckpointInfo:
    directory = files.directory
    path = directory / CONFIG
    if content is None and (content := weights[0].config):
        # Without a file of its own the configuration may stand in the weights.
        path = directory / weights[0].tensors[0].file
    elif content is None:
        content = read_json_object(path)  # raises, and says what is missing
    formats = sorted({file.format for file in weights})
    if len(formats) > 1:
        raise CheckpointError(f"{directory}: expected shards of one format, found {first_of(formats)}")
    if not isinstance(config_overrides, Mapping | None):
        raise ConfigError(f"config_overrides: expected a dict of keys of config.json, found {config_overrides!r:.80}")
    try:
        content = override(content, config_overrides or {})
        config, quantization = read_config(content)
        as_stored = content.get(STORED_TYPES)
        check(STORED_TYPES, as_stored, either(choice(*FLOAT_NAMES), NULL))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    tensors = tuple(tensor for file in weights for tensor in file.tensors)
    check_tensor_infos(directory, tensors)
    tensors = _without(directory, tensors, ignore)
    held = {(tensor.name, tensor.file) for tensor in tensors}
    named = [item for item in files.weight_map.items() if not _matches(item[0], ignore)]
    lost = [f"{name} ({file})" for name, file in named if (name, file) not in held]
    lines = [f"{len(lost)} tensors not in the file that the index names: {first_of(lost)}"] if lost else []
    try:
        blocking = (*lines, *diagnose(config, quantization, tensors))
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
        problems=(*blocking, *type_choices(formats[0], tensors, as_stored is not None)),
        blocking_problems=blocking,
        weight_dtype=None if as_stored is None else jax.numpy.dtype(as_stored),
    )


def _without(directory: Path, tensors: tuple[TensorInfo, ...], ignore: Sequence[str]) -> tuple[TensorInfo, ...]:
    """Returns the tensors but those that a pattern of `ignore` names.

    Raises:
        CheckpointError: `ignore` is no list of patterns, or a pattern names no tensor.
    """
    if isinstance(ignore, str) or not all(isinstance(pattern, str) for pattern in ignore):
        raise CheckpointError(f"ignore: expected a list of names of tensors, such as ['score.*'], found {ignore!r:.80}")
    for pattern in ignore:
        if not any(_matches(tensor.name, [pattern]) for tensor in tensors):
            raise CheckpointError(
                f"{directory}: ignore: expected names of tensors in the checkpoint, with * for any text, found "
                f"{pattern!r:.80}, which names none"
            )
    return tuple(tensor for tensor in tensors if not _matches(tensor.name, ignore))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether a pattern is that of a tensor, by its name in the file or by the canonical one."""
    names = (name, canonical_name(name) or name)
    return any(fnmatch.fnmatchcase(n, pattern) for n in names for pattern in patterns)
