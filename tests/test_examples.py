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


@pytest.mark.slow  # docs/lora.md runs the same
def test_an_adapter(run, one_layer, tmp_path):
    out = run("lora.py", "--model", one_layer, "--steps", 4, "--length", 16, "--output", tmp_path / "adapter")
    before, after, merged = map(float, re.search(r"token: (\S+) before, (\S+) with the adapter, (\S+) m", out).groups())
    assert after < before and abs(after - merged) < 0.02 and "base: 'The parrot" in out


@pytest.mark.slow  # reads 3,000 questions
def test_fine_tuning(run, one_layer, tmp_path):
    """Writes an adapter with its tokenizer, over weights that stay; the loss on what was held out falls."""
    from mpt_eqx import from_pretrained, lora
    from mpt_eqx.text import load_tokenizer

    out = run("finetune.py", tmp_path, "--model", one_layer, "--epochs", 0.1, "--measured", 4, "--rank", 2)
    assert "the others are unchanged to the bit: True" in out and "--- What does zip() do?\nbefore: " in out
    figures = json.loads((tmp_path / "adapter" / "figures.json").read_text())
    assert figures["after"]["loss_phrasings"] < figures["before"]["loss_phrasings"]
    lora.load(from_pretrained(one_layer), tmp_path / "adapter")
    assert load_tokenizer(tmp_path / "adapter").eos_token_ids == (0,)


@pytest.mark.slow
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
            ["--documents", 60, "--layers", 1, "--width", 32, "--vocab-size", 300, "--length", 32, "--epochs", 0.015],
            (10_000, 100_000),
            id="small",
            marks=pytest.mark.slow,
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


@pytest.mark.parametrize("loader", ["numpy", "grain", "datasets"])
def test_data_of_other_libraries(run, tmp_path, monkeypatch, loader):
    """An iterator of NumPy batches is what a step takes; the libraries are not among those that tests need."""
    if loader != "numpy":
        pytest.importorskip(loader)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [{"text": f"Return the number {n}, and raise an error otherwise."} for n in range(9)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sizes = ("--steps", 2, "--batch", 2, "--length", 16, "--states", tmp_path / "states")
    out = run("data_loaders.py", tmp_path / "data.jsonl", "--loader", loader, *sizes)
    first, second = figures(r'loss"?:? ([0-9.]+)', out)[:, 0]
    assert second < first


def figures(pattern, text):
    """Returns the numbers of each match of a pattern, as rows."""
    found = [[float(x) for x in (row if isinstance(row, tuple) else (row,))] for row in re.findall(pattern, text, re.M)]
    assert found, text
    return np.array(found)


@pytest.mark.slow
def test_a_logit_lens(run, tmp_path):
    """The answer is formed on the way, and the last layer gives the model's own."""
    out = run("logit_lens.py", "--output", tmp_path / "lens.svg")
    probability, rank = figures(r"probability (\S+), rank +(\d+)", out).T
    assert "the model says ' name'" in out and len(rank) == 7
    assert rank[0] > 100 and rank[-1] == 1 and probability[0] < 0.01 and probability[-1] > 0.5
    assert (tmp_path / "lens.svg").stat().st_size > 5000


@pytest.mark.slow
def test_attention_patterns(run, tmp_path):
    """Heads with flatter slopes look further back."""
    out = run("attention_patterns.py", "--length", 48, "--output", tmp_path / "patterns.png")
    slope, distance, alibi = figures(r"slope 1/(\d+) +distance +(\S+), by ALiBi alone +(\S+);", out).T
    order = np.argsort(slope)
    assert slope[order].tolist() == [2, 4, 8, 16, 64, 256] and (np.diff(alibi[order]) > 0).all()
    assert distance[order][0] < distance[order][1] < distance[order][2] < distance[order][3:].min()
    assert (tmp_path / "patterns.png").stat().st_size > 5000


@pytest.mark.slow
def test_activation_patching(run, tmp_path):
    """All of the difference is at the changed token in the beginning, and at the last one in the end."""
    out = run("activation_patching.py", "--output", tmp_path / "patching.png")
    share = np.array([row.split() for row in re.findall(r"recovered: (.*)", out)], float)
    assert share.shape == (7, 11)
    assert share[0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0] and share[-1].tolist() == [0] * 10 + [1]
    assert (np.diff(share[:, 5]) <= 0).all() and (np.diff(share[:, -1]) >= 0).all()
    assert (tmp_path / "patching.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_linear_probe(run, tmp_path):
    """The stream knows more of the context than the token alone."""
    out = run("linear_probe.py", "--documents", 40, "--length", 96, "--output", tmp_path / "probe.png")
    accuracy, fitted = figures(r"accuracy (\S+) \(where it was fitted (\S+)\)", out).T
    assert len(accuracy) == 7 and accuracy[4:].min() > accuracy[0] + 0.08 and (accuracy < fitted).all()
    assert (tmp_path / "probe.png").stat().st_size > 5000


@pytest.mark.slow  # compiles for long
def test_rollouts(run, tmp_path):
    """The reward goes up, and the distance from the first model with it."""
    args = ("--steps", 8, "--rollouts", 8, "--new-tokens", 6, "--learning-rate", 1e-3, "--penalty", 0)
    out = run("rollouts.py", *args, "--output", tmp_path / "rollouts.png")
    reward, divergence = figures(r"mean reward (\S+), divergence (\S+) nats", out).T
    assert reward[-1] > reward[0] + 0.2 and abs(divergence[0]) < 0.01 < divergence[-1]
    assert "--- before\nReturn the" in out and "--- after\nReturn the" in out
    assert (tmp_path / "rollouts.png").stat().st_size > 5000


@pytest.mark.slow
def test_soft_prompts(run, tmp_path):
    """More vectors say more."""
    args = ("--text", "The dead parrot is no more.", "--vectors", 1, 6, "--steps", 60, "--learning-rate", 0.1)
    out = run("soft_prompt.py", *args, "--output", tmp_path / "soft.png")
    before, (few, many) = figures(r"before training (\S+)", out)[0, 0], figures(r"vectors: (\S+) nats", out)[:, 0]
    assert many < few < before - 1 and many < 0.5
    assert "100% right: 'The dead parrot is no more.'" in out
    assert (tmp_path / "soft.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_steering_vector(run, tmp_path):
    """The stronger, the likelier the words it stands for; with the sign turned round, the less likely."""
    args = ("--strengths", -2, 0, 2, 4, "--max-new-tokens", 6, "--output", tmp_path / "steering.png")
    out = run("steering_vector.py", *args)
    logprob = figures(r"log-probability +(\S+);", out)[:, 0]
    assert (np.diff(logprob) > 0.5).all() and len(set(re.findall(r"'If the file is not.*", out))) > 2
    assert (tmp_path / "steering.png").stat().st_size > 5000


@pytest.mark.slow  # compiles for long
def test_extrapolation(run, tmp_path):
    """With ALiBi the loss stays as it is beyond the trained length; with learned positions it does not."""
    args = ("--steps", 200, "--width", 32, "--length", 16, "--windows", 8, "--output", tmp_path / "beyond.png")
    out = run("extrapolation.py", *args)
    within, beyond = figures(r"^(?:learned|ALiBi).*?  (\d\S+)  (\S+)$", out).T
    (untrained, _, alibi, shipped) = beyond - within
    # Their standard error is 0.06: other bytes stand at each position. In the difference of two it cancels.
    assert untrained > alibi + 0.1 and abs(alibi) < 0.2 and abs(shipped) < 0.3
    assert (tmp_path / "beyond.png").stat().st_size > 5000


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_they_say_how_to_run_them(path):
    assert f"python examples/{path.name}" in path.read_text().split('"""')[1]
