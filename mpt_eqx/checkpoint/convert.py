"""Converting: any readable checkpoint to safetensors that load in place, one tensor at a time."""

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import DTypeLike

from mpt_eqx.checkpoint.arrays import byte_bar, finite, kept_dtype
from mpt_eqx.checkpoint.diagnose import stored_types
from mpt_eqx.checkpoint.files import files_of
from mpt_eqx.checkpoint.formats.safetensors import Outgoing
from mpt_eqx.checkpoint.info import CheckpointInfo, read_checkpoint
from mpt_eqx.checkpoint.load import refuse_problems, target_dtype, weights
from mpt_eqx.checkpoint.names import is_quantised, named_leaves, stored_name
from mpt_eqx.checkpoint.save import parse_size, write_checkpoint
from mpt_eqx.config import MPTConfig
from mpt_eqx.config.quantization import Quantization, check_quantization
from mpt_eqx.errors import CheckpointError, ConfigError
from mpt_eqx.model import MPT
from mpt_eqx.ops.quantized import QuantizedWeight
from mpt_eqx.surgery.quantization import quantized, with_zeros

COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "tokenizer.model"),
)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: DTypeLike | None = None,
    quantize: str | None = None,
    embeddings: bool = False,
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
        quantize: "int8" or "int4" to write what `mpt_eqx.quantize` makes of the loaded model; None for no such thing.
        embeddings: as in `mpt_eqx.quantize`.
        max_shard_size: as in `save_pretrained`.
        config_overrides: as in `from_pretrained`.
        progress: a bar on stderr; None means if stderr is a terminal.
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
    info = read_checkpoint(source, config_overrides=config_overrides, progress=progress, **hub)
    refuse_problems(info)
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
    shown = sys.stderr.isatty() if progress is None else progress

    def read(name: str) -> np.ndarray:
        tensor = named[name]
        view = tensor.read()
        if not finite(view):
            raise CheckpointError(f"{info.directory / tensor.file}: {tensor.name} holds NaN or infinity")
        with np.errstate(over="ignore"):  # looked for in the next line
            array = view.astype(kept_dtype(name, tensor, target), copy=False)
        if array is not view and not finite(array):
            raise CheckpointError(f"{info.directory / tensor.file}: {tensor.name} does not fit into {target.name}")
        return array

    def outgoing(name: str) -> Outgoing:
        tensor = named[name]
        dtype = kept_dtype(name, tensor, target)
        return Outgoing(stored_name(name, info.config), tensor.shape, dtype, lambda: read(name))

    if quantization is None:
        tensors = [outgoing(name) for name in named]
    else:
        tensors = _quantised(info.config, quantization, target, outgoing, read)
    companions = [path for name, path in files_of(info.directory).items() if name in COMPANIONS]
    total = sum(tensor.nbytes for tensor in tensors)
    with byte_bar(f"converting {info.directory.name}", total, shown) as bar:
        write_checkpoint(
            directory,
            info.config,
            tensors,
            limit,
            quantization=quantization or info.quantization,
            companions=companions,
            progress=bar.update,
        )
    return info


def _quantised(
    config: MPTConfig,
    quantization: Quantization,
    dtype: np.dtype,
    outgoing: Callable[[str], Outgoing],
    read: Callable[[str], np.ndarray],
) -> list[Outgoing]:
    """Returns the tensors of the quantised model; `outgoing` and `read` are those of the tensors of the source."""

    @functools.lru_cache(maxsize=1)  # because the two arrays of a weight are written one after the other
    def made(name: str) -> QuantizedWeight:
        return quantized(name, read(name), quantization.scheme)

    def part(name: str, leaf: jax.ShapeDtypeStruct) -> Outgoing:
        weight, _, which = name.rpartition(".")
        return Outgoing(
            stored_name(name, config), leaf.shape, leaf.dtype, lambda: np.asarray(getattr(made(weight), which))
        )

    key = jax.random.key(0)
    model = eqx.filter_eval_shape(lambda: with_zeros(MPT(config, key=key), quantization, dtype))
    leaves = named_leaves(model).items()
    return [part(name, leaf) if is_quantised(name) else outgoing(name) for name, leaf in leaves]


def _has_float64(info: CheckpointInfo) -> bool:
    """Tells whether the tensors are float64, which is copied without JAX and so needs none of its settings."""
    return stored_types(info.tensors).keys() == {"float64"}
