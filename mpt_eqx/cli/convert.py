"""`mpt-eqx convert`: rewrites a checkpoint as aligned safetensors."""

import argparse
import sys
import time
from typing import Any


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "convert", parents=[shared], help="rewrite a checkpoint as aligned safetensors",
        description="Converts any readable checkpoint to aligned (memory-mappable) safetensors, one tensor at a time. "
        "The tokenizer files are copied.",
    )  # fmt: skip
    parser.add_argument("source", metavar="SRC", help="directory, weight file or Hub repository id")
    parser.add_argument("destination", metavar="DST", help="directory to write to")
    parser.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument("--quantize", metavar="Q", help="quantise weights to int8 or int4 (default: no change)")
    parser.add_argument("--embeddings", action="store_true", help="quantise the embedding, too (default: no)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="S", help="maximum file size (default: %(default)s)")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="PATTERN",
        help="leave out tensors of this name, such as 'score.*'; may be repeated (default: none)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the converted checkpoint and prints one line about it to stderr."""
    from mpt_eqx.checkpoint import convert

    started = time.monotonic()
    info = convert(
        args.source, args.destination, dtype=args.dtype, quantize=args.quantize, embeddings=args.embeddings,
        max_shard_size=args.max_shard_size, revision=args.revision, ignore=args.ignore,
    )  # fmt: skip
    seconds = time.monotonic() - started
    print(f"{args.destination}: {info.parameters:,} parameters from {info.format} in {seconds:.1f} s", file=sys.stderr)
    return 0
