"""The tokenizer in the header of a GGUF file, as the tokenizer files of other checkpoints.

Sources: the names and meanings of the header's keys are those of llama.cpp's docs of GGUF; the fields of a
SentencePiece model are those of its sentencepiece_model.proto.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpt_eqx.checkpoint.formats.gguf import SCALARS, TEXT, scan_header
from mpt_eqx.errors import CheckpointError, printable

KEYS = "tokenizer."
# How struct calls the scalar types of the header.
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Ways to split a text into words that are GPT-2's; older files of MPT have none of these names.
GPT2_WORDS = (None, "default", "mpt", "gpt-2", "gpt2", "olmo")
COMPOSED = ("mpt", "olmo")
"""Those whose tokenizers compose characters first (NFC), as that of GPT-NeoX does, which is MPT's."""

UNIGRAM, BPE = 1, 2


def read_gguf_tokenizer(file: Path) -> dict[str, bytes]:
    """Returns the files of the tokenizer in a GGUF file, by name; empty without one.

    They are tokenizer.json for byte-level BPE and tokenizer.model for SentencePiece, each with a tokenizer_config.json.

    Raises:
        CheckpointError: the header is damaged, or the tokenizer is of another kind.
    """
    try:
        data = np.memmap(file, mode="r")
        scan_header(data)  # after which no length leads past the end of the file
        header = _tokenizer_entries(data.data)
        if not header.get("ggml.tokens"):
            return {}
        kind = header.get("ggml.model")
        if kind not in ("gpt2", "llama", "t5"):
            raise CheckpointError(
                f"{file}: expected tokenizer.ggml.model 'gpt2', 'llama' or 't5', found {printable(str(kind))!r}; put "
                f"the model's tokenizer.json beside the file"
            )
        words = header.get("ggml.pre")
        if kind == "gpt2" and words not in GPT2_WORDS:
            raise CheckpointError(
                f"{file}: expected words as GPT-2 splits them (tokenizer.ggml.pre of mpt or gpt-2), found "
                f"{printable(str(words))!r}; put the model's tokenizer.json beside the file"
            )
        settings = _settings(header)
        if kind == "gpt2":
            files = {"tokenizer.json": _byte_level(header)}
        else:
            files = {"tokenizer.model": _sentencepiece(header)}
            settings["added_tokens_decoder"] = _added(header)
        ends = [header.get(f"ggml.{name}_token_id") for name in ("eos", "eot")]
        if None not in ends and ends[0] != ends[1]:
            files["generation_config.json"] = _json({"eos_token_id": ends})
        return files | {"tokenizer_config.json": _json(settings)}
    except CheckpointError:
        raise
    except Exception as error:
        text = printable(" ".join(str(error).split()) or type(error).__name__, limit=200)
        raise CheckpointError(f"{file}: expected a tokenizer in its header, found a damaged one ({text})") from None


def _tokenizer_entries(data: memoryview) -> dict[str, Any]:
    """Returns the entries of a header about the tokenizer, without the beginning of their names."""
    at = 16

    def number(kind: int) -> Any:
        nonlocal at
        at += SCALARS[kind]
        return struct.unpack_from("<" + FORMATS[kind], data, at - SCALARS[kind])[0]

    def text() -> str:
        nonlocal at
        size = number(10)
        at += size
        return bytes(data[at - size : at]).decode("utf-8", errors="replace")

    def value(kind: int) -> Any:
        nonlocal at
        if kind in SCALARS:
            return number(kind)
        if kind == TEXT:
            return text()
        inner, count = number(4), number(10)
        if inner == TEXT:
            return [text() for _ in range(count)]
        at += count * SCALARS[inner]
        return list(struct.unpack_from(f"<{count}{FORMATS[inner]}", data, at - count * SCALARS[inner]))

    found = {}
    for _ in range(number(10)):
        key, kind = text(), number(4)
        content = value(kind)
        if key.startswith(KEYS):
            found[key.removeprefix(KEYS)] = content
    return found


def _byte_level(header: Mapping[str, Any]) -> bytes:
    """Returns the tokenizer.json of byte-level BPE."""
    tokens, types = _tokens(header)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"expected tokens that differ, found {len(tokens) - len(vocab)} twice")
    added = [
        {
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            **{"id": i, "content": token, "special": types[i] == CONTROL},
        }
        for i, token in enumerate(tokens)
        if types[i] in (CONTROL, USER_DEFINED)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    template: dict[str, Any] = {**byte_level, "trim_offsets": False}
    ids = {name: header.get(f"ggml.{name}_token_id") for name in ("bos", "eos")}
    begin, end = (
        [id_] if header.get(f"ggml.add_{name}_token") and id_ is not None else [] for name, id_ in ids.items()
    )
    if begin or end:
        one, other = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
        before, after = ([{"SpecialToken": {"id": tokens[id_], "type_id": 0}} for id_ in ids] for ids in (begin, end))
        template = {
            "type": "TemplateProcessing", "single": [*before, one, *after], "pair": [*before, one, *after, other],
            "special_tokens": {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in begin + end},
        }  # fmt: skip
    return _json(
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "NFC"} if header.get("ggml.pre") in COMPOSED else None,
            "pre_tokenizer": {**byte_level, "add_prefix_space": bool(header.get("ggml.add_space_prefix", False))},
            "post_processor": template,
            "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                "merges": header.get("ggml.merges", []),
            },
        }
    )  # fmt: skip


def _sentencepiece(header: Mapping[str, Any]) -> bytes:
    """Returns the SentencePiece model."""
    tokens, types = _tokens(header)
    tokens, types = tokens[: _model_size(types)], types[: _model_size(types)]
    scores = header.get("ggml.scores") or [0.0] * len(tokens)
    # SentencePiece's BPE numbers its tokens down, its unigram model has logarithms of probabilities.
    ranked = all(score == int(score) for score, kind in zip(scores, types, strict=False) if kind == NORMAL)
    pieces = b"".join(
        _field(1, _field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=False)
    )
    trainer = (
        _number(3, BPE if ranked and header["ggml.model"] != "t5" else UNIGRAM)
        + _number(4, len(tokens))
        + _number(35, int(BYTE in types))
    )
    for field, name in ((40, "unknown"), (41, "bos"), (42, "eos"), (43, "padding")):
        id_ = header.get(f"ggml.{name}_token_id", -1 if field != 40 else types.index(UNKNOWN))
        trainer += _number(field, id_ if id_ < len(tokens) else -1)
    charsmap = bytes(byte & 255 for byte in header.get("ggml.precompiled_charsmap") or ())
    normalizer = (_field(2, charsmap) if charsmap else b"") + _number(3, int(header.get("ggml.add_space_prefix", True)))
    normalizer += _number(4, int(header.get("ggml.remove_extra_whitespaces", False))) + _number(5, 1)
    return pieces + _field(2, trainer) + _field(3, normalizer)


def _added(header: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tokens that a SentencePiece model does not have itself, as tokenizer_config.json says it."""
    tokens, types = _tokens(header)
    ids = range(_model_size(types), len(tokens))
    return {str(i): {"content": tokens[i], "special": types[i] == CONTROL} for i in ids}


def _model_size(types: Sequence[int]) -> int:
    """Returns the number of a SentencePiece model's own tokens: those that control something come first in one."""
    return max((i + 1 for i, kind in enumerate(types) if kind not in (CONTROL, USER_DEFINED, UNUSED)), default=0)


def _tokens(header: Mapping[str, Any]) -> tuple[list[str], Sequence[int]]:
    """Returns the tokens and their types, without those at the end that only fill the embedding's rows."""
    tokens = header["ggml.tokens"]
    types = header.get("ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"expected a type for each of {len(tokens)} tokens, found {len(types)}")
    count = len(tokens)
    while count and types[count - 1] == UNUSED:
        count -= 1
    return tokens[:count], types[:count]


def _settings(header: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json."""
    tokens = header["ggml.tokens"]
    settings: dict[str, Any] = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        id_ = header.get(f"ggml.{key}_token_id")
        if id_ is not None and 0 <= id_ < len(tokens):
            settings[f"{name}_token"] = tokens[id_]
    if isinstance(template := header.get("chat_template"), str):
        settings["chat_template"] = template
    for key in ("add_bos_token", "add_eos_token"):
        settings[key] = bool(header.get(f"ggml.{key}", False))
    return settings


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()


def _field(number: int, content: bytes) -> bytes:
    """Returns a field of a protocol buffer that holds bytes."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    """Returns a field of a protocol buffer that holds a whole number; a negative one has 64 bits."""
    return _varint(number << 3) + _varint(value & (2**64 - 1))


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])
