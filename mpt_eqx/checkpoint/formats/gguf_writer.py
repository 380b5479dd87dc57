"""Writing GGUF files as llama.cpp's own converter does, through the gguf library, one tensor at a time."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpt_eqx.checkpoint.formats.gguf import NAMES, TOKENIZER
from mpt_eqx.checkpoint.formats.gguf_vocabulary import Vocabulary
from mpt_eqx.checkpoint.formats.safetensors import ALIGNMENT, TensorToWrite
from mpt_eqx.checkpoint.formats.tensors import release_pages
from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import CheckpointError

TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}
"""The types that matrices are written in, with the library's numbers for files of them."""

BLOCKS = {"Q8_0": 32, "Q4_0": 32}
"""How many columns share a scale."""

CHUNK = 2**20  # numbers that are converted at once
# Numbers from here on do not fit: float16 has no such number, or no such scale.
LIMITS = {"F16": 65520.0, "Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0}


def write_gguf(
    path: Path,
    config: MPTConfig,
    tensors: Sequence[TensorToWrite],
    type: str,
    *,
    vocabulary: Vocabulary,
    name: str,
    progress: Callable[[int], object] = lambda written: None,
) -> None:
    """Writes a GGUF file, and syncs it.

    Matrices, the embedding among them, are of one type; norms, biases and learned positions are float32. Blocks of Q8_0
    and Q4_0 are those of ggml's reference quantiser.

    Args:
        path: the file.
        config: what llama.cpp computes, as `computed_by` returns it.
        tensors: the weights under canonical names; each is read when it is its turn.
        type: one of `TYPES`.
        vocabulary: the tokenizer.
        name: of the model, for people.
        progress: called after each tensor with the number of bytes that were read.

    Raises:
        CheckpointError: the gguf library is missing, or a number does not fit into the type.
        OSError: the file cannot be written.
    """
    gguf = import_gguf(path)
    writer = gguf.GGUFWriter(None, "mpt")
    writer.add_custom_alignment(ALIGNMENT)
    writer.add_name(name)
    writer.add_file_type(TYPES[type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_head_count(config.n_heads)
    if config.kv_heads != config.n_heads:
        writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_eps(config.norm_eps)
    if config.attn_config.clip_qkv is not None:
        writer.add_clamp_kqv(config.attn_config.clip_qkv)
    writer.add_max_alibi_bias(config.attn_config.alibi_bias_max if config.attn_config.alibi else 0.0)
    writer.add_vocab_size(config.vocab_size)
    _add_vocabulary(writer, config, vocabulary, gguf)
    kinds = {}
    for tensor in tensors:
        is_matrix = len(tensor.shape) == 2 and not tensor.name.startswith("transformer.wpe.")
        kind = kinds[tensor.name] = gguf.GGMLQuantizationType[type if is_matrix else "F32"]
        shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
        size = int(np.prod(shape, dtype=np.int64))
        writer.add_tensor_info(gguf_name(tensor.name), tensor.shape, np.dtype(np.float32), size, kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            array = tensor.read()
            writer.write_tensor_data(_converted(tensor.name, array, kinds[tensor.name], gguf))
            release_pages(array)
            progress(tensor.nbytes)
        for file in writer.fout:
            file.flush()
            os.fsync(file.fileno())
    finally:
        with contextlib.suppress(OSError):  # of a full disk, which was said already
            writer.close()


def import_gguf(path: Path) -> Any:
    """Returns the gguf library.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            f"{path}: writing GGUF needs the gguf library; install it with pip install 'mpt_eqx[gguf]'"
        ) from None
    return gguf


def gguf_name(name: str) -> str:
    """Returns llama.cpp's name for the tensor of a canonical name."""
    stem, _, last = name.rpartition(".")
    theirs = {ours: theirs for theirs, ours in NAMES.items()}
    if stem in theirs:
        return f"{theirs[stem]}.{last}"
    _, _, number, *rest = stem.split(".")
    return f"blk.{number}.{theirs['.'.join(rest)]}.{last}"


def _converted(name: str, array: np.ndarray, kind: Any, gguf: Any) -> np.ndarray:
    """Returns the bytes of a tensor in a type of ggml, made a few rows at a time."""
    rows = array.reshape(-1, array.shape[-1])
    result = np.empty(gguf.quants.quant_shape_to_byte_shape(rows.shape, kind), np.uint8)
    step = max(1, CHUNK // rows.shape[1])
    for at in range(0, len(rows), step):
        part = rows[at : at + step].astype(np.float32)
        if np.abs(part).max() >= LIMITS.get(kind.name, np.inf):
            raise CheckpointError(f"{name} does not fit into {kind.name}; take BF16 or F32")
        result[at : at + step] = gguf.quants.quantize(part, kind).view(np.uint8)
    return result


def _add_vocabulary(writer: Any, config: MPTConfig, vocabulary: Vocabulary, gguf: Any) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    entries = dict(vocabulary.entries)
    for name, id_ in (("bos", config.bos_token_id), ("padding", config.text_pad_token_id)):
        if id_ is not None:
            entries[f"{name}_token_id"] = id_
    own = config.eos_token_id
    ends = vocabulary.ends or (own if isinstance(own, tuple) else () if own is None else (own,))
    if ends:
        entries["eos_token_id"] = ends[0]
    if len(ends) > 1:
        entries["eot_token_id"] = ends[1]
    if vocabulary.model != "no_vocab":
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_types(vocabulary.types)
    for name, value in entries.items():
        key = f"{TOKENIZER}{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif name == "precompiled_charsmap":
            writer.add_key_value(key, bytes(value), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8)
        else:
            writer.add_array(key, value)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
