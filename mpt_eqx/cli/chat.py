"""`mpt-eqx chat`: a conversation in the terminal."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpt_eqx import SHIPPED_ADAPTER, SHIPPED_MODEL
from mpt_eqx.cli.console import as_text, read_lines, without_panics
from mpt_eqx.cli.options import Note, add_options, load, read_options, with_file
from mpt_eqx.errors import GenerationError, MPTError

if TYPE_CHECKING:
    from mpt_eqx.config import MPTConfig
    from mpt_eqx.generation import Prefix
    from mpt_eqx.model import MPT

COMMANDS = """/reset         start a new conversation
/system TEXT   start a new conversation with TEXT as the system message
/help          show this help
/quit          quit; so does Ctrl-D
A line that begins with a space is always a message.
Ctrl-C stops the answer; the part that was printed stays in the conversation."""

TEMPLATE = "chat_template.jinja"
MIN_ANSWER = 16  # tokens that must be left for an answer
# Where llm-foundry's chat ends an answer, if the tokenizer has them.
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "chat", parents=[shared], help="chat with a model",
        description="Reads one message per line from stdin and writes the answers to stdout. Without --model it "
        "answers questions about Python's functions, with the model and the adapter that ship with mpt_eqx.",
        epilog=f"commands in a conversation:\n{COMMANDS}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_options(parser, max_new_tokens=512)
    parser.set_defaults(model=None)
    parser.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    parser.add_argument(
        "--template", metavar="T",
        help="chatml (MosaicML's chat models), mpt-instruct (its instruct models) or a file with a Jinja template "
        "(default: the adapter's or the checkpoint's own)",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print each answer as a line of JSON (default: text, an empty line between "
        "answers unless stdin is a terminal)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answers each line of stdin; the prompt is the whole conversation so far."""
    from mpt_eqx.generation import stream
    from mpt_eqx.generation.interrupts import held_interrupts

    if args.model is None:
        args.model, args.adapter = str(SHIPPED_MODEL), args.adapter or str(SHIPPED_ADAPTER)
    template = read_template(args.template)
    place, tokenizer, options = read_options(args)
    if template is None and (own := with_file(args, place, TEMPLATE)) != place:
        template = read_template(str(own / TEMPLATE))
    max_new_tokens = options.pop("max_new_tokens")
    end_ids = {*options.pop("eos_token_ids"), *tokenizer.ids_of(END_TOKENS)}
    start = [] if args.system is None else [{"role": "system", "content": as_text(args.system, "--system")}]

    def encoded(messages: list[dict[str, str]]) -> list[int]:
        with without_panics():
            tokens = tokenizer.apply_chat_template(messages, chat_template=template)
            tokenizer.decode(tokens)  # what cannot be decoded fails before it is the answer
            return tokens

    encoded([*start, {"role": "user", "content": "?"}])  # fails on an unusable template now, not after a message
    model = load(place, args, tokenizer, options)
    messages, prefix, note = list(start), None, Note()
    terminal, separator = sys.stdin is not None and sys.stdin.isatty(), ""
    for line in read_lines("give it messages, one a line"):
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
        interrupted = False
        try:
            note.show("prefill …")
            tokens = encoded(messages)
            room = min(max_new_tokens, model.config.max_seq_len - len(tokens))
            if room < min(max_new_tokens, MIN_ANSWER):
                raise GenerationError(
                    f"the conversation has {len(tokens)} tokens of max_seq_len={model.config.max_seq_len}, which "
                    f"leaves no room for an answer; start a new one with /reset{_longer(model.config)}"
                )
            prefix = _extend(model, prefix, tokens)
            new = stream(model, [], prefix=prefix, max_new_tokens=room, eos_token_ids=tuple(end_ids), **options)
            for piece in tokenizer.decode_stream(_before(new, end_ids), prompt=tokens, stop=args.stop):
                note.clear()
                with held_interrupts():
                    if not args.json:
                        print(piece if answer else separator + piece, end="", flush=True)
                    answer.append(piece)
        except KeyboardInterrupt:
            interrupted = True
        except MPTError as error:
            if not terminal:
                raise
            note.clear()
            print(f"mpt-eqx: {error}", file=sys.stderr)
            messages.pop()
            continue
        note.clear()
        text = "".join(answer)
        if args.json:
            print(json.dumps({"role": "assistant", "content": text}), flush=True)
        else:
            print("" if text else separator, flush=True)
        if interrupted and not terminal:
            return 130
        separator = "" if terminal else "\n"
        if answer:
            messages.append({"role": "assistant", "content": text})
        else:  # interrupted before the first token, or an empty answer
            messages.pop()
    return 0


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


def _longer(config: "MPTConfig") -> str:
    """Returns what else makes room, where something does."""
    return "" if config.learned_pos_emb else ", or allow more tokens with --max-seq-len N"


def read_template(name: str | None) -> str | None:
    """Returns the name of a built-in template, or the text of a file."""
    from mpt_eqx.text.chat_template import BUILT_IN

    if name is None or name in BUILT_IN or "{%" in name or "{{" in name:
        return name
    try:
        return Path(name).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        expected = f"{', '.join(BUILT_IN)} or a file with a Jinja template"
        raise GenerationError(f"--template: expected {expected}, found {name!r:.100}, which is no such file") from None
    except (OSError, ValueError) as error:  # not a file, or not in UTF-8
        what = getattr(error, "strerror", None) or error
        raise GenerationError(f"--template: expected a file with text, found {name!r:.100} ({what})") from None
