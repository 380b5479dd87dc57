"""Pretraining from scratch: the model that ships with mpt_eqx, trained on the text of a Python installation.

    python examples/pretrain.py my-model                  about an hour on two CPU cores
    python examples/pretrain.py my-model --epochs 0.1     a short run
    python examples/pretrain.py my-model --documents 200 --layers 1 --width 32 --length 64 --epochs 1      seconds

The text is the language reference (`pydoc_data.topics`) and the docstrings of the standard library. One document in
twenty is held out for choosing when to stop, and one in twenty for the figures in the model card. The directory then
holds an ordinary MPT checkpoint: config.json, model.safetensors, tokenizer.json, generation_config.json, and a card
with the loss curve. Needs the extras `text` and `plot`: pip install 'mpt_eqx[text,plot]'.
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

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from jaxtyping import Array, Float32, Int
from tqdm import tqdm

from mpt_eqx import MPT, AttnConfig, InitConfig, MPTConfig, save_pretrained
from mpt_eqx.train import next_token_loss

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


# Training ------------------------------------------------------------------------------------------------------------


def batches(rows: list[list[int]], size: int, length: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields batches [size, length] for ever: documents in random order, end to end, cut into windows."""
    while True:
        order = rng.permutation(len(rows))
        stream = np.concatenate([rows[i] for i in order])[rng.integers(length) :]
        windows = stream[: len(stream) // length * length].reshape(-1, length)
        windows = windows[rng.permutation(len(windows))]
        for start in range(0, len(windows) - size + 1, size):
            yield windows[start : start + size].astype(np.int32)


@eqx.filter_jit(donate="all")
def train_step(model, opt_state, optimizer, tokens):
    """Returns the model and the optimiser's state after one step, and the loss before it."""
    loss, grads = eqx.filter_value_and_grad(next_token_loss)(model, tokens)
    updates, opt_state = optimizer.update(grads, opt_state, model)
    return eqx.apply_updates(model, updates), opt_state, loss


@eqx.filter_jit
def window_losses(model: MPT, tokens: Int[Array, "B T"]) -> Float32[Array, "B T-1"]:
    """Returns −log p, in nats, of each token of each window given those before it in the window."""
    log_probs = jax.nn.log_softmax(jax.vmap(model)(tokens)[:, :-1].astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]


def held_out_nats(model: MPT, rows: list[list[int]], length: int) -> float:
    """Returns −log p, in nats, of all documents end to end, every token with at least length/2 tokens before it.

    Windows overlap by half; of each but the first only the second half counts, so every token counts once.
    """
    stream = np.concatenate([[0], *rows]).astype(np.int32)  # the first token is predicted from an end of text
    half = length // 2
    count = math.ceil(max(len(stream) - length, 0) / half) + 1
    padded = np.zeros(length + (count - 1) * half, np.int32)
    padded[: len(stream)] = stream
    starts = half * np.arange(count)
    total = 0.0
    for group in np.array_split(starts, math.ceil(count / 8)):
        losses = np.asarray(window_losses(model, np.stack([padded[start : start + length] for start in group])))
        for start, row in zip(group, losses, strict=True):
            total += float(row[0 if start == 0 else half - 1 : max(len(stream) - 1 - start, 0)].sum())
    return total


# What is written -----------------------------------------------------------------------------------------------------

CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# pydoc-3m: a small MPT that writes Python documentation

{parameters:,} parameters: {layers} layers of width {width}, {heads} heads, ALiBi, no biases, a byte-level BPE of
{vocab} tokens; bfloat16. It was trained with `examples/pretrain.py` of mpt_eqx, for trying the library out and for
its tests. What it writes reads like documentation and is made up.

**Data.** The language reference (`pydoc_data.topics`) and the docstrings of the standard library of Python {python}:
{documents:,} documents, {bytes:,} bytes, duplicates and tests left out. A hash of each document decides whether it is
trained on (18 of 20), decides when to stop (1 of 20) or is measured on (1 of 20). The text is under the Python
Software Foundation License; the weights are under Apache-2.0.

**Training.** {tokens:,} tokens, {epochs:g} times; AdamW, batches of {batch} × {length} tokens, peak learning rate
{rate:g}, {minutes:.0f} minutes on two CPU cores. The weights are those with the lowest loss on the validation
documents, at step {step}.

![loss curve](loss_curve.png)

**Figures** on the {test_bytes:,} bytes of the test documents (one between two of them), which nothing was chosen on:

| | nats per byte |
|---|---|
| this model, bfloat16 | {nats:.3f} |
| xz -9, after the training text | {xz_after:.3f} |
| xz -9 | {xz:.3f} |
| gzip -9 | {gzip:.3f} |

The third and fourth see the test documents alone; the second has the training text before them, as the model had.

**Reproduce**: `python examples/pretrain.py DIRECTORY` (seed {seed}). Another Python version has other text; another
processor rounds otherwise.
"""


def write(args, model, tokenizer, curve, minutes, parts, test_rows) -> None:
    """Writes the checkpoint in bfloat16, its tokenizer, its card and the loss curve; measures what was written."""
    train, _, test = ("\0".join(part).encode() for part in parts)
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    config = model.config
    save_pretrained(model, args.directory)
    tokenizer.save(str(args.directory / "tokenizer.json"))
    # It was not trained to talk: what is said to it is text that it continues, with an empty line between.
    joint = "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    template = "{% for message in messages %}{{ message.content }}" + joint + "{% endfor %}"
    write_json(
        args.directory / "tokenizer_config.json",
        {"chat_template": template, "eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}
    write_json(args.directory / "generation_config.json", {"eos_token_id": 0, "pad_token_id": 0, **sampling})

    def per_byte(compressed: bytes | int) -> float:
        size = compressed if isinstance(compressed, int) else len(compressed)
        return size * 8 * math.log(2) / len(test)

    best = min(curve, key=lambda point: point["validation_nats_per_byte"])
    figures = {
        "nats": held_out_nats(model, test_rows, args.length) / len(test),
        "gzip": per_byte(gzip.compress(test, 9)),
        "xz": per_byte(lzma.compress(test, preset=9)),
        "xz_after": per_byte(len(lzma.compress(train + test, preset=9)) - len(lzma.compress(train, preset=9))),
    }
    write_json(args.directory / "training.json", {"test_nats_per_byte": figures, "curve": curve})
    card = CARD.format(
        parameters=config.num_parameters(), layers=config.n_layers, width=config.d_model, heads=config.n_heads,
        vocab=config.vocab_size, python=platform.python_version(), documents=sum(map(len, parts)),
        bytes=sum(len(text.encode()) for part in parts for text in part), tokens=args.tokens, epochs=args.epochs,
        batch=args.batch, length=args.length, rate=args.learning_rate, minutes=minutes, step=best["step"],
        test_bytes=len(test), seed=args.seed, **figures,
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
    axes.plot([p["step"] for p in curve], [p["validation_nats_per_byte"] for p in curve], "o-", label="validation loss")
    for name, style in (("gzip", ":"), ("xz", "--"), ("xz_after", "-.")):
        label = {"xz_after": "xz -9 after the training text"}.get(name, f"{name} -9")
        axes.axhline(figures[name], color="gray", linestyle=style, label=f"{label} (test documents)")
    axes.set(
        xlabel="step", ylabel="nats per byte", title="pydoc-3m: loss on documents it was not trained on", ylim=(0, None)
    )
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
    train, validation, test = split(texts)
    if not validation or not test:
        parser.error(f"--documents: expected enough to hold some of them out, found {args.documents}; take 100")
    tokenizer = train_tokenizer(train, args.vocab_size)
    rows, val_rows, test_rows = (
        [[*e.ids, 0] for e in tokenizer.encode_batch(part)] for part in (train, validation, test)
    )
    args.tokens = n_tokens = sum(map(len, rows))
    steps = max(int(args.epochs * n_tokens / (args.batch * args.length)), 1)
    print(
        f"{len(texts)} documents, {sum(len(t.encode()) for t in texts):,} bytes; {n_tokens:,} training tokens, "
        f"{steps} steps of {args.batch * args.length} tokens",
        file=sys.stderr,
    )

    config = MPTConfig(
        d_model=args.width,
        n_heads=args.width // 32,
        n_layers=args.layers,
        vocab_size=tokenizer.get_vocab_size(),
        max_seq_len=1024,
        no_bias=True,
        attn_config=AttnConfig(alibi=True),
        init_config=InitConfig(emb_init_std=0.02),
    )
    model = MPT(config, key=jax.random.key(args.seed))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, min(100, steps // 10), steps, 0.02 * args.learning_rate
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask=lambda m: jax.tree.map(lambda x: x.ndim > 1, m)),
    )
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    val_bytes = sum(len(text.encode()) for text in validation)
    stream = batches(rows, args.batch, args.length, np.random.default_rng(args.seed))
    curve: list[dict[str, float]] = []
    best, best_model, recent, started = math.inf, model, [], time.monotonic()
    for step in tqdm(range(1, steps + 1), unit="step", disable=None):
        model, opt_state, loss = train_step(model, opt_state, optimizer, next(stream))
        recent.append(float(loss))
        if step % max(steps // 16, 1) == 0 or step == steps:
            nats = held_out_nats(model, val_rows, args.length) / val_bytes
            curve.append(
                {"step": step, "train_nats_per_token": float(np.mean(recent)), "validation_nats_per_byte": nats}
            )
            tqdm.write(json.dumps(curve[-1] | {"seconds": round(time.monotonic() - started)}), file=sys.stderr)
            recent = []
            if nats < best:
                best, best_model = nats, jax.tree.map(jnp.copy, model)
    minutes = (time.monotonic() - started) / 60
    write(args, best_model, tokenizer, curve, minutes, (train, validation, test), test_rows)


if __name__ == "__main__":
    main()
