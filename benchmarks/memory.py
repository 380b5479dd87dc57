"""Memory and time of loading and saving a model of 0.97 GB; the tests assert the memory.

    python benchmarks/memory.py

Writes benchmarks/results/memory.json, seconds.json and memory.md. Each load is a process of its own.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "tests"))  # for the writers of every format, and the measurement itself

ROWS = [
    ("safetensors", "load", {}, "in place"),
    ("safetensors", "load", {"mmap": False}, "copied"),
    ("safetensors", "load", {"dtype": "float32"}, "to float32"),
    ("shards", "load", {}, "in place"),
    ("shards", "load", {"mmap": False}, "copied"),
    ("zip", "load", {"mmap": False}, "copied"),
    ("zip", "load", {"dtype": "float32"}, "to float32"),
    ("zip", "load", {"mmap": False, "check_finite": True}, "copied, every number looked at"),
    ("legacy", "load", {"mmap": False}, "copied"),
    ("legacy", "load", {"dtype": "float32"}, "to float32"),
    ("gguf", "load", {"mmap": False}, "copied"),
    ("q8_0", "load", {}, "dequantised to float32"),
    ("q8_0", "load", {"dtype": "bfloat16"}, "dequantised to bfloat16"),
    ("zip", "convert", {}, "converted"),
    ("zip", "convert", {"dtype": "float32"}, "converted to float32"),
    ("q8_0", "convert", {"dtype": "bfloat16"}, "converted to bfloat16"),
    ("zip", "save", {}, "saved"),
]
NAMES = {
    "shards": "safetensors, 5 shards", "zip": "torch, zip", "legacy": "torch, legacy", "gguf": "GGUF, BF16",
    "q8_0": "GGUF, Q8_0",
}  # fmt: skip
SHAPE = (2048, 9, 16384)  # width, layers and vocabulary of a model of almost a gigabyte
WIDTHS = (1024, 1536, 2048)  # of the models that differ in size only
TIMES = 15  # the least of so many counts where seconds are compared


def main() -> None:
    """Writes the checkpoints, measures, and writes the results."""
    from test_memory import configuration, measuring, write_every_format, write_zip

    from mpt_eqx.checkpoint import convert

    record: dict[str, list[dict]] = {"memory": [], "size": [], "readers": []}

    def note(table: str, **row: object) -> None:
        record[table].append(row)
        print(table, row, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_every_format(root, configuration(*SHAPE))
        for width in WIDTHS:
            write_zip(root / f"zip-{width}", configuration(width, *SHAPE[1:]))
            convert(root / f"zip-{width}", root / f"width-{width}")
        size = sum(path.stat().st_size for path in (root / "safetensors").glob("*.safetensors"))
        with measuring(root) as measure:
            for name, action, options, how in ROWS:
                found = measure(name, action=action, **options)
                note(
                    "memory",
                    format=NAMES.get(name, name),
                    how=how,
                    weights_GB=round((found["size"] or size) / 1e9, 2),
                    peak_over_weights=round(found["peak"] / (found["size"] or size), 3),
                    VmHWM_GB=round(found["VmHWM"] / 1e9, 2),
                    seconds=round(found["seconds"], 2),
                )
            for width in WIDTHS:
                found = [measure(f"width-{width}") for _ in range(TIMES)]
                note(
                    "size",
                    GB=round(found[0]["size"] / 1e9, 2),
                    MB_read=round((found[0]["mapped"] + found[0]["read"]) / 1e6, 2),
                    seconds=round(min(one["seconds"] for one in found), 3),
                )
            for name in ("shards", "zip"):
                for readers in (1, 2, 4):
                    seconds = [measure(name, mmap=False, readers=readers)["seconds"] for _ in range(TIMES)]
                    note("readers", format=NAMES[name], threads=readers, seconds=round(min(seconds), 2))
    text = [
        "# Memory and time of loading and saving",
        "",
        "`python benchmarks/memory.py`, files in the page cache, two cores. VmHWM includes mapped files.",
        f"Load average {os.getloadavg()[0]:.1f}.",
        "",
        *_table("format||weights, GB|peak anonymous memory / weights|VmHWM, GB|seconds", record["memory"]),
        "",
        "In place (memory-mapped), only headers are read, so time does not depend on size:",
        "",
        *_table("weights, GB|MB read|seconds", record["size"]),
        "",
        "Copying with several threads:",
        "",
        *_table("format|threads|seconds", record["readers"]),
    ]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(record.pop("memory"), indent=2) + "\n")
    (RESULTS / "seconds.json").write_text(json.dumps(record, indent=2) + "\n")
    (RESULTS / "memory.md").write_text("\n".join(text) + "\n")


def _table(head: str, rows: list[dict]) -> list[str]:
    names = head.split("|")
    lines = [names, ["---"] * len(names), *([str(value) for value in row.values()] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    main()
