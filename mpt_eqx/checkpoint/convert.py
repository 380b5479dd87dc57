"""Converting any readable checkpoint to safetensors that load without copying, one tensor at a time."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import DTypeLike

from mpt_eqx.checkpoint.companions import read_companions, read_text_keys
from mpt_eqx.checkpoint.diagnose import stored_types
from mpt_eqx.checkpoint.formats.gguf_vocabulary import read_vocabulary
from mpt_eqx.checkpoint.formats.safetensors import TensorToWrite
from mpt_eqx.checkpoint.formats.tensors import release_pages
from mpt_eqx.checkpoint.host_arrays import is_finite, loaded_dtype
from mpt_eqx.checkpoint.hub import find_checkpoint
from mpt_eqx.checkpoint.info import CheckpointInfo, raise_if_blocked, read_checkpoint
from mpt_eqx.checkpoint.load import target_dtype, weights
from mpt_eqx.checkpoint.names import is_quantized, named_leaves, stored_name
from mpt_eqx.checkpoint.programs import gguf_path, target_for, write_target
from mpt_eqx.checkpoint.progress import byte_bar, is_shown
from mpt_eqx.checkpoint.save import parse_size, write_checkpoint
from mpt_eqx.config import MPTConfig
from mpt_eqx.config.programs import check_program, config_json_for
from mpt_eqx.config.quantization import Quantization, check_quantization
from mpt_eqx.errors import CheckpointError, ConfigError
from mpt_eqx.ops.quantized import QuantizedWeight
from mpt_eqx.surgery.quantization import quantize_weight, skeleton


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: DTypeLike | None = None,
    quantize: str | None = None,
    embeddings: bool = False,
    program: str | None = None,
    type: str | None = None,
    lossy: bool = False,
    max_shard_size: int | str = "5GB",
    config_overrides: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    progress: bool | None = None,
    **hub: Any,
) -> CheckpointInfo:
    """Writes a checkpoint of any readable format as aligned safetensors, with its tokenizer; returns what was read.

    Tensors are read, checked for NaN and infinity, converted and written one by one, so only one is in memory.

    For a program it writes what that program reads, in its own dialect. What the program ignores of the model, or
    computes otherwise, is refused by name (`mpt_eqx.config.programs.differences` lists it); with `lossy`, what the
    program does compute is written, in configuration and tensors, and `lost` of what is returned names the rest.

    Args:
        source: as in `from_pretrained`.
        destination: directory to write to, as in `save_pretrained`; not the source. For llama.cpp a .gguf file.
        dtype: as in `from_pretrained`.
        quantize: "int8" or "int4" to quantise the weights as `mpt_eqx.quantize` does; None to leave them.
        embeddings: as in `mpt_eqx.quantize`.
        program: "transformers", "llama.cpp" or "llm-foundry"; None for this library.
        type: for llama.cpp, as in `save_gguf`, in place of `dtype`.
        lossy: write what `program` computes of a model, where it does not compute the model itself.
        max_shard_size: as in `save_pretrained`.
        config_overrides: as in `from_pretrained`.
        ignore: as in `from_pretrained`.
        progress: show a bar on stderr; None for when stderr is a terminal.
        **hub: revision, subfolder, cache_dir, token and local_files_only, as in `from_pretrained`.

    Raises:
        CheckpointError: the source cannot be loaded or holds NaN or infinity, the destination cannot be written, or
            `program` does not compute this model.
        ConfigError: its config.json is not one of a supported MPT, there is no such quantisation or program, or two
            arguments exclude each other.
        MPTError: a weight does not fit the quantisation.
    """
    quantization = None if quantize is None else Quantization(quantize, embeddings)
    if quantization is not None:
        check_quantization(quantization)
    elif embeddings:
        raise ConfigError("embeddings: expected quantize='int8' or 'int4' with it, found none")
    _check_program(program, dtype, quantize, type, lossy)
    limit = parse_size(max_shard_size)
    place = gguf_path(destination) if program == "llama.cpp" else Path(destination)
    info = read_checkpoint(find_checkpoint(source, progress=progress, **hub), config_overrides, ignore)
    raise_if_blocked(info)
    unchanged = program == "llama.cpp" or (dtype is None and _has_float64(info))
    target = _stored(info) if unchanged else target_dtype(info, dtype)
    if place.exists() and any(place.samefile(path) for path in (info.directory, *_files(info))):
        raise CheckpointError(f"{place}: expected another {'file' if place.is_file() else 'directory'} than the source")
    if (quantize or program) and info.quantization is not None:
        raise CheckpointError(
            f"{info.directory}: expected weights that are not quantised, found {info.quantization.scheme}; "
            f"convert what it was made from"
        )
    if program is not None and not unchanged and target is None:
        raise CheckpointError(f"{info.directory}: expected tensors of one type for {program}; pass dtype=")
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
        return TensorToWrite(name, tensor.shape, loaded_dtype(name, tensor, target), lambda: read(name))

    companions = read_companions(info.directory / info.tensors[0].file)
    everything = {name: to_write(name) for name in named}
    if program == "llama.cpp":
        vocabulary = read_vocabulary(companions, info.config.vocab_size)
        wanted = target_for(program, info.config, everything, lossy, vocabulary)
        write_target(place, wanted, type, vocabulary, show=is_shown(progress))
        return dataclasses.replace(info, lost=tuple(wanted.differences))
    content, config, tensors = info.config.to_dict(), info.config, list(everything.values())
    if program is not None:
        config, tensors, lost = target_for(program, info.config, everything, lossy)
        content = config_json_for(program, config)
        info = dataclasses.replace(info, lost=tuple(lost))
    if quantization is not None:
        outside = target or info.weight_dtype
        assert outside is not None  # one of the two is there
        tensors = _quantized(info.config, quantization, outside, to_write, read)
    # What begins and ends a text stands in the configuration, as overrides have it.
    keys = {key: value for key, value in read_text_keys(info.directory).items() if not key.endswith("os_token_id")}
    total = sum(tensor.nbytes for tensor in tensors)
    with byte_bar(f"converting {info.directory.name}", total, is_shown(progress)) as bar:
        write_checkpoint(
            place,
            content,
            [tensor._replace(name=stored_name(tensor.name, config)) for tensor in tensors],
            limit,
            quantization=quantization or info.quantization,
            weight_dtype=info.weight_dtype if target is None else None,
            companions=companions,
            text_keys=keys,
            progress=bar.update,
        )
    return info


def _check_program(program: str | None, dtype: object, quantize: object, type: object, lossy: bool) -> None:
    """Raises where arguments of `convert` exclude each other."""
    if program is None:
        for name, value in (("type", type), ("lossy", lossy)):
            if value:
                raise ConfigError(f"{name}: expected program='transformers', 'llama.cpp' or 'llm-foundry' with it")
        return
    check_program(program)
    if quantize is not None:
        raise ConfigError(
            f"quantize: expected none for {program}, found {quantize!r}; no other program reads it (for llama.cpp take "
            f"type='Q8_0' or 'Q4_0')"
        )
    if program == "llama.cpp" and dtype is not None:
        raise ConfigError("dtype: expected none for llama.cpp, whose types are asked for by type='F16' and the like")
    if program != "llama.cpp" and type is not None:
        raise ConfigError(
            f"type: expected none for {program}, whose types are asked for by dtype='float16' and the like"
        )


def _files(info: CheckpointInfo) -> list[Path]:
    """Returns the weight files that a GGUF file must not replace."""
    return [info.directory / name for name in sorted({tensor.file for tensor in info.tensors})]


def _stored(info: CheckpointInfo) -> np.dtype | None:
    """Returns float64 where that is what all tensors have, else None: each stays as it is."""
    return np.dtype(np.float64) if _has_float64(info) else None


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
        return TensorToWrite(name, leaf.shape, leaf.dtype, lambda: np.asarray(getattr(quantize(weight), which)))

    leaves = named_leaves(skeleton(config, quantization, dtype)).items()
    return [part(name, leaf) if is_quantized(name) else to_write(name) for name, leaf in leaves]


def _has_float64(info: CheckpointInfo) -> bool:
    """Returns whether the tensors are float64, which is copied without JAX and so needs none of its settings."""
    return stored_types(info.tensors).keys() == {"float64"}
