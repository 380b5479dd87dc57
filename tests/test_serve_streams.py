"""Answers that do not come to their end: errors have a status before the first piece, and are an event after it."""

import json
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from serving import ScriptedEngine, on_port, shipped

BODY = {"model": "pydoc", "prompt": "x", "max_tokens": 8}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def engine():
    return ScriptedEngine(None)


@pytest.fixture(scope="module")
def url(engine):
    from mpt_eqx.serve.app import create_app
    from mpt_eqx.serve.settings import Settings

    with on_port(create_app(engine, {"pydoc": shipped()}, Settings(timeout=30))) as url:
        yield url


@pytest.fixture
def ask(engine, url):
    """Asks for a completion, which an engine answers with some events."""

    def ask(script, path="/v1/completions", **fields):
        engine.script = script
        with httpx.Client(timeout=20) as http:
            return http.post(f"{url}{path}", json={**(CHAT if "chat" in path else BODY), **fields})

    return ask


def events(*some):
    return lambda request, ticket: iter(some)


def begun():
    from mpt_eqx.serve import Chunk, Prompt

    return Prompt(0, [], []), Chunk([40, 41], [-1.0, -1.0], [])


FAILURES = [("invalid", 400), ("deadline", 504), ("internal", 500), ("unavailable", 503), ("cancelled", 499)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("kind", "status"), FAILURES)
def test_a_failure_before_the_first_token_has_a_status(ask, kind, status, stream):
    from mpt_eqx.serve import Failure

    response = ask(events(Failure(kind, "no more")), stream=stream)
    error = response.json()["error"]
    assert response.status_code == status and error["message"] == "no more" and error["code"] == kind
    assert ("Retry-After" in response.headers) == (status == 503)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_failure_later_ends_a_stream_with_an_error_event(ask, path):
    from mpt_eqx.serve import Failure

    response = ask(events(*begun(), Failure("internal", "no more")), path, stream=True)
    *pieces, last, rest = response.text.split("\n\n")
    assert response.status_code == 200 and pieces and rest == "" and "[DONE]" not in response.text
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error == {"message": "no more", "type": "server_error", "param": None, "code": "internal"}
    assert ask(events(*begun(), Failure("internal", "no more")), path).status_code == 500


def test_openais_client_raises_at_an_error_event(engine, url):
    from mpt_eqx.serve import Failure

    engine.script = events(*begun(), Failure("deadline", "took too long"))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(**BODY, stream=True)
        assert next(stream).choices[0].text
        with pytest.raises(openai.APIError, match="took too long"):
            list(stream)


@pytest.mark.parametrize("stream", [False, True])
def test_what_submit_refuses(ask, stream):
    from mpt_eqx import GenerationError
    from mpt_eqx.serve import QueueFullError, UnavailableError

    def raising(error):
        def script(request, ticket):
            raise error

        return script

    response = ask(raising(QueueFullError("64 requests wait")), stream=stream)
    assert response.status_code == 429 and response.headers["Retry-After"] == "1"
    assert response.json()["error"]["type"] == "rate_limit_error"
    response = ask(raising(UnavailableError("the server takes no requests: it is draining")), stream=stream)
    assert response.status_code == 503 and "draining" in response.json()["error"]["message"]
    response = ask(raising(GenerationError("temperature: expected less")), stream=stream)
    assert response.status_code == 400 and response.json()["error"]["param"] == "temperature"


def test_what_nobody_foresaw_is_in_the_log_only(ask, caplog):
    def script(request, ticket):
        raise RuntimeError("a secret")

    response = ask(script)
    assert response.status_code == 500 and "secret" not in response.text and "log" in response.text
    assert "a secret" in caplog.text


@pytest.mark.parametrize("health", ["dead", "stuck", "stopped"])
@pytest.mark.parametrize("stream", [False, True])
def test_nobody_waits_for_an_engine_that_does_nothing(engine, ask, health, stream):
    """Also if it has told nobody of its end."""

    def script(request, ticket):
        yield from begun()
        engine._health = health

    started = time.monotonic()
    try:
        response = ask(script, stream=stream)
    finally:
        engine._health = "ready"
    assert time.monotonic() - started < 5
    assert response.status_code == (200 if stream else 503)
    assert f"the engine is {health}; the answer cannot be completed" in response.text
    assert "[DONE]" not in response.text and engine.tickets[-1].cancelled.is_set()


def test_nobody_waits_for_longer_than_the_deadline(engine):
    from mpt_eqx.serve.app import create_app
    from mpt_eqx.serve.settings import Settings

    engine.script = events(*begun())
    with on_port(create_app(engine, {"pydoc": shipped()}, Settings(timeout=0.1))) as url:
        response = httpx.post(f"{url}/v1/completions", json=BODY, timeout=20)
    assert response.status_code == 504 and "longer than the server allows" in response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("queued", [False, True])
def test_a_client_that_goes_away_frees_its_slot(engine, url, stream, queued):
    """While it waits for its first token, and later; streaming or not."""
    submitted = threading.Event()

    def script(request, ticket):
        if not queued:
            yield from begun()
        submitted.set()
        ticket.cancelled.wait(20)

    engine.script = script
    target = urlsplit(url)
    body = json.dumps({**BODY, "stream": stream}).encode()
    with socket.create_connection((target.hostname, target.port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        assert submitted.wait(20)
        if stream and not queued:
            assert connection.recv(64).startswith(b"HTTP/1.1 200")
        assert not engine.tickets[-1].cancelled.wait(0.1)
    assert engine.tickets[-1].cancelled.wait(2)


def test_a_slow_reader_does_not_hold_the_engine(engine, url):
    """The engine's thread hands all over, while the client reads nothing."""
    from mpt_eqx.serve import Chunk, End, Prompt

    done = threading.Event()

    def script(request, ticket):
        yield Prompt(0, [], [])
        for _ in range(2000):
            yield Chunk([40] * 8, [-1.0] * 8, [[(n, -1.0) for n in range(20)]] * 8)
        yield End("length")
        done.set()

    engine.script = script
    with (
        httpx.Client(timeout=20) as http,
        http.stream("POST", f"{url}/v1/completions", json={**BODY, "stream": True, "logprobs": 20}) as response,
    ):
        assert done.wait(20) and response.status_code == 200
        assert httpx.get(f"{url}/health", timeout=5).status_code == 200


def test_the_log_is_told_of_tokens_and_figures_of_times(engine):
    from mpt_eqx.serve import Chunk, End
    from mpt_eqx.serve.app import create_app
    from mpt_eqx.serve.settings import Settings

    states, seen = [], []

    class Metrics:
        def observe_queue(self, model, seconds):
            seen.append((model, "queue", seconds))

        def observe_first_token(self, model, seconds):
            seen.append((model, 0, seconds >= 0))

        def observe_next_tokens(self, model, count, seconds):
            seen.append((model, count, seconds >= 0))

        def render(self):
            return b""

    app = create_app(engine, {"pydoc": shipped()}, Settings(), Metrics())

    async def outer(scope, receive, send):
        await app(scope, receive, send)
        states.append(dict(scope.get("state", {})))

    engine.script = events(*begun(), Chunk([42], [-1.0], []), End("length"))
    with on_port(outer) as url:
        assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 200
    assert states[-1] == {"model": "pydoc", "prompt_tokens": 1, "completion_tokens": 3}
    assert seen == [("pydoc", "queue", 0.0), ("pydoc", 0, True), ("pydoc", 1, True)]
