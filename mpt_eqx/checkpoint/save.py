"""Saving: config.json and safetensors that llm-foundry, transformers and `from_pretrained` read."""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpt_eqx.checkpoint.atomic import replace_checkpoint
from mpt_eqx.checkpoint.checkpoint_files import CONFIG
from mpt_eqx.checkpoint.companions import read_companions, read_text_keys
from mpt_eqx.checkpoint.formats.safetensors import TensorToWrite, write_order, write_safetensors
from mpt_eqx.checkpoint.host_arrays import gather_to_host
from mpt_eqx.checkpoint.hub import find_checkpoint
from mpt_eqx.checkpoint.names import is_quantized, named_leaves, stored_name
from mpt_eqx.checkpoint.savable import check_savable
from mpt_eqx.config.keys import STORED_TYPES
from mpt_eqx.config.quantization import KEY, Quantization
from mpt_eqx.errors import CheckpointError
from mpt_eqx.model import MPT
from mpt_eqx.model.stacked import unstack
from mpt_eqx.sharding.multihost import run_or_raise_everywhere
from mpt_eqx.sharding.qkv import is_qkv_slice, qkv_slice_of

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def save_pretrained(
    model: MPT,
    directory: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    companions_from: str | Path | None = None,
) -> None:
    """Writes config.json and model.safetensors, or shards and an index, under llm-foundry's tensor names.

    Saving is crash-safe: if it ends early, by an error, a full disk or a killed process, the directory holds the old
    checkpoint or the new one. The same is true for whoever loads meanwhile. (Other programs may see the new weights a
    moment before the new config.json.)

    Shards that replace others get new names, such as model-1a2b3c4d-00001-of-00002.safetensors. Weights of an earlier
    save are removed; other files stay. On Windows a file in use cannot be replaced: load with mmap=False what you save
    to again.

    A model that `mpt_eqx.quantize` made stays quantised. Only this library reads that; transformers refuses it.

    What is written loads back equal, each array in its own type. Weights of several types are noted in config.json;
    other programs convert them to one. A model that would not load back equal, because its arrays or modules are not
    those of its configuration, is refused before anything is written.

    Args:
        model: the model.
        directory: where to write; made if it does not exist.
        max_shard_size: largest size of a weight file, in bytes or as "200MB"; a larger tensor gets its own file.
        companions_from: the checkpoint that the model was made from, as `source` in `from_pretrained`. Its tokenizer,
            generation_config.json and what else it says about text are written, too. None for the weights and the
            configuration only, which has the tokens that begin and end a text.

    Raises:
        CheckpointError: the model would not load back equal, `max_shard_size` is not a size, the directory cannot be
            written, another save into it is in progress, or `companions_from` is no checkpoint or says nothing about
            text.
        MPTError: only some of the model's matrices are quantised.
        ShardingError: the first process, which writes a model on several, failed.
    """
    limit = parse_size(max_shard_size)
    model = unstack(model) if isinstance(model, MPT) else model
    quantization, weight_dtype = check_savable(model)
    tensors = [to_write(stored_name(name, model.config), parts) for name, parts in whole_tensors(model).items()]

    def write(tensors: Sequence[TensorToWrite]) -> None:
        companions, keys = (None, None) if companions_from is None else text_of(companions_from)
        write_checkpoint(
            Path(directory),
            model.config.to_dict(),
            tensors,
            limit,
            quantization=quantization,
            weight_dtype=weight_dtype,
            companions=companions,
            text_keys=keys,
        )

    if model.layout is not None and model.layout.several_processes:
        run_or_raise_everywhere(lambda: _write_in_first_process(write, tensors, limit))
    else:
        write(tensors)


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Sequence[TensorToWrite],
    limit: int,
    *,
    quantization: Quantization | None = None,
    weight_dtype: np.dtype | None = None,
    companions: Mapping[str, bytes] | None = None,
    text_keys: Mapping[str, Any] | None = None,
    progress: Callable[[int], object] = lambda written: None,
) -> None:
    """Writes a checkpoint as `save_pretrained` promises it.

    Args:
        directory: where to write; made if it does not exist.
        config: the content of config.json.
        tensors: the weights; each is read when it is its turn.
        limit: largest size of a weight file in bytes.
        quantization: how the weights are quantised; None if they are not.
        weight_dtype: the type of quantised weights, where it may be another than that of the other tensors.
        companions: other files for the directory, such as a tokenizer: their content by name.
        text_keys: what config.json says besides about text.
        progress: called after each tensor with the number of bytes written.

    Raises:
        CheckpointError: the directory cannot be written, or another save into it is in progress.
    """
    shards = _split(tensors, limit)
    types = [tensor.dtype.name for tensor in tensors if not is_quantized(tensor.name)]
    dtype = types[0] if weight_dtype is None else weight_dtype.name
    keys = {"dtype": dtype, "torch_dtype": dtype} | ({KEY: quantization.to_dict()} if quantization else {})
    if {dtype, *types} != {dtype}:
        keys[STORED_TYPES] = dtype

    def make_index(files: Sequence[str]) -> bytes:
        weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for tensor in tensors)
        return _json({"metadata": {"total_size": total}, "weight_map": weight_map})

    try:
        small_files = {**(companions or {}), CONFIG: _json({**(text_keys or {}), **config, **keys})}
        writers = [functools.partial(write_safetensors, tensors=shard, progress=progress) for shard in shards]
        replace_checkpoint(directory, writers, small_files, make_index)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written ({error})") from error


def parse_size(size: int | str) -> int:
    """Returns the bytes of a size such as "200MB".

    Raises:
        CheckpointError: it is not a size.
    """
    match = re.fullmatch(r"(\d+) ?(KB|MB|GB|)", str(size))
    if not match or not int(match[1]):
        raise CheckpointError(f"max_shard_size: expected bytes or a size such as '200MB' or '5GB', found {size!r}")
    return int(match[1]) * UNITS[match[2]]


def whole_tensors(model: MPT) -> dict[str, list[jax.Array | np.ndarray]]:
    """Returns the weights by the canonical names of the tensors; that of a Wqkv may be in its three parts."""
    tensors: dict[str, list[jax.Array | np.ndarray]] = {}
    for name, leaf in named_leaves(model).items():
        fused = model.layout is not None and is_qkv_slice(name, model.config)
        tensors.setdefault(qkv_slice_of(name, model.config)[0] if fused else name, []).append(leaf)
    return tensors


def to_write(name: str, parts: Sequence[jax.Array | np.ndarray]) -> TensorToWrite:
    """Returns a tensor of these parts, one below the other."""
    first, types = parts[0], sorted({part.dtype.name for part in parts})
    if len(types) > 1:
        raise CheckpointError(f"{name}: expected its three parts in one type, found {' and '.join(types)}; cast them")
    shape = (sum(len(part) for part in parts), *first.shape[1:]) if len(parts) > 1 else first.shape

    def read() -> np.ndarray:
        arrays = [gather_to_host(part) for part in parts]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    return TensorToWrite(name, shape, jax.numpy.dtype(types[0]), read)


def text_of(source: str | Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Returns the files of a checkpoint that are about text, and the keys of its config.json that are."""
    place = find_checkpoint(source, with_weights=str(source).endswith(".gguf"))
    directory = place.parent if place.is_file() else place
    companions, keys = read_companions(place), read_text_keys(directory)
    if not companions and not keys:
        raise CheckpointError(
            f"companions_from: expected a checkpoint with a tokenizer or another file about text, found none in "
            f"{directory}; leave companions_from out"
        )
    return companions, keys


def _write_in_first_process(
    write: Callable[[Sequence[TensorToWrite]], None], tensors: Sequence[TensorToWrite], limit: int
) -> None:
    """Calls `write` in the first process. Reading a tensor takes all processes, also after writing failed."""
    order = [tensor for shard in _split(tensors, limit) for tensor in write_order(shard)]
    unread = {tensor.name: tensor.read for tensor in order}

    def read_once(name: str) -> np.ndarray:
        return unread.pop(name)()

    try:
        if jax.process_index() == 0:
            write([tensor._replace(read=functools.partial(read_once, tensor.name)) for tensor in tensors])
    finally:
        for tensor in order:
            if tensor.name in unread:
                read_once(tensor.name)


def _split(tensors: Sequence[TensorToWrite], limit: int) -> list[list[TensorToWrite]]:
    """Returns the tensors in files of at most `limit` bytes, in order."""
    shards: list[list[TensorToWrite]] = [[]]
    room = limit
    for tensor in tensors:
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
