"""The benchmark: that it measures the right thing and says so. No test looks at a time."""

import argparse
import copy
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

ROWS = (1, 2)
KEYS = {
    "format", "date", "git_commit", "hardware", "load_average", "versions", "model", "settings", "machine", "kernel",
    "greedy_tokens", "results", "ratios", "start", "skipped",
}  # fmt: skip
RESULT = {
    "implementation", "form", "their_form", "prefill", "decode", "load_seconds", "start_seconds", "threads",
    "peak_bytes_after_load", "peak_bytes", "agreement", "compile_seconds", "weight_bytes", "step_bytes",
    "temporary_bytes", "temporary_over_weights", "kernel",
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


@pytest.fixture(scope="module")
def measured(checkpoint):
    """A whole run of mpt_eqx alone, and what was said meanwhile."""
    from mpt_eqx.bench import run

    said, warned = [], []
    settings = run.Settings(
        source=str(checkpoint), forms=("int8",), peers=(), prompt=16, new_tokens=8, batch_sizes=ROWS,
        prefill_lengths=(16,), rounds=2, machine_size="small",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_start", lambda directory, rounds: {"seconds": [1.0] * rounds, "median_seconds": 1.0,
                                                                 "first_start_seconds": 2.0})  # fmt: skip
        return run.run_benchmark(settings, said.append, warned.append), said, warned


@pytest.fixture
def canned():
    """A report of two implementations with round figures."""

    def result(name, form, theirs, times, **more):
        return {
            "implementation": name, "form": form, "their_form": theirs, "load_seconds": 0.5, "start_seconds": 1.5,
            "peak_bytes_after_load": 10**9, "peak_bytes": 2 * 10**9, "weight_bytes": 10**9, "step_bytes": 10**9,
            "prefill": {"128": {"tokens_per_s": 300.0 * times, "median_seconds": 1.0}},
            "decode": {
                "1": {"tokens_per_s": 10.0 * times, "share_of_bandwidth": 0.5},
                "16": {"tokens_per_s": 80.0 * times, "share_of_bandwidth": 0.25},
            },
            "agreement": {"difference": 0.01, "largest_difference": 0.2, "tolerance": 0.1, "agrees": True,
                          "greedy_tokens": 8},
            **more,
        }  # fmt: skip

    from mpt_eqx.bench.run import ratios

    results = [
        result("mpt_eqx", "float32", "float32", 3, compile_seconds=4.0, temporary_over_weights=0.02),
        result("llama.cpp", "float32", "F32", 2),
        result("transformers", "float32", "float32", 1),
    ]
    return {
        "format": 1, "date": "2026-01-02T03:04:05+00:00", "git_commit": "abc", "load_average": [0.1, 0.2],
        "hardware": {"cpu": "A Processor", "cores": 2, "memory_GB": 24.0, "system": "Linux 6", "backend": "cpu",
                     "device": "cpu"},
        "versions": {"jax": "0.10.0"},
        "model": {"name": "m", "parameters": 354_000_000, "d_model": 1024, "n_layers": 24, "n_heads": 16,
                  "vocab_size": 50368, "max_seq_len": 4096},
        "settings": {"threads": 2, "prompt": 128, "new_tokens": 64, "batch_sizes": [1, 16], "prefill_lengths": [128],
                     "rounds": 3},
        "machine": {"read_GB_per_s": {"jax": 20.0, "numpy": 19.0},
                    "matmul_GFLOP_per_s": {"float32": {"jax": 100.0}, "bfloat16": {"jax": 150.0}}},
        "kernel": True, "greedy_tokens": 8, "results": results, "ratios": ratios(results),
        "start": {"model": "pydoc-3m", "first_start_seconds": 5.0, "seconds": [2.0], "median_seconds": 2.0},
        "skipped": ["a line"],
    }  # fmt: skip


def test_a_run_is_complete(measured):
    report, said, warned = measured
    json.dumps(report)
    assert set(report) == KEYS and report["settings"]["threads"] == report["results"][0]["threads"] >= 1
    names = {"mpt_eqx", "mpt_eqx (plain XLA)"} if report["kernel"] else {"mpt_eqx"}
    found = [(result["implementation"], result["form"]) for result in report["results"]]
    assert sorted(found) == sorted((name, "int8") for name in names)
    for result in report["results"]:
        assert set(result) == RESULT
        assert set(result["prefill"]) == {"16"} and set(result["decode"]) == {"1", "2"}
        assert set(result["prefill"]["16"]) == RUN | {"GFLOP_per_s", "share_of_peak"}
        for size, run in result["decode"].items():
            assert set(run) - {"over_one_row"} == RUN | {"weights_GB_per_s", "share_of_bandwidth"}
            assert ("over_one_row" in run) == (size != "1") and len(run["seconds"]) == 2
        assert result["agreement"]["agrees"] and result["agreement"]["greedy_tokens"] == 8
        assert result["kernel"] == (report["kernel"] and result["implementation"] == "mpt_eqx")
        assert 10**7 < result["peak_bytes_after_load"] <= result["peak_bytes"]
    assert set(report["versions"]) >= {"python", "jax", "equinox", "numpy"} and report["hardware"]["cores"] >= 1
    assert report["start"]["seconds"] and report["skipped"] == []
    assert warned == [f"the optional CPU kernel is {'used' if report['kernel'] else 'not used'}"]
    assert "making the weights" in said and any("round 2 of 2" in line for line in said)


def test_figures_follow_from_what_was_measured(measured, checkpoint):
    from mpt_eqx import from_pretrained
    from mpt_eqx.bench.measure import prefill_flops

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


def test_the_time_to_the_first_text(tmp_path):
    from mpt_eqx.bench.run import _start

    found = _start(tmp_path, 1)
    assert len(found["seconds"]) == 1 and found["seconds"][0] == found["median_seconds"] > 0
    assert os.listdir(tmp_path / "cache")  # kept from the first start for the second


def test_rounds_alternate(measured):
    report, said, _ = measured
    if not report["kernel"]:
        pytest.skip("there is one implementation only")
    rounds = [line.split(", ") for line in said if line.startswith("int8: decode of 1 rows, round")]
    assert [(what[-10:], name) for _, what, name in rounds] == [
        (f"ound {n} of 2"[-10:], name) for n in (1, 2) for name in ("mpt_eqx", "mpt_eqx (plain XLA)")
    ]


def test_all_files_are_written(measured, tmp_path):
    from mpt_eqx.bench.report import write_report

    assert write_report(measured[0], tmp_path) == []
    assert json.loads((tmp_path / "speed.json").read_text())["format"] == 1
    assert (tmp_path / "speed.md").read_text().startswith("# Speed\n")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_operations_of_reading(tiny_config):
    """Of two tokens, by hand: the blocks' weights twice for each, the output matrix once, 1 + 2 keys in attention."""
    from mpt_eqx.bench.measure import prefill_flops

    config = tiny_config()
    blocks = config.num_parameters() - 61 * 32
    assert prefill_flops(config, 2) == 2 * (2 * blocks + 61 * 32 + 2 * config.n_layers * 32 * (1 + 2))


def test_a_step_does_not_read_vectors_of_tokens_that_are_not_there(tiny_config):
    from mpt_eqx.bench.measure import step_bytes

    sizes = {"transformer.wte.weight": 1, "transformer.wpe.weight": 10, "transformer.norm_f.weight": 100}
    assert step_bytes(tiny_config(), sizes) == 101
    assert step_bytes(tiny_config(tie_word_embeddings=False), {**sizes, "lm_head.weight": 1000}) == 1100


def test_ratios(canned):
    from mpt_eqx.bench.run import ratios

    found = {(r["over"], r["what"], r["size"]): r["ratio"] for r in ratios(canned["results"])}
    assert found["llama.cpp", "decode", "1"] == 1.5 and found["transformers", "prefill", "128"] == 3
    assert len(found) == 6 and canned["results"][0]["decode"]["16"]["over_one_row"] == 8


def test_the_tables(canned):
    from mpt_eqx.bench.report import markdown

    text = markdown(canned)
    for line in (
        "| form |  | batch 1 | batch 16 | of the memory's speed | of one row |",
        "| float32 | mpt_eqx | 30 | 240 | 50 % | 8.0× |",
        "| float32 | llama.cpp, F32 | 20 (1.50×) | 160 (1.50×) | 50 % | 8.0× |",
        "| float32 | mpt_eqx | 1.5 | 0.5 | 1 | 2 | 1 | 4 | 0.02 |",
        "| float32 | transformers | 1.5 | 0.5 | 1 | 2 | 1 | – | – |",
        "| float32 | llama.cpp F32 | 0.01 | 0.1 | 0.2 | 8 |  |",
        "* a line",
    ):
        assert line in text.split("\n"), line
    for words in ("A Processor, 2 cores, 24.0 GB", "2 threads each; medians of 3 rounds", "commit abc; jax 0.10.0",
                  "20.0 GB/s", "100 GFLOP/s in float32", "2.00 s, 5.00 s when", "CPU kernel: used"):  # fmt: skip
        assert words in text


def test_what_disagrees_is_marked(canned):
    from mpt_eqx.bench.report import markdown
    from mpt_eqx.bench.run import agreement, disagreement

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
    from mpt_eqx.bench.report import markdown, write_report

    failed = {"implementation": "llama.cpp", "form": "int8", "their_form": "Q8_0", "prefill": {}, "decode": {},
              "error": "no room"}  # fmt: skip
    canned["results"].append(failed)
    text = markdown(canned)
    assert "* llama.cpp, int8: failed, no room" in text and "| int8 | llama.cpp, Q8_0 | – | – | – | – |" in text
    assert write_report(canned, tmp_path) == []


def test_without_matplotlib_there_is_no_plot(canned, tmp_path, monkeypatch):
    from mpt_eqx.bench.report import write_report

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_report(canned, tmp_path) == [
        "speed.png: skipped, matplotlib not installed; pip install 'mpt_eqx[plot]'"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.md"]


def test_peers_that_are_not_there_are_skipped(monkeypatch):
    from mpt_eqx.bench import peers

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [peers.missing(peer) for peer in peers.PEERS] == [
        "transformers: skipped, torch and transformers not installed; pip install 'mpt_eqx[reference]'",
        "llama.cpp: skipped, llama_cpp and gguf not installed; pip install 'mpt_eqx[bench]'",
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert [peers.missing(peer) for peer in peers.PEERS] == [None, None]


def test_a_run_without_its_peers_goes_on(checkpoint, monkeypatch):
    """What is missing is said at the start, in the report, and the rest is measured."""
    from mpt_eqx.bench import peers, run

    monkeypatch.setattr(peers, "missing", lambda peer: f"{peer}: skipped")
    monkeypatch.setattr(run, "_measure_form", lambda job, form, names: [])
    monkeypatch.setattr(run, "_start", lambda directory, rounds: {"error": "not measured"})
    warned = []
    settings = run.Settings(source=str(checkpoint), forms=("float32",), prompt=16, new_tokens=4, machine_size="small")
    report = run.run_benchmark(settings, lambda text: None, warned.append)
    assert warned[:2] == report["skipped"] == ["transformers: skipped", "llama.cpp: skipped"]


@pytest.mark.parametrize("name", ["transformers", "llama.cpp"])
def test_a_peer_computes_the_same(name, checkpoint, tmp_path):
    """Where it is installed: its logits are ours, in a process that has loaded nothing of ours."""
    from mpt_eqx import from_pretrained
    from mpt_eqx.bench import peers, run
    from mpt_eqx.bench.gguf_writer import write_gguf
    from mpt_eqx.bench.measure import make_prompts

    if line := peers.missing(name):
        pytest.skip(line)
    model, place = from_pretrained(checkpoint), checkpoint
    if name == "llama.cpp":
        write_gguf(model, place := tmp_path / "model.gguf", "F32")
    with run._worker(bare=True, environment={}) as worker:
        config = model.config.to_dict()
        answer = worker.ask("load", implementation=name, place=str(place), form="float32", config=config)
        assert answer["threads"] >= 1, answer
        assert worker.ask("logits", length=24, file=str(tmp_path / "logits.npy")) == {}
        made = worker.ask("decode", rows=3, length=24, steps=6)
        assert worker.ask("again")["tokens"] == made["tokens"]  # from the same place every time
        facts = worker.ask("facts")
    (prompt,) = make_prompts(160, 1, 24)
    expected = np.asarray(model(jnp.asarray(prompt))[-1])
    found = run.agreement(expected, np.load(tmp_path / "logits.npy"), "float32")
    assert found["agrees"] and (found["difference"] < 1e-5 or name == "llama.cpp")
    from mpt_eqx import generate

    assert made["tokens"] == generate(model, make_prompts(160, 3, 24), max_new_tokens=6).tokens[0].tolist()
    assert facts["weight_bytes"] == facts["step_bytes"] == 4 * model.config.num_parameters()


GGUF = ("hf_default", "f_bias", "f_gqa_kv2", "f_learned_pos", "f_qk_ln", "f_untied", "hf_clip_qkv")


@pytest.mark.parametrize("name", GGUF)
@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("BF16", "bfloat16")])
def test_gguf_holds_the_same_weights(name, kind, dtype, tmp_path):
    """Bit for bit, and the header says what config.json said."""
    from mpt_eqx import from_pretrained
    from mpt_eqx.bench.gguf_writer import not_in_llama_cpp, write_gguf
    from mpt_eqx.checkpoint.names import named_leaves

    model = from_pretrained(GOLDEN / name, dtype=dtype)
    if reason := not_in_llama_cpp(model.config, kind):
        pytest.skip(reason)
    write_gguf(model, tmp_path / "m.gguf", kind)
    again = from_pretrained(tmp_path / "m.gguf", dtype=dtype)
    found, wanted = named_leaves(again), named_leaves(model)
    assert found.keys() == wanted.keys()
    for key, leaf in found.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted[key]))
    tokens = jnp.arange(8)
    np.testing.assert_array_equal(*(np.asarray(m(tokens), np.float32) for m in (again, model)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("f_rope_theta", "rotary positions"), ("f_no_pos", "no positions"), ("f_rmsnorm", "norm_type rmsnorm"),
     ("f_glu_silu", "ffn_type mptglu"), ("f_logit_scale", "logit_scale"), ("f_act_relu", "another activation")],
)  # fmt: skip
def test_what_llama_cpp_has_not_is_refused(name, reason, tmp_path):
    from mpt_eqx import CheckpointError, from_pretrained
    from mpt_eqx.bench.gguf_writer import write_gguf

    with pytest.raises(CheckpointError, match=f"expected a model that llama.cpp can run, found {reason}"):
        write_gguf(from_pretrained(GOLDEN / name), tmp_path / "m.gguf", "F32")


def test_gguf_of_an_unknown_kind(tiny_model, tmp_path):
    from mpt_eqx import CheckpointError
    from mpt_eqx.bench.gguf_writer import write_gguf

    with pytest.raises(CheckpointError, match="kind: expected F32, BF16, Q8_0, Q4_0, found 'Q9'"):
        write_gguf(tiny_model, tmp_path / "m.gguf", "Q9")


def test_writing_gguf_says_what_to_install(tiny_model, tmp_path, monkeypatch):
    from mpt_eqx import CheckpointError
    from mpt_eqx.bench.gguf_writer import write_gguf

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"needs the gguf library; install it with pip install 'mpt_eqx\[gguf\]'"):
        write_gguf(tiny_model, tmp_path / "m.gguf", "F32")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("f_gqa_kv2", "2 heads of keys and values"), ("f_bias", "biases"), ("f_learned_pos", "no ALiBi")],
)
def test_what_transformers_has_not(name, reason):
    from mpt_eqx import MPTConfig
    from mpt_eqx.bench.peers import unsupported

    config = MPTConfig.from_json_file(GOLDEN / name / "config.json")
    assert unsupported("transformers", config, "float32") in (reason, "no ALiBi")
    default = MPTConfig.from_json_file(GOLDEN / "hf_default" / "config.json")
    assert unsupported("transformers", default, "float32") is None is unsupported("llama.cpp", default, "int8")


def test_a_process_that_ends_is_an_error_and_not_the_end(tmp_path):
    from mpt_eqx.bench import run

    with run._worker(bare=True, environment={}) as worker:
        answer = worker.ask("load", implementation="mpt_eqx", place=str(tmp_path / "none"), form="float32", config={})
        assert answer["error"] and worker.ask("forget") == {}
        worker.process.kill()
        assert worker.ask("forget")["error"].startswith("its process ended with code -9")


def command(*args, **environment):
    return subprocess.run(
        [sys.executable, "-m", "mpt_eqx", "bench", *map(str, args)], capture_output=True, text=True, timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--forms", "int3"), "--forms: expected some of float32, bfloat16, int8, int4, found 'int3'"),
        (("--forms", ""), "--forms: expected some of float32, bfloat16, int8, int4, found none"),
        (("--peers", "vllm"), "--peers: expected some of transformers, llama.cpp, found 'vllm'"),
        (("--batch-sizes", "1,x"), "--batch-sizes: expected a whole number ≥ 1, found 'x'"),
        (("--batch-sizes", "0"), "--batch-sizes: expected a whole number ≥ 1, found '0'"),
        (("--prefill-lengths", ""), "--prefill-lengths: expected a whole number ≥ 1, found ''"),
        (("--prompt", "2"), "--prompt: expected a whole number ≥ 8, found '2'"),
        (("--new-tokens", "-4"), "--new-tokens: expected a whole number ≥ 1, found '-4'"),
        (("--rounds", "0"), "--rounds: expected a whole number ≥ 1, found '0'"),
        (("--reference-size", "--model", "m"), "not allowed with argument"),
    ],
)
def test_bad_use(args, message, capsys):
    from mpt_eqx.cli import main

    with pytest.raises(SystemExit) as error:
        main(["bench", *args])
    assert error.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_error_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for args, message in (
        (("--model", "./none"), "./none: no such directory"),
        (("--output", tmp_path / "file"), "--output: expected a directory that can be written to, found "),
    ):
        done = command(*args)
        assert done.returncode == 1 and done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("mpt-eqx: error: ") and message in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 250}, r"--prompt 250 and --new-tokens 64: expected at most max_seq_len=256 together, found 314"),
        ({"prefill_lengths": (8, 300)}, "--prefill-lengths: expected at most max_seq_len=256, found 300; give shorter"),
    ],
)
def test_what_is_too_long(changes, message, tiny_config):
    from mpt_eqx import MPTError
    from mpt_eqx.bench.run import Settings, check_lengths

    with pytest.raises(MPTError, match=message):
        check_lengths(Settings(**changes), tiny_config())
    assert check_lengths(Settings(), tiny_config()) == [128]
    assert check_lengths(Settings(prefill_lengths=(3,)), tiny_config()) == (3,)


def test_what_is_quantised_already(tiny_model, tmp_path):
    from mpt_eqx import MPTError, quantize, save_pretrained
    from mpt_eqx.bench.ours import prepare

    save_pretrained(quantize(tiny_model, "int8"), tmp_path / "m")
    with pytest.raises(MPTError, match="expected weights that are not quantised, found int8; give the checkpoint that"):
        prepare(str(tmp_path / "m"), tmp_path, ["int8"])


def test_a_form_that_cannot_be_made_is_said(tmp_path):
    """And weights of dropout, which has switches beside its weights, are cast."""
    from mpt_eqx import MPT, MPTConfig, save_pretrained
    from mpt_eqx.bench.ours import prepare

    config = MPTConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=32, resid_pdrop=0.1)
    save_pretrained(MPT(config, key=jax.random.key(0)), tmp_path / "m")
    made = prepare(str(tmp_path / "m"), tmp_path, ["float32", "int8", "int4"])
    assert list(made["failed"]) == ["int4"] and "32" in made["failed"]["int4"]
    assert {path.name for path in tmp_path.iterdir()} == {"m", "float32", "bfloat16", "int8"}


@pytest.mark.parametrize(("agrees", "code"), [(True, 0), (False, 1)])
def test_the_command_writes_tables(canned, agrees, code, monkeypatch, tmp_path, capsys):
    from mpt_eqx.bench import run
    from mpt_eqx.bench.report import markdown
    from mpt_eqx.cli import main

    asked = []
    canned["results"][0]["agreement"]["agrees"] = agrees

    def pretend(settings, say, warn):
        asked.append(settings)
        say("something")  # not shown, because stderr is no terminal
        warn("a line")
        return copy.deepcopy(canned)

    monkeypatch.setattr(run, "run_benchmark", pretend)
    arguments = ["bench", "--reference-size", "--forms", "int8,float32,int8", "--batch-sizes", "4,1", "--peers", ""]
    assert main([*arguments, "--output", str(tmp_path / "new" / "place")]) == code
    out, err = capsys.readouterr()
    assert out == markdown(canned) and err == "mpt-eqx: a line\n"
    assert {path.name for path in (tmp_path / "new" / "place").iterdir()} == {"speed.json", "speed.md", "speed.png"}
    (settings,) = asked
    assert settings.source is None and settings.forms == ("int8", "float32") and settings.peers == ()
    assert settings.batch_sizes == (1, 4) and settings.prefill_lengths is None


def test_what_can_be_asked_for_is_what_there_is():
    """The command names them itself, so that --help loads no benchmark."""
    from mpt_eqx.bench import measure, peers
    from mpt_eqx.cli import bench

    assert bench.FORMS == measure.FORMS and bench.PEERS == peers.PEERS
    with pytest.raises(argparse.ArgumentTypeError):
        bench.counts("1,,2")


def test_help_teaches():
    done = command("--help")
    assert done.returncode == 0
    for text in ("examples:", "what the numbers mean:", "--batch-sizes A,B", "of the memory's speed", "Q8_0",
                 "pip install 'mpt_eqx[bench]'", "(default: 128)"):  # fmt: skip
        assert text in done.stdout
