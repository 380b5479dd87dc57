"""`mpt-eqx train`: pretrains or fine-tunes a model, or trains an adapter, from a TOML file and flags."""

import argparse
import dataclasses
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from mpt_eqx.cli._train_log import Log
from mpt_eqx.cli._train_mesh import ROWS, connect, make_mesh, new_on_mesh
from mpt_eqx.cli._train_needs import needs
from mpt_eqx.cli._train_options import OPTIONS, read_options
from mpt_eqx.errors import MPTError, printable

if TYPE_CHECKING:
    from mpt_eqx.text import Tokenizer
    from mpt_eqx.train import Recipe, TrainState

DESCRIPTION = """Trains a model on texts, instructions or conversations. Options come from CONFIG, a TOML file, and from
flags, which win over it; the keys of the file are the names of the flags, with _ for -."""

EPILOG = """examples:
  mpt-eqx train --data notes.jsonl --output run --dry-run      what it would need; nothing is trained
  mpt-eqx train --data notes.jsonl --output run --steps 200    all weights of the small model that ships with mpt_eqx
  mpt-eqx train --data qa.jsonl --output run --lora 8          an adapter; the model stays as it is
  mpt-eqx train --model ./mpt-7b --quantize int4 --lora 16 --data qa.jsonl --output run     over 4 bits
  mpt-eqx train run.toml --learning-rate 1e-4                  options of a file, and one in another value
  mpt-eqx train run.toml --mesh fsdp=4,tp=2                    on eight devices
  mpt-eqx train run.toml --mesh fsdp=32 --coordinator auto     on several machines, started by Slurm

a file run.toml:
  model = "./mpt-7b"
  data = "qa.jsonl"
  output = "run"
  preset = "mpt-7b-dolly-sft"
  batch_size = 8

data: a .txt file is one document; each line of a .jsonl file is one, with the keys "text", or "prompt" and "response",
or "instruction" and "output", or "messages". Of the last three the answers are trained, and the rest is not.

The output directory gets states/, log.jsonl, curve.png (with matplotlib), and at the end model/ or adapter/. Ctrl-C and
SIGTERM let the step end and save; the same command goes on from there, to the bit.
"""


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "train", parents=[shared], help="pretrain, fine-tune, or train an adapter", description=DESCRIPTION,
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a TOML file with options (default: none)")
    groups: dict[str, Any] = {}
    for title, flag, kind, metavar, text, default in OPTIONS:
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(flag, type=kind, metavar=metavar, help=f"{text} (default: {default})")
    parser.add_argument("--dry-run", action="store_true", help="say what the run needs, and stop (default: train)")
    parser.set_defaults(run=run)


def read_recipe(options: SimpleNamespace, longest: int) -> "Recipe":
    """Returns the numbers of the preset, or defaults, with those of the options in their place.

    Raises:
        MPTError: there is no such preset, or rows are longer than the model takes.
    """
    from mpt_eqx.train import RECIPES, Recipe

    if options.preset is not None and options.preset not in RECIPES:
        raise MPTError(f"--preset: expected {' or '.join(RECIPES)}, found {printable(repr(options.preset))}")
    lion = options.optimizer == "lionw"
    rate = (6e-4 if options.new else 2e-4 if options.lora else 1e-5) / (10 if lion else 1)
    recipe = RECIPES.get(options.preset) or Recipe(
        rate, 0.99 if lion else 0.95, "cosine" if options.new else "linear", 100, 0.1 if options.new else 0.0, 8,
        min(512, longest), None, 1, "defaults",
    )  # fmt: skip
    given = {f.name: getattr(options, f.name, None) for f in dataclasses.fields(recipe)} | {"rule": options.optimizer}
    recipe = dataclasses.replace(recipe, **{name: value for name, value in given.items() if value is not None})
    if options.epochs is not None and options.steps is None:
        recipe = dataclasses.replace(recipe, steps=None)
    if recipe.length > longest:
        raise MPTError(f"--length: expected at most max_seq_len={longest}, found {recipe.length}; give --length")
    if recipe.batch_size % options.accumulate:
        raise MPTError(
            f"--accumulate: expected a divisor of --batch-size {recipe.batch_size}, found {options.accumulate}"
        )
    rows = recipe.batch_size // options.accumulate
    devices = math.prod(size for axis, size in (options.mesh or {}).items() if axis in ROWS)
    if rows % devices:
        raise MPTError(
            f"--mesh: expected {' × '.join(ROWS)} to divide the {rows} rows that are computed at a time, --batch-size "
            f"/ --accumulate, found {devices}"
        )
    return recipe


def read_data(path: str, tokenizer: "Tokenizer", chat_template: str | None) -> list[Any]:
    """Returns documents as `pack` takes them."""
    import numpy as np

    from mpt_eqx.train import read_documents

    if not path.endswith(".txt"):
        return read_documents(path, tokenizer, chat_template=chat_template)
    try:
        tokens = tokenizer.encode(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise MPTError(f"{path}: expected text in UTF-8, found none that can be read ({error})") from None
    ids = np.asarray([*tokens, *tokenizer.eos_token_ids[:1]], np.int32)
    return [{"tokens": ids, "labels": ids}]


class Plan(NamedTuple):
    """What a run is made of.

    Attributes:
        options: of the command.
        place: the checkpoint of the tokenizer, and of the weights unless they are new.
        tokenizer: its tokenizer.
        recipe: its numbers.
        steps: how many.
        epoch: rows of one pass over the data, and tokens in it that are trained.
        rows: returns the rows from a place in the data on.
        eval_rows: those that the loss is measured on.
        start: returns the state before the first step.
        shapes: does so without its numbers, from nothing.
        step: of training.
        optimizer: that it is made of.
        dtype: that the model is saved in.
    """

    options: SimpleNamespace
    place: Path
    tokenizer: "Tokenizer"
    recipe: "Recipe"
    steps: int
    epoch: tuple[int, int]
    rows: Callable[..., Any]
    eval_rows: list[dict[str, Any]] | None
    start: Callable[[], "TrainState"]
    shapes: Callable[[], "TrainState"]
    step: Callable[..., Any]
    optimizer: Any
    dtype: str


def prepare(options: SimpleNamespace, revision: str | None) -> Plan:
    """Returns the plan of a run, for which data, but no weights are read."""
    import jax

    from mpt_eqx import MPT, MPTConfig, checkpoint_info, from_pretrained, lora, quantize, stack, train
    from mpt_eqx.checkpoint.hub import find_checkpoint
    from mpt_eqx.sharding import shard
    from mpt_eqx.text import load_tokenizer

    place = find_checkpoint(options.model, revision=revision)
    tokenizer, info = load_tokenizer(place), checkpoint_info(place)
    config, stored, scheme = info.config, info.quantization, options.quantize
    dtype = "float32" if options.new else str(info.weight_dtype or _dtype_of(info))
    if options.new:
        config = MPTConfig.from_json_file(options.new) if Path(options.new).exists() else MPTConfig.preset(options.new)
        if config.vocab_size < tokenizer.vocab_size:
            raise MPTError(
                f"--new: expected a vocab_size of at least {tokenizer.vocab_size}, as the tokenizer of --model has, "
                f"found {config.vocab_size}"
            )
    elif stored is not None and (options.lora is None or scheme is not None):
        raise MPTError(f"--model: expected floating weights, found {stored.scheme}; give --lora, and no --quantize")
    recipe = read_recipe(options, config.max_seq_len)
    with_ids = config.attn_config.attn_uses_sequence_id

    def packed(path: str) -> Callable[..., Any]:
        documents = read_data(path, tokenizer, options.chat_template)
        split = not any((document["labels"] < 0).any() for document in documents)

        def rows(state: Any, epochs: int | None = None) -> Any:
            sampler = train.Sampler(documents, seed=options.seed, epochs=epochs)
            return train.pack(sampler, recipe.length, split=split, state=state)

        return rows

    def used(batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: array for name, array in batch.items() if with_ids or name != "sequence_ids"}

    rows = packed(options.data)
    eval_rows = None if options.eval_data is None else [used(row) for row in packed(options.eval_data)(None, 1)]
    counted = [int((row["labels"] >= 0).sum()) for row in rows(None, 1)]
    steps = recipe.steps or max((recipe.epochs or 1) * len(counted) // recipe.batch_size, 1)
    if options.warmup_steps is None and options.preset is None:
        recipe = dataclasses.replace(recipe, warmup_steps=min(100, steps // 10))
    optimizer = recipe.optimizer(steps)
    key = jax.random.key(options.seed)
    mesh: Any
    mesh, rules = (None, None) if options.mesh is None else make_mesh(options.mesh)
    one = train.make_train_step(
        optimizer, accumulate=options.accumulate, max_grad_norm=recipe.max_grad_norm, remat=options.remat,
        compute_dtype=options.compute_dtype,
    )  # fmt: skip

    def state_of(model: MPT) -> "TrainState":
        trainable: Any = None
        if scheme is not None:
            model = quantize(model, scheme)
        if options.blocks == "stacked":
            model = stack(model)
        if options.lora:
            targets, dropout = options.lora_targets or ("Wqkv",), options.lora_dropout or 0.0
            model = lora.add(
                model, rank=options.lora, alpha=options.lora_alpha, targets=targets, dropout=dropout, key=key
            )
            trainable = lora.trainable(model)
        elif options.freeze:
            trainable = train.not_named(*options.freeze.split(","))
        with warnings.catch_warnings(action="ignore"):  # weights of 16 bits are widened, as --help says
            return train.TrainState.create(model, optimizer, key=key, trainable=trainable)

    def new() -> MPT:
        return MPT(config, key=key) if rules is None else new_on_mesh(config, key, mesh, rules)

    def empty() -> "TrainState":
        model = MPT(config, key=key)
        if not options.new:
            model = jax.tree.map(lambda x: x.astype(dtype) if hasattr(x, "astype") else x, model)
        model = model if stored is None else quantize(model, stored.scheme, embeddings=stored.embeddings)
        return state_of(model if rules is None else shard(model, mesh, rules))

    return Plan(
        options, place, tokenizer, recipe, steps, (len(counted), sum(counted)), rows, eval_rows,
        lambda: state_of(new() if options.new else from_pretrained(place, mesh=mesh, rules=rules)), empty,
        lambda state, batch: one(state, used(batch)), optimizer, dtype,
    )  # fmt: skip


def _dtype_of(info: Any) -> Any:
    """Returns the type of the checkpoint's largest floating tensor."""
    from mpt_eqx.checkpoint.formats.tensors import FLOAT_NAMES

    return max((x for x in info.tensors if x.dtype in FLOAT_NAMES), key=lambda x: x.size).dtype


def run(args: argparse.Namespace) -> int:
    """Trains; returns 0 also where a signal ended the run after it was saved."""
    options = read_options(args)
    connect(options)
    plan = prepare(options, args.revision)
    import jax

    first = jax.process_index() == 0
    if args.dry_run:
        text = needs(plan)
        if first:
            print(text)
        return 0

    from mpt_eqx import generate, lora, save_pretrained, train

    output, every = Path(options.output), max(plan.steps // 10, 1)
    log = Log(output, plan.steps)

    def evaluate(model: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if plan.eval_rows is not None:
            size = plan.recipe.batch_size
            found["eval_loss"] = train.mean_loss(model, plan.eval_rows, size, compute_dtype=options.compute_dtype)
        if options.sample is not None:
            prompt, ends = plan.tokenizer.encode(options.sample), plan.tokenizer.eos_token_ids
            result = generate(model, prompt, max_new_tokens=40, eos_token_ids=ends, progress=False)
            found["sample"] = plan.tokenizer.decode(result.tokens[0, : result.lengths[0]].tolist(), prompt=prompt)
        return found

    try:
        state = train.run(
            plan.start, plan.step, plan.rows, output / "states", steps=plan.steps,
            batch_size=plan.recipe.batch_size, save_every=options.save_every or every, evaluate=evaluate,
            eval_every=options.eval_every or every, log=log if first else None,
        )  # fmt: skip
    finally:
        log.close()
    if (done := int(state.step)) < plan.steps:
        if first:
            print(f"stopped and saved after step {done} of {plan.steps}; the same command goes on", file=sys.stderr)
        return 0
    if options.lora:
        place = output / "adapter"
        if first:  # every device has the adapters whole
            lora.save(state.model, place, base=options.model)
    else:
        place, dtype = output / "model", options.save_dtype or plan.dtype
        model = jax.tree.map(lambda x: x.astype(dtype) if hasattr(x, "astype") else x, state.model)
        save_pretrained(model, place, companions_from=plan.place)
    if first:
        log.draw()
        print(place)
    return 0
