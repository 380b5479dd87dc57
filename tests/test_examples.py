"""The examples run as their first lines say, on the model that ships with the package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_they_say_how_to_run_them(path):
    assert f"python examples/{path.name}" in path.read_text().split('"""')[1]
