"""`mpt-eqx generate`: how a prompt goes on."""

import argparse
import json
import sys
import time
from typing import Any

from mpt_eqx import SHIPPED_MODEL
from mpt_eqx.errors import GenerationError

CHUNK = 8  # tokens between two looks at what has been made


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "generate", parents=[shared], help="continue a prompt", description="Writes how a prompt goes on, to stdout."
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue; from stdin when left out")
    parser.add_argument(
        "--model", default=str(SHIPPED_MODEL), metavar="M",
        help="directory, weight file or Hub repository id (default: the small model that ships with mpt_eqx)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most so many (default: 128)")
    parser.add_argument(
        "--temperature", type=float, metavar="T",
        help="0 for the likeliest tokens, more for variety (default: the checkpoint's generation_config.json, else 0)",
    )  # fmt: skip
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of probability P only")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, another text (default: 0)")
    parser.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="S", help="end before this text; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of streamed text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the text to stdout as it is made, its speed to stderr."""
    import jax

    from mpt_eqx.checkpoint import from_pretrained
    from mpt_eqx.checkpoint.hub import find_checkpoint
    from mpt_eqx.generation import stream
    from mpt_eqx.text import load_tokenizer, until_stop
    from mpt_eqx.text.tokenizer import generation_config

    if any(not stop for stop in args.stop):
        raise GenerationError("--stop: expected some text, found an empty string")
    prompt = args.prompt if args.prompt is not None else sys.stdin.read().removesuffix("\n")
    place = find_checkpoint(args.model, revision=args.revision)
    directory = place.parent if place.is_file() else place
    tokenizer = load_tokenizer(directory)
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise GenerationError("PROMPT: expected some text, found an empty prompt")
    options = sampling(args, generation_config(directory))
    model = from_pretrained(place, dtype=args.dtype)

    note = Note()
    note.show("compiling …")
    started = time.monotonic()
    new_tokens: list[int] = []
    moments: list[float] = []

    def noted():
        for token in stream(
            model, tokens, max_new_tokens=args.max_new_tokens, chunk_size=CHUNK, eos_token_ids=tokenizer.eos_token_ids,
            key=jax.random.key(args.seed), **options,
        ):  # fmt: skip
            note.clear()
            moments.append(time.monotonic())
            new_tokens.append(token)
            yield token

    text = ""
    try:
        for piece in until_stop(tokenizer.decode_stream(noted()), args.stop):
            text += piece
            if not args.json:
                print(prompt + piece if text == piece else piece, end="", flush=True)
    finally:
        note.clear()
    ended = new_tokens[-1] in tokenizer.eos_token_ids
    stopped = ended or any(stop in tokenizer.decode(new_tokens) for stop in args.stop)
    if args.json:
        record = {
            "prompt": prompt,
            "text": text,
            "tokens": new_tokens,
            "finish_reason": "stop" if stopped else "length",
        }
        print(json.dumps(record))
    else:
        print("" if text else prompt)
    print(speed(len(tokens), started, moments), file=sys.stderr)
    return 0


def sampling(args: argparse.Namespace, defaults: dict) -> dict:
    """Returns how to choose tokens: what the call says, else what the checkpoint's generation_config.json says."""
    sampled = bool(defaults.get("do_sample"))
    options = {}
    for name, greedy in (("temperature", 0.0), ("top_k", None), ("top_p", None)):
        given = getattr(args, name)
        default = defaults.get(name, 1.0 if name == "temperature" else None) if sampled else greedy
        options[name] = default if given is None else given
    return options


def speed(prompt_tokens: int, started: float, moments: list[float]) -> str:
    """Returns a line on how fast it went: after the first chunk, or over all where that one was the only one."""
    counts = f"{prompt_tokens} prompt tokens, {len(moments)} new tokens"
    if len(moments) > CHUNK:
        return f"{counts}, {(len(moments) - CHUNK) / (moments[-1] - moments[0]):.1f} tokens/s"
    return f"{counts}, {len(moments) / (time.monotonic() - started):.1f} tokens/s with compilation"


class Note:
    """A word on stderr while nothing else is to be seen; nothing when stderr is not a terminal."""

    def __init__(self) -> None:
        self._length = 0

    def show(self, text: str) -> None:
        """Writes the word."""
        if sys.stderr.isatty():
            self._length = len(text)
            print(text, end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Takes the word away again."""
        if self._length:
            print("\r" + " " * self._length + "\r", end="", file=sys.stderr, flush=True)
            self._length = 0
