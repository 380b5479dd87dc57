"""Text from and to consoles, pipes and files, whatever their encoding is, and whether they are there."""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from mpt_eqx.errors import GenerationError, MPTError

STDERR = 2  # of the process: where libraries in other languages write


def prepare() -> None:
    """Makes the standard streams take any text.

    Raises:
        MPTError: stdout is closed.
    """
    if sys.stderr is None:  # print would write to stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        raise MPTError("stdout: expected a place to write to, found it closed; redirect it to a file or /dev/null")
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(io.UnsupportedOperation):  # of a stream that the caller of `main` has read from
                stream.reconfigure(errors=errors)


def forget(stream: Any) -> None:
    """Makes a stream that cannot be written to write nowhere, so that Python does not fail again when it exits."""
    with contextlib.suppress(OSError, ValueError):
        _redirect_to_nowhere(stream.fileno())


def _redirect_to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def as_text(text: str, where: str, encoding: str | None = None) -> str:
    """Returns the text of an argument or of a line of stdin, in which bytes that are no text are lone surrogates.

    Args:
        text: the argument or line.
        where: its name.
        encoding: that it was read with; None for the one of arguments.

    Raises:
        GenerationError: it is no text.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        encoding = encoding or sys.getfilesystemencoding()
    try:
        raw = text.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "surrogatepass")
    try:
        return raw.decode()  # UTF-8 under a locale that says something else
    except UnicodeDecodeError as error:
        raise GenerationError(
            f"{where}: expected text in UTF-8, found the byte 0x{raw[error.start]:02x} at {error.start}; convert it, "
            f"for example with iconv -f latin1 -t utf-8"
        ) from None


def read_all(instead: str) -> str:
    """Returns the text of stdin; arguments and errors as in `read_lines`."""
    with _readable(instead):
        return as_text(sys.stdin.read(), "stdin", getattr(sys.stdin, "encoding", None)).removeprefix("\ufeff")


def read_lines(instead: str) -> Iterator[str]:
    """Yields the non-empty lines of stdin; a terminal gets a prompt and line editing.

    Args:
        instead: what to do where there is no stdin.

    Raises:
        GenerationError: stdin is closed, cannot be read or holds no text.
    """
    with _readable(instead):
        terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            importlib.import_module("readline")  # gives input() its editing and history
    while True:
        with _readable(instead):
            try:
                line = input("> ") if terminal else input()
            except EOFError:
                return
        line = as_text(line, "stdin", getattr(sys.stdin, "encoding", None)).removeprefix("\ufeff")
        if line.strip():
            yield line


@contextlib.contextmanager
def _readable(instead: str) -> Iterator[None]:
    if sys.stdin is None or sys.stdin.closed:
        raise GenerationError(f"stdin: expected text, found it closed; {instead}")
    try:
        yield
    except (OSError, UnicodeError) as error:
        raise GenerationError(f"stdin: expected text, found something that cannot be read ({error})") from None


@contextlib.contextmanager
def without_panics() -> Iterator[None]:
    """Keeps the `tokenizers` library from writing on stderr itself what it also raises as an error."""
    try:
        kept = os.dup(STDERR)
    except OSError:  # it is closed
        yield
        return
    sys.stderr.flush()
    _redirect_to_nowhere(STDERR)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, STDERR)
        os.close(kept)
