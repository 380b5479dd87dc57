"""`mpt-eqx chat`: a conversation in the terminal."""

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpt_eqx.cli.options import Note, add_options, load, read_options
from mpt_eqx.errors import GenerationError, MPTError

if TYPE_CHECKING:
    from mpt_eqx.generation import Prefix
    from mpt_eqx.model import MPT

COMMANDS = """/reset         forget what was said
/system TEXT   begin anew, with TEXT as the system's message
/help          these lines
/quit          leave; Ctrl-D does too
A line that begins with a space is a message, whatever follows.
Ctrl-C ends an answer; what there is of it stays in the conversation."""

LEAST = 16  # tokens that must be left for an answer
ENDS = ("<|im_end|>", "<|endoftext|>")  # what llm-foundry's chat ends an answer at, where the tokenizer has them


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "chat", parents=[shared], help="talk with a model",
        description="Reads a message a line from stdin and writes the answers to stdout.",
        epilog=f"in the conversation:\n{COMMANDS}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system's message")
    parser.add_argument(
        "--template", metavar="T",
        help="chatml (MosaicML's chat models), mpt-instruct (its instruct models) or the file of a Jinja template "
        "(default: the checkpoint's own)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answers each line of stdin until it ends; the whole conversation so far is the prompt."""
    from mpt_eqx.generation import stream
    from mpt_eqx.text import until_stop

    template = _template(args.template)
    place, tokenizer, options = read_options(args)
    most = options.pop("max_new_tokens", 512)
    ends = {*options.pop("eos_token_ids"), *tokenizer.ids_of(ENDS)}
    start = [] if args.system is None else [{"role": "system", "content": args.system}]
    # A template that cannot be used is told at once, not after the first message.
    tokenizer.apply_chat_template([*start, {"role": "user", "content": "?"}], chat_template=template)
    model = load(place, args, tokenizer, options)
    said, prefix, note = list(start), None, Note()
    for line in _lines():
        command, _, rest = line.partition(" ")
        if command in ("/reset", "/system"):
            if command == "/system":
                start = [{"role": "system", "content": rest}] if rest else []
            said, prefix = list(start), None
            continue
        if command == "/quit":
            break
        if line.startswith("/"):
            print(COMMANDS if command == "/help" else f"{command} is no command\n{COMMANDS}", file=sys.stderr)
            continue
        said.append({"role": "user", "content": line})
        answer: list[str] = []
        try:
            note.show("reading …")
            tokens = tokenizer.apply_chat_template(said, chat_template=template)
            room = min(most, model.config.max_seq_len - len(tokens))
            if room < min(most, LEAST):
                raise GenerationError(
                    f"the conversation has {len(tokens)} tokens of max_seq_len={model.config.max_seq_len}, which "
                    f"leaves no room for an answer; /reset begins a new one"
                )
            prefix = _read(model, prefix, tokens)
            made = stream(model, [], prefix=prefix, max_new_tokens=room, eos_token_ids=tuple(ends), **options)
            for piece in until_stop(tokenizer.decode_stream(_before(made, ends)), args.stop):
                note.clear()
                answer.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        except MPTError as error:
            if not sys.stdin.isatty():
                raise
            note.clear()
            print(f"mpt-eqx: {error}", file=sys.stderr)
            said.pop()
            continue
        note.clear()
        print(flush=True)
        if answer:
            said.append({"role": "assistant", "content": "".join(answer)})
        else:  # interrupted before the first word, or ended with none
            said.pop()
    return 0


def _lines() -> Iterator[str]:
    """Yields the lines of stdin that are not empty; in a terminal with a sign to write at, and line editing."""
    if sys.stdin.isatty():
        importlib.import_module("readline")  # gives input() its editing and history
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if line.strip():
            yield line


def _read(model: "MPT", prefix: "Prefix | None", tokens: list[int]) -> "Prefix":
    """Returns tokens read, of which those that the earlier prefix holds are not read again."""
    from mpt_eqx.generation import prefill

    if prefix is not None and prefix.tokens.tolist() == tokens[: len(prefix)]:
        return prefill(model, tokens[len(prefix) :], prefix=prefix)
    return prefill(model, tokens)


def _before(tokens: Iterator[int], ends: set[int]) -> Iterator[int]:
    for token in tokens:
        if token in ends:
            return
        yield token


def _template(name: str | None) -> str | None:
    """Returns the name of a built-in template, or the text of a file."""
    path = Path(name or "")
    if name is None or not path.is_file():
        return name
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise GenerationError(f"--template: expected a file with text, found {path} ({error})") from None
