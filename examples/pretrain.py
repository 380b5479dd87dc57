"""Pretraining from scratch: the model that ships with mpt_eqx, trained on the text of a Python installation.

    python examples/pretrain.py my-model                  about an hour on two CPU cores
    python examples/pretrain.py my-model --epochs 0.1     a short run
    python examples/pretrain.py my-model --documents 200 --layers 1 --width 32 --length 64 --epochs 1      seconds

The text is the language reference (`pydoc_data.topics`) and the docstrings of the standard library. One document in
twenty is held out for choosing when to stop, and one in twenty for the figures in the model card. The directory then
holds an ordinary MPT checkpoint: config.json, model.safetensors, tokenizer.json, generation_config.json, and a card
with the loss curve. Stopped, by Ctrl-C or by a crash, the same command goes on where it was. Needs the extras `text`
and `plot`: pip install 'mpt_eqx[text,plot]'.
"""

import argparse
import ast
import gzip
import hashlib
import importlib
import inspect
import itertools
import json
import lzma
import math
import platform
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import jax
import numpy as np
import tokenizers

from mpt_eqx import MPT, AttnConfig, InitConfig, MPTConfig, from_pretrained, save_pretrained, train

END = "<|endoftext|>"


# The text ------------------------------------------------------------------------------------------------------------


def documents(limit: int | None = None) -> list[str]:
    """Returns the texts of this Python installation, without duplicates, in a fixed order; the first `limit` found."""
    found: dict[str, str] = {}
    texts = ((text, text.strip()) for text in topics.topics.values())
    docstrings = (
        (docstring, f"{heading}\n\n{docstring.strip()}")
        for heading, docstring in itertools.chain(source_docstrings(), compiled_docstrings())
    )
    for text, document in itertools.islice(itertools.chain(texts, docstrings), limit):
        found.setdefault(text, document)
    return [found[text] for text in sorted(found, key=_digest)]


def source_docstrings() -> Iterator[tuple[str, str]]:
    """Yields (name with signature, docstring) from the standard library's source files, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if left_out & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # files that are broken on purpose
            continue
        yield from _walk(tree, ".".join(part for part in parts if part != "__init__"))


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if docstring := ast.get_docstring(node):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name}({ast.unparse(node.args)})", docstring
        else:
            yield f"{'class' if isinstance(node, ast.ClassDef) else 'module'} {name}", docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, f"{name}.{child.name}")


def compiled_docstrings() -> Iterator[tuple[str, str]]:
    """Yields (name, docstring) from the standard library's compiled modules, which have no source to parse."""
    compiled = {path.name.split(".")[0] for path in Path(sysconfig.get_paths()["stdlib"]).glob("lib-dynload/*")}
    for name in sorted(set(sys.builtin_module_names) | compiled & sys.stdlib_module_names):
        try:
            with warnings.catch_warnings(action="ignore"):
                module = importlib.import_module(name)
        except ImportError:
            continue
        for obj_name, obj in sorted(vars(module).items()):
            if docstring := _own_docstring(obj):
                yield f"{name}.{obj_name}".removeprefix("builtins."), docstring
            if inspect.isclass(obj):
                for attr_name, attr in sorted(vars(obj).items()):
                    if docstring := _own_docstring(attr):
                        yield f"{name}.{obj_name}.{attr_name}".removeprefix("builtins."), docstring


def _own_docstring(obj: object) -> str | None:
    docstring = inspect.getdoc(obj) if callable(obj) or inspect.isdatadescriptor(obj) else None
    return docstring if docstring and len(docstring) > 40 else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def split(texts: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Returns (train, validation, test): 18, 1 and 1 of every 20 documents, chosen by a hash of the text."""
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for text in texts:
        parts[{0: 2, 1: 1}.get(int(_digest(text), 16) % 20, 0)].append(text)
    return parts


def train_tokenizer(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Returns a byte-level BPE tokenizer trained on `texts`; the end of a text is id 0, as in GPT-NeoX's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# What is measured ----------------------------------------------------------------------------------------------------


def nats_per_byte(model: MPT, texts: list[str], rows: list[list[int]], length: int) -> float:
    """Returns −log p, in nats, of all texts end to end, for each of their bytes and of those between two of them.

    Windows overlap by half, and only the second half of each but the first counts: every token counts once, with at
    least length/2 tokens before it.
    """
    stream, half = np.concatenate([[0], *rows]), length // 2  # the first token is predicted from an end of text
    windows = []
    for start in range(0, max(len(stream) - length, 0) + half, half):
        window = stream[start : start + length]
        labels = np.where(np.arange(len(window)) < (half if start else 1), -100, window)
        fill = (0, length - len(window))
        windows.append({"tokens": np.pad(window, fill), "labels": np.pad(labels, fill, constant_values=-100)})
    return train.mean_loss(model, windows, 8) * (len(stream) - 1) / len(joined(texts))


def joined(texts: list[str]) -> bytes:
    """Returns texts as bytes, with one between two of them."""
    return "\0".join(texts).encode()


# What is written -----------------------------------------------------------------------------------------------------

CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# pydoc-3m: a small MPT that writes Python documentation

{parameters:,} parameters: {config.n_layers} layers of width {config.d_model}, {config.n_heads} heads, ALiBi, no biases,
a byte-level BPE of {config.vocab_size} tokens; bfloat16. It was trained with `examples/pretrain.py` of mpt_eqx, for
trying the library out and for its tests. What it writes reads like documentation and is made up.

**Data.** The language reference (`pydoc_data.topics`) and the docstrings of the standard library of Python {python}:
{documents:,} documents, {bytes:,} bytes, duplicates and tests left out. A hash of each document decides whether it is
trained on (18 of 20), decides when to stop (1 of 20) or is measured on (1 of 20). The text is under the Python
Software Foundation License; the weights are under Apache-2.0.

**Training.** {tokens:,} tokens, {args.epochs:g} times; AdamW, batches of {args.batch} × {args.length} tokens, peak
learning rate {args.learning_rate:g}, {minutes:.0f} minutes on two CPU cores. The weights are those with the lowest loss
on the validation documents, at step {step}.

![loss curve](loss_curve.png)

**Figures** on the {test_bytes:,} bytes of the test documents (one between two of them), which nothing was chosen on:

| | nats per byte |
|---|---|
| this model, bfloat16 | {nats:.3f} |
| xz -9, after the training text | {xz_after:.3f} |
| xz -9 | {xz:.3f} |
| gzip -9 | {gzip:.3f} |

The third and fourth see the test documents alone; the second has the training text before them, as the model had.

**Reproduce**: `python examples/pretrain.py DIRECTORY` (seed {args.seed}). Another Python version has other text;
another processor rounds otherwise.
"""


def write(args: argparse.Namespace, curve: list[dict], parts: dict[str, list[str]], rows: dict) -> None:
    """Writes what stands beside weights and tokenizer: how to generate, the figures, the card and the loss curve."""
    # It was not trained to talk: what is said to it is text that it continues, with an empty line between.
    joint = "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    template = "{% for message in messages %}{{ message.content }}" + joint + "{% endfor %}"
    reading = {"chat_template": template, "eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(args.directory / "tokenizer_config.json", reading)
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}
    write_json(args.directory / "generation_config.json", {"eos_token_id": 0, "pad_token_id": 0, **sampling})

    model, best = from_pretrained(args.directory), min(curve, key=lambda point: point["validation_nats_per_byte"])
    config, learned, test = model.config, joined(parts["train"]), joined(parts["test"])

    def per_byte(size: int) -> float:
        return size * 8 * math.log(2) / len(test)

    figures = {
        "nats": nats_per_byte(model, parts["test"], rows["test"], args.length),
        "gzip": per_byte(len(gzip.compress(test, 9))),
        "xz": per_byte(len(lzma.compress(test, preset=9))),
        "xz_after": per_byte(len(lzma.compress(learned + test, preset=9)) - len(lzma.compress(learned, preset=9))),
    }
    write_json(args.directory / "training.json", {"test_nats_per_byte": figures, "curve": curve})
    card = CARD.format(
        args=args, config=config, parameters=config.num_parameters(), python=platform.python_version(),
        documents=sum(map(len, parts.values())), tokens=sum(map(len, rows["train"])), test_bytes=len(test),
        bytes=sum(len(text.encode()) for part in parts.values() for text in part), step=best["step"],
        minutes=curve[-1]["minutes"], **figures,
    )  # fmt: skip
    (args.directory / "README.md").write_text(card, encoding="utf-8")
    plot(args.directory / "loss_curve.png", curve, figures)
    print(json.dumps(figures, indent=2), file=sys.stderr)


def plot(path: Path, curve: list[dict[str, float]], figures: dict[str, float]) -> None:
    """Draws the loss on the validation documents over the steps, with the compressors as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=110, layout="constrained")
    steps, nats = zip(*((point["step"], point["validation_nats_per_byte"]) for point in curve), strict=True)
    axes.plot(steps, nats, "o-", label="validation loss")
    names = {"gzip": "gzip -9", "xz": "xz -9", "xz_after": "xz -9 after the training text"}
    for (name, words), style in zip(names.items(), (":", "--", "-."), strict=True):
        axes.axhline(figures[name], color="gray", linestyle=style, label=f"{words} (test documents)")
    title = "pydoc-3m: loss on documents it was not trained on"
    axes.set(xlabel="step", ylabel="nats per byte", title=title, ylim=(0, None))
    axes.legend()
    figure.savefig(path)


def write_json(path: Path, content: dict) -> None:
    """Writes one JSON object."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Collects the text, trains tokenizer and model, measures, and writes the directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="output directory of the checkpoint")
    parser.add_argument("--epochs", type=float, default=10, help="passes over the data (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="batch size (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="blocks (default: %(default)s)")
    parser.add_argument("--width", type=int, default=192, help="d_model, heads of 32 each (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the tokenizer (default: %(default)s)")
    parser.add_argument("--documents", type=int, help="train on so many documents only (default: all)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=17, help="of weights and data order (default: %(default)s)")
    args = parser.parse_args()

    texts = documents(args.documents)
    parts = dict(zip(("train", "validation", "test"), split(texts), strict=True))
    if not parts["validation"] or not parts["test"]:
        parser.error(f"--documents: expected enough to hold some of them out, found {args.documents}; take 100")
    tokenizer = train_tokenizer(parts["train"], args.vocab_size)
    rows = {name: [[*e.ids, 0] for e in tokenizer.encode_batch(part)] for name, part in parts.items()}
    n_tokens = sum(map(len, rows["train"]))
    steps = max(int(args.epochs * n_tokens / (args.batch * args.length)), 1)
    print(
        f"{len(texts)} documents, {sum(len(t.encode()) for t in texts):,} bytes; {n_tokens:,} training tokens, "
        f"{steps} steps of {args.batch * args.length} tokens",
        file=sys.stderr,
    )

    config = MPTConfig(
        d_model=args.width, n_heads=args.width // 32, n_layers=args.layers, vocab_size=tokenizer.get_vocab_size(),
        max_seq_len=1024, no_bias=True, attn_config=AttnConfig(alibi=True), init_config=InitConfig(emb_init_std=0.02),
    )  # fmt: skip
    peak = args.learning_rate
    rate = train.cosine_with_warmup(peak, steps, warmup_steps=min(100, steps // 10), floor=0.02)
    optimizer = train.decoupled_adamw(rate, peak=peak, weight_decay=0.1 * peak, mask=train.not_named("*norm*"))
    whole_rows = train.make_train_step(optimizer, max_grad_norm=1.0)

    # The curve is kept, so that a run that goes on knows what was best before.
    states, points = args.directory / "states", args.directory / "training.json"
    curve = json.loads(points.read_text())["curve"] if states.is_dir() and points.exists() else []
    began = time.monotonic() - 60 * (curve[-1]["minutes"] if curve else 0)

    def evaluate(model: MPT) -> dict[str, float]:
        """Measures on the validation documents; the weights that do best there are those of the checkpoint."""
        nats = nats_per_byte(model, parts["validation"], rows["validation"], args.length)
        if nats <= min((point["validation_nats_per_byte"] for point in curve), default=math.inf):
            save_pretrained(jax.tree.map(lambda x: x.astype("bfloat16"), model), args.directory)
        return {"validation_nats_per_byte": nats, "minutes": (time.monotonic() - began) / 60}

    def log(record: dict[str, float]) -> None:
        if "minutes" in record:
            curve[:] = [point for point in curve if point["step"] < record["step"]]  # none twice, after a crash
            kept = {name: record[name] for name in ("step", "validation_nats_per_byte", "minutes")}
            curve.append({**kept, "train_nats_per_token": record["loss"]})
            print(json.dumps(curve[-1]), file=sys.stderr)
            write_json(points, {"curve": curve})

    every = max(steps // 16, 1)
    state = train.run(
        lambda: train.TrainState.create(MPT(config, key=jax.random.key(args.seed)), optimizer),
        lambda state, batch: whole_rows(state, {"tokens": batch["tokens"]}),  # documents see those before them
        lambda place: train.pack(train.Sampler(rows["train"], seed=args.seed), args.length, state=place),
        states, steps=steps, batch_size=args.batch, save_every=every, evaluate=evaluate, eval_every=every, log=log,
    )  # fmt: skip
    if int(state.step) < steps:
        sys.exit("stopped; the same command goes on")
    tokenizer.save(str(args.directory / "tokenizer.json"))
    write(args, curve, parts, rows)


if __name__ == "__main__":
    main()
