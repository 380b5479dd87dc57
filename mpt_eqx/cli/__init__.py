"""The command line `mpt-eqx`: one module per command. Results go to stdout, everything else to stderr."""

import argparse
import contextlib
import gc
import sys
from collections.abc import Sequence

from mpt_eqx import __version__
from mpt_eqx.cli import bench, chat, console, convert, eval, generate, inspect, perplexity, score, serve, train
from mpt_eqx.errors import MPTError

COMMANDS = (
    generate,
    chat,
    serve,
    score,
    perplexity,
    eval,
    inspect,
    convert,
    train,
    bench,
)  # one module each, in the order in which --help lists them

EXAMPLES = """examples:
  mpt-eqx generate "The zip() function"                      the small model that ships with mpt_eqx
  mpt-eqx generate "Once" --model ./mpt-7b --temperature 0    a local checkpoint, greedy decoding
  echo "json.dumps(obj" | mpt-eqx generate --seed 3           the prompt from stdin, another seed
  mpt-eqx chat --model ./mpt-7b-chat --template chatml         a conversation
  mpt-eqx serve ./mpt-7b-chat --slots 16                      OpenAI's interface, and a chat page
  mpt-eqx perplexity notes.txt --model ./mpt-7b               how likely a text is, per token and per byte
  mpt-eqx inspect ./mpt-7b                                    what a checkpoint contains, and what is wrong with it
  mpt-eqx convert ./mpt-7b ./mpt-7b-aligned                   torch files or GGUF to memory-mapped safetensors
  mpt-eqx train --data notes.jsonl --output run               fine-tune that small model on your texts
  mpt-eqx eval --tasks lambada_openai --model ./mpt-7b        tasks of lm-evaluation-harness
  mpt-eqx bench --model ./mpt-7b --dtypes bfloat16,int8       its speed and memory here, in two dtypes
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    It is 0 for success, 1 for a failure (one line on stderr), 2 for invalid usage, 130 for Ctrl-C.
    """
    debug = False
    # What is imported stays, and tracing makes many objects and few cycles: a tenth of a short command is collecting.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    try:
        console.prepare()
        # parse_args would answer an unknown flag with the usage of the main parser, whichever command was given.
        args, unknown = _parser().parse_known_args(argv)
        debug = getattr(args, "debug", False)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has closed it
        console.forget(sys.stdout)
        return 0
    except Exception as error:
        if debug:
            raise
        return _failed(error)


def _failed(error: Exception) -> int:
    """Writes one line about an error to stderr and returns the exit code."""
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and sys.stdout is not None:
        console.forget(sys.stdout)  # it may be what cannot be written to
    if not isinstance(error, MPTError):
        message = f"{type(error).__name__}: {message[:500]}; --debug shows where"
    with contextlib.suppress(OSError, ValueError):
        print(f"mpt-eqx: error: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpt-eqx",
        description="MosaicML's MPT language models in JAX, without torch.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mpt-eqx {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error (default: one line)")
    shared.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub repository (default: main)")
    for command in COMMANDS:
        command.add_to(commands, shared)
    for subparser in commands.choices.values():
        subparser.set_defaults(parser=subparser)
    return parser
