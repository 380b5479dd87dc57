"""Checks of single values in a configuration; each raises a ConfigError that names the field."""

import math
import sys

from mpt_eqx.errors import ConfigError


def shown(value: object) -> str:
    """Returns a value as an error shows it: not longer than a line, whatever a file holds."""
    try:
        return f"{value!r:.200}"
    except (ValueError, RecursionError):  # of a whole number with thousands of digits, or of something nested too deep
        return f"something too long to show ({type(value).__name__})"


def check_int(name: str, value: object, *, low: int = 1, high: int = 2**31 - 1, optional: bool = False) -> None:
    """Raises unless `value` is a whole number from `low` to `high`, or None if that is allowed."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        or_null = " or null" if optional else ""
        raise ConfigError(f"{name}: expected a whole number from {low} to {high}{or_null}, found {shown(value)}")


def check_number(name: str, value: object, *, low: float = 0.0, optional: bool = False) -> None:
    """Raises unless `value` is a finite number above `low`, or None if that is allowed."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= sys.float_info.max:
        above = "a finite number" if low == -math.inf else f"a finite number > {low:g}"
        raise ConfigError(f"{name}: expected {above}{' or null' if optional else ''}, found {shown(value)}")


def check_probability(name: str, value: object) -> None:
    """Raises unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name}: expected a probability from 0 to 1, found {shown(value)}")


def check_bool(name: str, value: object) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected true or false, found {shown(value)}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name}: expected {' or '.join(map(repr, choices))}, found {shown(value)}; not supported")


def check_part(name: str, value: object, part: type) -> None:
    """Raises unless `value` is an instance of the dataclass `part`."""
    if not isinstance(value, part):
        raise ConfigError(
            f"{name}: expected {part.__name__}, found {type(value).__name__}; MPTConfig.from_dict takes plain dicts"
        )
