"""`mpt-eqx generate`: continues a prompt."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mpt_eqx.cli._lines import Record, add_output, at_line, done_lines, encoded, read_texts, write_answers
from mpt_eqx.cli.console import as_text, read_all, without_panics
from mpt_eqx.cli.options import Note, add_options, count, load, read_options
from mpt_eqx.errors import GenerationError

if TYPE_CHECKING:
    from mpt_eqx.text import Tokenizer


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "generate",
        parents=[shared],
        help="continue a prompt, or those of a file",
        description="Continues a prompt and streams the text to stdout; or continues every prompt of a JSONL file.",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue (default: read from stdin)")
    add_options(parser, max_new_tokens=128)
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: streamed text)")
    many = parser.add_argument_group(
        "many prompts", 'Each line of the file is a JSON object with a "prompt". The object is written with "text", '
        '"tokens" and "finish_reason" added, in the order of the file, whatever the batch size.',
    )  # fmt: skip
    many.add_argument("--input", metavar="FILE", help="continue the prompts of this JSONL file (default: PROMPT)")
    many.add_argument(
        "--batch-size", type=count(1), metavar="N", default=8,
        help="prompts that are continued together (default: %(default)s)",
    )  # fmt: skip
    add_output(many)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Streams the text to stdout and prints its speed to stderr; Ctrl-C ends the text, and 130 is returned."""
    if args.input is not None:
        return run_many(args)
    if args.output is not None or args.resume:
        raise GenerationError("--output, --resume: expected --input FILE with them, found none")
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
    if args.json:
        reason = finish_reason(tokenizer, tokens, new_tokens, args.stop, "interrupted" if interrupted else "length")
        print(json.dumps({"prompt": prompt, "text": text, "tokens": new_tokens, "finish_reason": reason}))
    if new_tokens:
        print(speed(len(tokens), started, times), file=sys.stderr)
    return 130 if interrupted else 0


def run_many(args: argparse.Namespace) -> int:
    """Continues the prompts of --input, writes them to --output or stdout, and returns the exit code."""
    import jax
    import numpy as np

    from mpt_eqx.generation import generate
    from mpt_eqx.generation.validate import check_prompts
    from mpt_eqx.text.tokenizer import ends_in_stop

    if args.prompt is not None or args.json:
        raise GenerationError(
            "--input: expected neither PROMPT nor --json with it, found one; its lines are JSON anyway"
        )
    lines = read_texts(args.input, ("prompt",), ("text", "tokens", "finish_reason"))
    done = done_lines(args, lines)
    place, tokenizer, options = read_options(args)
    prompts = encoded(args.input, lines, lambda record: tokenizer.encode(record["prompt"]))
    model = load(place, args, tokenizer, options)
    for (number, _), prompt in zip(lines, prompts, strict=True):
        with at_line(args.input, number):
            check_prompts(model.config, [prompt], max_new_tokens=options["max_new_tokens"], before=0)
    key = options.pop("key")

    def continued(first: int, records: list[Record]) -> list[Record]:
        places = np.arange(first, first + len(records))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
        rows = [prompts[place] for place in places]

        def stopped(row: int, tokens: list[int]) -> bool:
            return ends_in_stop(tokenizer, tokens, args.stop, rows[row])

        until = stopped if args.stop else None
        result = generate(model, rows, key=keys, until=until, progress=False, **options)
        return [
            answer(tokenizer, row, tokens[:length].tolist(), args.stop)
            for row, tokens, length in zip(rows, result.tokens, result.lengths, strict=True)
        ]

    return write_answers(args, lines, done, args.batch_size, continued)


def answer(tokenizer: "Tokenizer", prompt: list[int], tokens: list[int], stop: list[str]) -> Record:
    """Returns the text of new tokens, those of them that it is made of, and why it ends."""
    used: list[int] = []

    def taken() -> Iterator[int]:
        for token in tokens:
            used.append(token)
            yield token

    with without_panics():
        text = "".join(tokenizer.decode_stream(taken(), prompt=prompt, stop=stop))
    return {"text": text, "tokens": used, "finish_reason": finish_reason(tokenizer, prompt, used, stop, "length")}


def finish_reason(tokenizer: "Tokenizer", prompt: list[int], tokens: list[int], stop: list[str], otherwise: str) -> str:
    """Returns "stop" where an end-of-text token or a stop string ended the text, `otherwise` where none did."""
    ended = bool(tokens) and tokens[-1] in tokenizer.eos_token_ids
    written = tokenizer.decode(tokens, prompt=prompt)
    return "stop" if ended or any(text in written for text in stop) else otherwise


def speed(prompt_tokens: int, started: float, times: list[float]) -> str:
    """Returns a line on the speed: without the first chunk, which includes compilation, if there are others."""
    from mpt_eqx.generation.buckets import DECODE_CHUNK

    counts = f"{prompt_tokens} prompt tokens, {len(times)} new tokens"
    if len(times) > DECODE_CHUNK:
        return f"{counts}, {(len(times) - DECODE_CHUNK) / (times[-1] - times[0]):.1f} tokens/s"
    return f"{counts}, {len(times) / (time.monotonic() - started):.1f} tokens/s with compilation"
