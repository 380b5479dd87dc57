"""The examples run as their first lines say, on the model that ships with the package."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mpt_eqx import SHIPPED_MODEL, from_pretrained

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *args, stdin=""):
    command = [sys.executable, EXAMPLES / name, *args]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_several_prompts_at_once():
    out = run("generate.py")
    assert len(re.findall(r"^--- -\d\.\d\d nats per token$", out, re.MULTILINE)) == 3
    assert "The zip() function " in out and "class collections.OrderedDict" in out


def test_a_conversation():
    out = run("chat.py", "--max-new-tokens", "12", stdin="The zip() function\nReturn True if\n")
    assert out.startswith("> ") and out.count("> ") >= 3


def test_a_text_read_once():
    out = run("prefix.py")
    assert re.match(r"\d+ tokens read in \d+\.\d\d s\n", out) and len(re.findall(r"--- \d+\.\d\d s\n…", out)) == 3


def test_a_long_document():
    out = run("long_document.py")
    assert out.startswith("4000 tokens read in ") and re.search(r"took \d\.\d\d GB at most\n$", out)


def test_a_model_on_several_devices():
    out = run("sharded_generate.py", "--cpu-devices", "4", "--mesh", "fsdp=2,tp=2", "--max-new-tokens", "8")
    assert "The zip() function" in out and re.search(r"16 tokens in \d", out)
    out = run("sharded_generate.py", "--mesh", "fsdp=2,tp=4", "--explain")
    assert out.startswith("mesh: fsdp=2, tp=4\n") and "on each of 8 devices" in out


def test_two_processes(tmp_path):
    """As in the two terminals of the script's first lines, with another port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, EXAMPLES / "distributed.py", "--coordinator", f"localhost:{port}", "--processes", "2"]
    command += ["--cpu-devices", "2", "--steps", "1", "--save", str(tmp_path / "trained"), "--process"]
    second = subprocess.Popen([*command, "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = subprocess.run([*command, "0"], capture_output=True, text=True, timeout=120)
    out, err = second.communicate(timeout=30)
    assert first.returncode == second.returncode == 0, first.stderr + err
    assert "2 processes, 4 devices, mesh {'fsdp': 4, 'tp': 1}\n" in first.stdout and "step 0: loss " in first.stdout
    assert "step" not in out
    assert from_pretrained(tmp_path / "trained").config == from_pretrained(SHIPPED_MODEL).config


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_they_say_how_to_run_them(path):
    assert f"python examples/{path.name}" in path.read_text().split('"""')[1]
