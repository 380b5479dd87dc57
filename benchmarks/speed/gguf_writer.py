"""Writes a model as GGUF, so that llama.cpp can be measured on the same weights."""

from pathlib import Path
from typing import Any

import numpy as np

from mpt_eqx.checkpoint.formats.gguf import NAMES
from mpt_eqx.checkpoint.names import named_leaves
from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import CheckpointError
from mpt_eqx.model import MPT

KINDS = ("F32", "BF16", "Q8_0", "Q4_0")
"""The types that matrices are written in."""

QUANTIZED = ("Q8_0", "Q4_0")
GROUP = 32  # columns that share a scale in both of these


def write_gguf(model: MPT, file: str | Path, kind: str) -> None:
    """Writes a GGUF file as llama.cpp's converter makes it of an MPT, but without a tokenizer.

    Matrices, the embedding among them, are of type `kind`; norms and biases are float32.

    Args:
        model: the model.
        file: where to write.
        kind: "F32", "BF16", "Q8_0" or "Q4_0".

    Raises:
        CheckpointError: the gguf library is missing, or llama.cpp has no such model.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            f"{file}: writing GGUF needs the gguf library; install it with pip install 'mpt_eqx[gguf]'"
        ) from None
    if kind not in KINDS:
        raise CheckpointError(f"kind: expected {', '.join(KINDS)}, found {kind!r}")
    if reason := not_in_llama_cpp(model.config, kind):
        raise CheckpointError(f"{file}: expected a model that llama.cpp can run, found {reason}")
    config = model.config
    # Otherwise the library keeps all tensors in memory until the header is written.
    writer = gguf.GGUFWriter(file, "mpt", use_temp_file=True)
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
    writer.add_tokenizer_model("no_vocab")  # token ids are all that is ever given to it
    for name, leaf in named_leaves(model).items():
        array = np.asarray(leaf).astype(np.float32)  # exact, also of bfloat16
        type_ = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Returns llama.cpp's name for the tensor of a canonical name."""
    stem, _, last = name.rpartition(".")
    theirs = {ours: theirs for theirs, ours in NAMES.items()}
    if stem in theirs:
        return f"{theirs[stem]}.{last}"
    _, _, number, *rest = stem.split(".")
    return f"blk.{number}.{theirs['.'.join(rest)]}.{last}"


def not_in_llama_cpp(config: MPTConfig, kind: str) -> str | None:
    """Returns what of a configuration llama.cpp's MPT does not support, or None."""
    attn, ffn = config.attn_config, config.ffn_config
    wrong: list[tuple[Any, str]] = [
        (attn.rope, "rotary positions"),
        (not attn.alibi and not config.learned_pos_emb, "no positions"),
        (not attn.fused_qkv, "fused_qkv false"),
        (attn.qk_gn, "qk_gn"),
        (attn.softmax_scale is not None, "softmax_scale"),
        (attn.attn_logit_softcapping is not None, "attn_logit_softcapping"),
        (attn.sliding_window_size != -1, "sliding_window_size"),
        (config.block_overrides is not None, "block_overrides"),
        (config.logit_scale is not None, "logit_scale"),
        (config.final_logit_softcapping is not None, "final_logit_softcapping"),
        ("layernorm" not in config.norm_type, f"norm_type {config.norm_type}"),
        (ffn.ffn_type != "mptmlp", f"ffn_type {ffn.ffn_type}"),
        (ffn.ffn_act_fn is not None and ffn.ffn_act_fn.name != "gelu", "another activation than GELU"),
        (kind in QUANTIZED and config.d_model % GROUP, f"d_model {config.d_model}, no multiple of {GROUP}"),
        (kind in QUANTIZED and config.ffn_hidden_size % GROUP, f"an FFN width that is no multiple of {GROUP}"),
    ]
    return next((reason for is_so, reason in wrong if is_so), None)
