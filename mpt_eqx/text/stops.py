"""Stop strings, before the first of which a text ends."""

from collections.abc import Iterable, Iterator, Sequence

from mpt_eqx.errors import MPTError


def until_stop(pieces: Iterable[str], stops: str | Sequence[str]) -> Iterator[str]:
    """Returns an iterator over text up to the first stop string, of one or several, which may span pieces.

    Text that could be the beginning of a stop string is held back until it is decided.

    Raises:
        MPTError: a stop string is empty or no text.
    """
    stops = [stops] if isinstance(stops, str) else list(stops)
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            found = "an empty one" if stop == "" else type(stop).__name__
            raise MPTError(f"stop: expected a text or a list of texts, found {found}")
    return _until_stop(pieces, stops)


def _until_stop(pieces: Iterable[str], stops: list[str]) -> Iterator[str]:
    held = ""
    for piece in pieces:
        ready, held, found = split_at_stop(held + piece, stops)
        if ready:
            yield ready
        if found:
            return
    if held:
        yield held


def split_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """Returns what is before the first stop string, what may be the beginning of one, and whether there is one."""
    if found := [at for stop in stops if (at := text.find(stop)) >= 0]:
        return text[: min(found)], "", True
    keep = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - keep], text[len(text) - keep :], False
