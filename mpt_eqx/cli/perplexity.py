"""`mpt-eqx perplexity`: how likely a text is, per token and per byte."""

import argparse
import importlib
import json
import math
from pathlib import Path
from typing import Any

from mpt_eqx.cli.console import as_text, read_all, without_panics
from mpt_eqx.cli.options import add_loading, add_model, add_prefix_token, count, find, find_prefix_token, load
from mpt_eqx.errors import MPTError

DESCRIPTION = """Measures how likely a text is. The model reads it in windows of --length tokens that move by --stride;
each window scores the tokens that the one before it has not. Numbers per byte compare models with other tokenizers."""

EPILOG = """examples:
  mpt-eqx perplexity notes.txt                                       the small model that ships with mpt_eqx
  mpt-eqx perplexity book.txt --model ./mpt-7b --dtype bfloat16
  mpt-eqx perplexity book.txt --stride 1024 --plot context.png       what more context gives
"""


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "perplexity", parents=[shared], help="how likely a text is, per token and per byte", description=DESCRIPTION,
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("file", nargs="?", metavar="FILE", help="text in UTF-8 (default: stdin)")
    add_model(parser, "--model")
    parser.add_argument(
        "--length", type=count(1), metavar="N", help="tokens that the model sees at most (default: its max_seq_len)"
    )
    parser.add_argument(
        "--stride", type=count(1), metavar="N",
        help="tokens from one window to the next; fewer give each token more context and take longer (default: half of "
        "--length)",
    )  # fmt: skip
    add_prefix_token(parser)
    parser.add_argument(
        "--plot",
        metavar="PNG",
        help="draw the nats per token over the tokens before it; needs the extra plot (default: no picture)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: a table)")
    add_loading(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the figures to stdout, and returns the exit code."""
    from mpt_eqx.evaluation import perplexity
    from mpt_eqx.text.pairs import after

    if args.plot is not None:
        _check_plot(Path(args.plot))
    text = _read(args.file)
    place, tokenizer = find(args)
    before = find_prefix_token(args, tokenizer)
    with without_panics():
        tokens = after(before, tokenizer.encode(text))[1:]
    if not tokens:
        raise MPTError(f"{args.file or 'stdin'}: expected some text, found none")
    model = load(place, args, tokenizer)
    result = perplexity(model, tokens, prefix_token=before, length=args.length, stride=args.stride)
    size = len(text.encode())
    figures = {
        "tokens": len(tokens),
        "bytes": size,
        "nats_per_token": result.nats / len(tokens),
        "perplexity": result.perplexity,
        "nats_per_byte": result.nats / size,
        "bits_per_byte": result.nats / size / math.log(2),
    }
    if args.plot is not None:
        _draw(Path(args.plot), result.curve())
    if args.json:
        print(json.dumps({**figures, "curve": result.curve()}))
        return 0
    for name, value in figures.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        print(f"{name.replace('_', ' '):<16}{shown:>14}")
    return 0


def _read(file: str | None) -> str:
    if file is None:
        return read_all("give FILE instead")
    try:
        with open(file, encoding="utf-8", errors="surrogateescape", newline="") as opened:
            return as_text(opened.read(), file, "utf-8")
    except OSError as error:
        raise MPTError(f"{file}: expected a text file, found none that can be read ({error})") from None


def _check_plot(path: Path) -> None:
    """Raises unless a picture can be drawn there, which would be a pity to find out at the end."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise MPTError("--plot needs the extra plot: pip install 'mpt_eqx[plot]'") from None
    if path.suffix != ".png":
        raise MPTError(f"--plot: expected a name that ends in .png, found {path}")
    if not path.absolute().parent.is_dir():
        raise MPTError(f"--plot: expected a directory for the picture, found none at {path.absolute().parent}")


def _draw(path: Path, curve: list[tuple[float, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*curve, strict=True))
    axes.set_xlabel("tokens before")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    figure.savefig(path)
    plt.close(figure)
