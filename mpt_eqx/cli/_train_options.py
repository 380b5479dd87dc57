"""The options of `mpt-eqx train`: flags, and keys of a TOML file."""

import argparse
import difflib
import tomllib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from mpt_eqx import SHIPPED_MODEL
from mpt_eqx.cli.options import count, some_of
from mpt_eqx.errors import MPTError, printable


def positive(text: str) -> float:
    """Returns a number > 0."""
    return _number(text, lambda x: 0 < x < float("inf"), "a number > 0")


def share(text: str) -> float:
    """Returns a number from 0 to 1."""
    return _number(text, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def _number(text: str, fits: Callable[[float], bool], expected: str) -> float:
    try:
        if fits(value := float(text)):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")


def one_of(*known: str) -> Callable[[str], str]:
    """Returns a parser of one of some words."""

    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"expected {' or '.join(known)}, found {text!r}")
        return text

    return parse


AXES = ("dp", "fsdp", "tp", "sp")


def mesh_axes(text: str) -> dict[str, int]:
    """Returns the sizes of the axes of a mesh, from a text such as fsdp=2,tp=4."""
    found = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or name in found:
            raise argparse.ArgumentTypeError(f"expected each of {', '.join(AXES)} at most once, found {part!r}")
        found[name] = count(1)(size)
    return found


TARGETS = some_of(("Wqkv", "Wq", "Wk", "Wv", "out_proj", "up_proj", "down_proj", "gate_proj"))
TYPE = one_of("float32", "bfloat16", "float16")
SCHEDULE, SCHEME, REMAT = one_of("cosine", "linear"), one_of("int8", "int4"), one_of("none", "full", "dots", "offload")
OPTIMIZER, BLOCKS = one_of("adamw", "lionw"), one_of("single", "stacked")
WORDS = (str, mesh_axes, TARGETS, TYPE, SCHEDULE, SCHEME, REMAT, OPTIMIZER, BLOCKS)
"""The parsers of options that are texts in a TOML file; the others are numbers there."""

# Group; flag, parser, metavar, help, and the default where it is a word for what the command does without the option.
OPTIONS = (
    ("model", "--model", str, "M", "directory, weight file or Hub repository id, also of the tokenizer",
     "the small model that ships with mpt_eqx"),
    ("model", "--new", str, "NAME", "train new weights: a preset, such as mpt-7b, or a config.json",
     "those of --model"),
    ("model", "--lora", count(1), "RANK", "train an adapter of this rank only", "all weights"),
    ("model", "--lora-alpha", positive, "A", "the adapter is scaled by A / RANK", "RANK"),
    ("model", "--lora-targets", TARGETS, "A,B", "linear maps that get an adapter", "Wqkv"),
    ("model", "--lora-dropout", share, "P", "of the adapter's input, in training", "0"),
    ("model", "--quantize", SCHEME, "S", "int8 or int4, under an adapter", "as stored"),
    ("model", "--freeze", str, "P,Q", "weights that stay as they are, such as wte.weight,blocks.0.*", "none"),
    ("data", "--data", str, "FILE", "what is trained on", "none; it is needed"),
    ("data", "--eval-data", str, "FILE", "what the loss is measured on besides", "none"),
    ("data", "--chat-template", str, "T", "of conversations and instructions, such as chatml", "the checkpoint's"),
    ("data", "--length", count(2), "N", "tokens of a row", "the preset's, else at most 512"),
    ("data", "--seed", count(0), "S", "of new weights, adapters and the order of documents", "0"),
    ("recipe", "--preset", str, "NAME", "a published recipe: mpt-125m, mpt-7b, mpt-30b, mpt-7b-dolly-sft or "
     "mpt-30b-instruct; options below replace its numbers", "none"),
    ("recipe", "--steps", count(1), "N", "length of the run", "the preset's, else that of --epochs"),
    ("recipe", "--epochs", count(1), "N", "passes over the data, without --steps", "the preset's, else 1"),
    ("recipe", "--batch-size", count(1), "N", "rows of a step", "the preset's, else 8"),
    ("recipe", "--accumulate", count(1), "N", "parts of a batch, computed one after another", "1"),
    ("recipe", "--optimizer", OPTIMIZER, "O", "adamw or lionw, with decoupled weight decay", "adamw"),
    ("recipe", "--learning-rate", positive, "R", "the highest", "the preset's, else 1e-5, with --lora 2e-4, with "
     "--new 6e-4; with lionw a tenth of these"),
    ("recipe", "--schedule", SCHEDULE, "S", "cosine or linear", "the preset's, else linear, with --new cosine"),
    ("recipe", "--warmup-steps", count(0), "N", "steps in which the rate rises", "the preset's, else a tenth, at most "
     "100"),
    ("recipe", "--floor", share, "F", "the last rate, as a part of the highest", "the preset's, else 0, with --new "
     "0.1"),
    ("recipe", "--b2", share, "B", "of the optimizer", "the preset's, else 0.95, with lionw 0.99"),
    ("recipe", "--weight-decay", share, "W", "of the optimizer, times the schedule only", "the preset's, else 0"),
    ("recipe", "--max-grad-norm", positive, "G", "larger gradients are scaled down", "the preset's, else 1"),
    ("computing", "--compute-dtype", TYPE, "D", "of the forward and backward pass", "that of the weights, which is "
     "float32 where they are trained"),
    ("computing", "--remat", REMAT, "R", "none, dots, full or offload: time for memory", "none"),
    ("computing", "--blocks", BLOCKS, "B", "single, or stacked: compiled as one, in a time that no depth changes",
     "single"),
    ("computing", "--mesh", mesh_axes, "AXES", "devices by axis: dp and fsdp share rows, fsdp weights, tp heads and "
     "hidden units, sp positions; such as fsdp=8 or fsdp=2,tp=4", "one device"),
    ("processes", "--coordinator", str, "HOST:PORT", "of process 0, or auto: on Slurm, TPU pods and Kubernetes",
     "one process"),
    ("processes", "--processes", count(1), "N", "that run this command, with --coordinator HOST:PORT", "JAX finds it"),
    ("processes", "--process", count(0), "I", "which of them this is", "JAX finds it"),
    ("output", "--output", str, "DIR", "directory of this run", "none; it is needed"),
    ("output", "--save-every", count(1), "N", "steps between saved states, of which three stay", "a tenth of the run"),
    ("output", "--eval-every", count(1), "N", "steps between measurements and samples", "a tenth of the run"),
    ("output", "--sample", str, "TEXT", "a prompt that is continued at each measurement", "none"),
    ("output", "--save-dtype", TYPE, "D", "of the weights in model/", "as stored, with --new float32"),
)  # fmt: skip


def name_of(flag: str) -> str:
    """Returns the name of an option: batch_size of --batch-size."""
    return flag.removeprefix("--").replace("-", "_")


def read_file(path: str) -> dict[str, Any]:
    """Returns the options of a TOML file.

    Raises:
        MPTError: it cannot be read, or has a key or a value that is none of an option.
    """
    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise MPTError(f"{path}: expected a TOML file, found none that can be read ({error})") from None
    kinds = {name_of(flag): kind for _, flag, kind, *_ in OPTIONS}
    options = {}
    for key, value in found.items():
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, 1) or sorted(kinds)
            raise MPTError(f"{path}: expected options such as {', '.join(close)}, found {printable(repr(key))}")
        text = ",".join(map(str, value)) if isinstance(value, list) and kinds[key] in WORDS else value
        if isinstance(value, bool) or isinstance(text, str) != (kinds[key] in WORDS):
            wanted = "a text" if kinds[key] in WORDS else "a number"
            raise MPTError(f"{path}: {key}: expected {wanted}, found {printable(repr(value))}")
        try:
            options[key] = kinds[key](text if isinstance(text, str) else repr(text))
        except argparse.ArgumentTypeError as error:
            raise MPTError(f"{path}: {key}: {error}") from None
    return options


def read_options(args: argparse.Namespace) -> SimpleNamespace:
    """Returns all options: those of flags, of the file, and None for the rest.

    Raises:
        MPTError: one is missing, or two exclude each other.
    """
    options = SimpleNamespace(**dict.fromkeys((name_of(flag) for _, flag, *_ in OPTIONS)))
    for source in ({} if args.config is None else read_file(args.config), vars(args)):
        vars(options).update(
            {key: value for key, value in source.items() if value is not None and hasattr(options, key)}
        )
    for name in ("data", "output"):
        if getattr(options, name) is None:
            raise MPTError(f"--{name}: expected a path, found none; give --{name}, or {name} = in a TOML file")
    for one, other, why in (
        ("lora", "freeze", "under an adapter all weights stay as they are"),
        ("lora", "new", "an adapter needs a model that was trained"),
    ):
        if getattr(options, one) is not None and getattr(options, other) is not None:
            raise MPTError(f"--{one} and --{other}: expected one of them, found both; {why}")
    for name in ("lora_alpha", "lora_targets", "lora_dropout", "quantize"):
        if getattr(options, name) is not None and options.lora is None:
            raise MPTError(f"--{name.replace('_', '-')}: expected --lora with it, found none")
    for name in ("processes", "process"):
        if getattr(options, name) is not None and options.coordinator is None:
            raise MPTError(f"--{name}: expected --coordinator with it, found none")
    if options.coordinator is not None and options.mesh is None:
        raise MPTError("--coordinator: expected --mesh with it, of the devices of all processes, found none")
    options.model = str(SHIPPED_MODEL) if options.model is None else options.model
    options.seed, options.accumulate = options.seed or 0, options.accumulate or 1
    options.remat = options.remat or "none"
    return options
