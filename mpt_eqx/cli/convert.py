"""`mpt-eqx convert`: any readable checkpoint as safetensors that load at once."""

import argparse
import sys
import time
from typing import Any


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "convert", parents=[shared], help="rewrite a checkpoint as safetensors that load at once",
        description="Writes any readable checkpoint as aligned safetensors, one tensor at a time, with its tokenizer.",
    )  # fmt: skip
    parser.add_argument("source", metavar="SRC", help="directory, weight file or Hub repository id")
    parser.add_argument("destination", metavar="DST", help="directory to write to")
    parser.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument("--quantize", metavar="Q", help="int8 or int4: matrices in so many bits (default: as stored)")
    parser.add_argument("--embeddings", action="store_true", help="with --quantize: the embedding, too")
    parser.add_argument("--max-shard-size", default="5GB", metavar="S", help="largest file (default: 5GB)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the converted checkpoint, and one line about it to stderr."""
    from mpt_eqx.checkpoint import convert

    started = time.monotonic()
    info = convert(
        args.source, args.destination, dtype=args.dtype, quantize=args.quantize, embeddings=args.embeddings,
        max_shard_size=args.max_shard_size, revision=args.revision,
    )  # fmt: skip
    seconds = time.monotonic() - started
    print(f"{args.destination}: {info.parameters:,} parameters from {info.format} in {seconds:.1f} s", file=sys.stderr)
    return 0
