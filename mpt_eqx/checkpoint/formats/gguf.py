"""GGUF files, as llama.cpp reads and writes them, through the gguf library's reader and dequantisers."""

from pathlib import Path
from typing import Any

import numpy as np

from mpt_eqx.checkpoint.formats.tensors import FLOATS, MAX_TENSORS, TensorInfo, release_pages
from mpt_eqx.config.keys import TEXT_PADDING
from mpt_eqx.errors import CheckpointError, printable

# llama.cpp's name → llm-foundry's. Blocks are "blk.N." there and "transformer.blocks.N." here.
NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.norm_f",
    "output": "lm_head",
    "attn_norm": "norm_1",
    "attn_qkv": "attn.Wqkv",
    "attn_q_norm": "attn.q_ln",
    "attn_k_norm": "attn.k_ln",
    "attn_output": "attn.out_proj",
    "ffn_norm": "norm_2",
    "ffn_up": "ffn.up_proj",
    "ffn_down": "ffn.down_proj",
}
# Bytes of the scalar types of the header, by their number; 8 is text, 9 an array.
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, ARRAY = 8, 9
# Of a header's entries and of texts in arrays; a vocabulary of 130 000 with its merges has 400 000 of the last.
MAX_ENTRIES = 10_000
MAX_TEXTS = 1_000_000
MAX_RANK = 4
TOKENIZER = "tokenizer.ggml."


def read_gguf(file: Path) -> tuple[list[TensorInfo], dict[str, Any], str]:
    """Returns the tensors of a GGUF file, the config.json that its header amounts to, and its types.

    Tensors stored as they are become views of the file; quantised ones become float32 when they are read.

    Raises:
        CheckpointError: the gguf library is missing, or the file is damaged or holds another architecture.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            f"{file}: reading GGUF needs the gguf library; install it with pip install 'mpt_eqx[gguf]'"
        ) from None
    try:
        data = np.memmap(file, mode="r")
        arrays = scan_header(data)

        class Reader(gguf.GGUFReader):
            """The library's reader, which would make ten objects of every token of the vocabulary."""

            def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
                if (size := arrays.get(orig_offs)) is not None:
                    return size, [], [], [gguf.GGUFValueType.ARRAY]
                return super()._get_field_parts(orig_offs, raw_type)

        reader = Reader(file)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        ids = (f"{TOKENIZER}{name}_token_id" for name in ("bos", "eos", "eot", "padding"))
        fields |= {name: reader.fields[name].contents() for name in ids if name in reader.fields}
        if fields.get("general.architecture") != "mpt":
            raise ValueError(f"expected general.architecture 'mpt', found {fields.get('general.architecture')!r}")
        # Parts of the file that several tensors shared would let a small file fill the memory.
        if (total := sum(tensor.n_bytes for tensor in reader.tensors)) > len(data):
            raise ValueError(f"expected tensors of at most the file's {len(data)} bytes, found {total} bytes of them")
        tensors = [_tensor_info(tensor, file, gguf) for tensor in reader.tensors]
        types = sorted({tensor.tensor_type.name for tensor in reader.tensors})
        return tensors, _config(fields, {tensor.name: tensor.shape for tensor in tensors}), ", ".join(types)
    except Exception as error:
        # The library meets damage with errors of many kinds.
        text = printable(" ".join(str(error).split()), limit=200)
        raise CheckpointError(
            f"{file}: expected a GGUF file of an MPT, found something else or a part ({text})"
        ) from None


def _tensor_info(tensor: Any, file: Path, gguf: Any) -> TensorInfo:
    shape = tuple(int(n) for n in reversed(tensor.shape))
    kind = tensor.tensor_type
    dtype = FLOATS.get(kind.name)

    def read() -> np.ndarray:
        if dtype is None:
            values: np.ndarray = gguf.quants.dequantize(tensor.data, kind)
            release_pages(tensor.data)
        else:
            values = tensor.data.reshape(-1).view(np.uint8).view(dtype)
        return values.reshape(shape)

    # A type that the library cannot dequantise keeps its own name, by which it is refused.
    type_name = "float32" if dtype is not None or _is_readable(kind, gguf) else kind.name
    return TensorInfo(_name(tensor.name), shape, type_name if dtype is None else dtype.name, file.name, read)


def _is_readable(kind: Any, gguf: Any) -> bool:
    """Returns whether the library can dequantise a type, by trying one block."""
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in NAMES:
        return f"transformer.blocks.{parts[1]}.{NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in NAMES:
        return f"{NAMES[parts[0]]}.{parts[1]}"
    return name


def _config(fields: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns a config.json from a GGUF header; what the header lacks follows from which tensors there are."""

    def value(name: str, default: Any = None) -> Any:
        return fields.get(f"mpt.{name}", default)

    heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")
    width = value("embedding_length")
    alibi = _float(value("attention.max_alibi_bias", 0.0))
    biased = "transformer.blocks.0.ffn.up_proj.bias" in shapes
    attn_config: dict[str, Any] = {
        "alibi": alibi > 0,
        "alibi_bias_max": alibi or 8,
        "clip_qkv": _float(value("attention.clamp_kqv", 0.0)),
        "qk_ln": "transformer.blocks.0.attn.q_ln.weight" in shapes,
    }
    if kv_heads not in (None, heads):
        attn_config |= {"attn_type": "grouped_query_attention", "kv_n_heads": kv_heads}
    vocab_size = shapes["transformer.wte.weight"][0]
    # What begins and ends a text; a number that is no token says that there is none.
    found = {name: fields.get(f"{TOKENIZER}{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    text: dict[str, Any] = {name: id_ for name, id_ in found.items() if isinstance(id_, int) and 0 <= id_ < vocab_size}
    ends = {text[name] for name in ("eos", "eot") if name in text}
    if (turn := text.pop("eot", None)) is not None and len(ends) > 1:
        text["eos"] = [text["eos"], turn]
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    return {
        "model_type": "mpt",
        **{names[name]: id_ for name, id_ in text.items()},
        TEXT_PADDING: "padding" in text,
        "d_model": width,
        "n_heads": heads,
        "n_layers": value("block_count"),
        "max_seq_len": value("context_length"),
        "vocab_size": vocab_size,
        "norm_eps": _float(value("attention.layer_norm_epsilon", 1e-5)),
        "no_bias": not biased,
        "attention_bias": "transformer.blocks.0.attn.Wqkv.bias" in shapes,
        "learned_pos_emb": "transformer.wpe.weight" in shapes,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "attn_config": attn_config,
        "ffn_config": {"ffn_hidden_size": value("feed_forward_length")},
    }


def _float(value: Any) -> float:
    """Returns the shortest decimal that is this float32: 1e-05, not 9.99999974737875e-06."""
    return float(str(np.float32(value)))


def scan_header(data: np.ndarray) -> dict[int, int]:
    """Checks a header, because the library would follow lengths that lead past the end of the file.

    Returns the size in bytes of each array by its offset, so that the library can skip them.
    """
    at, texts = 4, 0
    arrays = {}

    def number(size: int) -> int:
        nonlocal at
        if at + size > len(data):
            raise ValueError("the header ends early")
        at += size
        return int.from_bytes(bytes(data[at - size : at]), "little")

    def skip(size: int) -> None:
        nonlocal at
        if size > len(data) - at:
            raise ValueError("the header ends early")
        at += size

    def skip_value(kind: int) -> None:
        nonlocal texts
        if kind in SCALARS:
            skip(SCALARS[kind])
        elif kind == TEXT:
            skip(number(8))
        elif kind == ARRAY:
            start, inner, count = at, number(4), number(8)
            if inner in SCALARS:
                skip(SCALARS[inner] * count)
            elif inner == TEXT:
                texts = _bounded(texts + count, MAX_TEXTS, "texts in arrays")
                for _ in range(count):
                    skip(number(8))
            else:
                raise ValueError(f"unknown type {inner} in an array of the header")
            arrays[start] = at - start
        else:
            raise ValueError(f"unknown type {kind} in the header")

    if bytes(data[:4]) != b"GGUF" or number(4) not in (2, 3):
        raise ValueError("expected GGUF version 2 or 3, little-endian")
    tensors = _bounded(number(8), MAX_TENSORS, "tensors")
    entries = _bounded(number(8), MAX_ENTRIES, "entries")
    for _ in range(entries):
        skip(number(8))
        skip_value(number(4))
    for _ in range(tensors):
        skip(number(8))
        rank = number(4)
        if rank > MAX_RANK:
            raise ValueError(f"a tensor has {rank} dimensions")
        skip(8 * rank + 4 + 8)
    return arrays


def _bounded(count: int, most: int, what: str) -> int:
    if count > most:
        raise ValueError(f"expected at most {most} {what} in the header, found {count}")
    return count
