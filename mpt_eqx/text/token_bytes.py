"""The bytes of single tokens: a token may be a part of a character, which has no text of its own."""

import functools
import re
from typing import TYPE_CHECKING

from mpt_eqx.text.sentencepiece import SentencePieceBackend

if TYPE_CHECKING:
    import tokenizers


def token_bytes(backend: "tokenizers.Tokenizer | SentencePieceBackend", token: int) -> bytes:
    """Returns the bytes that a token stands for in the middle of a text; none where there is no such token."""
    if isinstance(backend, SentencePieceBackend):
        return _piece_bytes(backend.id_to_token(token) or "")
    name = backend.id_to_token(token) or ""
    # An added token stands for its name.
    if (added := backend.get_added_tokens_decoder().get(token)) is not None:
        return added.content.encode()
    if "ByteLevel(" not in repr(backend.decoder):
        return _piece_bytes(name)
    table = _byte_of_character()
    return b"".join(bytes([table[c]]) if c in table else c.encode() for c in name)


def _piece_bytes(piece: str) -> bytes:
    """Returns the bytes of a token of SentencePiece: spaces have a sign, and bytes without a character a number."""
    if match := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(match[1])
    return piece.replace("\u2581", " ").encode()


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Returns the byte for each character of byte-level BPE: what can be printed stands for itself, as in GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
