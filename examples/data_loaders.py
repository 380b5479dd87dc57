"""Data from other libraries: batches of grain, and documents of Hugging Face's datasets.

    python examples/data_loaders.py data.jsonl --loader datasets     needs: pip install datasets
    python examples/data_loaders.py data.jsonl --loader grain        needs: pip install grain
    python examples/data_loaders.py data.jsonl                       neither: lists and NumPy do the same

Each line of the file is an object with `text`. A step takes any mapping of NumPy arrays, so that batches may come from
any iterator; `train.run` goes on where it was with all that has a length and can be picked from by numbers.
"""

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from mpt_eqx import MPT, SHIPPED_MODEL, AttnConfig, MPTConfig, train
from mpt_eqx.text import Tokenizer, load_tokenizer


def documents_of_datasets(path: Path, tokenizer: Tokenizer) -> Sequence[dict]:
    """Returns a dataset of `tokens` and `labels`, as `train.pack` takes them: encoded once, and kept on the disk."""
    import datasets

    def encode(line: dict) -> dict:
        ids = tokenizer.encode(line["text"])
        return {"tokens": ids, "labels": ids}

    texts = datasets.load_dataset("json", data_files=str(path), split="train")
    return texts.map(encode, remove_columns=texts.column_names)


def batches_of_grain(rows: Sequence[dict], size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Returns batches of rows, in another order in each epoch. `get_state` and `set_state` of it say where it is."""
    import grain

    return iter(grain.MapDataset.source(rows).seed(seed).shuffle().repeat().batch(size).to_iter_dataset())


def batches_of_numpy(rows: Sequence[dict], size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the same with NumPy alone."""
    numbers = np.random.default_rng(seed)
    while True:
        order = numbers.permutation(len(rows))
        yield from train.batches((rows[i] for i in order), size)


def follow(batches: Iterable[dict], step, state: train.TrainState, steps: int) -> train.TrainState:
    """Returns the state after so many steps over batches."""
    for batch in itertools.islice(batches, steps):
        state, metrics = step(state, batch)
        print(f"step {int(state.step)}: loss {metrics['loss']:.3f}")
    return state


def main() -> None:
    """Trains a small new model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="JSONL file")
    parser.add_argument("--loader", choices=("datasets", "grain", "lists", "numpy"), default="numpy")
    parser.add_argument("--states", type=Path, default=Path("states"), help="where they are (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of the whole run (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row (default: %(default)s)")
    args = parser.parse_args()

    tokenizer = load_tokenizer(SHIPPED_MODEL)
    config = MPTConfig(
        d_model=32, n_heads=4, n_layers=1, vocab_size=tokenizer.vocab_size, max_seq_len=args.length,
        attn_config=AttnConfig(alibi=True, attn_uses_sequence_id=True),
    )  # fmt: skip
    optimizer = train.decoupled_adamw(3e-3)
    step = train.make_train_step(optimizer, max_grad_norm=1.0)

    def start() -> train.TrainState:
        return train.TrainState.create(MPT(config, key=jax.random.key(0)), optimizer)

    if args.loader == "datasets":
        documents = documents_of_datasets(args.data, tokenizer)
    else:
        documents = train.read_documents(args.data, tokenizer)
    if args.loader in ("datasets", "lists"):
        train.run(
            start,
            step,
            lambda place: train.pack(train.Sampler(documents, seed=0), args.length, state=place),
            args.states,
            steps=args.steps,
            batch_size=args.batch,
            log=lambda record: print(json.dumps(record)),
        )
    else:
        batches = {"grain": batches_of_grain, "numpy": batches_of_numpy}[args.loader]
        rows = list(train.pack(documents, args.length))
        follow(batches(rows, args.batch, seed=0), step, start(), args.steps)


if __name__ == "__main__":
    main()
