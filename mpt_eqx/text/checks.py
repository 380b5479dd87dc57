"""Checks of what goes into a tokenizer, and its failures as errors of this package."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from mpt_eqx.errors import MPTError


def check_unicode(text: str, where: str) -> None:
    """Raises MPTError if a text holds half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MPTError(
            f"{where}: expected text, found half of a character ({text[error.start]!r}) at {error.start}; "
            f"decode it with errors='replace'"
        ) from None


def check_text(text: Any, where: str) -> None:
    """Raises MPTError unless it is one text of whole characters."""
    if not isinstance(text, str):
        instead = "decode them" if isinstance(text, (bytes, bytearray)) else "give one text at a time"
        raise MPTError(f"{where}: expected text, found {type(text).__name__}; {instead}")
    check_unicode(text, where)


def token_ids(tokens: Any, where: str = "tokens") -> list[int]:
    """Returns the ids of one text as numbers of Python, from numbers of any kind.

    Raises:
        MPTError: they are not whole numbers from 0 to 2³² − 1 in one row.
    """
    if not isinstance(tokens, Iterable) or isinstance(tokens, (str, bytes)):
        raise MPTError(f"{where}: expected the token ids of one text, found {type(tokens).__name__}")
    return [token_id(token, where) for token in tokens]


def token_id(token: Any, where: str = "tokens") -> int:
    """Returns one token id as a number of Python; errors as in `token_ids`."""
    try:
        id_ = token.__index__()
    except (AttributeError, TypeError):
        shape = getattr(token, "shape", ())
        found = f"a row of shape {shape} in it; decode one row at a time" if shape else repr(token)
        raise MPTError(f"{where}: expected the token ids of one text, found {found}") from None
    if not 0 <= id_ < 2**32:
        raise MPTError(f"{where}: expected token ids ≥ 0, found {id_}")
    return int(id_)


def is_failure(error: BaseException) -> bool:
    """Tells a failure of the `tokenizers` library from an interrupt; its panics are no Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def backend_errors(where: str, kind: type[MPTError] = MPTError) -> Iterator[None]:
    """Raises `kind` for whatever the `tokenizers` library raises: plain Exception, or PanicException.

    The latter is no Exception; the library's Rust code raises it where it was not written to fail, such as at a regular
    expression that gives up.
    """
    try:
        yield
    except MPTError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        found = " ".join(str(error).split())
        found = found if len(found) <= 300 else f"{found[:300]}…"
        raise kind(f"{where}: expected a working tokenizer, found one that fails ({found})") from None
