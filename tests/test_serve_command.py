"""`mpt-eqx serve`: its options in this process, and one server in a process of its own."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
from command import environment, run
from conftest import ROOT

pytest.importorskip("uvicorn")

posix = pytest.mark.skipif(os.name != "posix", reason="signals")

SMALL = (
    "--slots",
    "2",
    "--context",
    "64",
    "--prefix-memory",
    "0",
    "--no-warmup",
    "--port",
    "0",
    "--template",
    "mpt-instruct",
)


def refused(*args):
    """Returns what the command says and does not start for."""
    done = run("serve", *args)
    assert done.returncode in (1, 2) and not done.stdout, done
    return done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--port", "70000"), "expected a port from 0 to 65535, found '70000'"),
        (("--slots", "0"), "expected a whole number ≥ 1, found '0'"),
        (("--timeout", "0"), "expected a number of seconds above 0, found '0'"),
        (("--cache-memory", "much"), "expected a size such as 512MB or 2GiB, found 'much'"),
        (("--max-body", "0"), "--max-body: expected at least 1 byte, found 0"),
        (("--api-key", ""), "--api-key: expected a key of visible ASCII characters without spaces, found nothing"),
        (("--api-key", "a b"), "found characters that are no visible ASCII"),
        (("--api-key-file", "nowhere"), "--api-key-file: expected a file with keys, found nowhere"),
        (("--allow-origin", "example.com"), "--allow-origin: expected an origin such as https://example.com"),
        (("--allow-host", "http://x"), "--allow-host: expected a name without a port, found 'http://x'"),
        (("--host", "no.such.host.invalid"), "--host: expected an address of this machine"),
        (("--adapter", "nowhere", "--port", "0"), "--adapter: expected a directory, found none at nowhere"),
        (("--adapter", "a b=.", "--port", "0"), "--adapter: expected a name of letters, digits"),
        (("--template", "nowhere", "--port", "0"), "--template: expected"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_is_loaded(flags, said):
    assert said in refused(*flags)


def test_two_adapters_need_two_names(tmp_path):
    assert "found the same twice; give NAME=DIR" in refused(
        "--port", "0", "--adapter", f"a={tmp_path}", "--adapter", f"a={tmp_path}"
    )


def test_an_empty_key_in_the_environment_or_a_file_opens_nothing(monkeypatch, tmp_path):
    (tmp_path / "keys").write_text("\n")
    assert "--api-key-file: expected a key" in refused("--api-key-file", tmp_path / "keys")
    monkeypatch.setenv("MPT_EQX_API_KEY", "")
    assert "$MPT_EQX_API_KEY: expected a key" in refused()


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("--port", str(port))
    assert said.count("\n") == 1 and f"--port: expected a free port, found 127.0.0.1:{port}" in said


def test_the_cache_of_all_slots_has_to_fit(one_layer):
    assert "cache_bytes: expected at least" in refused(one_layer, "--cache-memory", "1KB", *SMALL)


def test_keys_come_from_all_three_places(monkeypatch, tmp_path):
    from mpt_eqx.cli.serve import read_settings, size

    (tmp_path / "keys").write_text("one\n\ntwo \n")
    monkeypatch.setenv("MPT_EQX_API_KEY", "three")
    args = SimpleNamespace(
        api_key=["zero", "one"], api_key_file=tmp_path / "keys", host="gpu1", allow_host=["gpu"], allow_origin=["*"],
        max_body=size("2KiB"), timeout=1.0, edits=False, no_page=True,
    )  # fmt: skip
    settings = read_settings(args)
    assert settings.api_keys == ("zero", "one", "two", "three") and settings.max_body == 2048 and not settings.page
    assert settings.hosts == ("localhost", "127.0.0.1", "[::1]", "gpu1", "gpu")
    assert [size(text) for text in ("7", "1.5kB", "2M", "1 GiB")] == [7, 1500, 2_000_000, 2**30]


def test_the_help_says_who_can_see_a_key():
    done = run("serve", "--help")
    assert done.returncode == 0 and "can see it in the list of processes" in " ".join(done.stdout.split())


def test_adapters_are_models_by_name_that_share_the_bases_weights():
    from mpt_eqx import SHIPPED_ADAPTER, SHIPPED_MODEL
    from mpt_eqx.cli._serve_models import load_models

    options = {"revision": None, "template": None, "mesh": None, "dtype": None, "max_seq_len": 128, "quantize": None}
    args = SimpleNamespace(model=str(SHIPPED_MODEL), name=None, adapter=[f"qa={SHIPPED_ADAPTER}"], **options)
    models, served = load_models(args)
    assert list(models) == list(served) == ["pydoc-3m", "pydoc-3m:qa"]
    assert models["pydoc-3m"].wte.weight is models["pydoc-3m:qa"].wte.weight
    assert {model.config.max_seq_len for model in served.values()} == {128}
    # What is beside the adapter wins over what is beside the model.
    assert served["pydoc-3m"].chat_template is None and "{%" in served["pydoc-3m:qa"].chat_template
    assert [model.defaults["temperature"] for model in served.values()] == [0.7, 0.0]
    args = SimpleNamespace(model=None, name="base", adapter=[], **options)
    assert list(load_models(args)[1]) == ["base", "base:answers"]


class Process:
    """A server in a process of its own."""

    def __init__(self, *args):
        command = [sys.executable, "-m", "mpt_eqx", "serve", *map(str, args)]
        env = {**environment(), "MPT_EQX_API_KEY": "sk-1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        self.said = []
        self.url = self.wait_for("listening on ").split()[-1]

    def wait_for(self, text):
        """Returns the first line of stderr that has the text."""
        for line in self.process.stderr:
            self.said.append(line)
            if text in line:
                return line
        raise AssertionError("".join(self.said))

    def ask(self, path, data=None, key="sk-1"):
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        body = None if data is None else json.dumps(data).encode()
        return urllib.request.urlopen(urllib.request.Request(self.url + path, body, headers), timeout=60)

    def end(self, number=signal.SIGTERM):
        """Returns the exit code, the lines about requests, and what was said."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, [json.loads(line) for line in out.splitlines()], "".join(self.said) + err


@contextlib.contextmanager
def started(*args):
    server = Process(*args)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


@posix
def test_a_server_starts_answers_drains_and_ends(one_layer):
    with started(one_layer, "--name", "base", *SMALL) as server:
        server.wait_for("ready after ")
        assert json.load(server.ask("/health", key=""))["status"] == "ready"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.ask("/v1/models", key="sk-2")
        assert [model["id"] for model in json.load(server.ask("/v1/models"))["data"]] == ["base"]
        with pytest.raises(urllib.error.HTTPError, match="413"):
            server.ask("/v1/completions", {"model": "base", "prompt": "x" * 2 * 2**20})
        asked = {"model": "base", "prompt": "The", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        whole = json.load(server.ask("/v1/completions", {**asked, "stream": False}))
        assert whole["usage"]["completion_tokens"] >= 1
        metrics = server.ask("/metrics").read().decode()
        assert "mpt_eqx_ready 1.0" in metrics and 'mpt_eqx_first_token_seconds_count{model="base"} 1.0' in metrics
        assert 'mpt_eqx_queue_seconds_count{model="base"} 1.0' in metrics
        assert b"<title>mpt_eqx" in server.ask("/", key="").read()

        for flags in ([], ["--plain"]):
            command = [
                sys.executable,
                ROOT / "examples" / "serve_client.py",
                "--url",
                server.url,
                "--key",
                "sk-1",
                *flags,
            ]
            asked_for = subprocess.run(
                [*command, "--question", "Hi", "--max-tokens", "8"],
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            )
            assert re.search(r"^-\d+\.\d\d nats for \d+ tokens$", asked_for.stdout, re.MULTILINE), asked_for

        answers = []

        def stream():
            answers.append(server.ask("/v1/completions", {**asked, "stream": True, "n": 2}).read().decode())

        clients = [threading.Thread(target=stream) for _ in range(3)]
        for client in clients:
            client.start()
        while "queued 0.0" in (text := server.ask("/metrics").read().decode()) and "active 0.0" in text and not answers:
            time.sleep(0.01)
        time.sleep(0.1)  # all three have been sent
        code, lines, said = server.end()
        for client in clients:
            client.join()
        assert code == 0, said
        assert len(answers) == 3 and all(answer.rstrip().endswith("[DONE]") for answer in answers), answers
        assert [line["status"] for line in lines[:4]] == [200, 401, 200, 413]
        assert lines[4] | {"time": 0, "seconds": 0, "bytes": 0} == {
            "time": 0, "method": "POST", "path": "/v1/completions", "status": 200, "complete": True, "seconds": 0,
            "client": "127.0.0.1", "bytes": 0, "model": "base", "prompt_tokens": whole["usage"]["prompt_tokens"],
            "completion_tokens": whole["usage"]["completion_tokens"],
        }  # fmt: skip
        assert "weights " in said and "KV caches " in said and "peak memory" in said and "Traceback" not in said


@posix
@pytest.mark.slow
def test_a_server_on_a_mesh_gives_the_same_answers(one_layer, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    answers = []
    for mesh in ((), ("--mesh", "tp=2")):
        with started(one_layer, *SMALL, *mesh) as server:
            server.wait_for("ready after ")
            asked = {"prompt": "Return True if", "max_tokens": 12, "temperature": 0}
            answers.append(json.load(server.ask("/v1/completions", asked))["choices"][0]["text"])
            assert server.end()[0] == 0
    assert answers[0] and answers[0] == answers[1]


class Engine:
    """One that does what a test says: it is ready at once, and drains when `done` is set."""

    def __init__(self, health="ready", done=False):
        self.phase, self.done, self.calls, self.failures = health, threading.Event(), [], []
        if done:
            self.done.set()

    def start(self):
        self.calls.append("start")

    def health(self):
        return "stopped" if self.phase == "draining" and self.done.is_set() else self.phase

    def stats(self):
        return SimpleNamespace(active=1, queued=1, peak_bytes=10**6)

    def drain(self):
        self.calls.append("drain")
        self.phase = "draining"

    def stop(self, timeout):
        self.calls.append("stop")
        self.phase = "stopped"
        for fail in self.failures:
            fail()


@pytest.fixture
def serve(monkeypatch):
    """Serves an application with an engine in this process, and returns the exit code and what was said."""
    from mpt_eqx.cli import _serve_process

    ends = []
    monkeypatch.setattr(_serve_process, "_end_now", ends.append)

    def call(app, engine, *, until="ready", then=None, drain_timeout=0.2):
        said = []

        def say(text):
            said.append(text)
            if until in text:
                threading.Thread(target=tell).start()

        def tell():
            if then is not None:
                then(next(line for line in said if "listening" in line).split()[-1])
            os.kill(os.getpid(), signal.SIGTERM)

        with _serve_process.bind("127.0.0.1", 0) as listener:
            code = _serve_process.serve_until_told(
                app, engine, listener, drain_timeout=drain_timeout, log=None, say=say
            )
        return code, said, ends

    before = signal.getsignal(signal.SIGTERM)
    yield call
    assert signal.getsignal(signal.SIGTERM) is before


async def nothing(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


@posix
def test_what_has_not_ended_after_the_drain_ends_with_an_error(serve):
    """It has begun as a stream, and is no half answer without an error."""
    engine, answers = Engine(), []

    async def streams(scope, receive, send):
        loop, failed = asyncio.get_running_loop(), asyncio.Event()
        engine.failures.append(lambda: loop.call_soon_threadsafe(failed.set))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await failed.wait()
        await send({"type": "http.response.body", "body": b"data: {error}\n\n"})

    clients = []

    def then(url):
        clients.append(threading.Thread(target=lambda: answers.append(urllib.request.urlopen(url).read())))
        clients[0].start()
        while not engine.failures:
            time.sleep(0.01)

    code, said, ends = serve(streams, engine, then=then)
    clients[0].join(10)
    assert code == 0 and answers == [b"data: 1\n\ndata: {error}\n\n"] and not ends
    assert engine.calls == ["start", "drain", "stop"]
    assert "draining: 2 sequences have 0.2 seconds to end" in said
    assert "drained no further: 2 sequences end with an error" in said


@posix
def test_a_drain_is_no_longer_than_it_needs_to_be(serve):
    engine = Engine(done=True)
    started = time.monotonic()
    code, _, ends = serve(nothing, engine, drain_timeout=60)
    assert code == 0 and time.monotonic() - started < 10 and not ends


@posix
def test_it_does_not_wait_for_a_warm_up_to_end(serve):
    engine = Engine("starting")
    code, said, _ = serve(nothing, engine, until="listening")
    assert code == 0 and engine.calls == ["start", "stop"] and not any("ready" in line for line in said)


@posix
def test_a_second_signal_ends_it_at_once(serve):
    engine = Engine()
    seen = []

    def say_twice(url):
        threading.Timer(0.3, lambda: (os.kill(os.getpid(), signal.SIGINT), seen.append(1), engine.done.set())).start()

    code, _, ends = serve(nothing, engine, then=say_twice, drain_timeout=30)
    assert code == 0 and ends == [128 + signal.SIGINT] and seen


@posix
def test_the_process_ends_with_an_error_when_the_engine_does(serve):
    from mpt_eqx import MPTError

    with pytest.raises(MPTError, match="the engine has ended, and so does the server; its log above says why"):
        serve(nothing, Engine("dead"), until="never")


@posix
def test_the_process_ends_with_an_error_when_http_does(serve, monkeypatch):
    from mpt_eqx import MPTError

    async def ends(self, sockets=None):
        self.started = True

    async def fails(self, sockets=None):
        raise OSError("no loop")

    monkeypatch.setattr("threading.excepthook", lambda _: None)
    for broken, said in ((ends, "HTTP has ended, and so does the server"), (fails, "HTTP did not start")):
        monkeypatch.setattr("uvicorn.Server.serve", broken)
        with pytest.raises(MPTError, match=f"{said}; its log above says why"):
            serve(nothing, Engine(), until="never")


def test_a_pipe_that_nobody_reads_keeps_no_request_waiting():
    """The lines are written in a thread of their own, which then waits alone."""
    from mpt_eqx.cli._serve_process import _logged
    from mpt_eqx.serve.guards import access

    reading, writing = os.pipe()
    with open(writing, "w") as stream, open(reading) as reader:
        with _logged(stream):
            for number in range(2000):
                access.info("%s", f"{number} " + "x" * 100)  # more than a pipe holds
            read = [reader.readline() for _ in range(2000)]
        assert [int(line.split()[0]) for line in read] == list(range(2000))
