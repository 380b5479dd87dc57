"""The command line: results on stdout, the rest on stderr, exit codes, one line for an error."""

import argparse
import json
import shutil

import pytest
from command import run, run_process
from conftest import GOLDEN


@pytest.mark.slow
def test_generate_writes_text_and_speed():
    """In a process of its own, as users run it."""
    done = run_process("generate", "The zip() function", "--max-new-tokens", 24, "--seed", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The zip() function ") and done.stdout.endswith("\n")
    *before, last = done.stderr.splitlines()
    assert before == [] and " prompt tokens, " in last and last.endswith(" tokens/s")


def test_the_speed_of_a_short_text_counts_the_compilation():
    done = run("generate", "The zip() function", "--max-new-tokens", 8)
    assert done.stderr.startswith("4 prompt tokens, 8 new tokens, ") and done.stderr.endswith(
        " tokens/s with compilation\n"
    )


def test_generate_is_the_librarys_generate(one_layer):
    import jax

    from mpt_eqx import from_pretrained, generate
    from mpt_eqx.text import load_tokenizer

    model, tokenizer = from_pretrained(one_layer, dtype="float32"), load_tokenizer(one_layer)
    prompt = "Return a list of"
    result = generate(
        model, tokenizer.encode(prompt), max_new_tokens=20, temperature=0.9, top_k=50, top_p=0.8,
        key=jax.random.key(7), eos_token_ids=tokenizer.eos_token_ids,
    )  # fmt: skip
    done = run(
        "generate", "--max-new-tokens", 20, "--temperature", 0.9, "--top-k", 50, "--top-p", 0.8, "--seed", 7,
        "--dtype", "float32", "--json", "--model", one_layer, stdin=prompt,
    )  # fmt: skip
    record = json.loads(done.stdout)
    tokens = result.tokens[0, : result.lengths[0]].tolist()
    assert record == {
        "prompt": prompt, "text": tokenizer.decode(tokens), "tokens": tokens,
        "finish_reason": result.finish_reasons[0],
    }  # fmt: skip


def test_every_sampling_option_reaches_stream(monkeypatch):
    """With its own type; the checkpoint's generation_config.json gives what is not on the command line."""
    from mpt_eqx import generation
    from mpt_eqx.cli.options import SAMPLING

    seen = {}
    monkeypatch.setattr(generation, "stream", lambda model, tokens, **options: seen.update(options) or iter(()))
    values = {flag: 0.75 if kind is float else 3 for flag, kind, *_ in SAMPLING}
    assert run("generate", "x", *(part for pair in values.items() for part in pair)).returncode == 0
    for flag, value in values.items():
        found = seen[flag.removeprefix("--").replace("-", "_")]
        assert found == value and type(found) is type(value), flag
    seen.clear()
    assert run("generate", "x").returncode == 0
    assert (seen["temperature"], seen["top_p"], seen["max_new_tokens"], seen["eos_token_ids"]) == (0.7, 0.95, 128, (0,))
    seen.clear()
    assert run("generate", "x", "--no-defaults").returncode == 0
    assert seen["temperature"] == 0 and "top_p" not in seen


def test_stop():
    whole = json.loads(run("generate", "def", "--temperature", 0, "--json", "--max-new-tokens", 30).stdout)["text"]
    stop = whole[8:11]
    done = run("generate", "def", "--temperature", 0, "--json", "--max-new-tokens", 30, "--stop", stop)
    assert json.loads(done.stdout)["text"] == whole[: whole.index(stop)]
    record = json.loads(done.stdout)
    assert record["finish_reason"] == "stop"
    n = len(record["tokens"])  # the stop string is complete with the very last token that is allowed
    done = run("generate", "def", "--temperature", 0, "--json", "--max-new-tokens", n, "--stop", stop)
    assert json.loads(done.stdout) == record


def test_inspect():
    done = run("inspect", GOLDEN / "hf_sharded")
    assert done.returncode == 0 and done.stderr == ""
    for text in ("safetensors, 5 files", "27,840 in 14 tensors", "float32", "transformer.wte.weight", "ALiBi"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("f_rope_theta", "rotary, rope_theta 500, max_seq_len 64"),
        ("f_learned_pos", "learned, max_seq_len 32"),
        ("f_no_pos", "none, max_seq_len 64"),
        ("f_gqa_kv2", "4 heads, 2 KV heads, mptmlp 128"),
    ],
)
def test_inspect_shows_what_is_special(case, text):
    assert text in run("inspect", GOLDEN / case).stdout


def test_inspect_what_is_wrong(tmp_path):
    shutil.copytree(GOLDEN / "hf_default", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"n_layers": 3}))
    done = run("inspect", tmp_path / "m")
    assert done.returncode == 1
    assert done.stderr.startswith("mpt-eqx: problem: config.json says n_layers 3, the tensors have 2 blocks\n")
    assert "mpt-eqx: problem: 6 missing: transformer.blocks.2." in done.stderr


def test_convert(tmp_path):
    done = run(
        "convert", GOLDEN / "hf_bin" / "bf16_legacy", tmp_path / "m", "--dtype", "float32", "--max-shard-size", "9KB"
    )
    assert done.returncode == 0 and done.stdout == ""
    assert "parameters from torch in" in done.stderr
    assert run("inspect", tmp_path / "m").returncode == 0
    done = run("convert", GOLDEN / "hf_ignored_keys", tmp_path / "n")
    assert done.returncode == 1 and done.stderr.startswith("mpt-eqx: error: ") and not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "x", "--model", "./none"], "./none: no such directory"),
        (["generate", "x", "--model", "owner/name"], "owner/name: no such directory, and not completely in the Hub's"),
        (["generate", "x", "--model", GOLDEN / "hf_default"], "expected tokenizer.json, found no such file"),
        (["generate", ""], "PROMPT: expected some text, found an empty prompt"),
        (["generate", "x", "--temperature", "-1"], "temperature: expected a finite number ≥ 0, found -1.0"),
        (["generate", "x", "--temperature", "nan"], "temperature: expected a finite number ≥ 0, found nan"),
        (["generate", "x", "--top-p", "2"], "top_p: expected a number with 0 < top_p ≤ 1, found 2.0"),
        (
            ["generate", "x", "--max-new-tokens", "2000"],
            "exceed max_seq_len=1024; shorten the input, or load the model for more",
        ),
        (
            ["generate", "x", "--dtype", "int4"],
            "dtype: expected float64 or float32 or float16 or bfloat16, found 'int4'",
        ),
        (["generate", "x", "--stop", ""], "--stop: expected some text, found an empty string"),
        (["inspect", "./none"], "./none: no such directory"),
    ],
)
def test_an_error_is_one_line(args, message):
    done = run(*args)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("mpt-eqx: error: ") and message in line


def test_a_config_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text("not json")
    (tmp_path / "model.safetensors").touch()
    done = run("inspect", tmp_path)
    assert done.returncode == 1 and "config.json: expected JSON, found something else" in done.stderr
    assert "Traceback" in run_process("inspect", tmp_path, "--debug").stderr


def test_bad_use_is_exit_code_2():
    for args in ([], ["frobnicate"], ["generate", "x", "--max-new-tokens", "many"]):
        done = run(*args)
        assert done.returncode == 2 and done.stderr.startswith("usage: mpt-eqx")


def test_an_unknown_flag_shows_the_usage_of_its_command():
    for command in ("generate", "chat", "inspect", "convert", "bench"):
        done = run(command, *(["a", "b"] if command == "convert" else []), "--nope")
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"usage: mpt-eqx {command} ")
        assert done.stderr.endswith(f"mpt-eqx {command}: error: unrecognized arguments: --nope\n")


def test_the_version():
    from mpt_eqx import __version__

    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"mpt-eqx {__version__}\n")


def test_help_has_examples():
    assert "mpt-eqx generate" in run("--help").stdout
    for text in ("--temperature T", "generation_config.json", "--seed S"):
        assert text in run("generate", "--help").stdout


def test_help_states_every_default():
    from mpt_eqx.cli import _parser

    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, parser in commands.choices.items():
        for action in parser._actions:
            optional = (action.option_strings and not action.required) or action.nargs == "?"
            if optional and action.dest not in ("help", "reference_size"):
                assert "default: " in action.help, f"{name}: {action.dest}"
