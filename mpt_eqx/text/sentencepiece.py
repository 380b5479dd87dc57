"""SentencePiece models, read with the library's own wheel (extra `sentencepiece`), so that ids are that library's."""

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mpt_eqx.config.json_file import read_json_object
from mpt_eqx.errors import CheckpointError, MPTError

NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model")
"""The files, in the order in which they are looked for."""


class SentencePieceBackend:
    """A SentencePiece model and added tokens, with the methods of `tokenizers.Tokenizer` that this library uses."""

    def __init__(self, processor: Any, added: Mapping[str, tuple[int, bool]], *, bos: bool = False, eos: bool = False):
        """Wraps a SentencePieceProcessor.

        Args:
            processor: the model.
            added: tokens that the model does not have: their ids, and whether they are special, so that they are no
                text.
            bos: whether every text begins with the model's token for that.
            eos: whether every text ends with the model's token for that.
        """
        self._processor = processor
        self._added = dict(added)
        self._ends = (bos, eos)
        self._size = processor.get_piece_size()
        self._by_id = {id_: (token, special) for token, (id_, special) in added.items()}
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        """Returns an object with the `ids` of a text; added tokens in it are those tokens."""
        ids: list[int] = []
        for at, part in enumerate(self._split.split(text) if self._split else [text]):
            ids += [self._added[part][0]] if at % 2 else self._plain(part)
        begin, end = (add_special_tokens and wanted for wanted in self._ends)
        before = [self._processor.bos_id()] if begin and self._processor.bos_id() >= 0 else []
        after = [self._processor.eos_id()] if end and self._processor.eos_id() >= 0 else []
        return SimpleNamespace(ids=[*before, *ids, *after])

    def encode_pieces(self, pieces: Sequence[tuple[str, int | None]]) -> list[int]:
        """Returns the ids of a prompt in pieces, in whose text no control token is found.

        Raises:
            MPTError: the model itself knows a control token that stands in the text.
        """
        controls, ids = set(self.get_added_tokens_decoder()), []
        for text, id_ in pieces:
            found = [id_] if id_ is not None else self._plain(text)
            if id_ is None and controls & set(found) - {self._processor.unk_id()}:
                raise MPTError(
                    "messages: expected text that can be encoded as ordinary text, found the text of a special token "
                    "that this tokenizer's model knows as a word; take it out of the messages"
                )
            ids += found
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids without special tokens."""
        parts: list[str] = []
        run: list[int] = []
        for id_ in ids:
            if id_ in self._by_id:
                token, special = self._by_id[id_]
                if not special:
                    parts += [self._text(run), token]
                    run = []
            elif 0 <= id_ < self._size and not self._processor.is_control(id_):
                run.append(id_)
        return "".join([*parts, self._text(run)])

    def eos_ids(self) -> list[int]:
        """Returns the model's own token for the end of a text, if it has one."""
        return [id_ for id_ in [self._processor.eos_id()] if id_ >= 0]

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token, None if there is no such."""
        return self.get_vocab().get(token)

    def get_vocab(self) -> dict[str, int]:
        """Returns the id of every token."""
        pieces = {self._processor.id_to_piece(i): i for i in range(self._size)}
        return pieces | {token: id_ for token, (id_, _) in self._added.items()}

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        """Returns the tokens that control something, and those that were added, by their ids."""
        import tokenizers

        p = self._processor
        found = {
            i: tokenizers.AddedToken(p.id_to_piece(i), normalized=False, special=True)
            for i in range(self._size)
            if p.is_control(i) or (set(p.id_to_piece(i)) & set("<|[") and self._is_symbol(i))
        }
        return found | {
            id_: tokenizers.AddedToken(token, normalized=False, special=special)
            for id_, (token, special) in self._by_id.items()
        }

    def _is_symbol(self, id_: int) -> bool:
        """Tells whether the model never splits a piece of text: it is a symbol that its maker has defined."""
        p, piece = self._processor, self._processor.id_to_piece(id_)
        return len(piece) > 1 and not p.is_byte(id_) and not p.is_unknown(id_) and p.get_score(id_) == 0.0

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text) if text else []
        return ids

    def _text(self, ids: list[int]) -> str:
        text: str = self._processor.decode(ids) if ids else ""
        return text


def load_sentencepiece(path: Path, directory: Path) -> SentencePieceBackend:
    """Returns the SentencePiece model of a file, with the tokens that other files in `directory` add to it.

    Raises:
        MPTError: the extra `sentencepiece` is not installed.
        CheckpointError: a file is damaged, or names an added token that the model has under another id.
        ConfigError: a file is no JSON object.
    """
    try:
        sentencepiece = importlib.import_module("sentencepiece")
    except ImportError:
        raise MPTError(
            f"{path}: reading a SentencePiece model needs its library; install it with "
            f"pip install 'mpt_eqx[text,sentencepiece]'"
        ) from None
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except Exception as error:  # the library has RuntimeError and OSError
        text = " ".join(str(error).split())
        raise CheckpointError(f"{path}: expected a SentencePiece model, found something else ({text:.200})") from None
    settings = _read(directory / "tokenizer_config.json")
    added: dict[str, tuple[int, bool]] = {}
    for token, id_ in _read(directory / "added_tokens.json").items():
        added[token] = (id_, False)
    for id_, token in (settings.get("added_tokens_decoder") or {}).items():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and id_.isdecimal():
            added[token["content"]] = (int(id_), bool(token.get("special")))
    special = {value.get("content") if isinstance(value, dict) else value for value in _special(directory, settings)}
    size, kept = processor.get_piece_size(), {}
    for token, (id_, is_special) in added.items():
        if not token or isinstance(id_, bool) or not isinstance(id_, int) or not 0 <= id_ < 2**31:
            raise CheckpointError(
                f"{directory}: expected a whole number for the added token {token!r:.60}, found {id_!r}"
            )
        if id_ >= size:
            kept[token] = (id_, is_special or token in special)
        elif processor.id_to_piece(id_) != token:
            raise CheckpointError(
                f"{directory}: expected added tokens from id {size} on, which {path.name} does not have, found "
                f"{token!r:.60} with id {id_}, which is {processor.id_to_piece(id_)!r:.60} there"
            )
    return SentencePieceBackend(
        processor, kept, bos=settings.get("add_bos_token") is True, eos=settings.get("add_eos_token") is True
    )


def _special(directory: Path, settings: Mapping[str, Any]) -> list[Any]:
    """Returns the special tokens that a checkpoint names."""
    found: list[Any] = []
    for content in (settings, _read(directory / "special_tokens_map.json")):
        for key, value in content.items():
            if key.endswith("_token"):
                found.append(value)
            elif key == "additional_special_tokens" and isinstance(value, list):
                found += value
    return [value for value in found if isinstance(value, str | dict)]


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
