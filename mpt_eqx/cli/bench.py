"""`mpt-eqx bench`: how fast a model is here, beside transformers and llama.cpp."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpt_eqx import SHIPPED_MODEL
from mpt_eqx.cli.options import Note

FORMS = ("float32", "bfloat16", "int8", "int4")
PEERS = ("transformers", "llama.cpp")

DESCRIPTION = """Measures mpt_eqx on this machine, and transformers and llama.cpp on the same weights where they are
installed (pip install 'mpt_eqx[bench]', 'mpt_eqx[reference]'). Tables go to stdout."""

EPILOG = """examples:
  mpt-eqx bench                                              the small model that ships with mpt_eqx
  mpt-eqx bench --model ./mpt-7b --forms bfloat16,int8       a local checkpoint, in two forms
  mpt-eqx bench --peers '' --batch-sizes 1 --rounds 5        mpt_eqx alone, one row, medians of five
  mpt-eqx bench --reference-size --output results            354 million random weights, as published figures are of

what the numbers mean:
  writing      tokens per second after the prompt, of all rows of a batch together; reading the prompt does not count
  reading      tokens of a prompt per second, until the next token is known
  (1.50×)      mpt_eqx makes 1.5 times the tokens per second of this row
  of the memory's speed   a step reads all weights once: their bytes per second, over what this memory gives at most;
               near 100 % nothing but fewer bytes makes it faster
  of the peak  operations per second over those of the fastest product of matrices seen here
  of one row   how much a batch gains: 16 rows at 10× write ten times the tokens of one row
  peak         the most memory of the process, with mapped files; measured in a process for each form
  compiling    what first calls took longer than later ones; mpt-eqx generate --compile-cache keeps it
  temporary    memory of one step besides weights and cache, over the weights
  difference   of the logits from those of the widest form measured; too large a one means that something else was
               computed, and its speed is worth nothing

llama.cpp's forms are F32, BF16, Q8_0 and Q4_0, its embedding quantised, too, as in our int8 and int4. Everybody gets
the same threads. Nothing else should run meanwhile; medians of alternating rounds help against what does.
"""


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "bench", parents=[shared], help="measure speed and memory, beside other libraries", description=DESCRIPTION,
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model", default=str(SHIPPED_MODEL), metavar="M",
        help="directory, weight file or Hub repository id (default: the small model that ships with mpt_eqx)",
    )  # fmt: skip
    which.add_argument("--reference-size", action="store_true", help="random weights instead, of 354 million")
    for flag, kind, default, text in (
        ("--forms", some_of(FORMS), ",".join(FORMS), "types of the weights"),
        ("--peers", some_of(PEERS, may_be_none=True), ",".join(PEERS), "libraries to measure beside; '' for none"),
        ("--batch-sizes", counts, "1,4,16", "rows that are written together"),
    ):
        parser.add_argument(flag, type=kind, default=default, metavar="A,B", help=f"{text} (default: {default})")
    parser.add_argument(
        "--prefill-lengths",
        type=counts,
        metavar="A,B",
        help="prompts that are read (default: what fits of 128,512,2048)",
    )
    for flag, value, text in (
        ("--prompt", 128, "tokens before those that are written"),
        ("--new-tokens", 64, "tokens that are written"),
        ("--rounds", 3, "times that each is measured; medians count"),
    ):
        least = 8 if flag == "--prompt" else 1
        parser.add_argument(flag, type=count(least), default=value, metavar="N", help=f"{text} (default: {value})")
    parser.add_argument(
        "--output", metavar="DIR", help="write speed.json, speed.md and speed.png here (default: not written)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the tables to stdout, what is left out to stderr; returns 1 where something failed or disagrees."""
    from mpt_eqx.bench import report as reports
    from mpt_eqx.bench.run import Settings, run_benchmark
    from mpt_eqx.checkpoint.hub import find_checkpoint

    if args.output is not None:
        reports.check_output(Path(args.output))
    settings = Settings(
        source=None if args.reference_size else str(find_checkpoint(args.model, revision=args.revision)),
        forms=args.forms,
        peers=args.peers,
        prompt=args.prompt,
        new_tokens=args.new_tokens,
        batch_sizes=args.batch_sizes,
        prefill_lengths=args.prefill_lengths,
        rounds=args.rounds,
    )
    note = Note()

    def say(text: str) -> None:
        note.clear()
        note.show(f"{text} …")

    def warn(text: str) -> None:
        note.clear()
        print(f"mpt-eqx: {text}", file=sys.stderr)

    try:
        report = run_benchmark(settings, say, warn)
    finally:
        note.clear()
    if args.output is not None:
        for line in reports.write_report(report, Path(args.output)):
            warn(line)
    print(reports.markdown(report), end="")
    wrong = [r for r in report["results"] if "error" in r or not r.get("agreement", {}).get("agrees")]
    return 1 if wrong else 0


def some_of(known: tuple[str, ...], *, may_be_none: bool = False) -> Callable[[str], tuple[str, ...]]:
    """Returns what makes of "a,b" the names in it, each once."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        if wrong := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found {wrong[0]!r}")
        if not names and not may_be_none:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found none")
        return names

    return parse


def counts(text: str) -> tuple[int, ...]:
    """Returns the whole numbers of "1,4,16", each once and in order."""
    numbers = tuple(sorted({count(1)(part.strip()) for part in text.split(",")}))
    return numbers


def count(least: int) -> Callable[[str], int]:
    """Returns what makes a whole number of a text."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number ≥ {least}, found {text!r}")
        return int(text)

    return parse
