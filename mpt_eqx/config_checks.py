"""Checks of single values in a configuration; each raises a ConfigError that names the field."""

import math

from mpt_eqx.errors import ConfigError


def check_int(name: str, value: object, *, low: int = 1, high: int = 2**31 - 1, optional: bool = False) -> None:
    """Raises unless `value` is a whole number from `low` to `high`, or None if that is allowed."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        or_null = " or null" if optional else ""
        raise ConfigError(f"{name}: expected a whole number from {low} to {high}{or_null}, found {value!r}")


def check_number(name: str, value: object, *, low: float = 0.0, optional: bool = False) -> None:
    """Raises unless `value` is a finite number above `low`, or None if that is allowed."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < math.inf:
        above = "a finite number" if low == -math.inf else f"a finite number > {low:g}"
        raise ConfigError(f"{name}: expected {above}{' or null' if optional else ''}, found {value!r}")


def check_probability(name: str, value: object) -> None:
    """Raises unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name}: expected a probability from 0 to 1, found {value!r}")


def check_bool(name: str, value: object) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected true or false, found {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name}: expected {' or '.join(map(repr, choices))}, found {value!r}; not supported")


def check_part(name: str, value: object, part: type) -> None:
    """Raises unless `value` is an instance of the dataclass `part`."""
    if not isinstance(value, part):
        raise ConfigError(
            f"{name}: expected {part.__name__}, found {type(value).__name__}; MPTConfig.from_dict takes plain dicts"
        )
