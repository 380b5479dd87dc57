"""Whether what `save_pretrained` would write of a model loads back equal, asked before anything is written."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import numpy as np

from mpt_eqx.checkpoint.diagnose import has_float64
from mpt_eqx.checkpoint.formats.tensors import FLOAT_NAMES
from mpt_eqx.config.quantization import Quantization
from mpt_eqx.errors import CheckpointError, MPTError
from mpt_eqx.model import MPT
from mpt_eqx.model.leaves import is_array
from mpt_eqx.ops.quantized import QuantizedWeight
from mpt_eqx.sharding.qkv import split_qkv
from mpt_eqx.surgery.quantization import quantization_of, skeleton

KEEP = "keep the model as it is with equinox.tree_serialise_leaves"
PUT_BACK = f"put that there with mpt_eqx.surgery.replace, or {KEEP}"
# What a module may have otherwise: a layout is made anew at loading, remat is for training, and the type of a quantised
# weight is written.
FREE = ("layout", "config", "dtype", "remat")


def check_savable(model: Any) -> tuple[Quantization | None, np.dtype | None]:
    """Returns how the model is quantised, and the type of its quantised weights; None and None if it is not.

    Raises:
        CheckpointError: the model would not load back equal. The message names a leaf or module that is not what
            `model.config` asks for.
        MPTError: only some of its matrices are quantised.
    """
    if not isinstance(model, MPT):
        raise CheckpointError(f"model: expected an MPT, found {_kind(model)}; pass the MPT inside, or {KEEP}")
    nodes = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, QuantizedWeight))
    quantized = [node for node in nodes if isinstance(node, QuantizedWeight)]
    scheme = "int4" if quantized and quantized[0].values.dtype == np.uint8 else "int8"
    guess = Quantization(scheme, isinstance(getattr(model.wte, "weight", None), QuantizedWeight)) if quantized else None
    try:
        quantization = quantization_of(model)
    except MPTError as error:
        if problem := _first_difference(model, guess):
            raise MPTError(f"{error}; {problem}") from None
        raise
    if problem := _first_difference(model, quantization):
        raise CheckpointError(problem)
    types = {node.dtype for node in quantized}
    if len(types) > 1:
        raise CheckpointError(
            f"model: expected quantised weights of one type, found {' and '.join(sorted(t.name for t in types))} in "
            f"QuantizedWeight.dtype; quantise a model in one type, or {KEEP}"
        )
    return quantization, next(iter(types), None)


def _first_difference(model: MPT, quantization: Quantization | None) -> str | None:
    """Returns what the first thing is that `model.config` asks for otherwise, None if nothing."""
    try:
        wanted = skeleton(model.config, quantization)
    except MPTError as error:  # such a quantisation is not possible
        return str(error)
    if model.layout is not None and (model.layout.rules.heads or model.layout.rules.kv_heads):
        wanted = split_qkv(wanted)
    return next(_differences(model, wanted, ""), None)


def _differences(found: Any, wanted: Any, name: str) -> Any:
    """Yields what differs in a part of a model, a line each."""
    if isinstance(wanted, jax.ShapeDtypeStruct):
        yield from _leaf_differences(found, wanted, name)
    elif dataclasses.is_dataclass(wanted) and isinstance(wanted, eqx.Module):
        if name and type(found) is not type(wanted):
            plain = type(wanted).__name__
            asked = f"an {plain}" if plain[0] in "AEIOU" else f"a {plain}"
            yield (
                f"{name}: expected {asked}, which model.config asks for, found {_kind(found)}; put a plain {plain} "
                f"there with mpt_eqx.surgery.replace (of a LoRA its merged weight, as mpt_eqx.lora.merge makes it, "
                f"of a wrapper what it wraps), or {KEEP}"
            )
            return
        for field in dataclasses.fields(wanted):
            path = f"{name}.{field.name}" if name else field.name
            if field.name in FREE:
                continue
            one, other = getattr(found, field.name), getattr(wanted, field.name)
            if not field.metadata.get("static"):
                yield from _differences(one, other, path)
            elif one != other:
                yield f"{path}: expected {other!r:.80}, which model.config asks for, found {one!r:.80}; {PUT_BACK}"
    elif isinstance(wanted, tuple):
        if not isinstance(found, tuple) or len(found) != len(wanted):
            count = f"{len(found)} of them" if isinstance(found, tuple) else _kind(found)
            yield (
                f"{name}: expected {len(wanted)}, as model.config.n_layers says, found {count}; take blocks with "
                f"mpt_eqx.surgery.keep_blocks, which changes model.config, too, or {KEEP}"
            )
            return
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            yield from _differences(one, other, f"{name}.{i}")
    elif wanted is None:
        if found is not None:
            yield (
                f"{name}: expected nothing there, as model.config asks for, found {_kind(found)}; take it out with "
                f"equinox.tree_at, give the model a config that asks for it, or {KEEP}"
            )
    elif isinstance(wanted, bool):
        if not isinstance(found, bool):  # the switch of inference_mode may stand either way
            yield f"{name}: expected true or false, found {_kind(found)}"
    elif found is not wanted and found != wanted:
        yield f"{name}: expected {wanted!r:.80}, which model.config asks for, found {found!r:.80}; {PUT_BACK}"


def _leaf_differences(found: Any, wanted: jax.ShapeDtypeStruct, name: str) -> Any:
    """Yields what differs in one array."""
    asked = f"{name}: expected an array of shape {list(wanted.shape)}, which model.config asks for"
    if not is_array(found) or isinstance(found, jax.ShapeDtypeStruct):
        yield f"{asked}, found {_kind(found)}; put the array there with equinox.tree_at, or {KEEP}"
    elif isinstance(found, jax.core.Tracer):
        yield f"{name}: expected an array, found a value that is being traced; save outside jit and grad"
    elif isinstance(found, jax.Array) and found.is_deleted():
        yield f"{name}: expected an array, found one whose memory was donated; save the model that came out of the step"
    elif tuple(found.shape) != wanted.shape:
        rows = tuple(found.shape[1:]) == wanted.shape[1:] and name.startswith(("wte.", "lm_head."))
        way = f"mpt_eqx.surgery.resize_vocab(model, {found.shape[0]}) makes the config agree" if rows else (
            "make an MPT of a config with these sizes and put the arrays there with equinox.tree_at"
        )  # fmt: skip
        yield f"{asked}, found {list(found.shape)}; {way}, or {KEEP}"
    elif name.endswith((".values", ".scale")):
        if found.dtype != wanted.dtype:
            yield (
                f"{name}: expected {wanted.dtype.name}, found {found.dtype}; cast the other arrays of a quantised "
                f"model only, or quantise it again"
            )
    elif found.dtype.name not in FLOAT_NAMES:
        yield f"{name}: expected {' or '.join(FLOAT_NAMES)}, found {found.dtype}; cast it, or {KEEP}"
    elif found.dtype == np.float64 and not has_float64():
        yield f"{name}: found float64, which JAX has switched off; cast it to float32, or set jax_enable_x64"


def _kind(value: Any) -> str:
    if is_array(value):
        return f"an array of shape {list(value.shape)}"
    return (
        f"{value!r}"
        if value is None or isinstance(value, int | float)
        else f"{type(value).__module__}.{type(value).__name__}"
    )
