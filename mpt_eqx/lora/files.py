"""PEFT's files: adapter_config.json and adapter_model.safetensors."""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpt_eqx.checkpoint.atomic import sync_directory, write_synced
from mpt_eqx.checkpoint.checkpoint_files import ADAPTER
from mpt_eqx.checkpoint.formats.detect import check_tensor_infos, read_weight_file
from mpt_eqx.checkpoint.formats.safetensors import TensorToWrite, write_safetensors
from mpt_eqx.checkpoint.formats.tensors import FLOAT_NAMES, TensorInfo
from mpt_eqx.checkpoint.host_arrays import gather_to_host
from mpt_eqx.checkpoint.names import canonical_name
from mpt_eqx.config.json_file import read_json_object
from mpt_eqx.config.validation import BOOLEAN, Check, check, is_number, number, shown, whole
from mpt_eqx.errors import CheckpointError, ConfigError, MPTError, first_of, printable
from mpt_eqx.lora.adapters import (
    adapter_dtype,
    adapters,
    is_split,
    is_stacked,
    last_of,
    linears,
    map_linears,
    remove,
    shape_of,
    with_adapter,
)
from mpt_eqx.lora.linear import LoRALinear
from mpt_eqx.model import MPT
from mpt_eqx.model.linear import Linear
from mpt_eqx.ops.switches import model_function
from mpt_eqx.sharding.multihost import run_or_raise_everywhere

WEIGHTS = "adapter_model.safetensors"
TORCH_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the model that it wraps."""

TENSOR = re.compile(r"transformer\.(blocks\.\d+\.(?:attn|ffn)\.\w+)\.lora_([AB])\.weight")

DEFAULT_TARGETS = ("Wqkv",)
"""PEFT's for MPT."""

PROBABILITY = Check("a number from 0 to below 1", lambda value: is_number(value) and 0 <= value < 1)
READ: dict[str, tuple[Any, Check]] = {
    "r": (8, whole(1, 2**16)),
    "lora_alpha": (8, number()),
    "lora_dropout": (0.0, PROBABILITY),
    "use_rslora": (False, BOOLEAN),
}
"""The settings that are read, each with PEFT's default."""

FREE = {
    *("peft_type", "target_modules", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("peft_version", "auto_mapping", "megatron_core", "qalora_group_size", "eva_config", *READ),
}
"""The keys with any value: what is read, and what changes no number. (qalora_group_size does with use_qalora alone.)"""

KEEP_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""The values of init_lora_weights that leave the weights of the base as they are."""


def save(model: MPT, directory: str | Path, *, base: str | None = None) -> None:
    """Writes the adapters of a model as PEFT does: adapter_config.json and adapter_model.safetensors.

    `peft.PeftModel.from_pretrained(base_model, directory)` and `load` read them. If saving ends early, the directory
    holds the old adapter, the new one, or none that can be loaded, and never a mixture.

    Args:
        model: a model with adapters, of one rank, alpha and dropout. They are written in their own type.
        directory: where to write; made if it does not exist.
        base: what the base model is called, a directory or Hub repository id, which PEFT's AutoPeftModel loads.

    Raises:
        MPTError: the model has no adapters.
        CheckpointError: adapters differ in more than their numbers, or the directory cannot be written.
    """
    found = adapters(model)
    if not found:
        raise MPTError("model: expected one with adapters, found none; there is nothing to save")
    first_name, first = next(iter(found.items()))
    settings = _settings(first)
    for name, adapter in found.items():
        if (other := _settings(adapter)) != settings:
            raise CheckpointError(
                f"{name}: expected {settings} as {first_name}, found {other}; an adapter's files hold one rank, alpha "
                "and dropout for all"
            )
    targets = sorted({last_of(name) for name in found})
    if {name for name in linears(model) if last_of(name) in targets} != set(found):  # only in some of the blocks
        targets = sorted(layer for name in found for layer in _layers(model, name))
    content = {
        **settings,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }
    tensors = []
    for name, adapter in found.items():
        for part in ("lora_A", "lora_B"):
            weight: Any = getattr(adapter, part).weight
            gathered = gather_to_host(weight)
            for i, layer in enumerate(_layers(model, name)):
                array = gathered[i] if is_stacked(model) else gathered
                tensors.append(_to_write(f"{PREFIX}transformer.{layer}.{part}.weight", array))

    def write() -> None:
        if jax.process_index() == 0:
            _write(Path(directory), (json.dumps(content, indent=2, sort_keys=True) + "\n").encode(), tensors)

    run_or_raise_everywhere(write)


@model_function
def load(model: MPT, directory: str | Path) -> MPT:
    """Returns the model with the adapters in a directory of PEFT's files, which `save` and PEFT write.

    The model's own arrays stay those that they are, so that several adapters on one base share it. Adapters that the
    model has are replaced. Those that are read are float32 (float64 in a float64 model), as in PEFT, and their dropout
    is off until `equinox.nn.inference_mode(model, False)`.

    Args:
        model: the base, in any type, quantised, stacked or on a mesh.
        directory: with adapter_config.json, and adapter_model.safetensors or adapter_model.bin.

    Raises:
        CheckpointError: there is no adapter, it has settings that this library does not compute (the message names
            them), or its tensors are not those that it needs for this model.
    """
    directory, base = Path(directory), remove(model)
    settings, targets = _read_config(directory)
    tensors = _read_tensors(directory)
    known = [layer for name in linears(base) for layer in _layers(base, name)]
    wanted = {layer for layer in known if any(_is_target(layer, target) for target in targets)}
    for target in targets:
        if not any(_is_target(layer, target) for layer in known):
            split = " (rules that shard heads have split Wqkv: shard with mpt_eqx.sharding.FSDP)" * is_split(base)
            raise CheckpointError(
                f"{directory / ADAPTER}: target_modules: expected linear maps of this model's blocks, "
                f"{', '.join(dict.fromkeys(map(last_of, known)))}, found {printable(target)!r}{split}"
            )
    if strange := sorted({layer for layer, _ in tensors} - wanted):
        raise CheckpointError(
            f"{directory}: expected tensors of what target_modules names in {len(base.blocks)} blocks, found some of "
            f"{first_of(strange)}; the adapter is another model's"
        )
    if missing := sorted(f"{layer}.lora_{ab}" for layer in wanted for ab in "AB" if (layer, ab) not in tensors):
        raise CheckpointError(
            f"{directory}: expected tensors of all that target_modules names, missing: {first_of(missing)}"
        )
    dtype = adapter_dtype(base)

    def read(layer: str, ab: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = tensors[layer, ab]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{directory / tensor.file}: {tensor.name}: expected {list(shape)}, of rank r={settings['r']} for this "
                f"model, found {list(tensor.shape)}"
            )
        return np.asarray(tensor.read()).astype(dtype)

    def wrap(name: str, linear: Linear | LoRALinear) -> Linear | LoRALinear:
        layers = _layers(base, name)
        there = [layer for layer in layers if layer in wanted]
        if not there or isinstance(linear, LoRALinear):
            return linear
        if there != layers:
            raise CheckpointError(
                f"{directory}: expected adapters of all blocks alike, because the model is stacked, found only "
                f"{first_of(there)}; load it into mpt_eqx.unstack(model)"
            )
        *_, out, columns = shape_of(linear)
        shapes = {"A": (settings["r"], columns), "B": (out, settings["r"])}
        parts = {ab: [read(layer, ab, shape) for layer in layers] for ab, shape in shapes.items()}
        a, b = (np.stack(arrays) if is_stacked(base) else arrays[0] for arrays in parts.values())
        rank, alpha, dropout, rslora = (settings[key] for key in READ)
        return with_adapter(linear, a, b, rank, alpha, dropout, rslora=rslora, inference=True)

    return map_linears(wrap, base)


def _settings(adapter: LoRALinear) -> dict[str, Any]:
    """Returns what of an adapter's files is the same for all of its maps."""
    dropout = 0.0 if adapter.dropout is None else float(adapter.dropout.p)
    alpha = int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha
    return {"r": adapter.rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": adapter.rslora}


def _layers(model: MPT, name: str) -> list[str]:
    """Returns the names of a linear map in each layer, of stacked blocks all, else its own."""
    if not is_stacked(model):
        return [name]
    return [name.replace("blocks.block.", f"blocks.{i}.") for i in range(len(model.blocks))]


def _to_write(name: str, array: np.ndarray) -> TensorToWrite:
    return TensorToWrite(name, array.shape, jax.numpy.dtype(array.dtype), lambda: array)


def _write(directory: Path, config: bytes, tensors: list[TensorToWrite]) -> None:
    """Writes both files under other names first. Without adapter_config.json, which comes last, there is no adapter."""
    mark = secrets.token_hex(4)

    writers: Mapping[str, Callable[[Path], None]] = {
        WEIGHTS: lambda path: write_safetensors(path, tensors),
        ADAPTER: lambda path: write_synced(path, config),
    }
    new = {name: directory / f"{name}.mpt_eqx-{mark}" for name in writers}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            write(new[name])
        (directory / ADAPTER).unlink(missing_ok=True)
        for name, path in new.items():
            sync_directory(directory)
            os.replace(path, directory / name)
        sync_directory(directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written ({error})") from error
    finally:
        for path in new.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _read_config(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the settings that READ names, and the targets."""
    path = directory / ADAPTER
    if not path.is_file():
        raise CheckpointError(f"{directory}: expected an adapter of PEFT, found no {ADAPTER}")
    try:
        content = read_json_object(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if content.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type: expected 'LORA', found {shown(content.get('peft_type'))}")
    settings = {key: content.get(key, default) for key, (default, _) in READ.items()}
    for key, (_, wanted) in READ.items():
        check(f"{path}: {key}", settings[key], wanted, CheckpointError)
    if (how := content.get("init_lora_weights")) not in KEEP_BASE:
        raise CheckpointError(
            f"{path}: init_lora_weights: expected true, false or another that leaves the base as it is, found "
            f"{shown(how)}; convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, value in content.items():
        neutral = value in (None, False, "none") or value in ([], {})
        if key not in FREE and key != "init_lora_weights" and not neutral:
            raise CheckpointError(
                f"{path}: {key}: expected nothing, because it changes what an adapter computes, found {shown(value)}; "
                "merge the adapter in PEFT, with merge_and_unload(), and load the whole model"
            )
    targets = content.get("target_modules")
    targets = list(DEFAULT_TARGETS) if targets is None else targets
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(
            f"{path}: target_modules: expected a list of names, such as {list(DEFAULT_TARGETS)}, found {shown(targets)}"
        )
    return settings, targets


def _read_tensors(directory: Path) -> dict[tuple[str, str], TensorInfo]:
    """Returns the tensors of an adapter by the linear map, such as blocks.0.attn.Wqkv, and A or B."""
    path = next((directory / name for name in (WEIGHTS, TORCH_WEIGHTS) if (directory / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{directory}: expected {WEIGHTS} or {TORCH_WEIGHTS} beside {ADAPTER}, found neither")
    infos = read_weight_file(path).tensors
    check_tensor_infos(directory, infos)
    found: dict[tuple[str, str], TensorInfo] = {}
    for tensor in infos:
        match = TENSOR.fullmatch(canonical_name(tensor.name) or "")
        if match is None:
            raise CheckpointError(
                f"{path}: expected lora_A and lora_B of linear maps in blocks only, such as "
                f"{PREFIX}transformer.blocks.0.attn.Wqkv.lora_A.weight, found {printable(tensor.name)}"
            )
        if match.groups() in found:
            raise CheckpointError(f"{path}: {tensor.name}: expected it once, found it under two names")
        if tensor.dtype not in FLOAT_NAMES:
            raise CheckpointError(f"{path}: {tensor.name}: expected {' or '.join(FLOAT_NAMES)}, found {tensor.dtype}")
        found[match[1], match[2]] = tensor
    return found


def _is_target(layer: str, target: str) -> bool:
    """Tells whether a linear map is one that a name means: the whole name or the end of it after a dot, as in PEFT."""
    return f".transformer.{layer}".endswith(f".{target}")
