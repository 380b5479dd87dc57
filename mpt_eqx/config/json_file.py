"""Small JSON files from strangers, read strictly."""

import functools
import json
from pathlib import Path
from typing import Any

from mpt_eqx.errors import ConfigError, printable

MAX_KEY_LENGTH = 1000


def read_json_object(path: str | Path, *, max_bytes: int = 1_000_000, any_keys: bool = False) -> dict[str, Any]:
    """Returns the content of a small JSON file that must be one object, without NaN and without duplicate keys.

    Args:
        path: the file.
        max_bytes: how large it may be.
        any_keys: whether keys may be long and have any characters, as tokens do.

    Raises:
        ConfigError: the file is missing, larger than `max_bytes`, or not such an object.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; an MPT checkpoint has its configuration there")
    if path.stat().st_size > max_bytes:
        raise ConfigError(f"{path}: expected at most {max_bytes} bytes, found {path.stat().st_size}")
    hook = functools.partial(unique_keys, any_keys=any_keys)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, object_pairs_hook=hook)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"{path}: expected JSON, found something else ({str(error) or type(error).__name__})"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def unique_keys(pairs: list[tuple[str, Any]], *, any_keys: bool = False) -> dict[str, Any]:
    """Returns the dict of a JSON object; for json.loads, which would let the last of several equal keys win.

    Raises:
        ValueError: two keys are equal, or one is too long or not printable, so that no error could show it, unless
            `any_keys` are right.
    """
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key '{printable(key)}'")
        if not any_keys and (len(key) > MAX_KEY_LENGTH or not key.isprintable()):
            raise ValueError(
                f"expected keys of at most {MAX_KEY_LENGTH} printable characters, found '{printable(key)}'"
            )
        result[key] = value
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
