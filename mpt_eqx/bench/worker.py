"""A process that holds one implementation and measures what it is asked for, by lines of JSON on stdin and stdout.

While it is not asked it waits for a line, and uses no core.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpt_eqx.bench.measure import Implementation, make_prompts, measure_machine, peak_bytes, threads
from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import MPTError


def main() -> None:
    """Answers one line for each line."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    kept: dict[str, Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = QUESTIONS[question.pop("do")](kept, **question)
        except Exception as error:
            text = " ".join(str(error).split())
            answer = {"error": text if isinstance(error, MPTError) else f"{type(error).__name__}: {text}"}
        print(json.dumps(answer), file=answers)


def prepare(kept: dict[str, Any], source: str | None, directory: str, forms: list[str]) -> dict[str, Any]:
    """Writes the weights, from which everybody loads."""
    from mpt_eqx.bench import ours

    return ours.prepare(source, Path(directory), forms)


def reference(kept: dict[str, Any], place: str, length: int, steps: int, file: str) -> dict[str, Any]:
    """Writes the logits that all are compared with, and answers the greedy tokens."""
    from mpt_eqx.bench import ours

    vocab_size = MPTConfig.from_json_file(Path(place) / "config.json").vocab_size
    logits, tokens = ours.reference(place, make_prompts(vocab_size, 1, length)[0], steps)
    np.save(file, logits)
    return {"tokens": tokens}


def write_gguf(kept: dict[str, Any], place: str, file: str, kind: str) -> dict[str, Any]:
    """Writes a GGUF file of a checkpoint."""
    from mpt_eqx.bench import gguf_writer
    from mpt_eqx.checkpoint import from_pretrained

    gguf_writer.write_gguf(from_pretrained(place), file, kind)
    return {}


def machine(kept: dict[str, Any], size: str, with_torch: bool) -> dict[str, Any]:
    """Measures the machine, and tells whether the kernel runs on it."""
    from mpt_eqx.bench import ours

    figures = {**measure_machine(size), "kernel": ours.kernel_is_used()}
    if with_torch:
        from mpt_eqx.bench.peers import multiply_by_torch

        for dtype, by in figures["matmul_GFLOP_per_s"].items():
            by["torch"] = multiply_by_torch(figures["matmul_width"], dtype)
    return figures


def probe(kept: dict[str, Any], peer: str) -> dict[str, Any]:
    """Tells whether a peer can use the GPU."""
    from mpt_eqx.bench import peers

    return {"gpu": peers.uses_gpu(peer)}


def load(kept: dict[str, Any], implementation: str, place: str, form: str, config: dict[str, Any]) -> dict[str, Any]:
    """Imports an implementation and loads the weights."""
    if implementation == "transformers":
        import torch  # noqa: F401
        from transformers import MptForCausalLM  # noqa: F401

        from mpt_eqx.bench.peers import open_transformers as opened
    elif implementation == "llama.cpp":
        import llama_cpp  # noqa: F401

        from mpt_eqx.bench.peers import open_llama_cpp as opened
    else:
        import jax

        from mpt_eqx.bench.ours import open_mpt_eqx as opened

        jax.devices()
    started = time.perf_counter()
    read = MPTConfig.from_dict(config)
    kept["implementation"], kept["vocab_size"] = opened(place, form, read), read.vocab_size
    return {
        "load_seconds": time.perf_counter() - started,
        "peak_bytes_after_load": peak_bytes(),
        "threads": threads(),
    }


def logits(kept: dict[str, Any], length: int, file: str) -> dict[str, Any]:
    """Writes the logits after a prompt."""
    model: Implementation = kept["implementation"]
    np.save(file, model.logits(make_prompts(kept["vocab_size"], 1, length)[0]))
    return {}


def prefill(kept: dict[str, Any], length: int) -> dict[str, Any]:
    """Makes ready to read a prompt, and reads it for the first time."""
    model: Implementation = kept["implementation"]
    kept["run"] = model.prefill(make_prompts(kept["vocab_size"], 1, length)[0])
    return again(kept)


def decode(kept: dict[str, Any], rows: int, length: int, steps: int) -> dict[str, Any]:
    """Reads prompts, and continues them for the first time."""
    model: Implementation = kept["implementation"]
    kept["run"] = model.decode(make_prompts(kept["vocab_size"], rows, length), steps)
    return again(kept)


def again(kept: dict[str, Any]) -> dict[str, Any]:
    """Does once more what was last done for the first time."""
    result = kept["run"]()
    return {"seconds": result} if isinstance(result, float) else {"seconds": result[0], "tokens": result[1]}


def forget(kept: dict[str, Any]) -> dict[str, Any]:
    """Frees what was made ready."""
    kept.pop("run", None)
    return {}


def facts(kept: dict[str, Any]) -> dict[str, Any]:
    """Answers what is known without measuring, and the most memory so far."""
    model: Implementation = kept["implementation"]
    return {"peak_bytes": peak_bytes(), **model.facts()}


QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (
        prepare, reference, write_gguf, machine, probe, load, logits, prefill, decode, again, forget, facts,
    )
}  # fmt: skip
