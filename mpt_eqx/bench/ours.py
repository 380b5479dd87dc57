"""mpt_eqx as it is measured: the public steps of `generate`, without the checks of its arguments."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

import mpt_eqx
from mpt_eqx.bench.measure import ONE_BY_ONE, Implementation, step_bytes
from mpt_eqx.checkpoint import from_pretrained
from mpt_eqx.checkpoint.names import named_leaves
from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import MPTError
from mpt_eqx.generation.decode import DecodeState, append, decode, empty_state, next_logits, spread
from mpt_eqx.generation.loop import CHUNK, bar, capacity_for, chunk_for, make_tokens, read_prompts
from mpt_eqx.generation.validate import check_options
from mpt_eqx.model import MPT
from mpt_eqx.ops import cpu
from mpt_eqx.surgery.quantization import quantization_of


def kernel_is_used() -> bool:
    """Tells whether the optional CPU kernel is there and not switched off."""
    return bool(cpu.available())


def open_mpt_eqx(place: str, form: str, config: MPTConfig) -> Implementation:
    """Returns a checkpoint that is in this form already, which is used where it lies in the file."""
    model = from_pretrained(place)
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
    step: Any = decode
    memory = step.lower(fixed, state, CHUNK, False).compile().compiled.memory_analysis()
    return int(memory.temp_size_in_bytes)


def reference(place: str, prompt: list[int], steps: int) -> tuple[np.ndarray, list[int]]:
    """Returns what all others are compared with: the logits of the full forward pass, and the likeliest tokens."""
    model = from_pretrained(place)
    forward = eqx.filter_jit(lambda model, tokens: model(tokens)[-1].astype("float32"))
    logits = np.asarray(forward(model, jax.device_put(np.asarray(prompt, np.int32))))
    tokens = mpt_eqx.generate(model, prompt, max_new_tokens=steps, progress=False).tokens[0].tolist()
    return logits, tokens


def cast(model: MPT, dtype: str) -> MPT:
    """Returns the model with its weights in another type; what is no weight, such as a switch of dropout, stays."""
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_array(x) else x, model)


def prepare(source: str | None, directory: Path, forms: Sequence[str]) -> dict[str, Any]:
    """Writes the weights, a directory for each form; without a source, random ones of the reference size.

    Returns:
        The model's config.json, and why a form could not be made. Quantised weights are made of those in bfloat16,
        which stays the type that is computed in; bfloat16 is there in any case.

    Raises:
        MPTError: the source is quantised already.
    """
    from mpt_eqx.bench.run import REFERENCE

    base = "float32" if "float32" in forms else "bfloat16"
    if source is None:
        model = MPT(REFERENCE, key=jax.random.key(0))
    else:
        model = from_pretrained(source, dtype=base, progress=False)
    if (found := quantization_of(model)) is not None:
        raise MPTError(
            f"{source}: expected weights that are not quantised, found {found.scheme}; give the checkpoint that they "
            f"were made from, and --forms {found.scheme}"
        )
    model = cast(model, base)
    mpt_eqx.save_pretrained(model, directory / base)
    half = cast(model, "bfloat16")
    if base != "bfloat16":
        mpt_eqx.save_pretrained(half, directory / "bfloat16")
    del model
    failed = {}
    for form in forms:
        if form in ("int8", "int4"):
            try:
                mpt_eqx.save_pretrained(mpt_eqx.quantize(half, form, embeddings=True), directory / form)
            except MPTError as error:
                failed[form] = str(error)
    return {"config": half.config.to_dict(), "failed": failed}
