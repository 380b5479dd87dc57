"""`mpt-eqx generate`: continues a prompt."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from mpt_eqx.cli.console import as_text, read_all, without_panics
from mpt_eqx.cli.options import Note, add_options, load, read_options
from mpt_eqx.errors import GenerationError


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "generate",
        parents=[shared],
        help="continue a prompt",
        description="Continues a prompt and streams the text to stdout.",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue (default: read from stdin)")
    add_options(parser, max_new_tokens=128)
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: streamed text)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Streams the text to stdout and prints its speed to stderr; Ctrl-C ends the text, and 130 is returned."""
    from mpt_eqx.generation import stream
    from mpt_eqx.generation.interrupts import held_interrupts

    given = args.prompt is not None
    prompt = as_text(args.prompt, "PROMPT") if given else read_all("give PROMPT instead").removesuffix("\n")
    place, tokenizer, options = read_options(args)
    with without_panics():
        tokens = tokenizer.encode(prompt)
        tokenizer.decode(tokens)  # what cannot be decoded fails before the model is loaded
    if not tokens:
        raise GenerationError("PROMPT: expected some text, found an empty prompt")
    model = load(place, args, tokenizer, options)

    note = Note()
    note.show("compiling …")
    started = time.monotonic()
    new_tokens: list[int] = []
    times: list[float] = []
    text, interrupted, begun = "", False, False

    def recorded() -> Iterator[int]:
        for token in stream(model, tokens, **options):
            times.append(time.monotonic())
            new_tokens.append(token)
            yield token

    def show(piece: str) -> None:
        """Writes a piece of the text, and the prompt before the first."""
        nonlocal begun
        note.clear()
        if not args.json:
            print(piece if begun else prompt + piece, end="", flush=True)
        begun = True

    try:
        for piece in tokenizer.decode_stream(recorded(), prompt=tokens, stop=args.stop):
            with held_interrupts():
                show(piece)
                text += piece
    except KeyboardInterrupt:
        interrupted = True
        # Write what was held back because it could have become a stop string or half a character.
        rest = tokenizer.decode(new_tokens, prompt=tokens).removesuffix("\ufffd")[len(text) :]
        show(rest)
        text += rest
    finally:
        note.clear()
    show("\n")
    ended = bool(new_tokens) and new_tokens[-1] in tokenizer.eos_token_ids
    written = tokenizer.decode(new_tokens, prompt=tokens)
    stopped = ended or any(stop in written for stop in args.stop)
    if args.json:
        record = {
            "prompt": prompt,
            "text": text,
            "tokens": new_tokens,
            "finish_reason": "stop" if stopped else "interrupted" if interrupted else "length",
        }
        print(json.dumps(record))
    if new_tokens:
        print(speed(len(tokens), started, times), file=sys.stderr)
    return 130 if interrupted else 0


def speed(prompt_tokens: int, started: float, times: list[float]) -> str:
    """Returns a line on the speed: without the first chunk, which includes compilation, if there are others."""
    from mpt_eqx.generation.buckets import DECODE_CHUNK

    counts = f"{prompt_tokens} prompt tokens, {len(times)} new tokens"
    if len(times) > DECODE_CHUNK:
        return f"{counts}, {(len(times) - DECODE_CHUNK) / (times[-1] - times[0]):.1f} tokens/s"
    return f"{counts}, {len(times) / (time.monotonic() - started):.1f} tokens/s with compilation"
