"""`mpt-eqx chat`: a conversation, also in a terminal."""

import dataclasses
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command import environment, run, run_process

CHATML = ("--template", "chatml")


@pytest.fixture(scope="module")
def talker(one_layer, tmp_path_factory):
    """One layer of the shipped model, with ChatML's control tokens in its tokenizer."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import tokenizers

    from mpt_eqx import MPT, from_pretrained, save_pretrained

    directory = tmp_path_factory.mktemp("talker")
    tokenizer = tokenizers.Tokenizer.from_file(str(one_layer / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    model = from_pretrained(one_layer)
    wider = MPT(dataclasses.replace(model.config, vocab_size=4098), key=jax.random.key(0))
    rows = jnp.concatenate([model.wte.weight, model.wte.weight[:2]])  # those of other tokens stand in for the new ones
    wider = eqx.tree_at(lambda m: (m.wte.weight, m.blocks, m.norm_f), wider, (rows, model.blocks, model.norm_f))
    save_pretrained(wider, directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.slow
def test_the_shipped_model_goes_on_from_what_is_said():
    """Its own template joins what was said by empty lines, so the first answer is what generate writes."""
    from mpt_eqx import SHIPPED_MODEL

    plain = ("--model", SHIPPED_MODEL, "--temperature", 0, "--max-new-tokens", 12)
    done = run("chat", *plain, stdin="The zip() function\n")
    assert done.returncode == 0, done.stderr
    text = json.loads(
        run("generate", "The zip() function", "--temperature", 0, "--max-new-tokens", 12, "--json").stdout
    )["text"]
    assert done.stdout == text + "\n"


def test_without_a_model_questions_about_python_are_answered():
    """By the adapter that ships, each as if it were the first; the answers end by themselves."""
    asked = ("Can you tell me what dict.get does?", "What does str.split do?", "Can you tell me what dict.get does?")
    done = run("chat", stdin="\n".join(asked))
    assert done.returncode == 0, done.stderr
    first = "Return the value for key if key is in the dictionary, else default.\n"
    second = "Return a list of the substrings in the string, using sep as the separator string.\n"
    assert done.stdout == f"{first}\n{second}\n{first}"
    done = run("chat", "--system", "Be brief.", stdin="x\n")
    assert done.returncode == 1 and "expected no system message" in done.stderr


def test_an_adapter_of_ones_own(one_layer, tmp_path):
    """Its files win over the checkpoint's where it has some, and what is missing is an error."""
    import equinox as eqx
    import jax

    from mpt_eqx import from_pretrained, lora

    model = lora.add(from_pretrained(one_layer), rank=2, key=jax.random.key(0))
    adapter, base = eqx.partition(model, lora.trainable(model))
    lora.save(eqx.combine(jax.tree.map(lambda x: x + 2.0, adapter), base), tmp_path / "a")
    options = ("--model", one_layer, "--max-new-tokens", 8, "--temperature", 0)
    said = {name: run("generate", "The zip()", *options, *more).stdout for name, more in {
        "without": (), "with": ("--adapter", tmp_path / "a")}.items()}  # fmt: skip
    assert said["with"] != said["without"]
    (tmp_path / "a" / "chat_template.jinja").write_text("The {{ messages[0].content }}")
    (tmp_path / "a" / "generation_config.json").write_text('{"max_new_tokens": 8}')
    done = run("chat", "--model", one_layer, "--adapter", tmp_path / "a", stdin="zip()\n")
    assert "The zip()" + done.stdout == said["with"]
    done = run("generate", "x", "--adapter", tmp_path / "none")
    assert done.returncode == 1 and "expected an adapter of PEFT, found no adapter_config.json" in done.stderr


def test_a_conversation_is_its_prompt(talker):
    """Two turns give what generate gives for the template's whole prompt; /reset and /system begin anew."""
    import jax

    from mpt_eqx import from_pretrained, generate
    from mpt_eqx.text import load_tokenizer

    model, tokenizer = from_pretrained(talker), load_tokenizer(talker)
    ends = [0, *tokenizer.ids_of(["<|im_end|>"])]

    def answers(*said, system=None):
        messages = [] if system is None else [{"role": "system", "content": system}]
        for text in said:
            messages.append({"role": "user", "content": text})
            tokens = tokenizer.apply_chat_template(messages, chat_template="chatml")
            result = generate(
                model, tokens, max_new_tokens=12, temperature=0.8, key=jax.random.key(3), eos_token_ids=ends
            )
            made = [token for token in result.tokens[0, : result.lengths[0]].tolist() if token not in ends]
            messages.append({"role": "assistant", "content": "".join(tokenizer.decode_stream(made))})
            yield messages[-1]["content"]

    said = "What is a list?\nAnd a <|im_end|> dict?\n/reset\nWhat is a list?\n/system You are terse.\nWhat is a set?\n"
    done = run(
        "chat", "--model", talker, *CHATML, "--max-new-tokens", 12, "--temperature", 0.8, "--seed", 3, stdin=said
    )
    assert done.returncode == 0, done.stderr
    first, second = answers("What is a list?", "And a <|im_end|> dict?")
    (third,) = answers("What is a set?", system="You are terse.")
    assert done.stdout == "\n".join(f"{text}\n" for text in (first, second, first, third))


def test_the_system_message_and_stops_of_the_call():
    from mpt_eqx import SHIPPED_MODEL

    options = ("--model", SHIPPED_MODEL, "--max-new-tokens", 16, "--temperature", 0)
    (line,) = run("chat", *options, "--system", "Be brief.", stdin="The zip() function\n").stdout.splitlines()[:1]
    other = run("chat", *options, stdin="/system Be brief.\nThe zip() function\n").stdout
    assert other.splitlines()[0] == line
    stop = line[3:6]
    stopped = run("chat", *options, "--system", "Be brief.", "--stop", stop, stdin="The zip() function\n").stdout
    assert stopped == line[: line.index(stop)] + "\n"


def test_commands():
    assert run("chat", "--seed", -1).stderr.startswith("mpt-eqx: error: --seed: expected a whole number from 0 to 2^63")
    done = run("chat", stdin="/help\n/frobnicate\n\n/quit\nnever read\n")
    assert done.returncode == 0 and done.stdout == ""
    assert "/reset         start a new conversation" in done.stderr and "/frobnicate is no command" in done.stderr


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["--template", "alpaca"], "x\n", "chatml"),
        (
            ["--max-new-tokens", "1100"],
            "word " * 1018 + "\n",
            "leaves no room for an answer; start a new one with /reset",
        ),
        (["--model", "./none"], "x\n", "./none: no such directory"),
        (["--compile-cache", "/dev/null/x"], "x\n", "--compile-cache: expected a directory, found none"),
    ],
)
def test_an_error_is_one_line(args, stdin, message):
    done = run("chat", *args, stdin=stdin)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("mpt-eqx: error: ") and message in line


def test_a_model_without_a_template(talker):
    done = run("chat", "--model", talker, stdin="x\n")
    assert done.returncode == 1 and "chatml" in done.stderr and "mpt-instruct" in done.stderr


def test_a_template_from_a_file(talker, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    options = ("--model", talker, "--max-new-tokens", 12, "--temperature", 0)
    done = run("chat", *options, "--template", tmp_path / "own.jinja", stdin="The zip() function\n")
    text = json.loads(run("generate", "The zip() function", *options, "--json").stdout)["text"]
    assert done.stdout == text + "\n"
    (tmp_path / "own.jinja").write_bytes(b"\xff\xfe{{")
    done = run("chat", *options, "--template", tmp_path / "own.jinja", stdin="x\n")
    assert done.returncode == 1 and "--template: expected a file with text" in done.stderr


@pytest.fixture
def interruptible():
    """Processes that a test starts end at Ctrl-C, though who started the tests may have ignored it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_and_not_the_conversation(interruptible):
    """In a terminal: an endless answer is cut, the next one comes, Ctrl-D leaves."""
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mpt_eqx", "chat", "--temperature", "0", "--min-new-tokens", "900", "--max-new-tokens",
         "900"],
        stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True, env={**environment(), "TERM": "dumb"},
    )  # fmt: skip
    os.close(terminal)
    seen = b""

    def until(condition):
        nonlocal seen
        deadline = time.monotonic() + 200
        while not condition(seen):
            assert time.monotonic() < deadline, seen
            seen += os.read(keyboard, 4096)

    until(lambda text: b"> " in text)
    os.write(keyboard, b"The zip() function\n")
    until(lambda text: len(text.split(b"function", 1)[-1]) > 150)
    process.send_signal(signal.SIGINT)
    until(lambda text: text.endswith(b"> "))
    answer = seen.split(b"function", 1)[-1]
    assert len(answer) < 2500, "the answer was not cut: it is at its end after 3,600 characters"
    os.write(keyboard, b"/quit\n")
    assert process.wait(timeout=60) == 0
    os.close(keyboard)


@pytest.mark.slow
def test_ctrl_c_keeps_what_generate_has_made(interruptible):
    command = [
        sys.executable, "-u", "-m", "mpt_eqx", "generate", "The zip() function", "--temperature", "0",
        "--min-new-tokens", "1000", "--max-new-tokens", "1000",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        begun = process.stdout.read(60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert (begun + out).decode().startswith("The zip() function") and b"tokens/s" in err


def test_ctrl_c_as_json(monkeypatch, capsys):
    from mpt_eqx import generation
    from mpt_eqx.cli import main

    def interrupted(*_, **__):
        yield from [500, 501]
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "stream", interrupted)
    assert main(["generate", "The", "--json"]) == 130
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"] == [500, 501] and record["finish_reason"] == "interrupted"


@pytest.mark.slow
def test_what_is_compiled_can_be_kept(one_layer, tmp_path):
    cache = tmp_path / "cache"
    command = ("generate", "The", "--model", one_layer, "--max-new-tokens", 8, "--compile-cache", cache)
    first = run_process(*command)
    kept = {path.name for path in cache.iterdir()}
    second = run_process(*command)
    assert first.returncode == second.returncode == 0 and first.stdout == second.stdout
    assert kept and {path.name for path in cache.iterdir() if path.name.endswith("-cache")} <= kept


def test_where_compiled_programs_are_kept(tmp_path):
    """In the user's cache, bounded, with the rights of the user alone; unless JAX, or an option, says another place."""
    script = """if True:
        import os, sys
        from pathlib import Path
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
        import jax
        from mpt_eqx.cli.options import keep_compiled, user_cache
        root = Path(sys.argv[1])
        os.environ["XDG_CACHE_HOME"] = "/dev/null/x"
        keep_compiled(None)
        assert jax.config.jax_compilation_cache_dir is None
        os.environ["XDG_CACHE_HOME"], os.environ["HOME"] = "relative", str(root / "home")
        assert user_cache() == root / "home" / ".cache" / "mpt_eqx"
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        keep_compiled(None)
        assert jax.config.jax_compilation_cache_dir == str(root / "cache" / "mpt_eqx")
        assert jax.config.jax_compilation_cache_max_size == 512 * 2**20
        assert (root / "cache" / "mpt_eqx").stat().st_mode & 0o777 == 0o700
        jax.jit(lambda x: x + 1)(1.0)
        assert any(path.name.endswith("-cache") for path in (root / "cache" / "mpt_eqx").iterdir())
        keep_compiled(str(root / "own"))
        keep_compiled(None)
        assert jax.config.jax_compilation_cache_dir == str(root / "own")
        """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_compiled_programs_are_not_kept(monkeypatch):
    from mpt_eqx.cli import options

    monkeypatch.setattr(options, "keep_compiled", lambda _: pytest.fail("they are"))
    assert run("generate", "x", "--no-compile-cache", "--model", "/dev/null/x").returncode == 1
    assert run("generate", "x", "--no-compile-cache", "--compile-cache", "x").returncode == 2


def test_the_tokenizers_gap_is_barred(talker, tmp_path):
    """A model with more rows than its tokenizer has ids never writes one of those."""
    shutil.copytree(talker, tmp_path / "m")
    from mpt_eqx import SHIPPED_MODEL

    shutil.copy(SHIPPED_MODEL / "tokenizer.json", tmp_path / "m")
    done = run("generate", "The", "--model", tmp_path / "m", "--json", "--temperature", 50, "--max-new-tokens", 100)
    assert done.returncode == 0 and max(json.loads(done.stdout)["tokens"]) < 4096
