"""`mpt-eqx generate`: how a prompt goes on."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from mpt_eqx.cli.options import Note, add_options, load, read_options
from mpt_eqx.errors import GenerationError


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "generate", parents=[shared], help="continue a prompt", description="Writes how a prompt goes on, to stdout."
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue; from stdin when left out")
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of streamed text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the text to stdout as it is made, its speed to stderr; after Ctrl-C what there is, and returns 130."""
    from mpt_eqx.generation import stream
    from mpt_eqx.text import until_stop

    prompt = args.prompt if args.prompt is not None else sys.stdin.read().removesuffix("\n")
    place, tokenizer, options = read_options(args)
    options.setdefault("max_new_tokens", 128)
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise GenerationError("PROMPT: expected some text, found an empty prompt")
    model = load(place, args, tokenizer, options)

    note = Note()
    note.show("compiling …")
    started = time.monotonic()
    new_tokens: list[int] = []
    moments: list[float] = []

    def noted() -> Iterator[int]:
        for token in stream(model, tokens, **options):
            note.clear()
            moments.append(time.monotonic())
            new_tokens.append(token)
            yield token

    text, interrupted = "", False
    try:
        for piece in until_stop(tokenizer.decode_stream(noted()), args.stop):
            text += piece
            if not args.json:
                print(prompt + piece if text == piece else piece, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
        # Of what was held back, because it could have become a stop or half a character, nothing is lost.
        rest = tokenizer.decode(new_tokens).removesuffix("\ufffd")[len(text) :]
        text += rest
        if not args.json:
            print(rest if new_tokens and text != rest else prompt + rest, end="", flush=True)
    finally:
        note.clear()
    ended = bool(new_tokens) and new_tokens[-1] in tokenizer.eos_token_ids
    stopped = ended or any(stop in tokenizer.decode(new_tokens) for stop in args.stop)
    if args.json:
        record = {
            "prompt": prompt,
            "text": text,
            "tokens": new_tokens,
            "finish_reason": "stop" if stopped else "interrupted" if interrupted else "length",
        }
        print(json.dumps(record))
    else:
        print("" if text else prompt)
    if new_tokens:
        print(speed(len(tokens), started, moments), file=sys.stderr)
    return 130 if interrupted else 0


def speed(prompt_tokens: int, started: float, moments: list[float]) -> str:
    """Returns a line on how fast it went: after the first chunk, or over all where that one was the only one."""
    from mpt_eqx.generation.loop import CHUNK

    counts = f"{prompt_tokens} prompt tokens, {len(moments)} new tokens"
    if len(moments) > CHUNK:
        return f"{counts}, {(len(moments) - CHUNK) / (moments[-1] - moments[0]):.1f} tokens/s"
    return f"{counts}, {len(moments) / (time.monotonic() - started):.1f} tokens/s with compilation"
