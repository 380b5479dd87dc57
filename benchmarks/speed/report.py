"""What a run is written as: JSON, tables in Markdown, a plot."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.compare import OURS, OURS_XLA
from mpt_eqx.errors import MPTError

JSON, MARKDOWN, PLOT = "speed.json", "speed.md", "speed.png"
COLORS = {OURS: "#0b6e4f", OURS_XLA: "#8fc0a9", "transformers": "#e09f3e", "llama.cpp": "#577590"}


def check_output(directory: Path) -> None:
    """Raises unless a directory can be written to, before anything is measured.

    Raises:
        MPTError: it cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".speed.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MPTError(f"--output: expected a directory that can be written to, found {directory} ({error})") from None


def write_report(report: dict[str, Any], directory: Path) -> list[str]:
    """Writes all three files; returns a line on each that could not be made."""
    report = rounded(report)  # so that the tables can be made again from the file
    (directory / JSON).write_text(json.dumps(report, indent=1) + "\n")
    (directory / MARKDOWN).write_text(markdown(report))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return [f"{PLOT}: skipped, matplotlib not installed; pip install 'mpt_eqx[plot]'"]
    plot(report, directory / PLOT)
    return []


def rounded(value: Any) -> Any:
    """Returns the value with five significant digits in every float."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def markdown(report: dict[str, Any]) -> str:
    """Returns the tables, with what was measured and where."""
    settings, results = report["settings"], report["results"]
    new, prompt = settings["new_tokens"], settings["prompt"]
    parts = [
        "# Speed",
        _about(report),
        f"## Decode: tokens per second, {new} tokens after a prompt of {prompt}",
        "All rows of a batch together; in brackets the speedup of mpt_eqx over that row. Bandwidth: at batch 1, bytes "
        "of weights read per second over the memory bandwidth measured. The last column is the throughput of the "
        "largest batch over that of batch 1.",
        _speeds(report, "decode", settings["batch_sizes"], "batch"),
        "## Prefill: tokens per second, by prompt length",
        "One row. Peak FLOP/s: at the longest prompt, operations per second over those of the fastest matrix product "
        "measured.",
        _speeds(report, "prefill", settings["prefill_lengths"], "tokens"),
        *_scoring(report),
        *_training(report),
        "## Start",
        "Each in a process of its own, files in the page cache. Start: until the process has imported its library and "
        "found its devices. First token: from the start of the process, loading included, until the first token after "
        f"a prompt of {prompt} is there. Compile: what the first calls of all sizes above took longer than later "
        "ones. Kept: the same in another process, which finds the programs that the first one compiled.",
        _columns(results, {
            "start, s": ("start_seconds", 1), "load, s": ("load_seconds", 1),
            "first token, s": ("first_token_seconds", 1), "kept, s": ("cached.first_token_seconds", 1),
            "compile, s": ("compile_seconds", 1), "compile, kept, s": ("cached.compile_seconds", 1),
        }),
        "## Memory",
        "Of the same processes, mapped files included. Peak: of start, prefill and decode. Compiling takes: how much "
        "lower the peak is where the programs are kept. Temporary: buffers of the compiled decode step of one row, "
        "over the weights.",
        _columns(results, {
            "weights, GB": ("weight_bytes", 1e9), "peak after load, GB": ("peak_bytes_after_load", 1e9),
            "peak, GB": ("peak_bytes", 1e9), "compiling takes, GB": ("compile_bytes", 1e9),
            "temporary": ("temporary_over_weights", 1),
        }),
        "## Numerical agreement",
        f"Logits after the prompt, its last four tokens decoded one by one, against the full forward pass of mpt_eqx "
        f"in the widest dtype measured: root mean square of the difference over the standard deviation of the logits, "
        f"its tolerance, the largest difference, and how many of the first {report['greedy_tokens']} greedy tokens are "
        f"the same. Random weights have near ties.",
        table(
            ["dtype", "", "difference", "tolerance", "largest", "same tokens", ""],
            [
                [
                    result["dtype"], f"{result['implementation']} {result['their_dtype']}",
                    _number(found.get("difference")), _number(found.get("tolerance")),
                    _number(found.get("largest_difference")),
                    str(found.get("greedy_tokens", "–")), "" if found.get("agrees") else "**disagrees**",
                ]
                for result in results
                if (found := result.get("agreement"))
            ],
        ),
    ]  # fmt: skip
    if lines := [*report["skipped"], *(_failure(result) for result in results if "error" in result)]:
        parts += ["## Skipped and failed", "\n".join(f"* {line}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _about(report: dict[str, Any]) -> str:
    machine, hardware, model, settings = (report[key] for key in ("machine", "hardware", "model", "settings"))
    device = "" if hardware["backend"] == "cpu" else f", {hardware['device']}"
    peak = ", ".join(
        f"{max(by.values()):,.0f} GFLOP/s in {dtype}" for dtype, by in machine["matmul_GFLOP_per_s"].items()
    )
    start = report["start"]
    seconds = (
        start["error"]
        if "error" in start
        else f"{start['median_seconds']:.2f} s, {start['first_start_seconds']:.2f} s with an empty compilation cache"
    )
    lines = [
        f"model: {model['name']}; {model['parameters']:,} parameters, width {model['d_model']}, {model['n_layers']} "
        f"layers, {model['n_heads']} heads, vocabulary {model['vocab_size']:,}",
        f"machine: {hardware['cpu']}{device}, {hardware['cores']} cores, {hardware['memory_GB']} GB, "
        f"{hardware['system']}; load average {report['load_average'][0]} before, {report['load_average'][1]} after",
        f"memory bandwidth {max(machine['read_GB_per_s'].values()):.1f} GB/s, matrix products {peak}; both measured",
        f"{settings['threads']} threads each; medians of {settings['rounds']} alternating rounds",
        f"optional CPU kernel: {'used, except in the rows (plain XLA)' if report['kernel'] else 'not used'}",
        f"from the start of `mpt-eqx generate` to its first text, model {start.get('model', '')}: {seconds}",
        f"{report['date']}, commit {report['git_commit']}; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    ]
    return "\n".join(f"* {line}" for line in lines)


def _scoring(report: dict[str, Any]) -> list[str]:
    """Returns the section on scoring; none of a run without it."""
    if (size := report["settings"].get("score")) is None:
        return []
    return [
        f"## Scoring: tokens per second, {size[0]} sequences of {size[1]} tokens",
        "The log-likelihood of every sequence: by `score`; by log_softmax of transformers' logits; llama.cpp has no "
        "such function.",
        _speeds(report, "score", size[:1], "rows"),
    ]


def _training(report: dict[str, Any]) -> list[str]:
    """Returns the section on training; none of a run without it."""
    if not (found := report.get("training")):
        return []
    if "error" in found:
        return ["## Training", f"`benchmarks/training.py`: {found['error']}"]
    rows = []
    for result in found["results"]:
        ours = result["tokens per second"][OURS]
        for name, rate in result["tokens per second"].items():
            ratio = "" if name == OURS else f" ({ours / rate:.2f}×)"
            rows.append([result["dtype"], name, f"{_number(rate)}{ratio}", _number(result["peak GB"][name])])
    model, one = found["model"], found["results"][0]
    return [
        f"## Training: tokens per second of steps with AdamW, {one['rows']} rows of {one['length']} tokens",
        f"Width {model['d_model']}, {model['n_layers']} layers, vocabulary {model['vocab_size']:,}; float32 weights, "
        "the dtype is that of computations (`python benchmarks/training.py`). Peak: of the whole process.",
        table(["dtype", "", "tokens/s", "peak, GB"], rows),
    ]


def _columns(results: Sequence[dict[str, Any]], columns: dict[str, tuple[str, float]]) -> str:
    """Returns a table with a row for each result, and columns by their heads: a key of it and the unit."""

    def value(result: dict[str, Any], key: str) -> float | None:
        if key == "compile_bytes":
            peaks = result.get("peak_bytes"), result.get("cached", {}).get("peak_bytes")
            return None if None in peaks else max(0, peaks[0] - peaks[1])
        outer, _, inner = key.rpartition(".")
        return (result.get(outer, {}) if outer else result).get(inner)

    rows = [
        [
            result["dtype"],
            result["implementation"],
            *(_number(value(result, key), unit) for key, unit in columns.values()),
        ]
        for result in results
    ]
    return table(["dtype", "", *columns], rows)


def _speeds(report: dict[str, Any], what: str, sizes: Sequence[int], unit: str) -> str:
    """Returns the table of tokens per second, with the speedup of mpt_eqx over each other row."""
    ratios = {(r["dtype"], r["over"], r["what"], r["size"]): r["ratio"] for r in report["ratios"]}
    by_batch = what == "decode"
    header = ["dtype", "", *(f"{unit} {size}" if by_batch else f"{size} {unit}" for size in sizes)]
    last = {"decode": ["bandwidth", f"batch {max(sizes, default=1)} / 1"], "prefill": ["peak FLOP/s"]}.get(what, [])
    rows = []
    for result in report["results"]:
        cells = []
        for size in map(str, sizes):
            run = result.get(what, {}).get(size)
            ratio = ratios.get((result["dtype"], result["implementation"], what, size))
            cells.append("–" if run is None else _number(run["tokens_per_s"]) + (f" ({ratio:.2f}×)" if ratio else ""))
        runs = result.get(what, {})
        if by_batch:
            cells.append(_percent(runs.get("1", {}).get("share_of_bandwidth")))
            times = runs.get(str(max(sizes)), {}).get("over_one_row")
            cells.append("–" if times is None else f"{times:.1f}×")
        elif what == "prefill":
            cells.append(_percent(runs.get(str(max(sizes, default=0)), {}).get("share_of_peak")))
        rows.append([result["dtype"], _label(result), *cells])
    return table([*header, *last], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _label(result: dict[str, Any]) -> str:
    name, theirs = result["implementation"], result["their_dtype"]
    return name if theirs == result["dtype"] else f"{name}, {theirs}"


def _failure(result: dict[str, Any]) -> str:
    return f"{result['implementation']}, {result['dtype']}: failed, {result['error']}"


def _number(value: float | None, scale: float = 1) -> str:
    if value is None:
        return "–"
    value /= scale
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def plot(report: dict[str, Any], file: Path) -> None:
    """Writes bars: for each dtype and size, tokens per second of each implementation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings, results = report["settings"], report["results"]
    sides: list[tuple[str, str, Sequence[int], Callable[[int], str]]] = [
        ("decode", "decode, tokens/s", settings["batch_sizes"], lambda n: f"{n} row{'s' * (n != 1)}"),
        ("prefill", "prefill, tokens/s", settings["prefill_lengths"], lambda n: f"{n:,} tokens"),
    ]
    dtypes = list(dict.fromkeys(result["dtype"] for result in results))
    names = [name for name in COLORS if any(result["implementation"] == name for result in results)]
    most = max(1, *(len(sizes) for _, _, sizes, _ in sides))
    # Half an inch and a fifth of an inch a bar for each group, so that no number touches the next.
    figure = Figure(figsize=(13, 1.6 + len(dtypes) * most * (0.12 + 0.2 * max(1, len(names)))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(1, len(dtypes)), 2, squeeze=False)
    for row, dtype in zip(axes, dtypes, strict=False):
        own = [result for result in results if result["dtype"] == dtype]
        for axis, (what, title, sizes, label) in zip(row, sides, strict=True):
            _bars(axis, own, what, sizes, label)
            axis.set_title(f"{dtype}: {title}", loc="left", fontsize=10)
    handles = [_patch(COLORS[name], name) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=max(1, len(handles)), frameon=False)
    model, hardware = report["model"], report["hardware"]
    device = hardware["cpu"] if hardware["backend"] == "cpu" else hardware["device"]
    figure.supxlabel(
        f"{model['parameters'] / 1e6:,.0f} million parameters ({model['name']}), {device}, "
        f"{settings['threads']} threads",
        fontsize=9,
    )
    figure.savefig(file, dpi=110)


def _bars(
    axis: Any, results: list[dict[str, Any]], what: str, sizes: Sequence[int], label: Callable[[int], str]
) -> None:
    """Draws the groups of one axis, the first size on top, each bar with its figure."""
    height = 0.8 / max(1, len(results))
    for place, size in enumerate(sizes):
        for number, result in enumerate(results):
            if run := result[what].get(str(size)):
                y = place + (number - (len(results) - 1) / 2) * height
                bar = axis.barh(y, run["tokens_per_s"], height * 0.92, color=COLORS[result["implementation"]])
                axis.bar_label(bar, [_number(run["tokens_per_s"])], padding=3, fontsize=8)
    axis.set_yticks(range(len(sizes)), [label(size) for size in sizes])
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _patch(color: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)
