"""What commands share: options and their parsers, model loading and the status line."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpt_eqx import SHIPPED_MODEL
from mpt_eqx.cli.console import as_text, without_panics
from mpt_eqx.errors import GenerationError

if TYPE_CHECKING:
    from mpt_eqx.model import MPT
    from mpt_eqx.text import Tokenizer

CACHE_BYTES = 512 * 2**20
"""The most that compiled programs may take in the user's cache."""

# Flag, type, metavar, help, and the default where the checkpoint's generation_config.json has none.
SAMPLING = (
    ("--temperature", float, "T", "sampling temperature; 0 is greedy decoding", "0"),
    ("--top-k", int, "K", "sample from the K most probable tokens", "off"),
    ("--top-p", float, "P", "sample from the smallest set of tokens with total probability P (nucleus)", "off"),
    ("--min-p", float, "P", "drop tokens less probable than P times the most probable one", "off"),
    ("--typical-p", float, "P", "sample from the most typical tokens with total probability P", "off"),
    ("--epsilon-cutoff", float, "E", "drop tokens less probable than E", "off"),
    ("--eta-cutoff", float, "E", "drop tokens below a cutoff of E that adapts to the entropy (eta sampling)", "off"),
    ("--repetition-penalty", float, "R", "values above 1 make tokens that occurred before less probable", "off"),
    ("--no-repeat-ngram-size", int, "N", "never repeat a sequence of N tokens", "off"),
    ("--min-new-tokens", int, "N", "minimum number of new tokens", "0"),
)


def add_model(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """Adds the argument that says which model; `name` is that of an option or of a positional argument."""
    parser.add_argument(
        name, default=str(SHIPPED_MODEL), metavar="M", **options,
        help="directory, weight file or Hub repository id (default: the small model that ships with mpt_eqx)",
    )  # fmt: skip


def add_options(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """Adds the options for the model and for sampling; `max_new_tokens` is the command's default."""
    add_model(parser, "--model")
    parser.set_defaults(default_max_new_tokens=max_new_tokens)
    sampling = parser.add_argument_group(
        "sampling", "Values in the checkpoint's generation_config.json replace the defaults below."
    )
    sampling.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"maximum number of new tokens (default: {max_new_tokens})"
    )
    for flag, kind, metavar, text, default in SAMPLING:
        sampling.add_argument(flag, type=kind, metavar=metavar, help=f"{text} (default: {default})")
    sampling.add_argument(
        "--no-defaults", action="store_true", help="ignore the checkpoint's generation_config.json (default: use it)"
    )
    sampling.add_argument("--seed", type=int, default=0, metavar="S", help="random seed (default: %(default)s)")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="S",
        help="stop before this text; may be repeated (default: none)",
    )  # fmt: skip
    add_loading(parser)


def add_loading(parser: argparse.ArgumentParser, *, adapter: bool = True) -> None:
    """Adds the options for how the model is loaded and compiled, with or without the one for an adapter."""
    if adapter:
        parser.add_argument(
            "--adapter", metavar="DIR",
            help="directory with a LoRA adapter in PEFT's files; a tokenizer, chat template and generation_config.json "
            "in it win over the model's (default: none)",
        )  # fmt: skip
    parser.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16 (default: as stored)")
    add_length(parser)
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--compile-cache", metavar="DIR",
        help="keep compiled programs in this directory, which makes the next start faster (default: "
        "$JAX_COMPILATION_CACHE_DIR, else mpt_eqx in $XDG_CACHE_HOME or ~/.cache, where the least recently used go "
        f"beyond {CACHE_BYTES >> 20} MiB)",
    )  # fmt: skip
    kept.add_argument(
        "--no-compile-cache", action="store_true", help="keep no compiled programs (default: they are kept)"
    )


def add_length(parser: argparse.ArgumentParser) -> None:
    """Adds the option for a longer context."""
    parser.add_argument(
        "--max-seq-len", type=int, metavar="N",
        help="most tokens of prompt and answer together, also above the checkpoint's, except with learned positions "
        "(default: the checkpoint's)",
    )  # fmt: skip


def read_overrides(args: argparse.Namespace) -> dict[str, Any] | None:
    """Returns what --max-seq-len replaces in the configuration.

    Raises:
        GenerationError: it is not positive.
    """
    if args.max_seq_len is not None and args.max_seq_len < 1:
        raise GenerationError(f"--max-seq-len: expected a whole number ≥ 1, found {args.max_seq_len}")
    return None if args.max_seq_len is None else {"max_seq_len": args.max_seq_len}


def read_options(args: argparse.Namespace) -> tuple[Path, "Tokenizer", dict[str, Any]]:
    """Returns the checkpoint's path, its tokenizer, and the arguments of `stream`.

    An option on the command line wins over the checkpoint's generation_config.json, which wins over the default.

    Raises:
        MPTError: an option is invalid, or there is no checkpoint with a tokenizer.
    """
    import jax

    from mpt_eqx.generation import generation_defaults

    if not 0 <= args.seed < 2**63:
        raise GenerationError(f"--seed: expected a whole number from 0 to 2^63 - 1, found {args.seed}")
    if any(not stop for stop in args.stop):
        raise GenerationError("--stop: expected some text, found an empty string")
    args.stop = [as_text(stop, "--stop") for stop in args.stop]
    place, tokenizer = find(args)
    defaults = {} if args.no_defaults else generation_defaults(with_file(args, place, "generation_config.json"))
    options = {
        "temperature": 0.0, "max_new_tokens": args.default_max_new_tokens, **defaults,
        "eos_token_ids": tokenizer.eos_token_ids,
    }  # fmt: skip
    for flag, *_ in (*SAMPLING, ("--max-new-tokens",)):
        name = flag.removeprefix("--").replace("-", "_")
        if (given := getattr(args, name)) is not None:
            options[name] = given
    options.pop("num_return_sequences", None)  # the commands return one sequence
    if args.max_new_tokens is not None and args.min_new_tokens is None and "min_new_tokens" in options:
        options["min_new_tokens"] = min(options["min_new_tokens"], args.max_new_tokens)
    return place, tokenizer, {**options, "key": jax.random.key(args.seed)}


def find(args: argparse.Namespace) -> tuple[Path, "Tokenizer"]:
    """Returns the checkpoint's path and its tokenizer, and turns on the compilation cache.

    Raises:
        MPTError: an option is invalid, or there is no checkpoint with a tokenizer.
    """
    from mpt_eqx.checkpoint.hub import find_checkpoint
    from mpt_eqx.text import load_tokenizer

    read_overrides(args)
    if not args.no_compile_cache:
        keep_compiled(args.compile_cache)
    place = find_checkpoint(args.model, revision=args.revision)
    with without_panics():
        return place, load_tokenizer(with_file(args, place, "tokenizer.json"))


def with_file(args: argparse.Namespace, place: Path, name: str) -> Path:
    """Returns the directory of --adapter if it has a file of this name, else the checkpoint."""
    adapter = None if args.adapter is None else Path(args.adapter)
    return adapter if adapter is not None and (adapter / name).is_file() else place


def find_prefix_token(args: argparse.Namespace, tokenizer: "Tokenizer") -> int:
    """Returns the id before a text: that of --prefix-token, else the one that begins texts, else one that ends them.

    Raises:
        GenerationError: there is none.
    """
    if args.prefix_token is not None:
        return int(args.prefix_token)
    known = [*([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), *tokenizer.eos_token_ids]
    if not known:
        raise GenerationError("--prefix-token: expected an id, because the tokenizer has none that ends texts")
    return int(known[0])


def add_prefix_token(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the id before a text."""
    parser.add_argument(
        "--prefix-token", type=count(0), metavar="ID",
        help="id before a text, given which its first token is scored (default: the tokenizer's bos_token, else its "
        "end-of-text token)",
    )  # fmt: skip


def load(place: Path, args: argparse.Namespace, tokenizer: "Tokenizer", options: dict[str, Any] | None = None) -> "MPT":
    """Returns the model, with the adapter if there is one.

    Where its vocabulary is larger than the tokenizer's, `options` masks the extra ids.
    """
    from mpt_eqx import lora
    from mpt_eqx.checkpoint import from_pretrained

    model = from_pretrained(place, dtype=args.dtype, config_overrides=read_overrides(args))
    if args.adapter is not None:
        model = lora.load(model, args.adapter)
    if options is not None and tokenizer.vocab_size < model.config.vocab_size:
        options["vocab_size"] = tokenizer.vocab_size
    return model


def keep_compiled(directory: str | None) -> None:
    """Turns on JAX's persistent compilation cache for every program compiled from here on.

    Args:
        directory: where; None: where JAX was told to, else in the user's cache, bounded in size, if it is writable.

    Raises:
        GenerationError: the directory that was given cannot be created.
    """
    import jax

    if directory is None and jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    place = user_cache() if directory is None else Path(directory)
    try:
        # It holds machine code: nobody else may write there.
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        if directory is None:
            return
        raise GenerationError(f"--compile-cache: expected a directory, found none at {directory} ({error})") from None
    if directory is None:
        if not os.access(place, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def user_cache() -> Path:
    """Returns the directory for what is kept between runs, as the XDG Base Directory Specification has it."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "mpt_eqx"


class Note:
    """A status line on stderr while there is no output yet; silent when stderr is not a terminal."""

    def __init__(self) -> None:
        self._length = 0

    def show(self, text: str) -> None:
        """Shows the status."""
        if sys.stderr.isatty():
            self._length = len(text)
            print(text, end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Erases the status."""
        if self._length:
            print("\r" + " " * self._length + "\r", end="", file=sys.stderr, flush=True)
            self._length = 0


def some_of(known: tuple[str, ...], *, may_be_empty: bool = False) -> Callable[[str], tuple[str, ...]]:
    """Returns a parser of "a,b" into the names in it, each once."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        if wrong := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found {wrong[0]!r}")
        if not names and not may_be_empty:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found none")
        return names

    return parse


def counts(text: str) -> tuple[int, ...]:
    """Returns the whole numbers of "1,4,16", each once and in order."""
    return tuple(sorted({count(1)(part.strip()) for part in text.split(",")}))


def count(least: int, *, multiple: int = 1) -> Callable[[str], int]:
    """Returns a parser of whole numbers, at least `least`, that `multiple` divides."""
    expected = f"a whole number ≥ {least}" if multiple == 1 else f"a multiple of {multiple}, ≥ {least}"

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or int(text) < least or int(text) % multiple:
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
        return int(text)

    return parse
