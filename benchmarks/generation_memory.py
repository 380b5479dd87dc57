"""Peak memory of a process that loads a model, reads a prompt and decodes, beside llama.cpp where it is installed.

    python -m benchmarks.generation_memory              354 million random weights, a prompt of 2,048 tokens; Linux only
    python -m benchmarks.generation_memory --tiny       the shipped model, a prompt of 64

Each implementation is a process, of which the peak, mapped files included, is printed after each step: `first` reads
the prompt and gives its first token; `generate` reads it and decodes 64 tokens, in one call; `prefix` does so with what
was read kept, to be continued once more. JSON goes to stdout.
"""

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speed.baselines import BASELINES, THEIR_DTYPES
from benchmarks.speed.machine import num_threads
from benchmarks.speed.process import NO_KERNEL, worker
from benchmarks.speed.run import make_prompts
from mpt_eqx import SHIPPED_MODEL
from mpt_eqx.cli._measure import peak_bytes

DTYPES = ("float32", "bfloat16", "int8", "int4")


def peaks(implementation: str, place: Path, dtype: str, prompt: list[int], vocab_size: int) -> dict[str, Any]:
    """Returns the peak in GB after each step, or the error that ended them."""
    load = {"implementation": implementation, "place": str(place), "dtype": dtype, "vocab_size": vocab_size}
    found: dict[str, Any] = {}
    with worker() as one:
        for step, request in (
            ("load", {**load, "threads": num_threads()}),
            ("first", {"prompt": prompt}),
            ("forget", {}),
            ("generate", {"prompt": prompt, "steps": 64}),
            ("forget", {}),
            *([("decode", {"prompts": [prompt], "steps": 64})] if implementation == "mpt_eqx" else []),
        ):
            answer = one.ask(step, **request)
            if "error" in answer:
                return {**found, "error": answer["error"]}
            peak = peak_bytes(one.process.pid)
            found["prefix" if step == "decode" else step] = peak and round(peak / 1e9, 3)
    del found["forget"]
    return found


def main() -> None:
    """Writes the weights, measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        source = str(SHIPPED_MODEL) if args.tiny else None
        with worker(NO_KERNEL) as one:
            config = one.ask("prepare", source=source, directory=temporary, dtypes=DTYPES)["config"]
        vocab_size = config["vocab_size"]
        (prompt,) = make_prompts(vocab_size, 1, 64 if args.tiny else 2048)
        for dtype in DTYPES:
            results[dtype] = {"mpt_eqx": peaks("mpt_eqx", directory / dtype, dtype, prompt, vocab_size)}
            if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
                kind = THEIR_DTYPES[BASELINES[1]][dtype]
                file = directory / f"{kind}.gguf"
                with worker(NO_KERNEL) as one:
                    one.ask("write_gguf", place=str(directory / "bfloat16"), file=str(file), kind=kind)
                results[dtype]["llama.cpp"] = peaks("llama.cpp", file, dtype, prompt, vocab_size)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
