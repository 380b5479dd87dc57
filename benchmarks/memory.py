"""Memory and seconds of loading one model of almost a gigabyte from every format; the tests assert the memory.

    python benchmarks/memory.py

Writes benchmarks/results/memory.json and memory.md. Each load is a process of its own.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "tests"))  # for the writers of every format, and the measurement itself

LOADS = [
    ("safetensors", {}, "in place"),
    ("safetensors", {"mmap": False}, "copied"),
    ("safetensors", {"dtype": "float32"}, "to float32"),
    ("zip", {"mmap": False}, "copied"),
    ("zip", {"dtype": "float32"}, "to float32"),
    ("legacy", {"mmap": False}, "copied"),
    ("legacy", {"dtype": "float32"}, "to float32"),
    ("gguf", {"mmap": False}, "copied"),
    ("q8_0", {}, "dequantised to float32"),
    ("q8_0", {"dtype": "bfloat16"}, "dequantised to bfloat16"),
]
NAMES = {"zip": "torch, zip", "legacy": "torch, legacy", "gguf": "GGUF, BF16", "q8_0": "GGUF, Q8_0"}


def main() -> None:
    """Writes the checkpoints, loads them, and writes the results."""
    from test_memory import measure, write_every_format

    rows = []
    with tempfile.TemporaryDirectory() as directory:
        write_every_format(Path(directory))
        for name, options, how in LOADS:
            found = measure(Path(directory), name, **options)
            row = {
                "format": NAMES.get(name, name),
                "how": how,
                "weights_GB": round(found["size"] / 1e9, 2),
                "peak_over_weights": round(found["peak"] / found["size"], 3),
                "seconds": round(found["seconds"], 2),
            }
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(rows, indent=2) + "\n")
    table = ["| format | | weights, GB | peak memory of its own / weights | seconds |", "|---|---|---|---|---|"]
    table += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    head = ["# Memory of loading", "", "`python benchmarks/memory.py`, files in the page cache, two cores.", ""]
    (RESULTS / "memory.md").write_text("\n".join([*head, *table]) + "\n")


if __name__ == "__main__":
    main()
