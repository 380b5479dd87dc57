"""`mpt-eqx convert`: rewrites a checkpoint as aligned safetensors, or as another program reads it."""

import argparse
import sys
import time
from typing import Any

DESCRIPTION = """Converts any readable checkpoint to aligned (memory-mappable) safetensors, one tensor at a time, and
copies the tokenizer's files. A checkpoint in DST is replaced. With --for it writes what another program
reads, and refuses by name what that program would ignore or compute otherwise."""

EXAMPLES = """examples:
  mpt-eqx convert ./mpt-7b ./mpt-7b-aligned                           safetensors that load in place
  mpt-eqx convert ./storywriter ./copy --for llm-foundry              in llm-foundry's dialect
  mpt-eqx convert ./mpt-7b ./mpt-7b.gguf --for llama.cpp --type Q8_0  one GGUF file with the tokenizer
  mpt-eqx convert ./sea-lion ./lossy --for transformers --lossy       what transformers computes of it
"""


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "convert", parents=[shared], help="rewrite a checkpoint as aligned safetensors, or for another program",
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("source", metavar="SRC", help="directory, weight file or Hub repository id")
    parser.add_argument("destination", metavar="DST", help="directory to write to; for llama.cpp a .gguf file")
    parser.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument("--quantize", metavar="Q", help="quantise weights to int8 or int4 (default: no change)")
    parser.add_argument("--embeddings", action="store_true", help="quantise the embedding, too (default: no)")
    parser.add_argument(
        "--for", dest="program", metavar="P", choices=("transformers", "llama.cpp", "llm-foundry"),
        help="transformers, llama.cpp or llm-foundry (default: mpt-eqx)",
    )  # fmt: skip
    parser.add_argument(
        "--type", metavar="T", help="for llama.cpp: F32, F16, BF16, Q8_0 or Q4_0, of matrices (default: as stored)"
    )
    parser.add_argument(
        "--lossy", action="store_true", help="write what the other program does compute (default: refuse)"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="S", help="maximum file size (default: %(default)s)")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="PATTERN",
        help="leave out tensors of this name, such as 'score.*'; may be repeated (default: none)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the converted checkpoint, and prints to stderr what the other program ignores and one line about it."""
    from mpt_eqx.checkpoint import convert

    started = time.monotonic()
    info = convert(
        args.source, args.destination, dtype=args.dtype, quantize=args.quantize, embeddings=args.embeddings,
        program=args.program, type=args.type, lossy=args.lossy, max_shard_size=args.max_shard_size,
        revision=args.revision, ignore=args.ignore,
    )  # fmt: skip
    seconds = time.monotonic() - started
    for line in info.lost:
        print(f"{args.program} ignores {line}", file=sys.stderr)
    print(f"{args.destination}: {info.parameters:,} parameters from {info.format} in {seconds:.1f} s", file=sys.stderr)
    return 0
