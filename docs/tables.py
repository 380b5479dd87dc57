"""Fills in the measured figures: `python docs/tables.py` rewrites tables of README.md and docs/, and docs/speed.svg.

A table stands between `<!-- table NAME -->` and `<!-- end -->`, and comes from the committed results of the benchmarks,
or from the census of checkpoints in the tests.
A test compares what is committed with what this would write.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CENSUS, THEIRS = ROOT / "tests" / "census.json", ROOT / "tests" / "census_transformers.json"
COLOURS = {"mpt_eqx": "#0b6e4f", "transformers": "#d98e2b", "llama.cpp": "#56718f"}


def markdown_tables(path: Path) -> list[list[list[str]]]:
    """Returns the tables of a Markdown file: for each its rows of cells, the first of them the header."""
    blocks = re.findall(r"(?:^\|.*\n)+", path.read_text(), re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if set(line) - set("|- ")]
        for block in blocks
    ]


def to_markdown(rows: list[list[str]]) -> str:
    """Returns rows of cells, the first of them the header, as a Markdown table."""
    header, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])


def tables() -> dict[str, str]:
    """Returns every table by its name."""
    decode, prefill = markdown_tables(RESULTS / "speed.md")[:2]
    short = [[dtype, library, *(cell.split(" ")[0] for cell in row[:3])] for dtype, library, *row in decode[1:]]
    memory = [
        [row["format"], row["how"], str(row["peak_over_weights"])]
        for row in json.loads((RESULTS / "memory.json").read_text())
    ]
    steps = json.loads((RESULTS / "loading.json").read_text())["steps"]
    words = {
        "convert": "`mpt-eqx convert` from torch shards",
        "load": "load what it wrote, in place",
        "load_torch": "load the torch shards themselves",
    }
    loading = [[words[name], str(steps[name]["seconds"]), str(steps[name]["anonymous_GB"])] for name in words]
    gpu = json.loads((RESULTS / "gpu_generation.json").read_text())
    return {
        "gpu": to_markdown(gpu_rows(gpu)),
        "speed": to_markdown(
            [["weights", "library", "1 row", "4 rows", "16 rows"]] + [row for row in short if "XLA" not in row[1]]
        ),
        "decode": to_markdown(decode),
        "prefill": to_markdown(prefill),
        "memory": to_markdown([["format", "how", "peak memory / weights"], *memory]),
        "loading": to_markdown([["step", "seconds", "peak memory, GB"], *loading]),
        "census": to_markdown(census_rows()),
        "tokenizers": to_markdown(tokenizer_rows()),
        "quality": to_markdown(markdown_tables(RESULTS / "quality.md")[0]),
        "masters": to_markdown(masters_rows()),
        "serving": to_markdown(serving_rows()),
        "training": to_markdown(training_rows()),
        "remat": to_markdown(remat_rows()),
        "peaks": to_markdown(peak_rows()),
        "amx": to_markdown(amx_rows()),
    }


def amx_rows() -> list[list[str]]:
    """Returns decoding and prompts in bfloat16 on a processor with tiles for it."""
    decode, prefill = markdown_tables(RESULTS / "speed_amx.md")[:2]
    rows = [[*read[1:5], *prompts[2:5]] for read, prompts in zip(decode, prefill, strict=True)]
    return [["", "1 row", "4 rows", "16 rows", "128 tokens", "512", "2,048"], *rows[1:]]


def serving_rows() -> list[list[str]]:
    """Returns the figures of servers under the same load."""
    servers = json.loads((RESULTS / "serving.json").read_text())["servers"]
    rows = []
    for name, found in servers.items():
        first, between = found["first_token_s"], found["between_tokens_s"]
        rows.append([
            name, f"{found['tokens_per_s']:.1f}", *(f"{first[p]:.1f}" for p in ("p50", "p99")),
            *(f"{1000 * between[p]:.0f}" for p in ("p50", "p99")),
        ])  # fmt: skip
    return [["", "tokens/s", "first token, s: median", "99 %", "between tokens, ms: median", "99 %"], *rows]


def training_rows() -> list[list[str]]:
    """Returns the figures of training steps beside those of torch."""
    rows = [["", "compute", "rows × tokens", "tokens/s", "peak GB", "torch: tokens/s", "peak GB", "times as fast"]]
    for name, file in (("all weights of 123M", "training"), ("LoRA on the shipped model", "training_lora")):
        for found in json.loads((RESULTS / f"{file}.json").read_text())["results"]:
            speeds, peaks = found["tokens per second"], found["peak GB"]
            other = next(key for key in speeds if key != "mpt_eqx")
            figures = [[f"{speeds[key]:,.0f}", f"{peaks[key]:.2f}"] for key in ("mpt_eqx", other)]
            size, times = f"{found['rows']} × {found['length']:,}", f"{found['times as fast as'][other]:.2f}"
            rows.append([name, found["dtype"], size, *figures[0], *figures[1], times])
    return rows


def peak_rows() -> list[list[str]]:
    """Returns the peaks of processes that load a model, read a prompt and decode."""
    rows = [["weights", "", "first token", "64 tokens in one call", "the same, with the prompt's cache kept"]]
    for dtype, found in json.loads((RESULTS / "generation_memory.json").read_text()).items():
        for name, peaks in found.items():
            figures = [f"{peaks[key]:.2f}" if key in peaks else "–" for key in ("first", "generate", "prefix")]
            rows.append([dtype, name, *figures])
    return rows


def remat_rows() -> list[list[str]]:
    """Returns the temporary memory of a gradient for each word of `remat`."""
    found = json.loads((RESULTS / "remat.json").read_text())["bytes"]
    rows = [[how, *(f"{size / 1e6:.1f} MB" for size in sizes.values())] for how, sizes in found.items()]
    return [["remat", *(f"{layers} blocks" for layers in found["none"])], *rows]


def masters_rows() -> list[list[str]]:
    """Returns what steps of training made of weights of each type."""
    runs = json.loads((RESULTS / "masters.json").read_text())
    rows = [
        [name, f"{run['loss'][0]:.2f}", f"{run['loss'][-1]:.2f}", f"{run['moved'][-1]:.1g}"]
        for name, run in runs.items()
    ]
    return [["", "loss at first", f"at step {len(runs[rows[0][0]]['loss'])}", "first norm moved by"], *rows]


def census_rows() -> list[list[str]]:
    """Returns the table of public checkpoints: alike ones in one row."""
    census, theirs = json.loads(CENSUS.read_text()), json.loads(THEIRS.read_text())
    alike: dict[tuple[str, ...], list[str]] = {}
    for entry in census["repositories"]:
        row = tuple(str(entry[key]) for key in ("parameters", "special", "outcome", "config", "basis"))
        alike.setdefault(row, []).append(f"`{entry['repository']}`")
    version = theirs["transformers"].rsplit(".", 1)[0]
    rows = [
        ["repositories", "size", "what is special", "mpt_eqx", f"transformers {version}", "llama.cpp", "vLLM", "known"]
    ]
    for (size, special, outcome, name, basis), names in alike.items():
        config, found = census["configs"].get(name, {}), theirs["outcomes"].get(name, {})
        if outcome == "refused":
            others = ["–", "–", "–"]
        else:
            others = [said(found), config.get("llama.cpp", "–"), config.get("vLLM", "–")]
        rows.append([", ".join(names), size, special, outcome, *others, {"excerpt": "in part"}.get(basis, basis)])
    return rows


def tokenizer_rows() -> list[list[str]]:
    """Returns the table of the tokenizers that public checkpoints have."""
    census = json.loads(CENSUS.read_text())
    used = Counter(entry["tokenizer"] for entry in census["repositories"] if entry["outcome"] == "runs")
    rows = [["tokenizer", "kind", "repositories", "read from"]]
    for name, entry in census["tokenizers"].items():
        if name in used:
            read = f"`{entry['reads']}`" if entry["reads"] and "." in entry["reads"] else entry["reads"] or "?"
            rows.append([name, entry["kind"] + ("" if entry["certain"] else " (?)"), str(used[name]), read])
    return rows


def said(outcome: dict[str, Any]) -> str:
    """Returns in a few words what transformers did with a checkpoint."""
    if text := outcome.get("refuses"):
        field = re.search(r"field '(\w+)'", text)
        kinds = {"custom code": "refuses the architecture", "mismatched": "refuses the network's width"}
        return f"refuses `{field[1]}`" if field else next(words for part, words in kinds.items() if part in text)
    if "off_by" not in outcome:
        return "–"
    return "runs" if outcome["off_by"] < 1e-4 else f"**wrong**: logits off by {outcome['off_by']:g}"


def gpu_rows(results: dict[str, Any]) -> list[list[str]]:
    """Returns the table of generation on a GPU: steps and prompts, by type."""

    def decode(name: str) -> list[str]:
        steps = [results.get(f"{name} decode {rows}") for rows in (1, 8, 32)]
        shares = [
            f" ({step['share_of_bandwidth']:.0%})" if step and "share_of_bandwidth" in step else "" for step in steps
        ]
        return [f"{step['step_ms']:.2f}{share}" if step else "–" for step, share in zip(steps, shares, strict=True)]

    def prefill(name: str, lengths: tuple[int, ...] = (128, 512, 2048)) -> list[str]:
        speeds = [results.get(f"{name} prefill {length}", {}).get("tokens_per_s") for length in lengths]
        return ["–" if speed is None else f"{speed:,.0f}" for speed in speeds]

    header = ["weights", "", "step, 1 row, ms", "8 rows", "32 rows", "prefill 128, tokens/s", "512", "2,048"]
    ours = [[dtype, "mpt_eqx", *decode(dtype), *prefill(dtype)] for dtype in ("bfloat16", "int8", "int4")]
    eager = ["bfloat16", "transformers", *decode("transformers"), *prefill("transformers eager")]
    compiled = ["bfloat16", "transformers, torch.compile", "–", "–", "–", *prefill("transformers compiled")]
    return [header, *[row for row in (*ours, eager, compiled) if set(row[2:]) != {"–"}]]


def chart() -> str:
    """Returns an SVG with a bar for each type and library: tokens per second of one sequence."""
    rows = [row for row in markdown_tables(RESULTS / "speed.md")[0][1:] if "XLA" not in row[1]]
    figures = [(row[0], row[1].split(",")[0], float(row[2].split(" ")[0])) for row in rows]
    largest = max(value for *_, value in figures)
    left, bar, gap, width = 84, 15, 10, 720
    parts, y, before = [], 62, None
    for dtype, library, value in figures:
        if dtype != before:
            y += gap if before else 0
            count = sum(other == dtype for other, *_ in figures)
            parts.append(f'<text x="{left - 10}" y="{y + count * bar / 2 + 4:g}" text-anchor="end">{dtype}</text>')
        length = round((width - left - 70) * value / largest, 1)
        parts += [
            f'<rect x="{left}" y="{y}" width="{length}" height="{bar - 2}" fill="{COLOURS[library]}"/>',
            f'<text x="{left + length + 6:g}" y="{y + 11}" font-size="11">{value:g}</text>',
        ]
        y, before = y + bar, dtype
    legend = []
    for index, (library, colour) in enumerate(COLOURS.items()):
        legend += [
            f'<rect x="{left + 120 * index}" y="38" width="12" height="12" fill="{colour}"/>',
            f'<text x="{left + 120 * index + 18}" y="48">{library}</text>',
        ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 14}" width="{width}" '
            f'height="{y + 14}" font-family="sans-serif" font-size="12" fill="#1f2933">',
            f'<rect width="{width}" height="{y + 14}" rx="8" fill="#f6f7f9"/>',
            f'<text x="{left}" y="24" font-size="14">Generation on two CPU cores: tokens per second, one sequence, '
            "354M parameters</text>",
            *legend, *parts, "</svg>", "",
        ]
    )  # fmt: skip


def filled(text: str) -> str:
    """Returns a page with its tables filled in."""
    known = tables()
    pattern = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{known[match[2]]}\n{match[3]}", text)


def main() -> None:
    """Writes the tables and the chart."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        page.write_text(filled(page.read_text()))
    (ROOT / "docs" / "speed.svg").write_text(chart())


if __name__ == "__main__":
    main()
