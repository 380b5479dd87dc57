"""mpt_eqx as it is measured, the reference for all others, and the weights that all implementations load."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import mpt_eqx
from benchmarks.speed.implementation import SINGLE_STEPS, Implementation
from mpt_eqx import MPT, AttnConfig, MPTConfig, MPTError, from_pretrained, save_pretrained
from mpt_eqx.cli._measure import decode_run, load_model, model_facts, next_logits, prefill_run
from mpt_eqx.model import KVCache
from mpt_eqx.model.flat import flat
from mpt_eqx.surgery.quantization import quantization_of

REFERENCE = MPTConfig(
    d_model=1024, n_layers=24, n_heads=16, vocab_size=50368, max_seq_len=4096, no_bias=True,
    attn_config=AttnConfig(alibi=True),
)  # fmt: skip
"""The model of random weights that published figures are of."""

STREAMED = 8
"""Tokens that are asked for where the first is waited for."""


@eqx.filter_jit(donate="all-except-first")
def decode_step(model: MPT, cache: KVCache, tokens: Array) -> tuple[Array, KVCache]:
    """Returns the logits [B, V] after one more token [B] in each row, and its cache, as a step of `generate` does."""
    hidden, cache = jax.vmap(lambda cache, token: model.extend(token[None], cache))(cache, tokens)
    return next_logits(flat(model), hidden[:, 0]), cache


def one_row(model: MPT, capacity: int) -> KVCache:
    """Returns an empty cache with a leading axis of one row."""
    cache = KVCache.empty(model.config, capacity, model.dtype, as_bits=True)
    return jax.tree.map(lambda x: x[None], cache)


def temporary_bytes(model: MPT) -> int:
    """Returns the memory of a compiled decode step of one row, besides weights and cache."""
    step: Any = decode_step
    compiled = step.lower(model, one_row(model, 512), jnp.zeros(1, jnp.int32)).compile().compiled
    return int(compiled.memory_analysis().temp_size_in_bytes)


def open_mpt_eqx(place: str) -> Implementation:
    """Returns a checkpoint that is written in the dtype to measure, used in place."""
    model = load_model(place, "stored")

    def logits(prompt: list[int]) -> np.ndarray:
        cache = one_row(model, len(prompt))
        read = eqx.filter_jit(lambda model, tokens, cache: jax.vmap(model.extend)(tokens, cache)[1])
        cache = read(model, jnp.asarray([prompt[:-SINGLE_STEPS]]), cache)
        for token in prompt[-SINGLE_STEPS:]:
            out, cache = decode_step(model, cache, jnp.asarray([token]))
        return np.asarray(out.astype(jnp.float32))[0]

    def first(prompt: list[int]) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            next(mpt_eqx.stream(model, prompt, max_new_tokens=STREAMED))
            return time.perf_counter() - started

        return run

    def generate(prompt: list[int], steps: int) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            mpt_eqx.generate(model, prompt, max_new_tokens=steps, progress=False)
            return time.perf_counter() - started

        return run

    def score(sequences: list[list[int]]) -> Callable[[], tuple[float, list[float]]]:
        def run() -> tuple[float, list[float]]:
            started = time.perf_counter()
            found = mpt_eqx.score(model, sequences, progress=False)
            return time.perf_counter() - started, [one.total for one in found]

        return run

    return Implementation(
        first=first,
        prefill=lambda prompt: prefill_run(model, prompt),
        decode=lambda prompts, steps: decode_run(model, prompts[0], len(prompts), steps),
        score=score,
        logits=logits,
        facts=lambda: {**model_facts(model), "temporary_bytes": temporary_bytes(model)},
        generate=generate,
    )


def reference(place: str, prompt: list[int], steps: int) -> tuple[np.ndarray, list[int]]:
    """Returns what all others are compared with: the logits of the full forward pass, and the greedy tokens."""
    model = from_pretrained(place)
    forward = eqx.filter_jit(lambda model, tokens: model(tokens)[-1].astype("float32"))
    logits = np.asarray(forward(model, jnp.asarray(prompt, jnp.int32)))
    tokens = mpt_eqx.generate(model, prompt, max_new_tokens=steps, progress=False).tokens[0].tolist()
    return logits, tokens


def cast(model: MPT, dtype: str) -> MPT:
    """Returns the model with its weights in another dtype; other leaves, such as dropout's switches, stay."""
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_array(x) else x, model)


def prepare(source: str | None, directory: Path, dtypes: Sequence[str]) -> dict[str, Any]:
    """Writes the weights, a directory for each dtype; without a source, random ones of the reference size.

    Returns:
        The model's config.json, and why a dtype could not be made. Quantised weights are made of those in bfloat16,
        which stays the dtype of computations; bfloat16 is written in any case.

    Raises:
        MPTError: the source is quantised already.
    """
    base = "float32" if "float32" in dtypes else "bfloat16"
    if source is None:
        model = MPT(REFERENCE, key=jax.random.key(0))
    else:
        model = from_pretrained(source, dtype=base, progress=False)
    if (found := quantization_of(model)) is not None:
        raise MPTError(
            f"{source}: expected weights that are not quantised, found {found.scheme}; give the checkpoint that they "
            f"were made from, and --dtypes {found.scheme}"
        )
    model = cast(model, base)
    save_pretrained(model, directory / base)
    half = cast(model, "bfloat16")
    if base != "bfloat16":
        save_pretrained(half, directory / "bfloat16")
    del model
    failed = {}
    for dtype in dtypes:
        if dtype in ("int8", "int4"):
            try:
                save_pretrained(mpt_eqx.quantize(half, dtype, embeddings=True), directory / dtype)
            except MPTError as error:
                failed[dtype] = str(error)
    return {"config": half.config.to_dict(), "failed": failed}
