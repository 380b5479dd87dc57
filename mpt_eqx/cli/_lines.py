"""JSONL in, JSONL out: what commands share that do the same with each line of a file."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mpt_eqx.cli.console import without_panics
from mpt_eqx.errors import MPTError
from mpt_eqx.text.jsonl import read_jsonl

Record = dict[str, Any]
Lines = list[tuple[int, Record]]
Ids = TypeVar("Ids")


def add_output(parser: Any) -> None:
    """Adds the options for where the lines go to a parser or a group of one."""
    parser.add_argument("--output", metavar="FILE", help="write the lines to this new file (default: stdout)")
    parser.add_argument(
        "--resume", action="store_true",
        help="go on after the lines that --output has, from an earlier run with the same options (default: refuse)",
    )  # fmt: skip


def read_texts(path: str, keys: tuple[str, ...], written: tuple[str, ...]) -> Lines:
    """Returns the number and the object of each line of a JSONL file.

    Args:
        path: the file.
        keys: each must have a text under these.
        written: the keys that the command adds, which none may have.

    Raises:
        MPTError: the file cannot be read, or a line is something else.
    """
    lines = list(read_jsonl(path))
    for number, record in lines:
        for key in keys:
            if not isinstance(record.get(key), str):
                found = type(record[key]).__name__ if key in record else "no such key"
                raise MPTError(f"{path}, line {number}: expected a text as {key!r}, found {found}")
        if taken := sorted(set(written) & set(record)):
            raise MPTError(f"{path}, line {number}: {taken[0]!r} is a key of the answer; rename it")
    if not lines:
        raise MPTError(f"{path}: expected at least one line, found none")
    return lines


@contextlib.contextmanager
def at_line(path: str, number: int) -> Iterator[None]:
    """Puts the place before the errors of a line."""
    try:
        yield
    except MPTError as error:
        raise type(error)(f"{path}, line {number}", str(error)) from None


def encoded(path: str, lines: Lines, encode: Callable[[Record], Ids]) -> list[Ids]:
    """Returns what `encode` makes of each object; nothing is loaded or written before all are known to be right."""
    found = []
    with without_panics():
        for number, record in lines:
            with at_line(path, number):
                found.append(encode(record))
    return found


def done_lines(args: argparse.Namespace, lines: Lines) -> int:
    """Returns how many lines are done already; a last one that a crash has torn is removed, and nothing else is.

    Raises:
        MPTError: --output exists and --resume is not given, or it holds something else.
    """
    if args.output is None:
        if args.resume:
            raise MPTError("--resume: expected --output FILE, which it goes on with, found none")
        return 0
    output = Path(args.output)
    if not output.exists():
        return 0
    if not args.resume:
        raise MPTError(f"--output: expected no file, found {output}; --resume goes on with it")
    content = output.read_bytes()
    whole = content.rfind(b"\n") + 1
    done = []
    for number, line in enumerate(content[:whole].splitlines(), 1):
        if number > len(lines) or not _answers(line, lines[number - 1][1]):
            raise _not_ours(output, number)
        done.append(line)
    # Only what this command has begun to write is removed.
    if torn := content[whole:]:
        begun = json.dumps(lines[len(done)][1])[:-1].encode() if len(done) < len(lines) else b""
        if not begun or not (torn.startswith(begun) or begun.startswith(torn)):
            raise _not_ours(output, len(done) + 1)
        os.truncate(output, whole)
    return len(done)


def _answers(line: bytes, record: Record) -> bool:
    """Whether a line of the output is what is written for an object of the input."""
    try:
        answer = json.loads(line)
    except ValueError:
        return False
    return isinstance(answer, dict) and {key: answer.get(key) for key in record} == record


def _not_ours(output: Path, number: int) -> MPTError:
    return MPTError(
        f"{output}, line {number}: expected the answer to line {number} of the input, found something else; resume "
        "with the input that it was begun with"
    )


def write_answers(
    args: argparse.Namespace,
    lines: Lines,
    done: int,
    batch_size: int,
    answer: Callable[[int, list[Record]], list[Record]],
) -> int:
    """Writes each object with what `answer` adds to it, in order and batch by batch, and returns the exit code.

    Args:
        args: --output.
        lines: of the input.
        done: how many of them are not to be written again.
        batch_size: objects that `answer` gets at a time.
        answer: a function of the place of the first object among all, and of the objects.
    """
    from tqdm import tqdm

    file = sys.stdout if args.output is None else open(args.output, "a", encoding="utf-8")  # noqa: SIM115
    bar = tqdm(total=len(lines), initial=done, unit="line", disable=None, delay=2)
    try:
        for first in range(done, len(lines), batch_size):
            records = [record for _, record in lines[first : first + batch_size]]
            for record, added in zip(records, answer(first, records), strict=True):
                print(json.dumps({**record, **added}), file=file)
            file.flush()
            done = first + len(records)
            bar.update(len(records))
    except KeyboardInterrupt:
        bar.close()
        hint = "" if args.output is None else "; --resume goes on"
        print(f"{done} of {len(lines)} lines are written{hint}", file=sys.stderr)
        return 130
    finally:
        bar.close()
        if args.output is not None:
            file.close()
    return 0
