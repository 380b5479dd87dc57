"""What a single value may be, how a dataclass declares it for each field, and the loop that checks them all.

A field stands on one line with its default and its range: `n_layers: int = field(24, whole(high=1024))`.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from mpt_eqx.errors import ConfigError, MPTError


def shown(value: object) -> str:
    """Returns a value as an error shows it: at most 200 characters, whatever a file holds."""
    try:
        return f"{value!r:.200}"
    except (ValueError, RecursionError):  # an integer of thousands of digits, or an object nested too deep
        return f"something too long to show ({type(value).__name__})"


class Check(NamedTuple):
    """What a value may be.

    Attributes:
        expected: the valid values in words.
        valid: tells whether a value is one of them.
        advice: what follows in the message, after the value found.
        show: how the message shows the value found.
    """

    expected: str
    valid: Callable[[Any], bool]
    advice: str = ""
    show: Callable[[object], str] = shown


def check(name: str, value: object, wanted: Check, error: type[MPTError] = ConfigError) -> None:
    """Raises an `error` that names the value `name` unless it is as `wanted`."""
    if not wanted.valid(value):
        raise error(name, f"expected {wanted.expected}, found {wanted.show(value)}{wanted.advice}")


def whole(low: int = 1, high: int = 2**31 - 1) -> Check:
    """A whole number from `low` to `high`."""
    return Check(
        f"a whole number from {low} to {high}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def number(above: float = 0.0) -> Check:
    """A finite number greater than `above`."""
    return Check(
        "a finite number" if above == -math.inf else f"a finite number > {above:g}",
        lambda value: is_number(value) and above < value <= sys.float_info.max,
    )


def between(low: float, high: float, expected: str) -> Check:
    """A number from `low` to `high`, which `expected` says in words."""
    return Check(expected, lambda value: is_number(value) and low <= value <= high)


def choice(*choices: str) -> Check:
    """One of some strings."""
    return Check(" or ".join(map(repr, choices)), lambda value: value in choices, "; not supported")


def part(cls: type) -> Check:
    """An instance of a dataclass."""
    return Check(
        cls.__name__,
        lambda value: isinstance(value, cls),
        "; MPTConfig.from_dict takes plain dicts",
        lambda value: type(value).__name__,
    )


def either(first: Check, second: Check) -> Check:
    """What one of two checks takes."""
    return first._replace(
        expected=f"{first.expected} or {second.expected}",
        valid=lambda value: first.valid(value) or second.valid(value),
    )


def is_number(value: object) -> bool:
    """Tells whether a value is an int or a float; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


ANY_NUMBER = number(above=-math.inf)
PROBABILITY = between(0, 1, "a probability from 0 to 1")
BOOLEAN = Check("true or false", lambda value: isinstance(value, bool))
NULL = Check("null", lambda value: value is None)


def field(default: Any, wanted: Check) -> Any:
    """A dataclass field that takes what `wanted` says, and None where None is the default."""
    if default is None:
        wanted = either(wanted, NULL)
    return dataclasses.field(default=default, metadata={"check": wanted})


def check_fields(instance: Any, path: str = "") -> None:
    """Raises a ConfigError unless every field has a value that it takes.

    Args:
        instance: of a dataclass whose fields are all made by `field`.
        path: where it stands in config.json, such as "attn_config."; the message begins with it.
    """
    for declared in dataclasses.fields(instance):
        check(f"{path}{declared.name}", getattr(instance, declared.name), declared.metadata["check"])
