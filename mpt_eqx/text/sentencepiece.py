"""SentencePiece models, read with the library's own wheel (extra `sentencepiece`), so that ids are that library's."""

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mpt_eqx.checkpoint.formats.gguf_vocabulary import ADDED_ENDS, SENTENCEPIECE
from mpt_eqx.errors import CheckpointError, MPTError, printable
from mpt_eqx.text.added_tokens import named_tokens, read_settings

NAMES = SENTENCEPIECE


class SentencePieceBackend:
    """A SentencePiece model and added tokens, with the methods of `tokenizers.Tokenizer` that this library uses."""

    def __init__(
        self,
        processor: Any,
        added: Mapping[str, tuple[int, bool]],
        *,
        follower: Any = None,
        bos: bool = False,
        eos: bool = False,
    ):
        """Wraps a SentencePieceProcessor.

        Args:
            processor: the model.
            added: tokens that are found in text before the model sees it: their ids, and whether they are special, so
                that they are no text.
            follower: the model for what follows an added token, where that gets no space in front.
            bos: whether every text begins with the model's token for that.
            eos: whether every text ends with the model's token for that.
        """
        self._processor, self._follower = processor, follower or processor
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
            ids += [self._added[part][0]] if at % 2 else self._plain(part, follows=at > 0)
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

    def id_to_token(self, id_: int) -> str | None:
        """Returns the token of an id, None if there is no such."""
        if id_ in self._by_id:
            return self._by_id[id_][0]
        return str(self._processor.id_to_piece(id_)) if 0 <= id_ < self._size else None

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

    def _plain(self, text: str, *, follows: bool = False) -> list[int]:
        ids: list[int] = (self._follower if follows else self._processor).encode(text) if text else []
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
        proto = path.read_bytes()
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    except Exception as error:  # the library has RuntimeError and OSError
        text = " ".join(str(error).split())
        raise CheckpointError(f"{path}: expected a SentencePiece model, found something else ({text:.200})") from None
    settings = read_settings(directory)
    size, kept = processor.get_piece_size(), {}
    for token, (id_, special, _) in named_tokens(directory).items():
        if id_ is None:
            id_ = processor.piece_to_id(token)
            if processor.id_to_piece(id_) != token:
                continue
        elif id_ < size and processor.id_to_piece(id_) != token:
            raise CheckpointError(
                f"{directory}: expected added tokens from id {size} on, which {path.name} does not have, found "
                f"'{printable(token)}' with id {id_}, which is '{printable(processor.id_to_piece(id_))}' there"
            )
        kept[token] = (id_, special)
    follower = None
    if settings.get("legacy") is False:
        # A model's settings can be written anew at its end: add_dummy_prefix false.
        follower = sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
    begins, ends = ADDED_ENDS.get(str(settings.get("tokenizer_class")).removesuffix("Fast"), (False, False))
    return SentencePieceBackend(
        processor,
        kept,
        follower=follower,
        bos=settings.get("add_bos_token", begins) is True,
        eos=settings.get("add_eos_token", ends) is True,
    )
