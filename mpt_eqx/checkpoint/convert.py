"""Converting any readable checkpoint to safetensors that load without copying, one tensor at a time."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import DTypeLike

from mpt_eqx.checkpoint.companions import read_companions, read_text_keys
from mpt_eqx.checkpoint.diagnose import stored_types
from mpt_eqx.checkpoint.formats.safetensors import TensorToWrite
from mpt_eqx.checkpoint.formats.tensors import release_pages
from mpt_eqx.checkpoint.host_arrays import is_finite, loaded_dtype
from mpt_eqx.checkpoint.hub import find_checkpoint
from mpt_eqx.checkpoint.info import CheckpointInfo, raise_if_blocked, read_checkpoint
from mpt_eqx.checkpoint.load import target_dtype, weights
from mpt_eqx.checkpoint.names import is_quantized, named_leaves, stored_name
from mpt_eqx.checkpoint.progress import byte_bar, is_shown
from mpt_eqx.checkpoint.save import parse_size, write_checkpoint
from mpt_eqx.config import MPTConfig
from mpt_eqx.config.quantization import Quantization, check_quantization
from mpt_eqx.errors import CheckpointError, ConfigError
from mpt_eqx.model import MPT
from mpt_eqx.ops.quantized import QuantizedWeight
from mpt_eqx.surgery.quantization import quantize_weight, with_zeros


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: DTypeLike | None = None,
    quantize: str | None = None,
    embeddings: bool = False,
    max_shard_size: int | str = "5GB",
    config_overrides: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    progress: bool | None = None,
    **hub: Any,
) -> CheckpointInfo:
    """Writes a checkpoint of any readable format as aligned safetensors, with its tokenizer; returns what was read.

    Tensors are read, checked for NaN and infinity, converted and written one by one, so only one is in memory.

    Args:
        source: as in `from_pretrained`.
        destination: directory to write to, as in `save_pretrained`; not the source.
        dtype: as in `from_pretrained`.
        quantize: "int8" or "int4" to quantise the weights as `mpt_eqx.quantize` does; None to leave them.
        embeddings: as in `mpt_eqx.quantize`.
        max_shard_size: as in `save_pretrained`.
        config_overrides: as in `from_pretrained`.
        ignore: as in `from_pretrained`.
        progress: show a bar on stderr; None for when stderr is a terminal.
        **hub: revision, subfolder, cache_dir, token and local_files_only, as in `from_pretrained`.

    Raises:
        CheckpointError: the source cannot be loaded or holds NaN or infinity, or the destination cannot be written.
        ConfigError: its config.json is not one of a supported MPT, or there is no such quantisation.
        MPTError: a weight does not fit the quantisation.
    """
    quantization = None if quantize is None else Quantization(quantize, embeddings)
    if quantization is not None:
        check_quantization(quantization)
    elif embeddings:
        raise ConfigError("embeddings: expected quantize='int8' or 'int4' with it, found none")
    limit = parse_size(max_shard_size)
    info = read_checkpoint(find_checkpoint(source, progress=progress, **hub), config_overrides, ignore)
    raise_if_blocked(info)
    target = target_dtype(info, dtype) if dtype is not None or not _has_float64(info) else np.dtype(np.float64)
    directory = Path(destination)
    if directory.exists() and directory.samefile(info.directory):
        raise CheckpointError(f"{directory}: expected another directory than the source")
    if quantization is not None and info.quantization is not None:
        raise CheckpointError(
            f"{info.directory}: expected weights that are not quantised, found {info.quantization.scheme}; "
            f"convert what it was made from"
        )
    named = weights(info)

    def read(name: str) -> np.ndarray:
        tensor = named[name]
        view = tensor.read()
        if not is_finite(view):
            raise CheckpointError(f"{info.directory / tensor.file}: {tensor.name} holds NaN or infinity")
        with np.errstate(over="ignore"):  # looked for in the next line
            array = view.astype(loaded_dtype(name, tensor, target), copy=False)
        if array is not view and not is_finite(array):
            raise CheckpointError(f"{info.directory / tensor.file}: {tensor.name} does not fit into {array.dtype.name}")
        if array is not view:
            release_pages(view)
        return array

    def to_write(name: str) -> TensorToWrite:
        tensor = named[name]
        dtype = loaded_dtype(name, tensor, target)
        return TensorToWrite(stored_name(name, info.config), tensor.shape, dtype, lambda: read(name))

    if quantization is None:
        tensors = [to_write(name) for name in named]
    else:
        outside = target or info.weight_dtype
        assert outside is not None  # one of the two is there
        tensors = _quantized(info.config, quantization, outside, to_write, read)
    # What begins and ends a text stands in the configuration, as overrides have it.
    keys = {key: value for key, value in read_text_keys(info.directory).items() if not key.endswith("os_token_id")}
    total = sum(tensor.nbytes for tensor in tensors)
    with byte_bar(f"converting {info.directory.name}", total, is_shown(progress)) as bar:
        write_checkpoint(
            directory,
            info.config,
            tensors,
            limit,
            quantization=quantization or info.quantization,
            weight_dtype=info.weight_dtype if target is None else None,
            companions=read_companions(info.directory / info.tensors[0].file),
            text_keys=keys,
            progress=bar.update,
        )
    return info


def _quantized(
    config: MPTConfig,
    quantization: Quantization,
    dtype: np.dtype,
    to_write: Callable[[str], TensorToWrite],
    read: Callable[[str], np.ndarray],
) -> list[TensorToWrite]:
    """Returns the tensors of the quantised model; `to_write` and `read` are for those of the source."""

    @functools.lru_cache(maxsize=1)  # because the two arrays of a weight are written one after the other
    def quantize(name: str) -> QuantizedWeight:
        array = read(name)
        weight = quantize_weight(name, array, quantization.scheme)
        release_pages(array)
        return weight

    def part(name: str, leaf: jax.ShapeDtypeStruct) -> TensorToWrite:
        weight, _, which = name.rpartition(".")
        return TensorToWrite(
            stored_name(name, config), leaf.shape, leaf.dtype, lambda: np.asarray(getattr(quantize(weight), which))
        )

    model = eqx.filter_eval_shape(lambda: with_zeros(MPT(config, key=jax.random.key(0)), quantization, dtype))
    leaves = named_leaves(model).items()
    return [part(name, leaf) if is_quantized(name) else to_write(name) for name, leaf in leaves]


def _has_float64(info: CheckpointInfo) -> bool:
    """Returns whether the tensors are float64, which is copied without JAX and so needs none of its settings."""
    return stored_types(info.tensors).keys() == {"float64"}
