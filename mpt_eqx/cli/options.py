"""What the commands that write text have in common: their options, the model, and a word on stderr meanwhile."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpt_eqx import SHIPPED_MODEL
from mpt_eqx.errors import GenerationError

if TYPE_CHECKING:
    from mpt_eqx.model import MPT
    from mpt_eqx.text import Tokenizer

SAMPLING = (
    ("--temperature", float, "T", "0 for the likeliest tokens, more for variety"),
    ("--top-k", int, "K", "draw from the K likeliest tokens only"),
    ("--top-p", float, "P", "draw from the likeliest tokens of probability P only"),
    ("--min-p", float, "P", "draw only from tokens at least P times as likely as the likeliest"),
    ("--typical-p", float, "P", "draw from the most typical tokens of probability P only"),
    ("--repetition-penalty", float, "R", "above 1: tokens that were there come less likely"),
    ("--no-repeat-ngram-size", int, "N", "no sequence of N tokens comes twice"),
    ("--min-new-tokens", int, "N", "at least so many tokens"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options on the model and on how its tokens are chosen."""
    parser.add_argument(
        "--model", default=str(SHIPPED_MODEL), metavar="M",
        help="directory, weight file or Hub repository id (default: the small model that ships with mpt_eqx)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="at most so many tokens")
    chosen = parser.add_argument_group(
        "how tokens are chosen", "defaults: the checkpoint's generation_config.json, else the likeliest token"
    )
    for flag, kind, metavar, text in SAMPLING:
        chosen.add_argument(flag, type=kind, metavar=metavar, help=text)
    chosen.add_argument(
        "--no-defaults", action="store_true", help="pay no attention to the checkpoint's generation_config.json"
    )
    chosen.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, another text (default: 0)")
    chosen.add_argument(
        "--stop", action="append", default=[], metavar="S", help="end before this text; may be repeated"
    )
    parser.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument(
        "--compile-cache", metavar="DIR", help="keep what is compiled here, so that the next start is quicker"
    )


def read_options(args: argparse.Namespace) -> tuple[Path, "Tokenizer", dict[str, Any]]:
    """Returns where the checkpoint is, its tokenizer, and the arguments of `stream`: the call's, else the checkpoint's.

    Raises:
        MPTError: an option is not valid, or there is no checkpoint with a tokenizer.
    """
    import jax

    from mpt_eqx.checkpoint.hub import find_checkpoint
    from mpt_eqx.generation import generation_defaults
    from mpt_eqx.text import load_tokenizer

    if not 0 <= args.seed < 2**63:
        raise GenerationError(f"--seed: expected a whole number from 0 to 2^63 - 1, found {args.seed}")
    if any(not stop for stop in args.stop):
        raise GenerationError("--stop: expected some text, found an empty string")
    if args.compile_cache is not None:
        keep_compiled(args.compile_cache)
    place = find_checkpoint(args.model, revision=args.revision)
    tokenizer = load_tokenizer(place)
    defaults = {} if args.no_defaults else generation_defaults(place)
    options = {"temperature": 0.0, **defaults, "eos_token_ids": tokenizer.eos_token_ids}
    for flag, *_ in (*SAMPLING, ("--max-new-tokens",)):
        name = flag.removeprefix("--").replace("-", "_")
        if (given := getattr(args, name)) is not None:
            options[name] = given
    options.pop("num_return_sequences", None)  # here is one
    if args.max_new_tokens is not None and args.min_new_tokens is None and "min_new_tokens" in options:
        options["min_new_tokens"] = min(options["min_new_tokens"], args.max_new_tokens)  # the call's word is the last
    return place, tokenizer, {**options, "key": jax.random.key(args.seed)}


def load(place: Path, args: argparse.Namespace, tokenizer: "Tokenizer", options: dict[str, Any]) -> "MPT":
    """Returns the model; where it has more ids than its tokenizer, `options` bars them."""
    from mpt_eqx.checkpoint import from_pretrained

    model = from_pretrained(place, dtype=args.dtype)
    if tokenizer.vocab_size < model.config.vocab_size:
        options["vocab_size"] = tokenizer.vocab_size
    return model


def keep_compiled(directory: str) -> None:
    """Makes JAX keep all that it compiles from here on.

    Raises:
        GenerationError: the directory cannot be made.
    """
    import jax

    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GenerationError(f"--compile-cache: expected a directory, found none at {directory} ({error})") from None
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Note:
    """A word on stderr while nothing else is to be seen; nothing when stderr is not a terminal."""

    def __init__(self) -> None:
        self._length = 0

    def show(self, text: str) -> None:
        """Writes the word."""
        if sys.stderr.isatty():
            self._length = len(text)
            print(text, end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Takes the word away again."""
        if self._length:
            print("\r" + " " * self._length + "\r", end="", file=sys.stderr, flush=True)
            self._length = 0
