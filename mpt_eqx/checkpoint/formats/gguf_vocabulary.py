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
"""The files of a SentencePiece model, in the order in which they are looked for."""

ADDED_ENDS = {"LlamaTokenizer": (True, False), "CodeLlamaTokenizer": (True, False), "GemmaTokenizer": (True, False)}
"""Classes of transformers that begin or end every text with a token, unless tokenizer_config.json says otherwise."""

GPT2_CLASSES = {"GPT2Tokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizer", "GPTNeoXTokenizerFast"}
"""Those of transformers that split text as GPT-2 does, and add nothing but what add_bos_token says."""

MOST = 10_000_000  # tokens, so that a file cannot fill the memory
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # in settings, and in the header


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as a GGUF header says it.

    Attributes:
        model: "gpt2", "llama", "t5", or "no_vocab" for none.
        tokens: the tokens in the order of their ids.
        types: what kind each is.
        entries: the other entries, by the name behind "tokenizer.ggml.".
        fixed: those of them that nothing else may change: the tokens that are put before and after a text.
        ends: the ids that end a text, as generation_config.json says.
        template: the chat template.
        problems: what llama.cpp does not do with this tokenizer, a line each.
    """

    model: str = "no_vocab"
    tokens: Sequence[str] = ()
    types: Sequence[int] = ()
    entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, int] = dataclasses.field(default_factory=dict)
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
    entries = dict(found.entries)
    if "scores" in entries:  # llama.cpp wants one for each
        entries["scores"] = [*entries["scores"], *[0.0] * len(fill)]
    return dataclasses.replace(found, tokens=tokens, types=types, entries=entries)


def _read(files: Mapping[str, bytes]) -> Vocabulary:
    settings = _object(files, "tokenizer_config.json")
    pieces = next((files[name] for name in SENTENCEPIECE if name in files), None)
    named = _named(files, settings)
    found = Vocabulary()
    if "tokenizer.json" in files:
        found = _byte_level(_object(files, "tokenizer.json"))
    elif pieces is None and "vocab.json" in files:
        found = _of_two_files(files, settings)
    if found.model == "no_vocab" and pieces is not None:
        found = _sentencepiece(pieces, settings)
    found = _with_named(found, named)
    ids = {token: i for i, token in enumerate(found.tokens)}
    special = {}
    for theirs, ours in SPECIAL.items():
        token = _content(
            settings.get(f"{theirs}_token", _object(files, "special_tokens_map.json").get(f"{theirs}_token"))
        )
        if token in ids:
            special[f"{ours}_token_id"] = ids[token]
    template = (
        files["chat_template.jinja"].decode() if "chat_template.jinja" in files else settings.get("chat_template")
    )
    ends = _object(files, "generation_config.json").get("eos_token_id")
    return dataclasses.replace(
        found,
        entries={**found.entries, **special, **found.fixed},
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
    fixed = {f"{name}_token_id": id_ for name, id_ in (("bos", begin), ("eos", end)) if id_ is not None}
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
        fixed,
        problems=problems,
    )


def _of_two_files(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> Vocabulary:
    """Returns the tokenizer of vocab.json and merges.txt, as GPT-2's were kept."""
    if "merges.txt" not in files or settings.get("tokenizer_class", "GPT2Tokenizer") not in GPT2_CLASSES:
        return _left_out("vocab.json is not one of a tokenizer like GPT-2's")
    lines = files["merges.txt"].decode().splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    words = {"type": "ByteLevel", "add_prefix_space": settings.get("add_prefix_space") is True}
    found = _byte_level({"model": {"vocab": _object(files, "vocab.json"), "merges": merges}, "pre_tokenizer": words})
    start = _content(settings.get("bos_token"))
    begins = settings.get("add_bos_token") is True and start in found.tokens
    return dataclasses.replace(found, entries={**found.entries, "add_bos_token": begins})


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


def _sentencepiece(proto: bytes, settings: Mapping[str, Any]) -> Vocabulary:
    """Returns a SentencePiece model."""
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
    charsmap = normalizer.get(2, [b""])[-1]
    begins, ends = ADDED_ENDS.get(str(settings.get("tokenizer_class")).removesuffix("Fast"), (False, False))
    entries: dict[str, Any] = {
        "scores": scores,
        "add_bos_token": settings.get("add_bos_token", begins) is True,
        "add_eos_token": settings.get("add_eos_token", ends) is True,
        "add_space_prefix": bool(number(normalizer, 3, 1)),
        "remove_extra_whitespaces": bool(number(normalizer, 4, 1)),
        **({"precompiled_charsmap": list(charsmap)} if charsmap else {}),
    }
    ids = (("unknown", number(trainer, 40, 0)), ("bos", number(trainer, 41, 1)), ("eos", number(trainer, 42, 2)))
    for name, id_ in (*ids, ("padding", number(trainer, 43, -1))):
        if 0 <= id_ < len(pieces):
            entries[f"{name}_token_id"] = id_
    # What the model itself puts at the ends is its own.
    fixed = {f"{n}_token_id": entries[f"{n}_token_id"] for n in ("bos", "eos") if entries[f"add_{n}_token"]}
    problems = []
    if kind == BPE and (charsmap or entries["remove_extra_whitespaces"]):
        problems.append("a text is not normalised, as this SentencePiece model asks for")
    if kind == UNIGRAM and BYTE in types:
        problems.append("a character without a token becomes the unknown token, and not bytes")
    if kind == UNIGRAM and not entries["add_space_prefix"]:
        problems.append("a space is put before a text")
    if kind == BPE and USER_DEFINED in types and entries["add_space_prefix"]:
        problems.append("a space is put before what follows a symbol that the model never splits")
    if settings.get("legacy") is False and entries["add_space_prefix"]:
        problems.append("a space is put before what follows a special token, too")
    return Vocabulary("llama" if kind == BPE else "t5", tokens, types, entries, fixed, problems=problems)


def _named(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> dict[str, tuple[int | None, bool]]:
    """Returns the tokens that files name beside a vocabulary: their ids, where one says it, and whether special."""
    found: dict[str, tuple[int | None, bool]] = {}
    for content in (_object(files, "special_tokens_map.json"), settings):
        for key, value in content.items():
            values = value if key == "additional_special_tokens" and isinstance(value, list) else [value]
            if key.endswith("_token") or key == "additional_special_tokens":
                found |= {token: (None, True) for one in values if (token := _content(one))}
    for token, id_ in _object(files, "added_tokens.json").items():
        found[token] = (id_, token in found)
    for id_, token in (settings.get("added_tokens_decoder") or {}).items():
        content = token["content"]
        found[content] = (int(id_), bool(token.get("special")) or found.get(content, (None, False))[1])
    return found


def _with_named(found: Vocabulary, named: Mapping[str, tuple[int | None, bool]]) -> Vocabulary:
    """Returns a vocabulary with the tokens that other files name: new ones, and what those are that it has."""
    if found.model == "no_vocab":
        return found
    tokens, types = list(found.tokens), list(found.types)
    ids = {token: i for i, token in enumerate(tokens)}
    for token, (id_, special) in named.items():
        id_ = ids.get(token) if id_ is None else id_
        if id_ is None or not 0 <= id_ < MOST:
            continue  # no such token could have been trained
        while id_ >= len(tokens):
            tokens.append(f"[PAD{len(tokens)}]")
            types.append(UNUSED)
        if types[id_] in (NORMAL, UNUSED, USER_DEFINED):
            tokens[id_], types[id_] = token, CONTROL if special else USER_DEFINED
    entries = dict(found.entries)
    if "scores" in entries:
        entries["scores"] = [*entries["scores"], *[0.0] * (len(tokens) - len(found.tokens))]
    return dataclasses.replace(found, tokens=tokens, types=types, entries=entries)


def _content(token: Any) -> str | None:
    """Returns the text of a token as settings have it: by itself, or in an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


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
