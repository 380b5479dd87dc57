"""The comparison with transformers and llama.cpp: that it measures the right thing. No test looks at a time."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

sys.path.insert(0, str(Path(__file__).parent.parent))  # where the benchmarks are, which are not installed

ROWS = (1, 2)
KEYS = {
    "format", "date", "git_commit", "hardware", "load_average", "versions", "model", "settings", "machine", "kernel",
    "greedy_tokens", "results", "ratios", "start", "training", "skipped",
}  # fmt: skip
RESULT = {
    "implementation", "dtype", "their_dtype", "first", "prefill", "decode", "score", "load_seconds", "start_seconds",
    "threads", "first_token_seconds", "cached", "peak_bytes_after_load", "peak_bytes", "agreement", "compile_seconds",
    "weight_bytes", "step_bytes", "temporary_bytes", "temporary_over_weights", "kernel",
}  # fmt: skip
RUN = {"seconds", "first_seconds", "median_seconds", "tokens_per_s"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model that every implementation can run, in a directory."""
    from mpt_eqx import MPT, AttnConfig, InitConfig, MPTConfig, save_pretrained

    config = MPTConfig(
        d_model=64, n_heads=4, n_layers=2, vocab_size=160, max_seq_len=256, no_bias=True,
        attn_config=AttnConfig(alibi=True), init_config=InitConfig(emb_init_std=0.5),
    )  # fmt: skip
    place = tmp_path_factory.mktemp("model")
    save_pretrained(MPT(config, key=jax.random.key(5)), place)
    return place


def settings_of(place, **changes):
    from benchmarks.speed.run import Settings

    return Settings(
        source=str(place), dtypes=("int8",), baselines=(), prompt=16, new_tokens=8, batch_sizes=ROWS,
        prefill_lengths=(16,), rounds=2, machine_size="small", score=(2, 16), **changes,
    )  # fmt: skip


START = {"seconds": [1.0, 1.0], "median_seconds": 1.0, "first_start_seconds": 2.0}


class InThisProcess:
    """Answers like a worker, without a process of its own: what a request does is the same."""

    def __init__(self):
        self.kept, self.started, self.process = {}, time.perf_counter(), SimpleNamespace(pid=os.getpid())

    def ask(self, do, **request):
        from benchmarks.speed.worker import REQUESTS

        return json.loads(json.dumps(REQUESTS[do](self.kept, **json.loads(json.dumps(request)))))


@pytest.fixture(scope="module")
def measured(checkpoint):
    """A whole run of mpt_eqx alone, and what was said meanwhile."""
    from benchmarks.speed import run

    said, warned = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure_start", lambda directory, rounds: START)
        patch.setattr(run, "worker", lambda environment={}: nullcontext(InThisProcess()))
        return run.run_benchmark(settings_of(checkpoint), said.append, warned.append), said, warned


@pytest.fixture
def canned():
    """A report of two implementations with round figures."""

    def result(name, form, theirs, times, **more):
        return {
            "implementation": name, "dtype": form, "their_dtype": theirs, "load_seconds": 0.5, "start_seconds": 1.5,
            "peak_bytes_after_load": 10**9, "peak_bytes": 2 * 10**9, "weight_bytes": 10**9, "step_bytes": 10**9,
            "first_token_seconds": 2.5,
            "prefill": {"128": {"tokens_per_s": 300.0 * times, "median_seconds": 1.0}},
            "score": {} if name == "llama.cpp" else {"4": {"tokens_per_s": 100.0 * times}},
            "decode": {
                "1": {"tokens_per_s": 10.0 * times, "share_of_bandwidth": 0.5},
                "16": {"tokens_per_s": 80.0 * times, "share_of_bandwidth": 0.25},
            },
            "agreement": {"difference": 0.01, "largest_difference": 0.2, "tolerance": 0.1, "agrees": True,
                          "greedy_tokens": 8},
            **more,
        }  # fmt: skip

    from benchmarks.speed.compare import ratios

    results = [
        result(
            "mpt_eqx",
            "float32",
            "float32",
            3,
            compile_seconds=4.0,
            temporary_over_weights=0.02,
            cached={"first_token_seconds": 2.0, "compile_seconds": 0.5, "peak_bytes": 1.75e9},
        ),
        result("llama.cpp", "float32", "F32", 2),
        result("transformers", "float32", "float32", 1),
    ]
    return {
        "format": 3, "date": "2026-01-02T03:04:05+00:00", "git_commit": "abc", "load_average": [0.1, 0.2],
        "hardware": {"cpu": "A Processor", "cores": 2, "memory_GB": 24.0, "system": "Linux 6", "backend": "cpu",
                     "device": "cpu"},
        "versions": {"jax": "0.10.0"},
        "model": {"name": "m", "parameters": 354_000_000, "d_model": 1024, "n_layers": 24, "n_heads": 16,
                  "vocab_size": 50368, "max_seq_len": 4096},
        "settings": {"threads": 2, "prompt": 128, "new_tokens": 64, "batch_sizes": [1, 16], "prefill_lengths": [128],
                     "rounds": 3, "score": [4, 512]},
        "machine": {"read_GB_per_s": {"jax": 20.0, "numpy": 19.0},
                    "matmul_GFLOP_per_s": {"float32": {"jax": 100.0}, "bfloat16": {"jax": 150.0}}},
        "kernel": True, "greedy_tokens": 8, "results": results, "ratios": ratios(results),
        "start": {"model": "pydoc-3m", "first_start_seconds": 5.0, "seconds": [2.0], "median_seconds": 2.0},
        "training": {
            "model": {"d_model": 768, "n_layers": 12, "vocab_size": 50368},
            "results": [{"dtype": "bfloat16", "rows": 2, "length": 512,
                         "tokens per second": {"mpt_eqx": 300.0, "transformers": 200.0},
                         "peak GB": {"mpt_eqx": 3.5, "transformers": 4.0}}],
        },
        "skipped": ["a line"],
    }  # fmt: skip


@pytest.mark.slow
def test_a_run_is_complete(measured):
    report, said, warned = measured
    json.dumps(report)
    assert set(report) == KEYS and report["settings"]["threads"] == report["results"][0]["threads"] >= 1
    names = {"mpt_eqx", "mpt_eqx (plain XLA)"} if report["kernel"] else {"mpt_eqx"}
    found = [(result["implementation"], result["dtype"]) for result in report["results"]]
    assert sorted(found) == sorted((name, "int8") for name in names)
    for result in report["results"]:
        assert set(result) == RESULT
        assert set(result["prefill"]) == {"16"} and set(result["decode"]) == {"1", "2"}
        assert set(result["first"]["16"]) == set(result["score"]["2"]) == RUN
        assert set(result["cached"]) == {"first_token_seconds", "compile_seconds", "peak_bytes"}
        assert result["first_token_seconds"] > result["load_seconds"] + result["first"]["16"]["first_seconds"]
        assert set(result["prefill"]["16"]) == RUN | {"GFLOP_per_s", "share_of_peak"}
        for size, run in result["decode"].items():
            assert set(run) - {"over_one_row"} == RUN | {"weights_GB_per_s", "share_of_bandwidth"}
            assert ("over_one_row" in run) == (size != "1") and len(run["seconds"]) == 2
        assert result["agreement"]["agrees"] and result["agreement"]["greedy_tokens"] == 8
        assert 10**7 < result["peak_bytes_after_load"] <= result["peak_bytes"]
    assert set(report["versions"]) >= {"python", "jax", "equinox", "numpy"} and report["hardware"]["cores"] >= 1
    assert report["start"]["seconds"] and report["skipped"] == [] and report["training"] is None
    assert warned == [f"the optional CPU kernel is {'used' if report['kernel'] else 'not used'}"]
    assert "preparing the weights" in said and any("round 2 of 2" in line for line in said)


@pytest.mark.slow
def test_figures_follow_from_what_was_measured(measured, checkpoint):
    from benchmarks.speed.machine import prefill_flops
    from mpt_eqx import from_pretrained

    report, *_ = measured
    config = from_pretrained(checkpoint).config
    for result in report["results"]:
        for rows, run in result["decode"].items():
            assert run["tokens_per_s"] == pytest.approx(int(rows) * 8 / np.median(run["seconds"]))
            step = run["median_seconds"] / 8
            share = result["step_bytes"] / step / 1e9 / max(report["machine"]["read_GB_per_s"].values())
            assert run["share_of_bandwidth"] == pytest.approx(share)
        read = result["prefill"]["16"]
        assert read["GFLOP_per_s"] == pytest.approx(prefill_flops(config, 16) / read["median_seconds"] / 1e9)
        assert result["temporary_over_weights"] == result["temporary_bytes"] / result["weight_bytes"]
        assert config.num_parameters() < result["weight_bytes"] < 1.2 * config.num_parameters()
        assert result["step_bytes"] == result["weight_bytes"]  # tied: all of it is read


@pytest.mark.slow
def test_every_implementation_has_a_process_of_its_own(checkpoint, monkeypatch):
    """End to end, with the real processes: only one of them uses the kernel, and the figures are as complete."""
    from benchmarks.speed import run

    monkeypatch.setattr(run, "measure_start", lambda directory, rounds: START)
    report = run.run_benchmark(settings_of(checkpoint), print, print)
    assert len(report["results"]) == (2 if report["kernel"] else 1)
    for result in report["results"]:
        assert set(result) == RESULT and result["agreement"]["agrees"] and result["agreement"]["greedy_tokens"] == 8
        assert result["kernel"] == (report["kernel"] and result["implementation"] == "mpt_eqx")


@pytest.mark.slow
def test_the_time_to_the_first_text(tmp_path):
    from benchmarks.speed.run import measure_start

    found = measure_start(tmp_path, 1)
    assert len(found["seconds"]) == 1 and found["seconds"][0] == found["median_seconds"] > 0
    assert os.listdir(tmp_path / "cache")  # kept from the first start for the second


@pytest.mark.slow
def test_rounds_alternate(measured):
    report, said, _ = measured
    if not report["kernel"]:
        pytest.skip("there is one implementation only")
    rounds = [line.split(", ") for line in said if line.startswith("int8: decode of 1 rows, round")]
    assert [(what[-10:], name) for _, what, name in rounds] == [
        (f"ound {n} of 2"[-10:], name) for n in (1, 2) for name in ("mpt_eqx", "mpt_eqx (plain XLA)")
    ]


@pytest.mark.slow
def test_all_files_are_written(measured, tmp_path):
    from benchmarks.speed.report import write_report

    assert write_report(measured[0], tmp_path) == []
    assert json.loads((tmp_path / "speed.json").read_text())["format"] == 3
    assert (tmp_path / "speed.md").read_text().startswith("# Speed\n")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_operations_of_a_prefill(tiny_config):
    """Of two tokens, by hand: the blocks' weights twice for each, the output matrix once, 1 + 2 keys in attention."""
    from benchmarks.speed.machine import prefill_flops

    config = tiny_config()
    blocks = config.num_parameters() - 61 * 32
    assert prefill_flops(config, 2) == 2 * (2 * blocks + 61 * 32 + 2 * config.n_layers * 32 * (1 + 2))


def test_a_step_does_not_read_vectors_of_tokens_that_are_not_there(tiny_config):
    from mpt_eqx.cli._measure import step_bytes

    sizes = {"transformer.wte.weight": 1, "transformer.wpe.weight": 10, "transformer.norm_f.weight": 100}
    assert step_bytes(tiny_config(), sizes) == 101
    assert step_bytes(tiny_config(tie_word_embeddings=False), {**sizes, "lm_head.weight": 1000}) == 1100


def test_ratios(canned):
    from benchmarks.speed.compare import ratios

    found = {(r["over"], r["what"], r["size"]): r["ratio"] for r in ratios(canned["results"])}
    assert found["llama.cpp", "decode", "1"] == 1.5 and found["transformers", "prefill", "128"] == 3
    assert found["transformers", "score", "4"] == 3
    assert len(found) == 7 and canned["results"][0]["decode"]["16"]["over_one_row"] == 8


def test_the_tables(canned):
    from benchmarks.speed.report import markdown

    text = markdown(canned)
    for line in (
        "| dtype |  | batch 1 | batch 16 | bandwidth | batch 16 / 1 |",
        "| float32 | mpt_eqx | 30 | 240 | 50 % | 8.0× |",
        "| float32 | llama.cpp, F32 | 20 (1.50×) | 160 (1.50×) | 50 % | 8.0× |",
        "| float32 | transformers | 100 (3.00×) |",
        "| float32 | llama.cpp, F32 | – |",
        "| bfloat16 | mpt_eqx | 300 | 3.5 |",
        "| bfloat16 | transformers | 200 (1.50×) | 4 |",
        "| float32 | mpt_eqx | 1.5 | 0.5 | 2.5 | 2 | 4 | 0.5 |",
        "| float32 | transformers | 1.5 | 0.5 | 2.5 | – | – | – |",
        "| float32 | mpt_eqx | 1 | 1 | 2 | 0.25 | 0.02 |",
        "| float32 | transformers | 1 | 1 | 2 | – | – |",
        "| float32 | llama.cpp F32 | 0.01 | 0.1 | 0.2 | 8 |  |",
        "* a line",
    ):
        assert line in text.split("\n"), line
    for words in (
        "A Processor, 2 cores, 24.0 GB", "2 threads each; medians of 3 alternating rounds", "commit abc; jax 0.10.0",
        "20.0 GB/s", "100 GFLOP/s in float32", "2.00 s, 5.00 s with", "CPU kernel: used",
    ):  # fmt: skip
        assert words in text


def test_a_run_of_other_weights_has_no_training(canned):
    from benchmarks.speed.report import markdown

    assert "## Training" not in markdown({**canned, "training": None})
    assert "`benchmarks/training.py`: ended with code 1" in markdown(
        {**canned, "training": {"error": "ended with code 1"}}
    )


def test_steps_of_training_are_measured_by_their_own_benchmark(monkeypatch):
    from benchmarks.speed import run

    asked, code = [], 0

    def answer(command, **_):
        asked.append(command[2:])
        return SimpleNamespace(returncode=code, stdout='{"results": []}')

    monkeypatch.setattr(run.subprocess, "run", answer)
    assert run.measure_training(True, 2) == {"results": []}
    code = 1
    assert run.measure_training(False, 3) == {"error": "ended with code 1"}
    assert asked == [["--rounds", "2"], ["--rounds", "3", "--no-torch"]]


def test_what_disagrees_is_marked(canned):
    from benchmarks.speed.compare import agreement, disagreement
    from benchmarks.speed.report import markdown

    expected = np.linspace(-1, 1, 100, dtype=np.float32)
    assert agreement(expected, expected, "float32")["agrees"]
    assert not agreement(expected, expected[::-1], "float32")["agrees"]
    near = agreement(expected, expected + np.float32(0.001), "float32")
    assert near["agrees"] and near["largest_difference"] == pytest.approx(0.001, rel=1e-3)
    assert near["difference"] == pytest.approx(0.001 / expected.std(), rel=1e-3)
    assert not agreement(expected, np.full(100, np.nan, np.float32), "int4")["agrees"]
    wrong = canned["results"][1]
    wrong["agreement"] = agreement(expected, expected[::-1], "float32")
    assert "| **disagrees** |" in markdown(canned)
    assert disagreement(wrong).startswith("llama.cpp, float32: its logits differ from those of mpt_eqx")


def test_a_failure_is_told(canned, tmp_path):
    from benchmarks.speed.report import markdown, write_report

    failed = {"implementation": "llama.cpp", "dtype": "int8", "their_dtype": "Q8_0", "prefill": {}, "decode": {},
              "error": "no room"}  # fmt: skip
    canned["results"].append(failed)
    text = markdown(canned)
    assert "* llama.cpp, int8: failed, no room" in text and "| int8 | llama.cpp, Q8_0 | – | – | – | – |" in text
    assert write_report(canned, tmp_path) == []


def test_without_matplotlib_there_is_no_plot(canned, tmp_path, monkeypatch):
    from benchmarks.speed.report import write_report

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_report(canned, tmp_path) == [
        "speed.png: skipped, matplotlib not installed; pip install 'mpt_eqx[plot]'"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.md"]


def test_baselines_that_are_not_installed_are_skipped(monkeypatch):
    from benchmarks.speed import baselines

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [baselines.missing(baseline) for baseline in baselines.BASELINES] == [
        "transformers: skipped, torch and transformers not installed; pip install 'mpt_eqx[reference]'",
        "llama.cpp: skipped, llama_cpp and gguf not installed; pip install 'mpt_eqx[bench]'",
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert [baselines.missing(baseline) for baseline in baselines.BASELINES] == [None, None]


@pytest.mark.slow
def test_a_run_without_its_baselines_goes_on(checkpoint, monkeypatch):
    """What is missing is said at the start, in the report, and the rest is measured."""
    from benchmarks.speed import baselines, run

    monkeypatch.setattr(baselines, "missing", lambda baseline: f"{baseline}: skipped")
    monkeypatch.setattr(run, "measure_dtype", lambda job, dtype, names, stack: [])
    monkeypatch.setattr(run, "measure_start", lambda directory, rounds: {"error": "not measured"})
    monkeypatch.setattr(run, "worker", lambda environment={}: nullcontext(InThisProcess()))
    warned = []
    settings = run.Settings(source=str(checkpoint), dtypes=("float32",), prompt=16, new_tokens=8, machine_size="small")
    report = run.run_benchmark(settings, lambda text: None, warned.append)
    assert warned[:2] == report["skipped"] == ["transformers: skipped", "llama.cpp: skipped"]


@pytest.mark.parametrize("name", ["transformers", "llama.cpp"])
def test_a_baseline_computes_the_same(name, checkpoint, tmp_path):
    """Where it is installed: its logits are ours, in a process that has loaded nothing of ours."""
    from benchmarks.speed import baselines
    from benchmarks.speed.compare import agreement
    from benchmarks.speed.process import worker
    from benchmarks.speed.run import make_prompts
    from mpt_eqx import from_pretrained, generate, score
    from mpt_eqx.checkpoint import save_gguf
    from mpt_eqx.cli._measure import step_bytes

    if line := baselines.missing(name):
        pytest.skip(line)
    model, place = from_pretrained(checkpoint), checkpoint
    if name == "llama.cpp":
        save_gguf(model, place := tmp_path / "model.gguf")
    prompts = make_prompts(160, 3, 24)
    with worker() as one:
        request = {"place": str(place), "dtype": "float32", "vocab_size": 160, "threads": 2}
        answer = one.ask("load", implementation=name, **request)
        assert answer["threads"] == 2, answer
        assert one.ask("logits", prompt=prompts[0], file=str(tmp_path / "logits.npy")) == {}
        made = one.ask("decode", prompts=prompts, steps=6)
        assert one.ask("again")["found"] == made["found"]  # from the same place every time
        assert one.ask("first", prompt=prompts[0])["seconds"] > 0
        scored = one.ask("score", sequences=prompts) if name == "transformers" else None
        sizes = one.ask("facts")["sizes"]
    expected = np.asarray(model(jnp.asarray(prompts[0]))[-1])
    found = agreement(expected, np.load(tmp_path / "logits.npy"), "float32")
    assert found["agrees"] and (found["difference"] < 1e-5 or name == "llama.cpp")
    if scored is not None:
        assert scored["found"] == pytest.approx([one.total for one in score(model, prompts)], rel=1e-5)
    assert made["found"] == generate(model, prompts, max_new_tokens=6).tokens[0].tolist()
    assert sum(sizes.values()) == step_bytes(model.config, sizes) == 4 * model.config.num_parameters()


def test_a_baselines_process_imports_nothing_of_ours():
    """So that its start and its memory are its own."""
    code = (
        "import benchmarks.speed.worker, benchmarks.speed.baselines, sys; print({'jax', 'mpt_eqx'} & set(sys.modules))"
    )
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root).stdout == "set()\n"


@pytest.mark.slow
def test_our_process_decodes_what_generate_does(checkpoint):
    """The tokens of steps and the logits of single steps are those of the library's calls, in every round."""
    from benchmarks.speed.ours import open_mpt_eqx
    from benchmarks.speed.run import make_prompts
    from mpt_eqx import from_pretrained, generate

    model, opened, prompts = from_pretrained(checkpoint), open_mpt_eqx(str(checkpoint)), make_prompts(160, 2, 24)
    expected = generate(model, prompts[0], max_new_tokens=8).tokens[0].tolist()
    run = opened.decode(prompts, 8)
    assert [run()[1] for _ in range(2)] == [expected] * 2
    logits = np.asarray(model(jnp.asarray(prompts[0]))[-1])
    np.testing.assert_allclose(opened.logits(prompts[0]), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("f_gqa_kv2", "attn_config.attn_type"),
        ("f_bias", "no_bias=False: biases"),
        ("f_learned_pos", "attn_config.alibi"),
    ],
)
def test_what_transformers_does_not_support(name, reason):
    from benchmarks.speed.baselines import unsupported
    from mpt_eqx import MPTConfig

    config = MPTConfig.from_json_file(GOLDEN / name / "config.json")
    assert unsupported("transformers", config, "float32").startswith(reason)
    default = MPTConfig.from_json_file(GOLDEN / "hf_default" / "config.json")
    assert unsupported("transformers", default, "float32") is None is unsupported("llama.cpp", default, "int8")


def test_a_process_that_ends_is_an_error_and_not_the_end():
    from benchmarks.speed.process import worker

    with worker() as one:
        assert one.ask("facts")["error"] == "KeyError: 'implementation'" and one.ask("forget") == {}
        one.process.kill()
        assert one.ask("forget")["error"].startswith("its process ended with code -9")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--dtypes", "int3"), "--dtypes: expected some of float32, bfloat16, int8, int4, found 'int3'"),
        (("--baselines", "vllm"), "--baselines: expected some of transformers, llama.cpp, found 'vllm'"),
        (("--prompt", "2"), "--prompt: expected a whole number ≥ 8, found '2'"),
        (("--reference-size", "--model", "m"), "not allowed with argument"),
    ],
)
def test_bad_use(args, message, capsys):
    from benchmarks.speed.__main__ import main

    with pytest.raises(SystemExit) as error:
        main(args)
    assert error.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_error_is_one_line(tmp_path, capsys):
    from benchmarks.speed.__main__ import main

    (tmp_path / "file").touch()
    for args, message in (
        (("--model", "./none"), "./none: no such directory"),
        (("--output", str(tmp_path / "file")), "--output: expected a directory that can be written to, found "),
    ):
        assert main(args) == 1
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert out == "" and line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt": 250},
            "--prompt 250, --new-tokens 64 and 8 tokens of warm-up: expected at most max_seq_len=256 "
            "together, found 322; give smaller",
        ),
        ({"prefill_lengths": (8, 300)}, "--prefill-lengths: expected at most max_seq_len=256, found 300; give shorter"),
    ],
)
def test_what_is_too_long(changes, message, tiny_config):
    from benchmarks.speed.run import Settings, check_lengths
    from mpt_eqx import MPTError

    with pytest.raises(MPTError, match=message):
        check_lengths(Settings(**changes), tiny_config())
    assert check_lengths(Settings(), tiny_config()) == [128]
    assert check_lengths(Settings(prefill_lengths=(3,)), tiny_config()) == (3,)


def test_what_is_quantised_already(tiny_model, tmp_path):
    from benchmarks.speed.ours import prepare
    from mpt_eqx import MPTError, quantize, save_pretrained

    save_pretrained(quantize(tiny_model, "int8"), tmp_path / "m")
    with pytest.raises(MPTError, match="expected weights that are not quantised, found int8; give the checkpoint that"):
        prepare(str(tmp_path / "m"), tmp_path, ["int8"])


def test_a_dtype_that_cannot_be_made_is_said(tmp_path):
    """And weights of dropout, which has switches beside its weights, are cast."""
    from benchmarks.speed.ours import prepare
    from mpt_eqx import MPT, MPTConfig, save_pretrained

    config = MPTConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=32, resid_pdrop=0.1)
    save_pretrained(MPT(config, key=jax.random.key(0)), tmp_path / "m")
    made = prepare(str(tmp_path / "m"), tmp_path, ["float32", "int8", "int4"])
    assert list(made["failed"]) == ["int4"] and "32" in made["failed"]["int4"]
    assert {path.name for path in tmp_path.iterdir()} == {"m", "float32", "bfloat16", "int8"}


@pytest.mark.parametrize(("agrees", "code"), [(True, 0), (False, 1)])
def test_the_command_writes_tables(canned, agrees, code, monkeypatch, tmp_path, capsys):
    from benchmarks.speed import run
    from benchmarks.speed.__main__ import main
    from benchmarks.speed.report import markdown

    asked = []
    canned["results"][0]["agreement"]["agrees"] = agrees

    def pretend(settings, say, warn):
        asked.append(settings)
        warn("a line")
        return copy.deepcopy(canned)

    monkeypatch.setattr(run, "run_benchmark", pretend)
    arguments = ["--reference-size", "--dtypes", "int8,float32,int8", "--batch-sizes", "4,1", "--baselines", ""]
    assert main([*arguments, "--output", str(tmp_path / "new" / "place")]) == code
    out, err = capsys.readouterr()
    assert out == markdown(canned) and err == "a line\n"
    assert {path.name for path in (tmp_path / "new" / "place").iterdir()} == {"speed.json", "speed.md", "speed.png"}
    (settings,) = asked
    assert settings.source is None and settings.dtypes == ("int8", "float32") and settings.baselines == ()
    assert settings.batch_sizes == (1, 4) and settings.prefill_lengths is None
