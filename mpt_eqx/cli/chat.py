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

COMMANDS = """/reset         start a new conversation
/system TEXT   start a new conversation with TEXT as the system message
/help          show this help
/quit          quit; so does Ctrl-D
A line that begins with a space is always a message.
Ctrl-C stops the answer; the part that was printed stays in the conversation."""

MIN_ANSWER = 16  # tokens that must be left for an answer
# Where llm-foundry's chat ends an answer, if the tokenizer has them.
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "chat", parents=[shared], help="chat with a model",
        description="Reads one message per line from stdin and writes the answers to stdout.",
        epilog=f"commands in a conversation:\n{COMMANDS}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_options(parser, max_new_tokens=512)
    parser.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    parser.add_argument(
        "--template", metavar="T",
        help="chatml (MosaicML's chat models), mpt-instruct (its instruct models) or a file with a Jinja template "
        "(default: the checkpoint's own)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answers each line of stdin; the prompt is the whole conversation so far."""
    from mpt_eqx.generation import stream
    from mpt_eqx.text import until_stop

    template = _template(args.template)
    place, tokenizer, options = read_options(args)
    max_new_tokens = options.pop("max_new_tokens")
    end_ids = {*options.pop("eos_token_ids"), *tokenizer.ids_of(END_TOKENS)}
    start = [] if args.system is None else [{"role": "system", "content": args.system}]
    # Fail on an unusable template now, not after the first message.
    tokenizer.apply_chat_template([*start, {"role": "user", "content": "?"}], chat_template=template)
    model = load(place, args, tokenizer, options)
    messages, prefix, note = list(start), None, Note()
    for line in _lines():
        command, _, rest = line.partition(" ")
        if command in ("/reset", "/system"):
            if command == "/system":
                start = [{"role": "system", "content": rest}] if rest else []
            messages, prefix = list(start), None
            continue
        if command == "/quit":
            break
        if line.startswith("/"):
            print(COMMANDS if command == "/help" else f"{command} is no command\n{COMMANDS}", file=sys.stderr)
            continue
        messages.append({"role": "user", "content": line})
        answer: list[str] = []
        try:
            note.show("prefill …")
            tokens = tokenizer.apply_chat_template(messages, chat_template=template)
            room = min(max_new_tokens, model.config.max_seq_len - len(tokens))
            if room < min(max_new_tokens, MIN_ANSWER):
                raise GenerationError(
                    f"the conversation has {len(tokens)} tokens of max_seq_len={model.config.max_seq_len}, which "
                    f"leaves no room for an answer; start a new one with /reset"
                )
            prefix = _extend(model, prefix, tokens)
            new = stream(model, [], prefix=prefix, max_new_tokens=room, eos_token_ids=tuple(end_ids), **options)
            for piece in until_stop(tokenizer.decode_stream(_before(new, end_ids)), args.stop):
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
            messages.pop()
            continue
        note.clear()
        print(flush=True)
        if answer:
            messages.append({"role": "assistant", "content": "".join(answer)})
        else:  # interrupted before the first token, or an empty answer
            messages.pop()
    return 0


def _lines() -> Iterator[str]:
    """Yields the non-empty lines of stdin; a terminal gets a prompt and line editing."""
    if sys.stdin.isatty():
        importlib.import_module("readline")  # gives input() its editing and history
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if line.strip():
            yield line


def _extend(model: "MPT", prefix: "Prefix | None", tokens: list[int]) -> "Prefix":
    """Returns the prefix of `tokens`; tokens that the earlier prefix has cached are not computed again."""
    from mpt_eqx.generation import prefill

    if prefix is not None and prefix.tokens.tolist() == tokens[: len(prefix)]:
        return prefill(model, tokens[len(prefix) :], prefix=prefix)
    return prefill(model, tokens)


def _before(tokens: Iterator[int], end_ids: set[int]) -> Iterator[int]:
    for token in tokens:
        if token in end_ids:
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
