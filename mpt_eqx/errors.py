"""The errors a user can cause. Each message says what was expected, what was found, where, and what to do."""

from typing import Any


class MPTError(ValueError):
    """Base of every error that a user of mpt_eqx can cause.

    Its text is its arguments joined by colons: where the problem is, from the outside in, and last what it is.
    """

    def __str__(self) -> str:
        return ": ".join(map(str, self.args))


class ConfigError(MPTError):
    """A configuration is not valid, or asks for something that is not supported."""


class CheckpointError(MPTError):
    """A checkpoint cannot be found, read or written, or does not fit its configuration."""


class GenerationError(MPTError):
    """A prompt or a generation argument is not valid, or the model produced no finite logits."""


class ShardingError(MPTError):
    """A mesh, rules for it and a model do not fit together."""


class Interrupted(KeyboardInterrupt):
    """Somebody pressed Ctrl-C.

    Attributes:
        result: what was done until then.
    """

    def __init__(self, result: Any):
        super().__init__()
        self.result = result


def first_of(values: list[str], *, limit: int = 10) -> str:
    """Returns the first `limit` of `values` as text, each as `printable`, and how many more there are."""
    shown = ", ".join(printable(value, limit=200) for value in values[:limit])
    return shown if len(values) <= limit else f"{shown}, … and {len(values) - limit} more"


def printable(text: str, *, limit: int = 100) -> str:
    """Returns a text from a file as it may be shown: not longer than `limit`, with nothing that a terminal obeys.

    Control characters and lone surrogates, which no encoding takes, become escapes.
    """
    cut = text if len(text) <= limit else f"{text[:limit]}…"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in cut)
