"""Bytes, consoles and Ctrl-C on the command line: text, or one line that says what to do, and never a traceback."""

import errno
import io
import json
import os
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
from command import python, run
from conftest import ROOT
from test_text import broken


@pytest.fixture
def console(monkeypatch):
    """Runs a command on standard streams of bytes, as consoles, pipes and locales make them."""

    def call(*args, stdin=b"", encoding="utf-8", errors="strict", shows="utf-8", closed=()):
        from mpt_eqx.cli import main

        out, err = io.BytesIO(), io.BytesIO()
        streams = {
            "stdin": io.TextIOWrapper(io.BytesIO(stdin), encoding=encoding, errors=errors),
            "stdout": io.TextIOWrapper(out, encoding=shows, write_through=True),
            "stderr": io.TextIOWrapper(err, encoding=shows, errors="backslashreplace", write_through=True),
        }
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, None if name in closed else stream)
            try:
                code = main([str(arg) for arg in args])
            except SystemExit as stop:
                code = stop.code
            if "stderr" in closed:
                sys.stderr.close()
        return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())

    return call


@pytest.fixture
def says(monkeypatch):
    """Makes the model of every command say a text; returns what it was asked."""
    from mpt_eqx import SHIPPED_MODEL, generation
    from mpt_eqx.text import load_tokenizer

    tokenizer, asked = load_tokenizer(SHIPPED_MODEL), []

    def make(text):
        def stream(model, tokens, *, prefix=None, **_):
            asked.append(tokenizer.decode(tokens if prefix is None else prefix))
            return iter([*tokenizer.encode(text), 0])

        monkeypatch.setattr(generation, "stream", stream)
        monkeypatch.setattr(generation, "prefill", lambda model, tokens, prefix=None: [*(prefix or ()), *tokens])
        monkeypatch.setattr("mpt_eqx.cli.chat._extend", lambda model, prefix, tokens: tokens)
        return asked

    return make


# A model with a template of its own would say more than what stdin has.
COMMANDS = (("generate",), ("chat", "--model", str(ROOT / "mpt_eqx" / "pydoc-3m")))
UTF8 = "héllo 日\n".encode()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("stdin", "encoding", "errors"),
    [
        (UTF8, "utf-8", "strict"),
        (UTF8, "utf-8", "surrogateescape"),
        (UTF8, "ascii", "surrogateescape"),  # a locale that is not UTF-8
        (UTF8, "ascii", "strict"),
        (b"\xef\xbb\xbf" + UTF8, "utf-8", "strict"),  # a mark of the byte order, as Windows writes it
        ("héllo\n".encode("latin1"), "latin1", "strict"),
    ],
)
def test_text_on_stdin(console, says, command, stdin, encoding, errors):
    asked = says("x")
    done = console(*command, stdin=stdin, encoding=encoding, errors=errors)
    assert done.code == 0 and b"error" not in done.err
    assert asked == ["héllo" if encoding == "latin1" else "héllo 日"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("stdin", ["né\n".encode("latin1"), "né\n".encode("utf-16"), b"\xff\xff", b"ok \x80\n"])
def test_bytes_that_are_no_text(console, command, stdin, errors):
    done = console(*command, stdin=stdin, errors=errors)
    (line,) = done.err.splitlines()
    assert done.code == 1 and line.startswith(b"mpt-eqx: error: stdin: expected text in UTF-8, found the byte 0x")
    assert line.endswith(b"convert it, for example with iconv -f latin1 -t utf-8")


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (("generate", "n\udce9"), b"PROMPT"),
        (("generate", "x", "--stop", "\udce9"), b"--stop"),
        (("chat", "--system", "\udce9"), b"--system"),
        (("chat", "--template", "\udce9"), b"--template"),
        (("generate", "x", "--model", "./\udce9"), b"no such directory"),
        (("inspect", "./\udce9"), b"no such directory"),
        (("inspect", "\udce9"), b"mpt-eqx: error: "),
        (("convert", "./\udce9", "./x"), b"no such directory"),
        (("bench", "--model", "./\udce9"), b"no such directory"),
        (("generate", "x", "--compile-cache", "/dev/null/\udce9"), b"--compile-cache"),
    ],
)
def test_arguments_that_are_no_text(console, args, name):
    done = console(*args)
    (line,) = done.err.splitlines()
    assert done.code == 1 and line.startswith(b"mpt-eqx: error: ") and name in line


def test_arguments_under_a_locale_that_is_not_utf8(console, says, monkeypatch):
    """Python makes surrogates of the bytes of é there."""
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    asked = says("x")
    assert console("generate", "h\udcc3\udca9llo").code == 0 and asked == ["héllo"]


@pytest.mark.parametrize("command", [("generate", "a"), ("chat",)])
def test_a_console_that_cannot_show_a_character(console, says, command):
    says("né 日")
    for shows, expected in (("ascii", b"n\\xe9 \\u65e5"), ("latin1", b"n\xe9 \\u65e5"), ("cp1252", b"n\xe9 \\u65e5")):
        done = console(*command, stdin=b"a\n", shows=shows)
        assert done.code == 0 and expected in done.out
    for shows in ("ascii", "cp1252"):
        assert console("generate", "--help", shows=shows).code == 0
        done = console("generate", "x", "--max-seq-len", "0", shows=shows)
        assert done.code == 1 and b"--max-seq-len: expected a whole number \\u2265 1, found 0" in done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_no_stdin(console, command):
    done = console(*command, closed=("stdin",))
    (line,) = done.err.splitlines()
    assert done.code == 1 and b"error: stdin: expected text, found it closed; give " in line


def test_stdin_that_cannot_be_read(console, monkeypatch):
    class Directory:
        encoding, closed = "utf-8", False

        def isatty(self):
            return False

        def read(self):
            raise OSError(errno.EISDIR, "Is a directory")

    monkeypatch.setattr(sys, "stdin", Directory())
    done = run("generate", stdin="")
    assert done.returncode == 1 and "PROMPT: expected some text" in done.stderr
    from mpt_eqx.cli import console as streams

    with pytest.raises(ValueError, match="stdin: expected text, found something that cannot be read .*Is a directory"):
        streams.read_all("")


def test_no_stdout_and_no_stderr(console, says):
    says("x")
    for args in (("inspect",), ("generate", "a"), ("chat",), ("--help",)):
        done = console(*args, closed=("stdout",))
        assert done.code == 1 and done.err.startswith(b"mpt-eqx: error: stdout: expected a place to write to, found it")
    done = console("generate", "a", closed=("stderr",))
    assert done.code == 0 and done.out == b"ax\n"  # the speed, which is for stderr, is not in it
    assert console("generate", "a", "--seed", "-1", closed=("stderr",)).code == 1


def test_a_stdout_that_is_full_or_closed_early(monkeypatch, capsys):
    from mpt_eqx.cli import main

    for error, code, message in (
        (OSError(errno.ENOSPC, "No space left on device"), 1, "mpt-eqx: error: OSError: [Errno 28] No space left on d"),
        (BrokenPipeError(), 0, ""),
    ):
        stdout = io.StringIO()
        monkeypatch.setattr(stdout, "flush", lambda error=error: (_ for _ in ()).throw(error))
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["inspect"]) == code
        assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("error", [MemoryError("full"), RecursionError("deep"), RuntimeError("a\nb"), KeyError("k")])
def test_what_nobody_expected_is_one_line_too(monkeypatch, capsys, error):
    from mpt_eqx import checkpoint
    from mpt_eqx.cli import main

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint, "checkpoint_info", fails)
    assert main(["inspect"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mpt-eqx: error: {type(error).__name__}: ") and line.endswith("; --debug shows where")
    with pytest.raises(type(error)):
        main(["inspect", "--debug"])


@pytest.mark.parametrize("name", ["pre_tokenizer", "decoder"])
def test_a_tokenizer_that_panics_is_one_line(tmp_path, capfd, name):
    """Its library also writes to the process's stderr, which nobody sees."""
    from mpt_eqx import SHIPPED_MODEL
    from mpt_eqx.cli import main

    for path in SHIPPED_MODEL.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokenizer.json").unlink()
    broken(tmp_path, name)
    word = "a" * 40 + "!"
    for args in (["generate", word], ["chat", "--system", word]):
        assert main([*args, "--model", str(tmp_path)]) == 1
        out, err = capfd.readouterr()
        (line,) = err.splitlines()
        assert out == "" and line.startswith("mpt-eqx: error: ") and "expected a working tokenizer, found one" in line


def test_the_space_after_the_prompt(one_layer, tmp_path, says, monkeypatch):
    """With a tokenizer that drops the space before the first word of a text, as text and as JSON."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from mpt_eqx import generation

    for path in one_layer.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokenizer.json").unlink()
    backend = tokenizers.Tokenizer(models.WordLevel({"[U]": 0, "▁hello": 1, "▁world": 2, "▁the": 3}, unk_token="[U]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(generation, "stream", lambda model, tokens, **_: iter([3, 2, 2]))
    options = ("--model", tmp_path, "--stop", " world world")
    assert run("generate", "hello world", *options).stdout == "hello world the\n"
    record = json.loads(run("generate", "hello world", *options, "--json").stdout)
    assert record["text"] == " the" and record["finish_reason"] == "stop"
    monkeypatch.setattr("mpt_eqx.cli.chat._extend", lambda model, prefix, tokens: tokens)
    done = run("chat", *options, "--template", "{{ messages[-1].content }}", stdin="hello\nworld\n")
    assert done.stdout == " the\n\n the\n"


def test_answers_as_json(console, says):
    says('a "b"\n\nc')
    done = console("chat", "--json", stdin=b"x\ny\n")
    assert [json.loads(line) for line in done.out.splitlines()] == [
        {"role": "assistant", "content": 'a "b"\n\nc'},
    ] * 2


@pytest.mark.parametrize("name", ["llama", "./none.jinja", "x" * 5000, "/dev/null/x"])
def test_a_template_that_is_none(name):
    done = run("chat", "--template", name)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("mpt-eqx: error: --template: expected ") and len(line) < 300
    if len(name) < 100:
        assert f"chatml, mpt-instruct or a file with a Jinja template, found {name!r}, which is no such file" in line


def test_a_longer_context(says, monkeypatch):
    """Wherever a model is loaded; the error without it names it."""
    from mpt_eqx import checkpoint

    loaded, load = [], checkpoint.from_pretrained
    monkeypatch.setattr(
        checkpoint, "from_pretrained", lambda *args, **kwargs: loaded.append(load(*args, **kwargs)) or loaded[-1]
    )
    long = "word " * 1100
    done = run("generate", long)
    assert done.returncode == 1 and " or --max-seq-len 1229 on the command line" in done.stderr
    assert ", or allow more tokens with --max-seq-len N" in run("chat", stdin=long + "\n").stderr
    says("x")
    assert run("generate", long, "--max-seq-len", 2048).returncode == 0
    assert run("chat", "--max-seq-len", 2048, stdin=long + "\n").returncode == 0
    assert [model.config.max_seq_len for model in loaded] == [1024, 1024, 2048, 2048]
    assert "--max-seq-len: expected a whole number ≥ 1, found 0" in run("generate", "x", "--max-seq-len", 0).stderr
    assert run("generate", "x", "--max-seq-len", "many").returncode == 2


@pytest.fixture
def ctrl_c():
    """Presses Ctrl-C in this process, whoever started it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_end_of_the_block(ctrl_c):
    from mpt_eqx.generation.interrupts import held_interrupts

    done = []
    with pytest.raises(KeyboardInterrupt), held_interrupts():
        ctrl_c()
        done.append(1)
    with pytest.raises(KeyboardInterrupt), held_interrupts():  # the first of two may have been swallowed
        ctrl_c()
        ctrl_c()
        done.append(2)
    with pytest.raises(KeyboardInterrupt), held_interrupts(), held_interrupts():
        ctrl_c()
        done.append(3)
    with pytest.raises(ValueError), held_interrupts():
        raise ValueError
    assert done == [1, 3] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_whoever_handles_interrupts_keeps_doing_so(ctrl_c):
    from mpt_eqx.generation.interrupts import held_interrupts

    pressed, handlers = [], []
    signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    with held_interrupts():
        ctrl_c()
        assert pressed == [1]
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def elsewhere():
        with held_interrupts():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


def test_an_interrupt_that_a_callback_swallows_ends_the_run_with_its_chunk(tiny_model, monkeypatch, ctrl_c):
    from mpt_eqx import generate, stream
    from mpt_eqx.generation import steps

    real, calls = steps.decode_chunk, []

    def pressed(*args):
        calls.append(1)
        try:
            if len(calls) == 2:
                ctrl_c()
        except KeyboardInterrupt:  # as JAX does where it runs somebody's Python
            pass
        return real(*args)

    monkeypatch.setattr(steps, "decode_chunk", pressed)
    with pytest.raises(KeyboardInterrupt) as error:
        generate(tiny_model, [5, 6, 7], max_new_tokens=40)
    result = error.value.result
    assert len(calls) == 2 and result.finish_reasons == ["interrupted"] and result.lengths.tolist() == [8]
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        list(stream(tiny_model, [5, 6, 7], max_new_tokens=40))
    assert len(calls) == 2


@pytest.mark.parametrize("after", [0, 1])
def test_the_prompt_is_written_once(monkeypatch, capsys, after):
    """Ctrl-C before there is a token, or after one that is no whole character: 130, and all text once."""
    from mpt_eqx import SHIPPED_MODEL, generation
    from mpt_eqx.cli import main
    from mpt_eqx.text import load_tokenizer

    half = load_tokenizer(SHIPPED_MODEL).encode("🙂")[0]

    def interrupted(*_, **__):
        yield from [half] * after
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "stream", interrupted)
    assert main(["generate", "The zip() function"]) == 130
    assert capsys.readouterr().out == "The zip() function\n"


def test_ctrl_c_among_piped_messages_ends_all(console, says, monkeypatch):
    from mpt_eqx import generation

    says("x")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "stream", interrupted)
    assert console("chat", stdin=b"a\nb\n").code == 130


def test_ctrl_c_while_compiling(one_layer):
    """In a process of its own, in the middle of the first compilation."""
    script = f"""
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
from mpt_eqx.cli import main
from mpt_eqx.generation import prompts
compiled = prompts.prefill_chunk
def pressed(*args):
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    return compiled(*args)
prompts.prefill_chunk = pressed
code = main(["generate", "The zip() function", "--model", {str(one_layer)!r}])
print(code)
"""
    assert python(script) == "The zip() function\n130\n"
