"""The run: one process for each implementation and dtype, those of a dtype measured in alternating rounds."""

import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.speed import baselines
from benchmarks.speed.compare import FIRST_CALLS, OURS, OURS_XLA, agreement, compile_seconds, disagreement, ratios
from benchmarks.speed.machine import add_shares, commit, hardware, num_threads, versions
from benchmarks.speed.process import NO_KERNEL, ROOT, Worker, child_environment, keeping_programs, worker
from mpt_eqx import SHIPPED_MODEL, MPTConfig, MPTError
from mpt_eqx.cli._measure import EXTRA_TOKENS, peak_bytes, step_bytes

DTYPES = ("float32", "bfloat16", "int8", "int4")
PREFILL_LENGTHS = (128, 512, 2048)
REFERENCE_LOGITS = "reference.npy"
GREEDY = 8
"""Tokens that are compared with those of the widest dtype."""

Say = Callable[[str], None]


def make_prompts(vocab_size: int, rows: int, length: int) -> list[list[int]]:
    """Returns prompts of random tokens, the same at every call."""
    return np.random.default_rng(0).integers(vocab_size, size=(rows, length)).tolist()


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        source: the checkpoint; None for random weights of the reference size.
        dtypes: of DTYPES.
        baselines: of BASELINES; those that are not installed are skipped.
        prompt: tokens before those that are decoded.
        new_tokens: how many are decoded, a multiple of 8.
        batch_sizes: rows that are decoded together.
        prefill_lengths: tokens of the prompts; None for those of 128, 512 and 2048 that the model takes.
        score: rows and tokens of each that are scored together; fewer tokens where the model takes fewer.
        rounds: how often each is measured; the median counts.
        machine_size: "large", or "small" where the machine's own figures do not matter.
    """

    source: str | None = str(SHIPPED_MODEL)
    dtypes: Sequence[str] = DTYPES
    baselines: Sequence[str] = baselines.BASELINES
    prompt: int = 128
    new_tokens: int = 64
    batch_sizes: Sequence[int] = (1, 4, 16)
    prefill_lengths: Sequence[int] | None = None
    score: tuple[int, int] = (4, 512)
    rounds: int = 3
    machine_size: str = "large"


def run_benchmark(settings: Settings, say: Say, warn: Say) -> dict[str, Any]:
    """Measures, and returns what speed.json holds.

    Args:
        settings: what to measure.
        say: called with progress.
        warn: called with what is skipped or wrong.

    Raises:
        MPTError: there is no such model, it is too short for what is to be measured, or the disk is full.
    """
    skipped: list[str] = []

    def skip(line: str) -> None:
        skipped.append(line)
        warn(line)

    lines = {baseline: baselines.missing(baseline) for baseline in settings.baselines}
    for line in filter(None, lines.values()):
        skip(line)
    chosen = [baseline for baseline, line in lines.items() if line is None]
    before, head = os.getloadavg()[0], commit()
    with tempfile.TemporaryDirectory(prefix="mpt_eqx-bench-") as temporary:
        directory = Path(temporary)

        def ask(text: str, do: str, **request: Any) -> dict[str, Any]:
            """Asks a process of its own, without the kernel."""
            say(text)
            with worker({} if do == "machine" else NO_KERNEL) as one:
                return one.ask(do, **request)

        made = _needed(
            ask(
                "preparing the weights", "prepare", source=settings.source, directory=temporary, dtypes=settings.dtypes
            ),
            directory,
        )
        for dtype, reason in made["failed"].items():
            skip(f"{dtype}: skipped, {reason}")
        config = MPTConfig.from_dict(made["config"])
        lengths = check_lengths(settings, config)
        base = directory / ("float32" if "float32" in settings.dtypes else "bfloat16")
        prompts = make_prompts(config.vocab_size, max(settings.batch_sizes, default=1), settings.prompt)
        request = {"prompt": prompts[0], "steps": GREEDY, "file": str(directory / REFERENCE_LOGITS)}
        answer = _needed(ask("computing the reference logits", "reference", place=str(base), **request), directory)
        with_torch = "transformers" in chosen
        machine = _needed(
            ask("measuring the machine", "machine", size=settings.machine_size, with_torch=with_torch), directory
        )
        if machine["backend"] == "gpu":
            for baseline in list(chosen):
                if not ask(f"looking whether {baseline} can use the GPU", "probe", baseline=baseline).get("gpu"):
                    chosen.remove(baseline)
                    skip(f"{baseline}: skipped, the installed build cannot use the GPU that mpt_eqx runs on")
        kernel = machine.pop("kernel")
        warn(f"the optional CPU kernel is {'used' if kernel else 'not used'}")
        job = Job(settings, lengths, config, directory, base, prompts, answer["tokens"], say, warn)
        results: list[dict[str, Any]] = []
        for dtype in (dtype for dtype in settings.dtypes if dtype not in made["failed"]):
            names = [OURS, *((OURS_XLA,) if kernel else ())]
            for baseline in chosen:
                if dtype not in baselines.THEIR_DTYPES[baseline]:
                    continue
                if reason := baselines.unsupported(baseline, config, dtype):
                    skip(f"{baseline}, {dtype}: skipped, it does not support {reason}")
                    continue
                names.append(baseline)
            with ExitStack() as stack:
                results += measure_dtype(job, dtype, names, stack)
        say("measuring the time to the first text")
        start = measure_start(directory, settings.rounds)
    training = None
    if settings.source is None:
        say("measuring steps of training")
        training = measure_training(with_torch, settings.rounds)
    for result in results:
        add_shares(result, machine, config)
    return {
        "format": 3,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": head,
        "hardware": {**hardware(), "backend": machine["backend"], "device": machine["device"]},
        "load_average": [round(before, 2), round(os.getloadavg()[0], 2)],
        "versions": versions(),
        "model": {
            "name": "random weights, seed 0" if settings.source is None else _shown(settings.source),
            "parameters": config.num_parameters(),
            **{key: getattr(config, key) for key in ("d_model", "n_layers", "n_heads", "vocab_size", "max_seq_len")},
        },
        "settings": {
            "threads": num_threads(),
            "prompt": settings.prompt,
            "new_tokens": settings.new_tokens,
            "batch_sizes": list(settings.batch_sizes),
            "prefill_lengths": list(lengths),
            "rounds": settings.rounds,
            "score": score_size(settings, config),
        },
        "machine": machine,
        "kernel": kernel,
        "greedy_tokens": GREEDY,
        "results": results,
        "ratios": ratios(results),
        "start": start,
        "training": training,
        "skipped": skipped,
    }


def check_lengths(settings: Settings, config: MPTConfig) -> Sequence[int]:
    """Returns the lengths of the prompts to prefill.

    Raises:
        MPTError: one is more than the model takes.
    """
    most, needed = config.max_seq_len, settings.prompt + settings.new_tokens + EXTRA_TOKENS
    if needed > most:
        raise MPTError(
            f"--prompt {settings.prompt}, --new-tokens {settings.new_tokens} and {EXTRA_TOKENS} tokens of warm-up: "
            f"expected at most max_seq_len={most} together, found {needed}; give smaller numbers"
        )
    if settings.prefill_lengths is None:
        return [length for length in PREFILL_LENGTHS if length <= most]
    if max(settings.prefill_lengths, default=0) > most:
        raise MPTError(
            f"--prefill-lengths: expected at most max_seq_len={most}, found {max(settings.prefill_lengths)}; "
            f"give shorter ones"
        )
    return settings.prefill_lengths


def score_size(settings: Settings, config: MPTConfig) -> list[int]:
    """Returns the rows to score, and the tokens of each."""
    rows, length = settings.score
    return [rows, min(length, config.max_seq_len)]


class Job(NamedTuple):
    """What the measurement of every dtype needs to know: see `Settings` and `run_benchmark`.

    Attributes:
        settings: what to measure.
        lengths: tokens of the prompts that are prefilled.
        config: the model's.
        directory: where the weights are, in a directory for each dtype.
        base: the widest of them, whose logits all others are compared with.
        prompts: of the largest batch.
        greedy: the first greedy tokens of mpt_eqx in the widest dtype.
        say: called with progress.
        warn: called with what is wrong.
    """

    settings: Settings
    lengths: Sequence[int]
    config: MPTConfig
    directory: Path
    base: Path
    prompts: list[list[int]]
    greedy: list[int]
    say: Say
    warn: Say


def measure_dtype(job: Job, dtype: str, names: Sequence[str], stack: ExitStack) -> list[dict[str, Any]]:
    """Returns a result for each implementation, whose processes live as long as the stack.

    One that fails has "error" in its result and is asked no more.
    """
    workers: dict[str, Worker] = {}
    results: dict[str, dict[str, Any]] = {
        name: {
            "implementation": name,
            "dtype": dtype,
            "their_dtype": baselines.THEIR_DTYPES.get(name, {}).get(dtype, dtype),
            **{what: {} for what in (*FIRST_CALLS, "score")},
        }
        for name in names
    }

    def ask(name: str, what: str, do: str, **request: Any) -> dict[str, Any] | None:
        if "error" in results[name]:
            return None
        job.say(f"{dtype}: {what}, {name}")
        answer = workers[name].ask(do, **request)
        if "error" in answer:
            results[name]["error"] = answer["error"]
            job.warn(f"{name}, {dtype}: failed, {answer['error']}")
            return None
        return answer

    same_tokens = dict.fromkeys(names, GREEDY)
    for name, result in results.items():
        place = str(_place(job, name, dtype))
        # Started when it is its turn, so that nothing else starts meanwhile.
        workers[name] = stack.enter_context(worker(_environment(job, name)))
        if (answer := ask(name, "loading", "load", **_load_request(job, name, dtype, place))) is not None:
            seconds = time.perf_counter() - workers[name].started
            result |= {**answer, "start_seconds": seconds - answer["load_seconds"]}
            result["peak_bytes_after_load"] = peak_bytes(workers[name].process.pid)
    steps = job.settings.new_tokens
    for what, size, request in _requests(job):
        for name, run in in_turn(names, ask, what, size, job.settings.rounds, request).items():
            if what == "decode":
                same = [a == b for a, b in zip(job.greedy, run.pop("found"), strict=False)]
                same_tokens[name] = min(same_tokens[name], [*same, False].index(False))
            tokens = {"first": 1, "prefill": size, "decode": size * steps}[what]
            results[name][what][str(size)] = {**run, "tokens_per_s": tokens / run["median_seconds"]}
    peaks = {name: peak_bytes(workers[name].process.pid) for name in names}
    rows, length = score_size(job.settings, job.config)
    request = {"sequences": make_prompts(job.config.vocab_size, rows, length)}
    scoring = [name for name in names if name != "llama.cpp"]
    for name, run in in_turn(scoring, ask, "score", rows, job.settings.rounds, request).items():
        del run["found"]
        results[name]["score"][str(rows)] = {**run, "tokens_per_s": rows * length / run["median_seconds"]}
    file = job.directory / "logits.npy"
    for name, result in results.items():
        # After the measurements, because it would compile what the first prompt is to be compiled for.
        if ask(name, "comparing", "logits", prompt=job.prompts[0], file=str(file)) is not None:
            found = agreement(np.load(job.directory / REFERENCE_LOGITS), np.load(file), dtype)
            result["agreement"] = {**found, "greedy_tokens": same_tokens[name]}
            if not found["agrees"]:
                job.warn(disagreement(result))
        if (facts := ask(name, "looking at its memory", "facts")) is not None:
            result["peak_bytes"] = peaks[name]
            if (sizes := facts.pop("sizes", None)) is not None:
                result |= {"weight_bytes": sum(sizes.values()), "step_bytes": step_bytes(job.config, sizes)}
            result |= facts
        first = result["first"].get(str(job.settings.prompt))
        if first is not None:
            result["first_token_seconds"] = result["start_seconds"] + result["load_seconds"] + first["first_seconds"]
        if name in (OURS, OURS_XLA):
            result["compile_seconds"] = compile_seconds(result)
            if "error" not in result:
                job.say(f"{dtype}: again with what was compiled, {name}")
                result["cached"] = measure_cached(job, name, dtype, result)
    for path in job.directory.glob("*.gguf"):
        path.unlink()
    return list(results.values())


def measure_cached(job: Job, name: str, dtype: str, result: dict[str, Any]) -> dict[str, Any]:
    """Returns what another process needs that does the same, but finds the programs compiled."""
    with worker(_environment(job, name)) as one:
        answer = one.ask("load", **_load_request(job, name, dtype, str(_place(job, name, dtype))))
        start, compiling = time.perf_counter() - one.started, 0.0
        for what, size, request in _requests(job):
            for do, more in ((what, request), ("again", {}), ("forget", {})):
                if "error" not in answer:
                    answer = one.ask(do, **more)
                if "error" in answer:
                    return {"error": answer["error"]}
                if do == what:
                    if what == "first":
                        first_token = start + answer["seconds"]
                    compiling += max(0.0, answer["seconds"] - result[what][str(size)]["median_seconds"])
        return {
            "first_token_seconds": first_token,
            "compile_seconds": compiling,
            "peak_bytes": peak_bytes(one.process.pid),
        }


def _requests(job: Job) -> list[tuple[str, int, dict[str, Any]]]:
    """Returns what is measured before scoring, in this order: the request, its size and its arguments."""
    longest = make_prompts(job.config.vocab_size, 1, max(job.lengths, default=1))[0]
    return [
        ("first", job.settings.prompt, {"prompt": job.prompts[0]}),
        *(("prefill", length, {"prompt": longest[:length]}) for length in job.lengths),
        *(
            ("decode", rows, {"prompts": job.prompts[:rows], "steps": job.settings.new_tokens})
            for rows in job.settings.batch_sizes
        ),
    ]


def _environment(job: Job, name: str) -> dict[str, str]:
    """Returns the environment of an implementation's process."""
    kept = keeping_programs(job.directory / "compiled") if name in (OURS, OURS_XLA) else {}
    return {**kept, **(NO_KERNEL if name == OURS_XLA else {})}


def _load_request(job: Job, name: str, dtype: str, place: str) -> dict[str, Any]:
    return {
        "implementation": name, "place": place, "dtype": dtype, "vocab_size": job.config.vocab_size,
        "threads": num_threads(),
    }  # fmt: skip


def _place(job: Job, name: str, dtype: str) -> Path:
    """Returns where an implementation loads a dtype from; llama.cpp's file is written first."""
    if name != "llama.cpp":
        return job.directory / dtype
    kind = baselines.THEIR_DTYPES[name][dtype]
    file = job.directory / f"{kind}.gguf"
    job.say(f"{dtype}: writing {file.name}")
    # By a process of its own, because the peak of the one that measures is to be that of loading.
    with worker(NO_KERNEL) as one:
        source = job.directory / "bfloat16" if dtype == "bfloat16" else job.base
        _needed(one.ask("write_gguf", place=str(source), file=str(file), kind=kind), job.directory)
    return file


def in_turn(
    names: Sequence[str], ask: Callable[..., dict[str, Any] | None], what: str, size: int, rounds: int, request: Any
) -> dict[str, dict[str, Any]]:
    """Returns the seconds of those that did not fail, in rounds a, b, c, a, b, c rather than a, a, b, b, c, c.

    What changes meanwhile on the machine then changes for all of them.
    """
    runs: dict[str, dict[str, Any]] = {}
    shown = f"{what} of {size} {'tokens' if what in ('first', 'prefill') else 'rows'}"
    for name in names:
        if answer := ask(name, f"{shown}, for the first time", what, **request):
            runs[name] = {**answer, "first_seconds": answer["seconds"], "seconds": []}
    for number in range(1, rounds + 1):
        for name in list(runs):
            if answer := ask(name, f"{shown}, round {number} of {rounds}", "again"):
                runs[name]["seconds"].append(answer["seconds"])
            else:
                del runs[name]
    for name, run in runs.items():
        run["median_seconds"] = statistics.median(run["seconds"])
        ask(name, shown, "forget")
    return runs


def measure_start(directory: Path, rounds: int) -> dict[str, Any]:
    """Returns seconds from the start of a process to its first text, the first time with an empty compilation cache."""
    command = [sys.executable, "-m", "mpt_eqx", "generate", "The zip() function", "--compile-cache", "cache"]
    seconds = []
    for _ in range(1 + rounds):
        started = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=directory, env=child_environment({})
        ) as process:
            assert process.stdout is not None
            there = bool(process.stdout.read(1))
            seconds.append(time.perf_counter() - started)
            process.kill()  # its first text is all that is waited for
        if not there:
            return {"error": "mpt-eqx generate wrote nothing"}
    return {
        "model": _shown(str(SHIPPED_MODEL)), "first_start_seconds": seconds[0], "seconds": seconds[1:],
        "median_seconds": statistics.median(seconds[1:]),
    }  # fmt: skip


def measure_training(with_torch: bool, rounds: int) -> dict[str, Any]:
    """Returns what `benchmarks/training.py` measures."""
    command = [sys.executable, str(ROOT / "benchmarks" / "training.py"), "--rounds", str(rounds)]
    done = subprocess.run(
        [*command, *(() if with_torch else ("--no-torch",))], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=child_environment({}),
    )  # fmt: skip
    return json.loads(done.stdout) if done.returncode == 0 else {"error": f"ended with code {done.returncode}"}


def _needed(answer: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Returns an answer without which the run cannot go on."""
    if "error" in answer:
        raise MPTError(answer["error"].replace(f"{directory}/", "temporary file "))
    return answer


def _shown(source: str) -> str:
    return "pydoc-3m" if source == str(SHIPPED_MODEL) else source
