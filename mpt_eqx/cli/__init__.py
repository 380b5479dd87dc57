"""The command line `mpt-eqx`. One module per command; text goes to stdout, everything else to stderr."""

import argparse
import sys
from collections.abc import Sequence

from mpt_eqx.cli import bench, chat, convert, generate, inspect
from mpt_eqx.errors import MPTError

COMMANDS = (generate, chat, inspect, convert, bench)  # one module each, in the order in which --help lists them

EXAMPLES = """examples:
  mpt-eqx generate "The zip() function"                      the small model that ships with mpt_eqx
  mpt-eqx generate "Once" --model ./mpt-7b --temperature 0    a local checkpoint, likeliest tokens
  echo "json.dumps(obj" | mpt-eqx generate --seed 3           the prompt from stdin, another draw
  mpt-eqx chat --model ./mpt-7b-chat --template chatml         a conversation
  mpt-eqx inspect ./mpt-7b                                    what a checkpoint holds, and what is wrong with it
  mpt-eqx convert ./mpt-7b ./mpt-7b-aligned                   torch files or GGUF to safetensors that load at once
  mpt-eqx bench --model ./mpt-7b --forms bfloat16,int8        how fast that is here, beside other libraries
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 ok, 1 failure with one line on stderr, 2 bad use."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except MPTError as error:
        if args.debug:
            raise
        print(f"mpt-eqx: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our text has had enough
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpt-eqx",
        description="MosaicML's MPT language models in JAX, without torch.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    shared.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub repository")
    for command in COMMANDS:
        command.add_to(commands, shared)
    return parser
