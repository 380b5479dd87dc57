"""The run: one process for each implementation and form, the ones of a form measured in turn."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mpt_eqx import SHIPPED_MODEL
from mpt_eqx.bench import peers
from mpt_eqx.bench.measure import FORMS, hardware, prefill_flops, threads
from mpt_eqx.config import AttnConfig, MPTConfig
from mpt_eqx.errors import MPTError, printable

REFERENCE = MPTConfig(
    d_model=1024, n_layers=24, n_heads=16, vocab_size=50368, max_seq_len=4096, no_bias=True,
    attn_config=AttnConfig(alibi=True),
)  # fmt: skip
"""The model of random weights that published figures are of."""

US, PLAIN = "mpt_eqx", "mpt_eqx (plain XLA)"
PREFILL_LENGTHS = (128, 512, 2048)
REFERENCE_LOGITS = "reference.npy"
GREEDY = 8
"""Tokens that are compared with those of float32."""

TOLERANCE = {"float32": 0.005, "bfloat16": 0.03, "int8": 0.06, "int4": 0.5}
"""How far logits may be from the widest form of mpt_eqx: the root mean square of the difference over their deviation.

In float32 not less, because llama.cpp reads GELU from a table of 16 bits. The others are twice what random weights of
the reference size lose, in 4 bits one and a half times; there only another computation would lose more.
"""

PACKAGE = Path(__file__).parents[1]
PLAIN_XLA = {"MPT_EQX_KERNEL": "0"}
"""What switches the CPU kernel off in a process."""

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is to be measured.

    Attributes:
        source: the checkpoint; None for random weights of the reference size.
        forms: of FORMS.
        peers: of PEERS; those that are not installed are skipped.
        prompt: tokens before those that are decoded.
        new_tokens: how many are decoded.
        batch_sizes: rows that are decoded together.
        prefill_lengths: tokens of the prompts that are read; None for those of 128, 512 and 2048 that the model takes.
        rounds: how often each is measured; the median counts.
        machine_size: "large", or "small" where the machine's own figures do not matter.
    """

    source: str | None = str(SHIPPED_MODEL)
    forms: Sequence[str] = FORMS
    peers: Sequence[str] = peers.PEERS
    prompt: int = 128
    new_tokens: int = 64
    batch_sizes: Sequence[int] = (1, 4, 16)
    prefill_lengths: Sequence[int] | None = None
    rounds: int = 3
    machine_size: str = "large"


# What a process runs in which the library itself is not to be loaded, because its memory and its start are to be
# those of another: its modules without the package's own imports, which bring JAX.
BARE = """import sys, types
package = types.ModuleType("mpt_eqx")
package.__path__ = [sys.argv[1]]
sys.modules["mpt_eqx"] = package
"""
WORK = "from mpt_eqx.bench.worker import main; main()"


class Worker:
    """A process that measures; it ends with the block that it was made for."""

    def __init__(self, log: IO[str], *, bare: bool, environment: Mapping[str, str]):
        self.log = log
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-c", (BARE if bare else "") + WORK, str(PACKAGE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=_environment(environment),
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, do: str, **question: Any) -> dict[str, Any]:
        """Returns the answer to one question; "error" in it where there is none."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps({"do": do, **question}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if line:
            return json.loads(line)
        self.log.seek(0)
        last = self.log.read().strip().rpartition("\n")[2]
        return {"error": f"its process ended with code {self.process.wait()} ({printable(last, limit=200)})"}


def run_benchmark(settings: Settings, say: Say, warn: Say) -> dict[str, Any]:
    """Measures, and returns what speed.json holds.

    Args:
        settings: what to measure.
        say: is told what is going on.
        warn: is told what is left out, or wrong.

    Raises:
        MPTError: there is no such model, it is too short for what is to be measured, or there is no room on the disk.
    """
    skipped: list[str] = []

    def skip(line: str) -> None:
        skipped.append(line)
        warn(line)

    lines = {peer: peers.missing(peer) for peer in settings.peers}
    for line in filter(None, lines.values()):
        skip(line)
    chosen = [peer for peer, line in lines.items() if line is None]
    before, commit = os.getloadavg()[0], _commit()
    with tempfile.TemporaryDirectory(prefix="mpt_eqx-bench-") as temporary:
        directory = Path(temporary)

        def ask(text: str, do: str, **question: Any) -> dict[str, Any]:
            """Asks a process of its own, in which everything is plain."""
            say(text)
            with _worker(environment={} if do == "machine" else PLAIN_XLA) as worker:
                return worker.ask(do, **question)

        made = _needed(
            ask("making the weights", "prepare", source=settings.source, directory=temporary, forms=settings.forms),
            directory,
        )
        for form, reason in made["failed"].items():
            skip(f"{form}: skipped, {reason}")
        forms = [form for form in settings.forms if form not in made["failed"]]
        config = MPTConfig.from_dict(made["config"])
        lengths = check_lengths(settings, config)
        base = directory / ("float32" if "float32" in settings.forms else "bfloat16")
        file = str(directory / REFERENCE_LOGITS)
        question = {"place": str(base), "length": settings.prompt, "steps": GREEDY, "file": file}
        answer = _needed(ask("making the logits that all are compared with", "reference", **question), directory)
        with_torch = "transformers" in chosen
        machine = _needed(
            ask("measuring the machine", "machine", size=settings.machine_size, with_torch=with_torch), directory
        )
        if machine["backend"] == "gpu":
            for peer in list(chosen):
                if not ask(f"looking whether {peer} can use the GPU", "probe", peer=peer).get("gpu"):
                    chosen.remove(peer)
                    skip(f"{peer}: skipped, the installed build cannot use the GPU that mpt_eqx runs on")
        kernel = machine.pop("kernel")
        warn(f"the optional CPU kernel is {'used' if kernel else 'not used'}")
        job = _Job(settings, lengths, config, directory, base, answer["tokens"], say, warn)
        results: list[dict[str, Any]] = []
        for form in forms:
            names = [US, *((PLAIN,) if kernel else ())]
            for peer in chosen:
                if form not in peers.THEIR_FORMS[peer]:
                    continue
                if reason := peers.unsupported(peer, config, form):
                    skip(f"{peer}, {form}: skipped, it has no {reason}")
                    continue
                names.append(peer)
            results += _measure_form(job, form, names)
        say("measuring the time to the first token")
        start = _start(directory, settings.rounds)
    for result in results:
        _add_shares(result, machine, config)
    return {
        "format": 1,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": commit,
        "hardware": {**hardware(), "backend": machine["backend"], "device": machine["device"]},
        "load_average": [round(before, 2), round(os.getloadavg()[0], 2)],
        "versions": _versions(),
        "model": {
            "name": "random weights, seed 0" if settings.source is None else _shown(settings.source),
            "parameters": config.num_parameters(),
            **{key: getattr(config, key) for key in ("d_model", "n_layers", "n_heads", "vocab_size", "max_seq_len")},
        },
        "settings": {
            "threads": threads(),
            "prompt": settings.prompt,
            "new_tokens": settings.new_tokens,
            "batch_sizes": list(settings.batch_sizes),
            "prefill_lengths": list(lengths),
            "rounds": settings.rounds,
        },
        "machine": machine,
        "kernel": kernel,
        "greedy_tokens": GREEDY,
        "results": results,
        "ratios": ratios(results),
        "start": start,
        "skipped": skipped,
    }


def check_lengths(settings: Settings, config: MPTConfig) -> Sequence[int]:
    """Returns the lengths of prompts to read.

    Raises:
        MPTError: one is more than the model takes.
    """
    most = config.max_seq_len
    if settings.prompt + settings.new_tokens > most:
        raise MPTError(
            f"--prompt {settings.prompt} and --new-tokens {settings.new_tokens}: expected at most max_seq_len={most} "
            f"together, found {settings.prompt + settings.new_tokens}; give smaller ones"
        )
    if settings.prefill_lengths is None:
        return [length for length in PREFILL_LENGTHS if length <= most]
    if max(settings.prefill_lengths, default=0) > most:
        raise MPTError(
            f"--prefill-lengths: expected at most max_seq_len={most}, found {max(settings.prefill_lengths)}; "
            f"give shorter ones"
        )
    return settings.prefill_lengths


class _Job(NamedTuple):
    """What the measuring of every form needs to know: see `Settings` and `run_benchmark`, whose arguments these are.

    Attributes:
        settings: what to measure.
        lengths: tokens of the prompts that are read.
        config: the model's.
        directory: where the weights are, in a directory for each form.
        base: the widest of them, whose logits all others are compared with.
        greedy: the tokens that mpt_eqx makes of it first.
        say: is told what is going on.
        warn: is told what is wrong.
    """

    settings: Settings
    lengths: Sequence[int]
    config: MPTConfig
    directory: Path
    base: Path
    greedy: list[int]
    say: Say
    warn: Say


def _measure_form(job: _Job, form: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a result for each implementation; one that fails has "error" in it and is asked no more."""
    with ExitStack() as stack:
        return _measure_together(job, form, names, stack)


def _measure_together(job: _Job, form: str, names: Sequence[str], stack: ExitStack) -> list[dict[str, Any]]:
    """Does what `_measure_form` says, with processes that live as long as the stack."""
    workers: dict[str, Worker] = {}
    results: dict[str, dict[str, Any]] = {
        name: {
            "implementation": name,
            "form": form,
            "their_form": peers.THEIR_FORMS.get(name, {}).get(form, form),
            "prefill": {},
            "decode": {},
        }
        for name in names
    }

    def ask(name: str, what: str, do: str, **question: Any) -> dict[str, Any] | None:
        if "error" in results[name]:
            return None
        job.say(f"{form}: {what}, {name}")
        answer = workers[name].ask(do, **question)
        if "error" in answer:
            results[name]["error"] = answer["error"]
            job.warn(f"{name}, {form}: failed, {answer['error']}")
            return None
        return answer

    same_tokens = dict.fromkeys(names, GREEDY)
    for name, result in results.items():
        place = str(_place(job, name, form))
        environment = PLAIN_XLA if name == PLAIN else {}
        # Made when it is its turn, so that nothing else starts meanwhile.
        workers[name] = stack.enter_context(_worker(bare=name in peers.PEERS, environment=environment))
        config = job.config.to_dict()
        answer = ask(name, "loading", "load", implementation=name, place=place, form=form, config=config)
        if answer is not None:
            seconds = time.perf_counter() - workers[name].started
            result |= {**answer, "start_seconds": seconds - answer["load_seconds"]}
    steps = job.settings.new_tokens
    for length in job.lengths:
        runs = _in_turn(names, ask, "prefill", length, job.settings.rounds, {"length": length})
        for name, run in runs.items():
            results[name]["prefill"][str(length)] = {**run, "tokens_per_s": length / run["median_seconds"]}
    for rows in job.settings.batch_sizes:
        question = {"rows": rows, "length": job.settings.prompt, "steps": steps}
        runs = _in_turn(names, ask, "decode", rows, job.settings.rounds, question)
        for name, run in runs.items():
            same = [a == b for a, b in zip(job.greedy, run.pop("tokens"), strict=False)]
            same_tokens[name] = min(same_tokens[name], [*same, False].index(False))
            results[name]["decode"][str(rows)] = {**run, "tokens_per_s": rows * steps / run["median_seconds"]}
    file = job.directory / "logits.npy"
    for name, result in results.items():
        # After the measuring, because it would compile what the first prompt is to be compiled for.
        if ask(name, "comparing", "logits", length=job.settings.prompt, file=str(file)) is not None:
            found = agreement(np.load(job.directory / REFERENCE_LOGITS), np.load(file), form)
            result["agreement"] = {**found, "greedy_tokens": same_tokens[name]}
            if not found["agrees"]:
                job.warn(disagreement(result))
        result |= ask(name, "looking at its memory", "facts") or {}
        if name in (US, PLAIN):
            result["compile_seconds"] = compile_seconds(result)
    for path in job.directory.glob("*.gguf"):
        path.unlink()
    return list(results.values())


def _place(job: _Job, name: str, form: str) -> Path:
    """Returns where an implementation loads a form from; llama.cpp's file is written first."""
    if name != "llama.cpp":
        return job.directory / form
    kind = peers.THEIR_FORMS[name][form]
    file = job.directory / f"{kind}.gguf"
    job.say(f"{form}: writing {file.name}")
    # By a process of its own, because the peak of the one that measures is to be that of loading.
    with _worker(environment=PLAIN_XLA) as worker:
        source = job.directory / "bfloat16" if form == "bfloat16" else job.base
        _needed(worker.ask("write_gguf", place=str(source), file=str(file), kind=kind), job.directory)
    return file


def _in_turn(
    names: Sequence[str], ask: Callable[..., dict[str, Any] | None], what: str, size: int, rounds: int, question: Any
) -> dict[str, dict[str, Any]]:
    """Returns the seconds of those that did not fail: a, b, c, a, b, c, and not a, a, b, b, c, c.

    What changes meanwhile on the machine then changes for all of them.
    """
    runs: dict[str, dict[str, Any]] = {}
    shown = f"{what} of {size} {'tokens' if what == 'prefill' else 'rows'}"
    for name in names:
        if answer := ask(name, f"{shown}, for the first time", what, **question):
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


def disagreement(result: dict[str, Any]) -> str:
    """Returns a line on a result whose logits are not those of the others."""
    found = result["agreement"]
    return (
        f"{result['implementation']}, {result['form']}: its logits differ from those of mpt_eqx in the widest form by "
        f"{found['difference']:.3g} of their standard deviation, expected at most {found['tolerance']}; "
        f"its figures are worth nothing"
    )


def agreement(expected: np.ndarray, found: np.ndarray, form: str) -> dict[str, Any]:
    """Returns how far logits are from those of float32, and whether that is near enough."""
    error = found.astype(np.float64) - expected
    difference = float(np.sqrt(np.mean(error**2)) / expected.std())
    return {
        "difference": difference,
        "largest_difference": float(np.abs(error).max()),
        "tolerance": TOLERANCE[form],
        "agrees": bool(difference <= TOLERANCE[form]),  # not so where it is NaN
        "same_next_token": bool(found.argmax() == expected.argmax()),
    }


def compile_seconds(result: dict[str, Any]) -> float | None:
    """Returns how much longer the first prompt and the first tokens took than later ones: all sizes together."""
    runs = [run for what in ("prefill", "decode") for run in result[what].values() if "median_seconds" in run]
    return sum(max(0.0, run["first_seconds"] - run["median_seconds"]) for run in runs) if runs else None


def ratios(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns our tokens per second over those of every other, and of every batch over those of one row."""
    by = {(result["implementation"], result["form"]): result for result in results}
    found = []
    for (name, form), result in by.items():
        us = by.get((US, form))
        for what in ("prefill", "decode"):
            for size, run in result[what].items():
                mine = us[what].get(size, {}).get("tokens_per_s") if us else None
                if name != US and mine and "tokens_per_s" in run:
                    ratio = mine / run["tokens_per_s"]
                    found.append({"over": name, "form": form, "what": what, "size": size, "ratio": ratio})
        one = result["decode"].get("1", {}).get("tokens_per_s")
        for size, run in result["decode"].items():
            if one and size != "1" and "tokens_per_s" in run:
                result["decode"][size]["over_one_row"] = run["tokens_per_s"] / one
    return found


def _add_shares(result: dict[str, Any], machine: dict[str, Any], config: MPTConfig) -> None:
    """Adds what of the machine's own speed was reached."""
    bandwidth = max(machine["read_GB_per_s"].values())
    kind = "float32" if result["form"] == "float32" else "bfloat16"
    peak = max(machine["matmul_GFLOP_per_s"][kind].values())
    for size, run in result["decode"].items():
        if "step_bytes" in result and "tokens_per_s" in run:
            run["weights_GB_per_s"] = result["step_bytes"] * run["tokens_per_s"] / int(size) / 1e9
            run["share_of_bandwidth"] = run["weights_GB_per_s"] / bandwidth
    for size, run in result["prefill"].items():
        if (flops := prefill_flops(config, int(size))) and "median_seconds" in run:
            run["GFLOP_per_s"] = flops / run["median_seconds"] / 1e9
            run["share_of_peak"] = run["GFLOP_per_s"] / peak
    if "temporary_bytes" in result:
        result["temporary_over_weights"] = result["temporary_bytes"] / result["weight_bytes"]


def _start(directory: Path, rounds: int) -> dict[str, Any]:
    """Returns seconds from the start of a process to its first text, with nothing compiled and with all of it kept."""
    command = [sys.executable, "-m", "mpt_eqx", "generate", "The zip() function", "--compile-cache", "cache"]
    seconds = []
    for _ in range(1 + rounds):
        started = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=directory, env=_environment({})
        ) as process:
            assert process.stdout is not None
            there = bool(process.stdout.read(1))
            seconds.append(time.perf_counter() - started)
            process.kill()  # its first text is all that is waited for
        if not there:
            return {"error": "mpt-eqx generate wrote nothing"}
    return {"model": _shown(str(SHIPPED_MODEL)), "first_start_seconds": seconds[0], "seconds": seconds[1:],
            "median_seconds": statistics.median(seconds[1:])}  # fmt: skip


@contextmanager
def _worker(*, bare: bool = False, environment: Mapping[str, str]) -> Iterator[Worker]:
    """Yields a process that measures, which ends with the block."""
    with tempfile.TemporaryFile("w+") as log, Worker(log, bare=bare, environment=environment) as worker:
        yield worker


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a process that measures: nothing compiled earlier, and room for others on a GPU."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION_CACHE")}
    # A process may be started from any directory, also where the package is not installed but lies.
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), kept.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **changes}


def _needed(answer: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Returns an answer without which nothing goes on."""
    if "error" in answer:
        raise MPTError(answer["error"].replace(f"{directory}/", "temporary file "))
    return answer


def _shown(source: str) -> str:
    return "pydoc-3m" if source == str(SHIPPED_MODEL) else source


def _versions() -> dict[str, str]:
    """Returns the versions of Python and of all packages that take part and are installed."""
    names = ("mpt_eqx", "jax", "jaxlib", "equinox", "numpy", "torch", "transformers", "llama_cpp_python", "gguf")
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Returns the commit that this package is of, with "+" where files of it have changed since; None outside git."""
    try:
        commit, changed = (
            subprocess.run(
                ["git", *command], cwd=PACKAGE, capture_output=True, text=True, timeout=20, check=True
            ).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "."])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+" if changed.strip() else "")
