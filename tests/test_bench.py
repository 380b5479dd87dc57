"""`mpt-eqx bench`: that it measures the right thing and says what it means. No test looks at a time."""

import argparse
import json
import subprocess
import sys

import jax
import pytest

SMALL = ("--prompt", "8", "--new-tokens", "8", "--batch-sizes", "2", "--prefill-lengths", "8", "--rounds", "1")
RESULT = {
    "asked", "dtype", "kernel", "prefill_tokens_per_s", "decode_tokens_per_s", "bandwidth_share", "load_seconds",
    "first_token_seconds", "compile_seconds", "weight_bytes", "step_bytes", "peak_bytes",
}  # fmt: skip

# An answer of the process that measures.
MEASURED = {
    "dtype": "int8", "kernel": True, "prefill_tokens_per_s": {"8": 1234.5}, "decode_tokens_per_s": {"2": 12.345},
    "bandwidth_share": 0.876, "load_seconds": 0.5, "first_token_seconds": 2.25, "compile_seconds": 10.0,
    "weight_bytes": 7 * 10**9, "peak_bytes": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from mpt_eqx import MPT, AttnConfig, MPTConfig, save_pretrained

    alibi = AttnConfig(alibi=True)
    config = MPTConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=64, max_seq_len=64, attn_config=alibi)
    place = tmp_path_factory.mktemp("model")
    save_pretrained(MPT(config, key=jax.random.key(5)), place)
    return place


@pytest.fixture
def in_this_process(monkeypatch):
    """Measures here instead of in a process for each dtype; returns what environments were asked for."""
    from mpt_eqx.cli import _measure, bench

    environments = []

    def ask(question, environment):
        environments.append(environment)
        return json.loads(json.dumps(_measure.measure(**question, array_size=2**20)))

    monkeypatch.setattr(bench, "ask", ask)
    return environments


def test_what_is_measured(checkpoint, in_this_process, capsys):
    """Every dtype asked for, in the dtype that it says, and the bytes that the weights have in it."""
    from mpt_eqx.cli import main

    args = ("--model", str(checkpoint), "--dtypes", "stored,int8", *SMALL, "--prompt", "60", "--max-seq-len", "80")
    assert main(["bench", *args, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == "" and report["new_tokens"] == 8 and report["batch_sizes"] == [2]
    found = {result["asked"]: result for result in report["results"]}
    assert [found[key]["dtype"] for key in ("stored", "int8")] == ["float32", "int8"]
    for result in found.values():
        assert set(result) == RESULT
        assert list(result["prefill_tokens_per_s"]) == ["8"] and list(result["decode_tokens_per_s"]) == ["2"]
        assert all(result[key] >= 0 for key in RESULT if key.endswith(("_seconds", "_bytes", "_share")))
    stored, int8 = (found[key]["weight_bytes"] / report["parameters"] for key in ("stored", "int8"))
    assert stored == 4 and 1 < int8 < 2
    assert in_this_process == [{"MPT_EQX_KERNEL": "1"}] * 2


def test_with_and_without_the_kernel(checkpoint, monkeypatch, capsys):
    from mpt_eqx.cli import bench, main

    environments = []
    monkeypatch.setattr(bench, "ask", lambda _, environment: (environments.append(environment), MEASURED)[1])
    assert main(["bench", "--model", str(checkpoint), *SMALL, "--kernel", "both"]) == 0
    assert environments == [{"MPT_EQX_KERNEL": "1"}, {"MPT_EQX_KERNEL": "0"}]
    about, head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:6] == ["dtype", "kernel", "prefill", "8", "decode", "×2"] and len(rows) == 2
    assert "Tokens per second; decode: batch sizes, 8 tokens after 8." in about


def test_a_step_does_not_read_other_tokens_embeddings(tiny_config):
    from mpt_eqx.cli._measure import step_bytes

    sizes = {"transformer.wte.weight": 1, "transformer.wpe.weight": 10, "transformer.norm_f.weight": 100}
    assert step_bytes(tiny_config(), sizes) == 101
    assert step_bytes(tiny_config(tie_word_embeddings=False), {**sizes, "lm_head.weight": 1000}) == 1100


def test_the_table():
    from mpt_eqx.cli.bench import text_report

    result = MEASURED | {"prefill_tokens_per_s": {"128": 1234.5}, "decode_tokens_per_s": {"1": 12.345}}
    report = {
        "model": "m", "parameters": 1234, "prompt": 128, "new_tokens": 64, "prefill_lengths": [128],
        "batch_sizes": [1], "results": [result, {"error": "no room"}],
    }  # fmt: skip
    assert text_report(report).splitlines() == [
        "m: 1,234 parameters. Tokens per second; decode: batch sizes, 64 tokens after 128.",
        "dtype  kernel  prefill 128  decode ×1  bandwidth   load  1st token  compile   weights  peak",
        " int8     yes        1,234       12.3       88 %  0.5 s     2.25 s     10 s  7,000 MB     –",
    ]


@pytest.mark.slow
def test_a_process_for_each_dtype(checkpoint, capfd):
    """The real one: a dtype that fails is a line on stderr and exit code 1, and the table has the others."""
    from mpt_eqx.cli.bench import ask

    question = {"place": str(checkpoint), "prompt": 8, "new_tokens": 8, "batch_sizes": [1], "prefill_lengths": [8],
                "rounds": 1, "array_size": 2**20}  # fmt: skip
    found = ask({**question, "dtype": "bfloat16"}, {"MPT_EQX_KERNEL": "0"})
    assert found["dtype"] == "bfloat16" and not found["kernel"] and found["peak_bytes"] > 10**7


def test_a_dtype_that_fails(checkpoint, monkeypatch, capsys):
    from mpt_eqx.cli import bench, main

    monkeypatch.setattr(bench, "ask", lambda question, environment: {"error": "no room"})
    assert main(["bench", "--model", str(checkpoint), *SMALL]) == 1
    assert capsys.readouterr().err == "mpt-eqx: stored: no room\n"


def test_a_process_that_dies(monkeypatch):
    from mpt_eqx.cli import bench

    dead = subprocess.CompletedProcess([], returncode=-9, stdout="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: dead)
    assert bench.ask({}, {}) == {"error": "its process ended with code -9; -9 means that memory ran out"}


def test_what_is_quantised_already(tiny_model, tmp_path):
    from mpt_eqx import MPTError, quantize, save_pretrained
    from mpt_eqx.cli._measure import load_model

    save_pretrained(quantize(tiny_model, "int8"), tmp_path / "m")
    with pytest.raises(
        MPTError, match="expected weights that are not quantised, found int8; measure it with --dtypes stored"
    ):
        load_model(tmp_path / "m", "float32")
    load_model(tmp_path / "m", "stored")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--dtypes", "int3"), "--dtypes: expected some of stored, float32, bfloat16, int8, int4, found 'int3'"),
        (("--dtypes", ""), "--dtypes: expected some of stored, float32, bfloat16, int8, int4, found none"),
        (("--batch-sizes", "1,x"), "--batch-sizes: expected a whole number ≥ 1, found 'x'"),
        (("--batch-sizes", "0"), "--batch-sizes: expected a whole number ≥ 1, found '0'"),
        (("--prefill-lengths", ""), "--prefill-lengths: expected a whole number ≥ 1, found ''"),
        (("--prompt", "0"), "--prompt: expected a whole number ≥ 1, found '0'"),
        (("--new-tokens", "-4"), "--new-tokens: expected a multiple of 8, ≥ 8, found '-4'"),
        (("--new-tokens", "12"), "--new-tokens: expected a multiple of 8, ≥ 8, found '12'"),
        (("--rounds", "0"), "--rounds: expected a whole number ≥ 1, found '0'"),
        (("--kernel", "maybe"), "--kernel: invalid choice: 'maybe'"),
    ],
)
def test_bad_use(args, message, capsys):
    from mpt_eqx.cli import main

    with pytest.raises(SystemExit) as error:
        main(["bench", *args])
    assert error.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_numbers_of_an_option():
    from mpt_eqx.cli.options import counts

    assert counts("4,1,4") == (1, 4)
    with pytest.raises(argparse.ArgumentTypeError):
        counts("1,,2")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--prompt", "50"), "--prompt 50, --new-tokens 64 and 8 tokens of warm-up: expected at most max_seq_len=64 "
                             "together, found 122; give smaller numbers, or --max-seq-len"),
        (("--max-seq-len", "0"), "--max-seq-len: expected a whole number ≥ 1, found 0"),
        ((*SMALL, "--prefill-lengths", "8,65"), "--prefill-lengths: expected at most max_seq_len=64, found 65; give"),
        (("--model", "./none"), "./none: no such directory"),
    ],
)  # fmt: skip
def test_an_error_is_one_line(args, message, checkpoint, capsys):
    from mpt_eqx.cli import main

    assert main(["bench", "--model", str(checkpoint), *args]) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("mpt-eqx: error: ") and message in line


def test_prompt_lengths_by_default(tiny_config):
    from mpt_eqx.cli.bench import check_lengths

    args = argparse.Namespace(prompt=128, new_tokens=64, prefill_lengths=None)
    assert check_lengths(args, tiny_config()) == (128,)  # of at most 256
    args = argparse.Namespace(prompt=20, new_tokens=8, prefill_lengths=None)
    assert check_lengths(args, tiny_config(max_seq_len=64)) == (20,)


def test_help_teaches(capsys):
    from mpt_eqx.cli import main

    with pytest.raises(SystemExit) as done:
        main(["bench", "--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    for words in ("examples:", "what the numbers mean:", "--batch-sizes A,B", "bandwidth", "MPT_EQX_KERNEL=0",
                  "(default: 128)", "(default: stored)", "(default: 1,4,16)", "(default: on)"):  # fmt: skip
        assert words in text


def test_help_and_import_start_no_backend():
    code = (
        "import sys; from mpt_eqx.cli import bench; from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized(), 'resource' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[0] == "False", done.stderr
