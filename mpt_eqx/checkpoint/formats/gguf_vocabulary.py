"""The files of a tokenizer as the entries of a GGUF header: the other direction of `gguf_tokenizer`.

llama.cpp has byte-level BPE with GPT-2's words (`tokenizer.ggml.model` gpt2), SentencePiece's BPE (llama) and its
unigram model (t5). A tokenizer of another kind is left out, and the file is one for token ids only.

Sources: as for `gguf_tokenizer`; the keys of tokenizer.json are those of the tokenizers library.
"""

import dataclasses
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from mpt_eqx.checkpoint.formats.gguf_tokenizer import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNUSED,
    USER_DEFINED,
)
from mpt_eqx.errors import CheckpointError

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model")
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # in settings, and in the header


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as a GGUF header says it.

    Attributes:
        model: "gpt2", "llama", "t5", or "no_vocab" for none.
        tokens: the tokens in the order of their ids.
        types: what kind each is.
        entries: the other entries, by the name behind "tokenizer.ggml.".
        ends: the ids that end a text, as generation_config.json says.
        template: the chat template.
        problems: what llama.cpp does not do with this tokenizer, a line each.
    """

    model: str = "no_vocab"
    tokens: Sequence[str] = ()
    types: Sequence[int] = ()
    entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ends: Sequence[int] = ()
    template: str | None = None
    problems: Sequence[str] = ()


def read_vocabulary(files: Mapping[str, bytes], size: int) -> Vocabulary:
    """Returns the tokenizer in the files of a checkpoint, with tokens that no text has for rows without one.

    Args:
        files: their content by name, as `read_companions` returns it.
        size: rows of the embedding.

    Raises:
        CheckpointError: a file is damaged, or there are more tokens than rows.
    """
    try:
        found = _read(files)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"expected the files of a tokenizer, found damaged ones ({text:.200})") from None
    if found.model == "no_vocab":
        return found
    if (count := len(found.tokens)) > size:
        raise CheckpointError(
            f"expected at most {size} tokens in the tokenizer, as many as the embedding has rows, found {count}; make "
            f"more rows with mpt_eqx.surgery.resize_vocab(model, {count})"
        )
    fill = range(count, size)
    tokens, types = [*found.tokens, *(f"[PAD{i}]" for i in fill)], [*found.types, *(UNUSED for _ in fill)]
    return dataclasses.replace(found, tokens=tokens, types=types)


def _read(files: Mapping[str, bytes]) -> Vocabulary:
    settings = _object(files, "tokenizer_config.json")
    pieces = next((files[name] for name in SENTENCEPIECE if name in files), None)
    found = _byte_level(_object(files, "tokenizer.json")) if "tokenizer.json" in files else Vocabulary()
    if found.model == "no_vocab" and pieces is not None:
        found = _sentencepiece(pieces, _added(files, settings), settings)
    ids = {token: i for i, token in enumerate(found.tokens)}
    named = {**_object(files, "special_tokens_map.json"), **settings}
    special = {}
    for theirs, ours in SPECIAL.items():
        token = named.get(f"{theirs}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            special[f"{ours}_token_id"] = ids[token]
    template = (
        files["chat_template.jinja"].decode() if "chat_template.jinja" in files else settings.get("chat_template")
    )
    ends = _object(files, "generation_config.json").get("eos_token_id")
    return dataclasses.replace(
        found,
        entries={**special, **found.entries},
        template=template if isinstance(template, str) else None,
        ends=[] if ends is None else ends if isinstance(ends, list) else [ends],
    )


def _left_out(reason: str) -> Vocabulary:
    return Vocabulary(problems=[f"left out, because {reason}: the file takes token ids only"])


def _byte_level(d: Mapping[str, Any]) -> Vocabulary:
    """Returns the tokenizer of a tokenizer.json, or why llama.cpp has none of its kind."""
    model, normalizer, words = d["model"], d.get("normalizer") or {}, d.get("pre_tokenizer") or {}
    if normalizer.get("type") == "Sequence" and len(normalizer["normalizers"]) < 2:
        normalizer = next(iter(normalizer["normalizers"]), {})
    begin, end, is_known = _ends_of_text(d.get("post_processor"))
    wrong = [
        reason
        for is_so, reason in (
            (model.get("type", "BPE") != "BPE" or model.get("byte_fallback"), "no byte-level BPE"),
            (words.get("type") != "ByteLevel" or not words.get("use_regex", True), "other words than GPT-2's"),
            (normalizer.get("type", "NFC") != "NFC", "another normalizer than NFC"),
            (bool(model.get("ignore_merges")), "ignore_merges"),
            (bool(model.get("dropout")), "dropout"),
            (bool(model.get("continuing_subword_prefix")), "continuing_subword_prefix"),
            (bool(model.get("end_of_word_suffix")), "end_of_word_suffix"),
            (not is_known, "a post_processor that is not known"),
        )
        if is_so
    ]
    if wrong:
        return _left_out(f"tokenizer.json has {wrong[0]}")
    added = {token["id"]: token for token in d.get("added_tokens") or ()}
    named = {id_: token for token, id_ in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    types = {i: CONTROL if token.get("special") else USER_DEFINED for i, token in added.items()}
    entries: dict[str, Any] = {
        "pre": "mpt" if normalizer else "gpt-2",
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "add_bos_token": begin is not None,
        "add_eos_token": end is not None,
    }
    entries |= {} if begin is None else {"bos_token_id": begin}
    entries |= {} if end is None else {"eos_token_id": end}
    problems = []
    if words.get("add_prefix_space", True):
        entries["add_space_prefix"] = True
        problems.append("no space is put before a text")
    if greedy := [t["content"] for t in added.values() if t.get("lstrip") or t.get("rstrip") or t.get("single_word")]:
        problems.append(f"an added token takes no space beside it, and is found within words: {greedy[0]!r:.60}")
    ids = range(max(named) + 1)
    return Vocabulary(
        "gpt2",
        [named.get(i, f"[PAD{i}]") for i in ids],
        [types.get(i, NORMAL) if i in named else UNUSED for i in ids],
        entries,
        problems=problems,
    )


def _ends_of_text(processor: Mapping[str, Any] | None) -> tuple[int | None, int | None, bool]:
    """Returns the tokens that a post-processor puts before and after a text, and whether it does nothing else."""
    steps = [] if processor is None else processor["processors"] if processor["type"] == "Sequence" else [processor]
    begin = end = None
    for step in steps:
        if step["type"] == "TemplateProcessing":
            names = [part["SpecialToken"]["id"] if "SpecialToken" in part else None for part in step["single"]]
            at = names.index(None)
            before, after = ([step["special_tokens"][n]["ids"] for n in part] for part in (names[:at], names[at + 1 :]))
            if any(len(part) > 1 or any(len(ids) != 1 for ids in part) for part in (before, after)):
                return None, None, False
            begin, end = (part[0][0] if part else None for part in (before, after))
        elif step["type"] != "ByteLevel":
            return None, None, False
    return begin, end, True


def _sentencepiece(proto: bytes, added: Mapping[int, tuple[str, bool]], settings: Mapping[str, Any]) -> Vocabulary:
    """Returns a SentencePiece model with added tokens, which follow its own."""
    model = _fields(proto)
    pieces = [_fields(piece) for piece in model[1]]
    trainer, normalizer = (_fields(model[field][-1]) if field in model else {} for field in (2, 3))

    def number(fields: Mapping[int, list[Any]], field: int, default: int) -> int:
        value = fields.get(field, [default])[-1]
        return value - 2**64 if value >= 2**63 else value

    kind = number(trainer, 3, UNIGRAM)
    if kind not in (UNIGRAM, BPE):
        return Vocabulary(
            problems=[
                "left out, because its SentencePiece model has words or characters: the file takes token ids only"
            ]
        )
    tokens = [piece[1][0].decode() for piece in pieces]
    types = [number(piece, 3, NORMAL) for piece in pieces]
    scores = [struct.unpack("<f", piece[2][0])[0] if 2 in piece else 0.0 for piece in pieces]
    count = max([len(tokens), *(id_ + 1 for id_ in added)])
    for i in range(len(tokens), count):
        token, special = added.get(i, (f"[PAD{i}]", None))
        tokens.append(token)
        types.append(UNUSED if special is None else CONTROL if special else USER_DEFINED)
        scores.append(0.0)
    charsmap = normalizer.get(2, [b""])[-1]
    entries = {
        "scores": scores,
        "add_bos_token": settings.get("add_bos_token") is True,
        "add_eos_token": settings.get("add_eos_token") is True,
        "add_space_prefix": bool(number(normalizer, 3, 1)),
        "remove_extra_whitespaces": bool(number(normalizer, 4, 1)),
        **({"precompiled_charsmap": list(charsmap)} if charsmap else {}),
    }
    ids = (("unknown", number(trainer, 40, 0)), ("bos", number(trainer, 41, 1)), ("eos", number(trainer, 42, 2)))
    for name, id_ in (*ids, ("padding", number(trainer, 43, -1))):
        if 0 <= id_ < len(pieces):
            entries[f"{name}_token_id"] = id_
    for name in ("bos", "eos"):  # what the settings name counts, unless the model itself puts its own there
        content = settings.get(f"{name}_token")
        content = content.get("content") if isinstance(content, dict) else content
        if not entries[f"add_{name}_token"] and content in tokens:
            entries[f"{name}_token_id"] = tokens.index(content)
    problems = []
    if kind == BPE and (charsmap or entries["remove_extra_whitespaces"]):
        problems.append("a text is not normalised, as this SentencePiece model asks for")
    if kind == UNIGRAM and BYTE in types:
        problems.append("a character without a token becomes the unknown token, and not bytes")
    return Vocabulary("llama" if kind == BPE else "t5", tokens, types, entries, problems=problems)


def _added(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Returns the tokens that other files add to a SentencePiece model, and whether each is special, by id."""
    found = {id_: (token, False) for token, id_ in _object(files, "added_tokens.json").items()}
    for id_, token in (settings.get("added_tokens_decoder") or {}).items():
        found[int(id_)] = (token["content"], bool(token.get("special")))
    return found


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    content = json.loads(files.get(name, b"{}"))
    if not isinstance(content, dict):
        raise ValueError(f"{name} is no JSON object")
    return content


def _fields(message: bytes) -> dict[int, list[Any]]:
    """Returns the fields of a protocol buffer by number: whole numbers, and bytes for all else."""
    found: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        value: Any
        if (wire := key & 7) == 0:
            value = varint()
        elif wire in (1, 2, 5):
            size = varint() if wire == 2 else 8 if wire == 1 else 4
            value, at = message[at : at + size], at + size
            if len(value) < size:
                raise ValueError("a SentencePiece model ends early")
        else:
            raise ValueError(f"a SentencePiece model has a field of the unknown kind {wire}")
        found.setdefault(key >> 3, []).append(value)
    return found
