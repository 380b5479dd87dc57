"""The examples run as their first lines say, on the model that ships with the package."""

import io
import json
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as a script, in this process."""

    def run(name, *args, stdin=""):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with jax.numpy_dtype_promotion("standard"):  # JAX's default, as users run them
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_batched_generation(run):
    out = run("generate.py", "--max-new-tokens", 24)
    assert len(re.findall(r"^--- -\d\.\d\d nats per token$", out, re.MULTILINE)) == 3
    assert "The zip() function " in out and "class collections.OrderedDict" in out


def test_a_chat(run):
    out = run("chat.py", "--max-new-tokens", 12, stdin="The zip() function\nReturn True if\n")
    assert out.startswith("> ") and out.count("> ") >= 3


def test_a_cached_prefix(run, one_layer):
    out = run("prefix.py", "--model", one_layer)
    assert re.match(r"\d+ tokens of prefill in \d+\.\d\d s\n", out)
    assert len(re.findall(r"--- \d+\.\d\d s\n…", out)) == 3


def test_a_long_document(run, one_layer):
    """About four times as long as the model's max_seq_len."""
    out = run("long_document.py", "--model", one_layer, "--max-new-tokens", 24)
    assert out.startswith("4000 tokens of prefill in ") and re.search(r"; peak memory \d+\.\d\d GB\n$", out)


def test_the_explanation_of_a_sharding(run):
    out = run("sharded_generate.py", "--mesh", "fsdp=2,tp=4", "--explain")
    assert out.startswith("mesh: fsdp=2, tp=4\n") and "on each of 8 devices" in out


def test_a_model_on_several_devices(one_layer):
    """In a process of its own: the number of devices is fixed when JAX starts."""
    command = [sys.executable, EXAMPLES / "sharded_generate.py", "--cpu-devices", "4", "--mesh", "fsdp=2,tp=2"]
    command += ["--model", one_layer, "--max-new-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "The zip() function" in done.stdout and re.search(r"16 tokens in \d", done.stdout)


@pytest.mark.slow  # tests of sharding have two processes, too
def test_two_processes(one_layer, tmp_path):
    """As in the two terminals of the script's first lines, with another port."""
    from mpt_eqx import from_pretrained

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, EXAMPLES / "distributed.py", "--coordinator", f"localhost:{port}", "--processes", "2"]
    command += [
        "--model",
        one_layer,
        "--cpu-devices",
        "2",
        "--steps",
        "1",
        "--save",
        str(tmp_path / "trained"),
        "--process",
    ]
    second = subprocess.Popen([*command, "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = subprocess.run([*command, "0"], capture_output=True, text=True, timeout=240)
    out, err = second.communicate(timeout=60)
    assert first.returncode == second.returncode == 0, first.stderr + err
    assert "2 processes, 4 devices, mesh {'fsdp': 4, 'tp': 1}\n" in first.stdout and "step 0: loss " in first.stdout
    assert "step" not in out
    assert from_pretrained(tmp_path / "trained").config == from_pretrained(one_layer).config


@pytest.mark.parametrize(
    ("args", "parameters"),
    [
        pytest.param(
            ["--documents", 40, "--layers", 1, "--width", 32, "--vocab-size", 300, "--length", 32, "--epochs", 0.05],
            (10_000, 100_000),
            id="small",
        ),
        pytest.param(["--epochs", 0.005, "--length", 64], (2e6, 5e6), id="true size", marks=pytest.mark.slow),
    ],
)
def test_pretraining(run, tmp_path, args, parameters):
    """Writes a checkpoint that loads and generates, with a card, figures and a picture."""
    run("pretrain.py", tmp_path / "m", *args)
    from mpt_eqx import from_pretrained, generate

    model = from_pretrained(tmp_path / "m")
    assert parameters[0] <= model.config.num_parameters() <= parameters[1]
    assert generate(model, [1, 2], max_new_tokens=2).tokens.shape == (1, 2)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "nats per byte" in card and "{" not in card
    assert (tmp_path / "m" / "loss_curve.png").stat().st_size > 5000
    assert np.isfinite(json.loads((tmp_path / "m" / "training.json").read_text())["test_nats_per_byte"]["nats"])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_they_say_how_to_run_them(path):
    assert f"python examples/{path.name}" in path.read_text().split('"""')[1]
