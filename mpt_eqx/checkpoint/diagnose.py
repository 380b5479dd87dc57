"""How the tensors of a checkpoint differ from those that its configuration asks for, and what may be the cause."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence

import equinox as eqx
import jax
import numpy as np

from mpt_eqx.checkpoint.formats.tensors import FLOAT_NAMES, TensorInfo
from mpt_eqx.checkpoint.names import EMBEDDING, HEAD, canonical_name, is_quantized, named_leaves
from mpt_eqx.config import LayerConfig, MPTConfig
from mpt_eqx.config.quantization import KEY, Quantization
from mpt_eqx.errors import first_of, printable
from mpt_eqx.model.block import Block
from mpt_eqx.surgery.quantization import skeleton, with_zeros


def diagnose(config: MPTConfig, quantization: Quantization | None, tensors: Sequence[TensorInfo]) -> Iterator[str]:
    """Yields why the tensors are not those of the model: guesses at the cause, then the differences, ten of each kind.

    Raises:
        MPTError: a weight cannot be quantised as `quantization` says.
    """
    leaves = expected_tensors(config, quantization)
    expected = {name: leaf.shape for name, leaf in leaves.items()}
    types = {name: leaf.dtype.name for name, leaf in leaves.items() if is_quantized(name)}
    found: dict[str, TensorInfo] = {}
    twice = []
    for tensor in tensors:
        if (name := canonical_name(tensor.name)) is None:
            continue
        if name in found:
            twice.append(f"{found[name].name} ({found[name].file}) and {tensor.name} ({tensor.file})")
        found[name] = tensor
    if config.tie_word_embeddings and HEAD in found and EMBEDDING in expected:
        expected[HEAD] = expected[EMBEDDING]

    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found]
    unexpected = [
        f"{tensor.name} {list(tensor.shape)} ({tensor.file})" for name, tensor in found.items() if name not in expected
    ]
    misshaped = [
        f"{name} (expected {list(shape)}, found {list(found[name].shape)} in {found[name].file})"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    mistyped = [
        f"{tensor.name} ({tensor.dtype}, {tensor.file})"
        for name, tensor in found.items()
        if name not in types and tensor.dtype not in FLOAT_NAMES
    ]
    misquantized = [
        f"{name} (expected {dtype}, found {found[name].dtype} in {found[name].file})"
        for name, dtype in types.items()
        if name in found and found[name].dtype != dtype
    ]
    if missing or unexpected or misshaped:
        yield from guess_causes(config, {name: tensor.shape for name, tensor in found.items()}, set(expected))
    for kind, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("misshaped", misshaped),
        (f"of another type than {', '.join(FLOAT_NAMES)}", mistyped),
        ("quantised to another type", misquantized),
        ("there twice", twice),
    ):
        if names:
            yield f"{len(names)} {kind}: {first_of(names)}"


def type_choices(format: str, tensors: Sequence[TensorInfo], as_stored: bool) -> Iterator[str]:
    """Yields why the tensors cannot be loaded without choosing a type with `dtype=`.

    Args:
        format: the files' format.
        tensors: the tensors.
        as_stored: whether config.json says to load each in its own type.
    """
    stored = stored_types(tensors)
    if not stored.keys() <= set(FLOAT_NAMES):
        return
    if len(stored) > 1 and not as_stored and not format.startswith("GGUF"):
        examples = [f"{name} ({kind})" for kind, name in stored.items()]
        yield f"the tensors are of several types: {first_of(examples)}; pass dtype= to load them as one"
    if (stored.keys() == {"float64"} or (as_stored and "float64" in stored)) and not has_float64():
        yield "the tensors are float64, which JAX has switched off; pass dtype='float32', or set jax_enable_x64"


def has_float64() -> bool:
    """Returns whether JAX has float64, which it narrows to float32 otherwise."""
    return bool(jax.config.read("jax_enable_x64"))


def stored_types(tensors: Sequence[TensorInfo]) -> dict[str, str]:
    """Returns the types of the weights that are not quantised, each with the name of a tensor that has it."""
    named = ((canonical_name(tensor.name), tensor) for tensor in tensors)
    return {tensor.dtype: tensor.name for name, tensor in named if name is not None and not is_quantized(name)}


@functools.lru_cache(maxsize=256)  # tracing a model takes longer than loading a small one
def expected_tensors(config: MPTConfig, quantization: Quantization | None) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and types of a model's tensors by canonical name.

    They follow from one block of each kind, so that a hostile config.json of a thousand blocks costs nothing.

    Raises:
        MPTError: a weight cannot be quantised as `quantization` says.
    """

    def block(layer: LayerConfig) -> Block:
        made: Block = with_zeros(Block(config, layer, key=jax.random.key(0)), quantization, np.dtype(np.float32))
        return made

    first = "transformer.blocks.0."
    small = named_leaves(skeleton(dataclasses.replace(config, n_layers=1, block_overrides=None), quantization))
    expected = {name: leaf for name, leaf in small.items() if not name.startswith(first)}
    # By whether a block reads another one's keys and values, or computes its own from another one's input. Whatever
    # else block_overrides change, it is no tensor.
    kinds = {(True, True): {name.removeprefix(first): leaf for name, leaf in small.items() if name.startswith(first)}}
    for i, layer in enumerate(config.layers):
        kind = (layer.kv_from is None, layer.kv_x_from is None)
        if kind not in kinds:
            leaves = named_leaves(eqx.filter_eval_shape(block, layer))
            kinds[kind] = {name.removeprefix("transformer."): leaf for name, leaf in leaves.items()}
        expected |= {f"transformer.blocks.{i}.{name}": leaf for name, leaf in kinds[kind].items()}
    return expected


def guess_causes(config: MPTConfig, found: Mapping[str, tuple[int, ...]], expected: set[str]) -> Iterator[str]:
    """Yields the keys of config.json that the tensors contradict.

    Args:
        config: the configuration.
        found: shapes of the checkpoint's tensors by canonical name.
        expected: canonical names of the model's tensors.
    """
    other = sorted({name.split(".")[0] for name in found if not name.startswith(("transformer.", "lm_head."))})
    if adapters := [name for name in found if "lora_" in name]:
        yield f"there are {len(adapters)} tensors of a LoRA that is not merged: merge it in PEFT (merge_and_unload)"
    elif other:
        patterns = ", ".join(f"'{printable(root)}.*'" for root in other[:5])
        yield f"the tensors have what is no part of an MPT, such as another head; ignore=[{patterns}] leaves it out"
    if packed := sum(name.endswith(".qweight") for name in found):
        yield f"{packed} weights are packed by GPTQ, AWQ or their like: take the checkpoint that this one was made from"
    quantised = sum(is_quantized(name) for name in found)
    if bool(quantised) != any(is_quantized(name) for name in expected):
        says, hold = ("has no", f"hold {quantised} of") if quantised else ("has a", "hold none of")
        yield f"config.json {says} {KEY}, the tensors {hold} quantised weights"
    blocks = [int(match[1]) for name in found if (match := re.match(r"transformer\.blocks\.(\d+)\.", name))]
    if blocks and max(blocks) + 1 != config.n_layers:
        yield f"config.json says n_layers {config.n_layers}, the tensors have {max(blocks) + 1} blocks"
    if (wte := found.get(EMBEDDING)) and len(wte) == 2 and wte != (config.vocab_size, config.d_model):
        yield (
            f"config.json says vocab_size {config.vocab_size} and d_model {config.d_model}, "
            f"the embedding is {wte[0]} by {wte[1]}"
        )
    for part, key in (
        ("norm_1.bias", "no_bias"),
        ("attn.Wqkv.bias", "attention_bias"),
        ("attn.q_ln.", "qk_ln or qk_gn"),
    ):
        there, wanted = any(part in name for name in found), any(part in name for name in expected)
        if there != wanted:
            yield f"config.json's {key} does not fit: there are {'' if there else 'no '}tensors {part.strip('.')}"
    wpe = "transformer.wpe.weight"
    if (wpe in found) != (wpe in expected):
        says, holds = ("asks for", "no") if wpe in expected else ("does not ask for", "a")
        yield f"config.json {says} learned positions (learned_pos_emb, no alibi, no rope), the tensors have {holds} wpe"
    if HEAD in expected and HEAD not in found:
        yield "config.json says tie_word_embeddings false, the tensors have no lm_head"
    qkv = found.get("transformer.blocks.0.attn.Wqkv.weight")
    rows = (config.n_heads + 2 * config.kv_heads) * config.head_size
    if qkv and len(qkv) == 2 and qkv[1] == config.d_model and qkv[0] != rows:
        kv = (qkv[0] - config.d_model) / 2 / config.head_size
        yield (
            f"config.json says {config.n_heads} heads over {config.kv_heads} of keys and values, so {rows} rows of "
            f"Wqkv; its {qkv[0]} rows would be {kv:g} heads of keys and values (attn_type, kv_n_heads)"
        )
