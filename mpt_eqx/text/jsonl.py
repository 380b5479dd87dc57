"""JSONL: files with a JSON object in each line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpt_eqx.config.json_file import unique_keys
from mpt_eqx.errors import MPTError, printable


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number and the content of each line of a file that is a JSON object; empty lines are passed over.

    Raises:
        MPTError: the file cannot be read, or a line is something else: the message names the file and the line.
    """
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = json.loads(line, object_pairs_hook=unique_keys)
                if not isinstance(record, dict):
                    raise ValueError(f"found {type(record).__name__}")
                yield number, record
    except OSError as error:
        raise MPTError(f"{path}: expected a JSONL file, found none that can be read ({error})") from None
    except UnicodeDecodeError as error:
        raise MPTError(f"{path}: expected text in UTF-8 after line {number}, found something else ({error})") from None
    except (ValueError, RecursionError) as error:
        text = printable(str(error) or type(error).__name__, limit=200)
        raise MPTError(
            f"{path}, line {number}: expected a JSON object in one line, found something else ({text})"
        ) from None
