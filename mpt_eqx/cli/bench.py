"""`mpt-eqx bench`: how fast a model is on this machine, and what memory it needs."""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from mpt_eqx import MPTConfig, checkpoint_info
from mpt_eqx.checkpoint.hub import find_checkpoint
from mpt_eqx.cli.options import Note, add_length, add_model, count, counts, read_overrides, some_of
from mpt_eqx.errors import MPTError

DTYPES = ("stored", "float32", "bfloat16", "int8", "int4")
KERNEL = {"on": ("1",), "off": ("0",), "both": ("1", "0")}  # values of MPT_EQX_KERNEL

DESCRIPTION = """Measures a model on this machine: tokens per second, start-up and memory. A table goes to stdout,
progress to stderr. Every dtype is measured in a process of its own, with random tokens and greedy decoding."""

EPILOG = """examples:
  mpt-eqx bench                                               the small model that ships with mpt_eqx
  mpt-eqx bench --model ./mpt-7b --dtypes bfloat16,int8       a local checkpoint in two dtypes
  mpt-eqx bench --dtypes bfloat16 --kernel both --json        with and without the CPU kernel, as JSON

what the numbers mean:
  prefill      prompt tokens per second, until the next token is known; one row
  decode       new tokens per second after the prompt, all rows of the batch together, prefill not included
  bandwidth    a decode step reads all weights once: their bytes per second at the smallest batch, over the memory
               bandwidth measured here; near 100 % only fewer bytes per weight can be faster
  load         seconds to load the checkpoint, and to quantise it for int8 and int4
  1st token    seconds of the first (shortest) prefill after loading, compilation included
  compile      what the first calls of all sizes took longer than later ones
  peak         most memory of the process, mapped files included; "–" where the system does not report it

int8 and int4 quantise the embedding too and compute in bfloat16. The optional CPU kernel serves decode steps on CPUs;
--kernel off sets MPT_EQX_KERNEL=0. Run nothing else meanwhile.
"""


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "bench", parents=[shared], help="measure a model's speed and memory", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model(parser, "--model")
    add_length(parser)
    for flag, kind, metavar, default, text in (
        ("--dtypes", some_of(DTYPES), "A,B", "stored", f"some of {', '.join(DTYPES)}"),
        ("--batch-sizes", counts, "A,B", "1,4,16", "rows that are decoded together"),
        ("--prefill-lengths", counts, "A,B", None, "prompt lengths (default: what the model takes of 128,512,2048)"),
        ("--prompt", count(1), "N", "128", "tokens before those that are decoded"),
        ("--new-tokens", count(8, multiple=8), "N", "64", "tokens that are decoded in each row, a multiple of 8"),
        ("--rounds", count(1), "N", "3", "times that everything is measured after a first run; medians count"),
    ):  # fmt: skip
        text += f" (default: {default})" if default else ""
        parser.add_argument(flag, type=kind, metavar=metavar, default=default, help=text)
    parser.add_argument("--kernel", choices=KERNEL, default="on", help="use the optional CPU kernel (default: on)")
    parser.add_argument("--json", action="store_true", help="write one JSON object (default: a table)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and writes; returns 1 where a dtype failed."""
    place = find_checkpoint(args.model, revision=args.revision)
    config = checkpoint_info(place, config_overrides=(overrides := read_overrides(args))).config
    question = {
        "place": str(place), "overrides": overrides, "prompt": args.prompt, "new_tokens": args.new_tokens,
        "batch_sizes": args.batch_sizes, "prefill_lengths": check_lengths(args, config), "rounds": args.rounds,
    }  # fmt: skip
    note, results = Note(), []
    for dtype in args.dtypes:
        for switch in KERNEL[args.kernel]:
            note.show(f"measuring {dtype}, kernel {'on' if switch == '1' else 'off'} …")
            found = ask({**question, "dtype": dtype}, {"MPT_EQX_KERNEL": switch})
            note.clear()
            if "error" in found:
                print(f"mpt-eqx: {dtype}: {found['error']}", file=sys.stderr)
            results.append({"asked": dtype, **found})
    report = {"model": args.model, "parameters": config.num_parameters(), **question, "results": results}
    print(json.dumps(report, indent=1) if args.json else text_report(report))
    return 1 if any("error" in result for result in results) else 0


def ask(question: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Returns what a process of its own measured, or "error"."""
    done = subprocess.run(
        [sys.executable, "-m", "mpt_eqx.cli._measure"], input=json.dumps(question), stdout=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    if done.returncode or not done.stdout.strip():
        return {"error": f"its process ended with code {done.returncode}; -9 means that memory ran out"}
    return json.loads(done.stdout.splitlines()[-1])


def check_lengths(args: argparse.Namespace, config: MPTConfig) -> tuple[int, ...]:
    """Returns the lengths to prefill.

    Raises:
        MPTError: something is longer than the model takes.
    """
    most, needed = config.max_seq_len, args.prompt + args.new_tokens + 8
    if needed > most:
        raise MPTError(
            f"--prompt {args.prompt}, --new-tokens {args.new_tokens} and 8 tokens of warm-up: expected at most "
            f"max_seq_len={most} together, found {needed}; give smaller numbers, or --max-seq-len"
        )
    lengths = args.prefill_lengths or tuple(n for n in (128, 512, 2048) if n <= most) or (args.prompt,)
    if max(lengths) > most:
        raise MPTError(f"--prefill-lengths: expected at most max_seq_len={most}, found {max(lengths)}; give less")
    return lengths


def text_report(report: dict[str, Any]) -> str:
    """Returns the report as a table, a line for each process that succeeded."""
    head = ["dtype", "kernel", *(f"prefill {n}" for n in report["prefill_lengths"])]
    head += [*(f"decode ×{n}" for n in report["batch_sizes"]), "bandwidth", "load", "1st token", "compile"]
    rows = [[*head, "weights", "peak"]]
    for result in report["results"]:
        if "error" not in result:
            rates = [*result["prefill_tokens_per_s"].values(), *result["decode_tokens_per_s"].values()]
            seconds = [result[key] for key in ("load_seconds", "first_token_seconds", "compile_seconds")]
            sizes = [result[key] for key in ("weight_bytes", "peak_bytes")]
            rows.append([
                result["dtype"], "yes" if result["kernel"] else "no", *map(_digits, rates),
                f"{100 * result['bandwidth_share']:.0f} %", *(f"{_digits(x)} s" for x in seconds), *map(_bytes, sizes),
            ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    about = f"{report['model']}: {report['parameters']:,} parameters. Tokens per second; decode: batch sizes, "
    return "\n".join([f"{about}{report['new_tokens']} tokens after {report['prompt']}.", *lines])


def _digits(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def _bytes(n: int | None) -> str:
    return "–" if n is None else f"{_digits(n / 1e6)} MB"
