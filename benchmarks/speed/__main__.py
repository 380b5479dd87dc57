"""The command line `python -m benchmarks.speed`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed import report as reports
from benchmarks.speed import run
from benchmarks.speed.baselines import BASELINES
from mpt_eqx import SHIPPED_MODEL, MPTError
from mpt_eqx.checkpoint.hub import find_checkpoint
from mpt_eqx.cli.options import count, counts, some_of

DESCRIPTION = """Measures mpt_eqx beside transformers and llama.cpp, where they are installed, on the same weights and
threads (pip install 'mpt_eqx[bench]', 'mpt_eqx[reference]'). Tables go to stdout, progress to stderr."""

EPILOG = """examples:
  python -m benchmarks.speed                                        the small model that ships with mpt_eqx
  python -m benchmarks.speed --model ./mpt-7b --dtypes bfloat16     a local checkpoint in one dtype
  python -m benchmarks.speed --baselines '' --batch-sizes 1         mpt_eqx alone, with and without its kernel
  python -m benchmarks.speed --reference-size --output results      354 million random weights, as published

--reference-size also measures steps of training (benchmarks/training.py).

(1.50×) in a table: mpt_eqx makes 1.5 times the tokens per second of this row. llama.cpp's dtypes are F32, BF16, Q8_0
and Q4_0, its embedding quantised too, as in our int8 and int4. The logits of all are compared: a large difference means
that something else was computed, and its speed is worth nothing. Run nothing else meanwhile; medians of alternating
rounds help against what does run.
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model", default=str(SHIPPED_MODEL), metavar="M",
        help="directory, weight file or Hub repository id (default: the small model that ships with mpt_eqx)",
    )  # fmt: skip
    which.add_argument("--reference-size", action="store_true", help="random weights instead, of 354 million")
    for flag, kind, metavar, default, text in (
        ("--dtypes", some_of(run.DTYPES), "A,B", ",".join(run.DTYPES), "of the weights"),
        ("--baselines", some_of(BASELINES, may_be_empty=True), "A,B", ",".join(BASELINES), "'' for none"),
        ("--batch-sizes", counts, "A,B", "1,4,16", "rows that are decoded together"),
        ("--prefill-lengths", counts, "A,B", None, "prompt lengths (default: what the model takes of 128,512,2048)"),
        ("--prompt", count(8), "N", "128", "tokens before those that are decoded"),
        ("--new-tokens", count(8, multiple=8), "N", "64", "tokens that are decoded, a multiple of 8"),
        ("--rounds", count(1), "N", "3", "times that each is measured; medians count"),
    ):
        text += f" (default: {default})" if default else ""
        parser.add_argument(flag, type=kind, metavar=metavar, default=default, help=text)
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write speed.json, speed.md and speed.png here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; returns 1 where something failed or disagrees."""
    args = parse(argv)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        if args.output is not None:
            reports.check_output(args.output)
        settings = run.Settings(
            source=None if args.reference_size else str(find_checkpoint(args.model, revision=args.revision)),
            dtypes=args.dtypes,
            baselines=args.baselines,
            prompt=args.prompt,
            new_tokens=args.new_tokens,
            batch_sizes=args.batch_sizes,
            prefill_lengths=args.prefill_lengths,
            rounds=args.rounds,
        )
        report = run.run_benchmark(settings, say, say)
    except MPTError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if args.output is not None:
        for line in reports.write_report(report, args.output):
            say(line)
    print(reports.markdown(report), end="")
    wrong = [r for r in report["results"] if "error" in r or not r.get("agreement", {}).get("agrees")]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
