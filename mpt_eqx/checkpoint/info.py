"""What a checkpoint holds and what is wrong with it, from its headers alone."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from mpt_eqx.checkpoint.hub import find_checkpoint
from mpt_eqx.checkpoint.names import EMBEDDING, HEAD, canonical_name, named_leaves
from mpt_eqx.config import MPTConfig
from mpt_eqx.config_dialects import override, read_json_object
from mpt_eqx.errors import CheckpointError, ConfigError, first_of
from mpt_eqx.model import MPT

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The types a weight may have: safetensors' name → numpy's.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint. `dtype` is numpy's name, or safetensors' for types no weight of an MPT may have."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds.

    Attributes:
        directory: where it is.
        format: "safetensors".
        config: its configuration.
        tensors: every tensor of every file.
        parameters: how many numbers the model has.
        bytes: size of the weight files on disk.
        problems: what keeps it from being loaded, a line each; empty when nothing does.
    """

    directory: Path
    format: str
    config: MPTConfig
    tensors: tuple[TensorInfo, ...]
    parameters: int
    bytes: int
    problems: tuple[str, ...]


def checkpoint_info(
    source: str | Path, *, config_overrides: Mapping[str, Any] | None = None, **hub: Any
) -> CheckpointInfo:
    """Returns what a checkpoint holds and what is wrong with it, reading no weights.

    Args:
        source: a directory or a Hub repository id.
        config_overrides: keys of config.json to replace, nested as there.
        **hub: revision, subfolder, cache_dir, token and local_files_only, as in `from_pretrained`.

    Raises:
        CheckpointError: no checkpoint is there, or a file of it cannot be read.
        ConfigError: its config.json is not one of a supported MPT.
    """
    directory = find_checkpoint(source, **hub)
    path = directory / "config.json"
    content = read_json_object(path)
    try:
        config = MPTConfig.from_dict(override(content, config_overrides or {}))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    files, index_problems = _weight_files(directory)
    tensors = tuple(tensor for file in files for tensor in _read_header(file))
    return CheckpointInfo(
        directory=directory,
        format="safetensors",
        config=config,
        tensors=tensors,
        parameters=config.num_parameters(),
        bytes=sum(file.stat().st_size for file in files),
        problems=(*index_problems(tensors), *_differences(config, tensors)),
    )


def _weight_files(directory: Path) -> tuple[list[Path], Callable[[tuple[TensorInfo, ...]], tuple[str, ...]]]:
    """Returns the files that hold the weights, and a function from their tensors to what the index has wrong."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS], lambda tensors: ()
    if not (directory / INDEX).is_file():
        others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".gguf", ".safetensors"))
        found = f"found {first_of(others)}, which is not supported" if others else "found no weights"
        raise CheckpointError(f"{directory}: expected {WEIGHTS} or {INDEX}, {found}")

    path = directory / INDEX
    try:
        weight_map = read_json_object(path, max_bytes=100_000_000).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(
            f"{path}: expected a 'weight_map' from tensor names to file names, found {weight_map!r:.80}"
        )
    names = sorted(set(weight_map.values()))
    # The name is checked, not where it leads: the Hub's cache is made of links.
    if strange := [name for name in names if name != Path(name).name or name in ("", ".", "..") or "\\" in name]:
        raise CheckpointError(f"{path}: expected names of files beside it, found {first_of(strange)}")
    if absent := [name for name in names if not (directory / name).is_file()]:
        raise CheckpointError(f"{directory}: expected the files that {INDEX} names; missing: {first_of(absent)}")

    def problems(tensors: tuple[TensorInfo, ...]) -> tuple[str, ...]:
        held = {(tensor.name, tensor.file) for tensor in tensors}
        lost = [f"{name} ({file})" for name, file in weight_map.items() if (name, file) not in held]
        return (f"{len(lost)} tensors not in the file that {INDEX} names: {first_of(lost)}",) if lost else ()

    return [directory / name for name in names], problems


def _read_header(file: Path) -> Iterator[TensorInfo]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            for name in sorted(opened.keys()):
                part = opened.get_slice(name)
                dtype = part.get_dtype()
                yield TensorInfo(name, tuple(part.get_shape()), DTYPES.get(dtype, dtype), file.name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: expected a safetensors file, found something else or a part ({error})"
        ) from None


def _differences(config: MPTConfig, tensors: tuple[TensorInfo, ...]) -> Iterator[str]:
    """Yields how the tensors differ from those that the configuration asks for."""
    skeleton = eqx.filter_eval_shape(MPT, config, key=jax.random.key(0))
    expected = {name: leaf.shape for name, leaf in named_leaves(skeleton).items()}
    found: dict[str, TensorInfo] = {}
    twice = []
    for tensor in tensors:
        if (name := canonical_name(tensor.name)) is None:
            continue
        if name in found:
            twice.append(f"{found[name].name} ({found[name].file}) and {tensor.name} ({tensor.file})")
        found[name] = tensor
    if twice:
        yield f"{len(twice)} there twice: {first_of(twice)}"
    if config.tie_word_embeddings and HEAD in found:
        expected[HEAD] = expected[EMBEDDING]

    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found]
    unexpected = [f"{tensor.name} {list(tensor.shape)}" for name, tensor in found.items() if name not in expected]
    misshaped = [
        f"{name} (expected {list(shape)}, found {list(found[name].shape)})"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    mistyped = [f"{t.name} ({t.dtype})" for t in tensors if t.dtype not in DTYPES.values()]
    for kind, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("misshaped", misshaped),
        (f"of another type than {', '.join(DTYPES.values())}", mistyped),
    ):
        if names:
            yield f"{len(names)} {kind}: {first_of(names)}"
