"""mpt_eqx as it is measured: the public steps of `generate`, without the checks of its arguments."""

import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

import mpt_eqx
from mpt_eqx.bench.measure import ONE_BY_ONE, Implementation, step_bytes
from mpt_eqx.checkpoint import from_pretrained
from mpt_eqx.checkpoint.names import named_leaves
from mpt_eqx.generation.arguments import check_options
from mpt_eqx.generation.decode import DecodeState, append, decode, empty_state, next_logits, spread
from mpt_eqx.generation.loop import CHUNK, bar, capacity_for, chunk_for, make_tokens, read_prompts
from mpt_eqx.model import MPT


def can_quantise() -> bool:
    """Tells whether this version has weights of 8 and 4 bits."""
    return callable(getattr(mpt_eqx, "quantize", None))


def kernel_is_used() -> bool:
    """Tells whether the optional CPU kernel is there and not switched off."""
    try:
        from mpt_eqx import kernel
    except ImportError:
        return False
    available = getattr(kernel, "available", None)
    return available is not None and bool(available())


def open_mpt_eqx(place: str, form: str) -> Implementation:
    """Returns the checkpoint at `place` in one of the forms; what is quantised computes in the type it was stored in."""
    if form in ("int8", "int4"):
        model = mpt_eqx.quantize(from_pretrained(place), form, embeddings=True)
    else:
        model = from_pretrained(place, dtype=form)
    jax.block_until_ready(jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    logits_of = eqx.filter_jit(next_logits)
    append_to = eqx.filter_jit(append)

    def after(prompts: list[list[int]], room: int) -> DecodeState:
        state = empty_state(model, len(prompts), capacity_for(model.config, len(prompts[0]) + room))
        with bar(len(prompts[0]), False) as hidden:
            return read_prompts(model, state, [np.asarray(prompt, np.int32) for prompt in prompts], 0, hidden)

    def prefill(prompt: list[int]) -> Any:
        def run() -> float:
            started = time.perf_counter()
            np.asarray(logits_of(model, after([prompt], 0).hidden)).argmax()
            return time.perf_counter() - started

        return run

    def make(prompts: list[list[int]], steps: int) -> Any:
        options, key = check_options(model.config, max_new_tokens=steps), jax.random.key(0)
        kept = after(prompts, steps)

        def run() -> tuple[float, list[int]]:
            state = jax.block_until_ready(spread(kept, 1, kept.cache.capacity))
            started = time.perf_counter()
            made = make_tokens(
                model, state, options, key, length=len(prompts[0]), max_new_tokens=steps, chunk=chunk_for(CHUNK, steps)
            )
            tokens = [token for decoded in made for token in decoded.tokens[:, 0].tolist()]
            return time.perf_counter() - started, tokens

        return run

    def logits(prompt: list[int]) -> np.ndarray:
        state = after([prompt[:-ONE_BY_ONE]], ONE_BY_ONE)
        for token in prompt[-ONE_BY_ONE:]:
            state = append_to(model, state, jax.device_put(np.asarray([token], np.int32)))
        return np.asarray(logits_of(model, state.hidden))[0]

    def facts() -> dict[str, Any]:
        sizes = {name: leaf.nbytes for name, leaf in named_leaves(model).items()}
        return {
            "weight_bytes": sum(sizes.values()),
            "step_bytes": step_bytes(model.config, sizes),
            "temporary_bytes": temporary_bytes(model),
            "kernel": kernel_is_used(),
        }

    return Implementation(prefill, make, logits, facts)


def temporary_bytes(model: MPT) -> int:
    """Returns the memory besides weights and cache that the compiled decode step of one row needs."""
    fixed = (model, check_options(model.config, max_new_tokens=CHUNK), jax.random.key(0))
    state = empty_state(model, 1, capacity_for(model.config, 1))
    memory = decode.lower(fixed, state, CHUNK, False).compile().compiled.memory_analysis()
    return int(memory.temp_size_in_bytes)


def reference(place: str, prompt: list[int], steps: int) -> tuple[np.ndarray, list[int]]:
    """Returns what all others are compared with: float32 logits of the full forward pass, and the greedy tokens."""
    model = from_pretrained(place, dtype="float32")
    forward = eqx.filter_jit(lambda model, tokens: model(tokens)[-1])
    logits = np.asarray(forward(model, jax.device_put(np.asarray(prompt, np.int32))))
    tokens = mpt_eqx.generate(model, prompt, max_new_tokens=steps, progress=False).tokens[0].tolist()
    return logits, tokens


def prepare(source: str | None, directory: Path, with_bfloat16: bool) -> dict[str, Any]:
    """Writes the weights in float32 and bfloat16; without a source, random ones of the reference size."""
    from mpt_eqx.bench.run import REFERENCE

    if source is None:
        model = MPT(REFERENCE, key=jax.random.key(0))
    else:
        model = from_pretrained(source, dtype="float32", progress=False)
    mpt_eqx.save_pretrained(model, directory / "float32")
    if with_bfloat16:
        half = jax.tree.map(lambda x: x.astype("bfloat16"), model)
        mpt_eqx.save_pretrained(half, directory / "bfloat16")
    return {"config": model.config.to_dict()}
