"""A process that holds one implementation and answers requests: lines of JSON on stdin and stdout.

It imports mpt_eqx only for requests that need it: a baseline's start and memory are to be the baseline's alone. Between
requests it waits for a line, and uses no core.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Answers one line for each line."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    kept: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = REQUESTS[request.pop("do")](kept, **request)
        except Exception as error:
            text = " ".join(str(error).split())
            ours = any(kind.__name__ == "MPTError" for kind in type(error).__mro__)
            answer = {"error": text if ours else f"{type(error).__name__}: {text}"}
        print(json.dumps(answer), file=answers)


def prepare(kept: dict[str, Any], source: str | None, directory: str, dtypes: list[str]) -> dict[str, Any]:
    """Writes the weights that all implementations load."""
    from benchmarks.speed import ours

    return ours.prepare(source, Path(directory), dtypes)


def reference(kept: dict[str, Any], place: str, prompt: list[int], steps: int, file: str) -> dict[str, Any]:
    """Writes the logits that all are compared with, and answers the greedy tokens."""
    from benchmarks.speed import ours

    logits, tokens = ours.reference(place, prompt, steps)
    np.save(file, logits)
    return {"tokens": tokens}


def write_gguf(kept: dict[str, Any], place: str, file: str, kind: str) -> dict[str, Any]:
    """Writes a GGUF file of a checkpoint."""
    from mpt_eqx import from_pretrained
    from mpt_eqx.checkpoint import save_gguf

    save_gguf(from_pretrained(place), file, type=kind)
    return {}


def machine(kept: dict[str, Any], size: str, with_torch: bool) -> dict[str, Any]:
    """Measures the machine, and tells whether the CPU kernel runs on it."""
    from benchmarks.speed.machine import measure_machine
    from mpt_eqx.ops import cpu

    return {**measure_machine(size, with_torch=with_torch), "kernel": bool(cpu.available())}


def probe(kept: dict[str, Any], baseline: str) -> dict[str, Any]:
    """Tells whether a baseline can use the GPU."""
    from benchmarks.speed import baselines

    return {"gpu": baselines.uses_gpu(baseline)}


def load(
    kept: dict[str, Any], implementation: str, place: str, dtype: str, vocab_size: int, threads: int
) -> dict[str, Any]:
    """Imports an implementation and loads the weights."""
    opened: Callable[[], Any]
    if implementation == "transformers":
        import torch  # noqa: F401
        from transformers import MptForCausalLM  # noqa: F401

        from benchmarks.speed.baselines import open_transformers

        def opened() -> Any:
            return open_transformers(place, dtype, threads)
    elif implementation == "llama.cpp":
        import llama_cpp  # noqa: F401

        from benchmarks.speed.baselines import open_llama_cpp

        def opened() -> Any:
            return open_llama_cpp(place, dtype, threads, vocab_size)
    else:
        import jax

        from benchmarks.speed.ours import open_mpt_eqx

        jax.devices()

        def opened() -> Any:
            return open_mpt_eqx(place)

    started = time.perf_counter()
    kept["implementation"] = opened()
    return {"load_seconds": time.perf_counter() - started, "threads": threads}


def logits(kept: dict[str, Any], prompt: list[int], file: str) -> dict[str, Any]:
    """Writes the logits after a prompt."""
    np.save(file, kept["implementation"].logits(prompt))
    return {}


def first(kept: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
    """Waits for the first token after a prompt."""
    kept["run"] = kept["implementation"].first(prompt)
    return again(kept)


def prefill(kept: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
    """Prepares the prefill of a prompt, and runs it for the first time."""
    kept["run"] = kept["implementation"].prefill(prompt)
    return again(kept)


def decode(kept: dict[str, Any], prompts: list[list[int]], steps: int) -> dict[str, Any]:
    """Reads prompts, and continues them for the first time."""
    kept["run"] = kept["implementation"].decode(prompts, steps)
    return again(kept)


def generate(kept: dict[str, Any], prompt: list[int], steps: int) -> dict[str, Any]:
    """Reads a prompt and continues it in one call, for the first time."""
    one = kept["implementation"]
    kept["run"] = one.generate(prompt, steps) if one.generate else one.decode([prompt], steps)
    return again(kept)


def score(kept: dict[str, Any], sequences: list[list[int]]) -> dict[str, Any]:
    """Scores sequences for the first time."""
    kept["run"] = kept["implementation"].score(sequences)
    return again(kept)


def again(kept: dict[str, Any]) -> dict[str, Any]:
    """Repeats the last of these."""
    result = kept["run"]()
    return {"seconds": result} if isinstance(result, float) else {"seconds": result[0], "found": result[1]}


def forget(kept: dict[str, Any]) -> dict[str, Any]:
    """Frees what the last of these keeps."""
    kept.pop("run", None)
    return {}


def facts(kept: dict[str, Any]) -> dict[str, Any]:
    """Answers what is known without measuring."""
    return kept["implementation"].facts()


REQUESTS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (
        prepare, reference, write_gguf, machine, probe, load, logits, first, prefill, decode, generate, score, again,
        forget, facts,
    )
}  # fmt: skip

if __name__ == "__main__":
    main()
