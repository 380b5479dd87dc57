"""The models of `mpt-eqx serve`: a base, and adapters on it that share its weights."""

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mpt_eqx import SHIPPED_ADAPTER, SHIPPED_MODEL
from mpt_eqx.cli._train_mesh import make_mesh
from mpt_eqx.cli.chat import TEMPLATE, read_template
from mpt_eqx.cli.console import without_panics
from mpt_eqx.cli.options import read_overrides
from mpt_eqx.errors import MPTError

if TYPE_CHECKING:
    from mpt_eqx.model import MPT
    from mpt_eqx.serve.settings import ServedModel


def load_models(args: argparse.Namespace) -> tuple[dict[str, "MPT"], dict[str, "ServedModel"]]:
    """Returns the models for the engine, and what clients see of them, both by name; the base comes first.

    Raises:
        MPTError: an option is invalid, or there is no checkpoint with a tokenizer.
    """
    from mpt_eqx import lora
    from mpt_eqx.checkpoint import from_pretrained
    from mpt_eqx.checkpoint.hub import find_checkpoint
    from mpt_eqx.surgery.quantization import quantize

    source, adapters = args.model, dict(map(_read_adapter, args.adapter))
    if len(adapters) < len(args.adapter):
        raise MPTError("--adapter: expected a name for each, found the same twice; give NAME=DIR")
    if source is None:
        source = str(SHIPPED_MODEL)
        if args.mesh is None:  # where heads are sharded, its targets are split
            adapters = adapters or {"answers": SHIPPED_ADAPTER}
    template = read_template(args.template)
    place = find_checkpoint(source, revision=args.revision)
    base = args.name or _name_of(source)
    places = {base: [place]} | {f"{base}:{name}": [directory, place] for name, directory in adapters.items()}
    # What can be wrong with small files is found before the weights are loaded.
    ready = {name: _read_small(where, template) for name, where in places.items()}
    mesh, rules = (None, None) if args.mesh is None else make_mesh(args.mesh)
    model = from_pretrained(place, dtype=args.dtype, config_overrides=read_overrides(args), mesh=mesh, rules=rules)
    if args.quantize is not None:
        model = quantize(model, args.quantize)
    models = {base: model} | {f"{base}:{name}": lora.load(model, path) for name, path in adapters.items()}
    return models, {name: make(name, models[name]) for name, make in ready.items()}


def _read_adapter(given: str) -> tuple[str, Path]:
    """Returns the name and the directory of an adapter."""
    name, separator, path = given.partition("=")
    if not separator:
        name, path = Path(given).resolve().name, given
    if not re.fullmatch(r"[\w.-]+", name):
        raise MPTError(f"--adapter: expected a name of letters, digits, _, . and -, found {name!r:.100}")
    if not Path(path).is_dir():
        raise MPTError(f"--adapter: expected a directory, found none at {path}")
    return name, Path(path)


def _name_of(source: str) -> str:
    """Returns what clients call a model: a Hub id as it is, of a path the end without what says the format."""
    path = Path(source)
    if not path.exists():
        return source
    return path.resolve().stem if path.is_file() else path.resolve().name


def _read_small(places: list[Path], template: str | None) -> Callable[[str, "MPT"], "ServedModel"]:
    """Returns a function that makes a served model, of whatever small files the first of the places has."""
    from mpt_eqx.generation import generation_defaults
    from mpt_eqx.serve.settings import ServedModel
    from mpt_eqx.text import load_tokenizer

    def find(name: str) -> Path:
        return next((place for place in places[:-1] if (place / name).is_file()), places[-1])

    with without_panics():
        tokenizer = load_tokenizer(find("tokenizer.json"))
    defaults = generation_defaults(find("generation_config.json"))
    if template is None and (own := find(TEMPLATE)) != places[-1]:
        template = read_template(str(own / TEMPLATE))

    def make(name: str, model: "MPT") -> "ServedModel":
        created = int(time.time())
        return ServedModel(name, model.config, tokenizer, defaults, template, created)

    return make
