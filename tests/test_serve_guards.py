"""What stands before the server: host, origin, key and size of a request, headers of answers, the access log."""

import asyncio
import json
import logging

import pytest

pytest.importorskip("fastapi")

from mpt_eqx.serve.guards import guard
from mpt_eqx.serve.pages import read_page
from mpt_eqx.serve.settings import Settings

KEY = "sk-0123456789"


async def echo(scope, receive, send):
    """Answers with the path and the body, in two parts."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    scope["state"]["model"], scope["state"]["prompt_tokens"] = "base", 7
    headers = [(b"server", b"something"), (b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": scope["path"].encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b" " + body})


class Answer:
    def __init__(self, messages):
        start = next((m for m in messages if m["type"] == "http.response.start"), {"status": None, "headers": []})
        self.status = start["status"]
        self.headers = {name.decode(): value.decode() for name, value in start["headers"]}
        self.body = b"".join(m.get("body", b"") for m in messages[1:])

    @property
    def error(self):
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error["message"]


def ask(
    settings=None, path="/v1/models", method="GET", host="localhost:8000", body=(), app=echo, observe=None, left=None,
    **headers,
):  # fmt: skip
    """Returns the answer to one request.

    `body` is what arrives, piece by piece, None where the client leaves, and a number where it waits; what was not read
    is in `left`.
    """
    names = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    listed = [(b"host", host.encode())] if host is not None else []
    scope = {"type": "http", "method": method, "path": path, "headers": [*listed, *names.items()]}
    scope |= {"client": ("127.0.0.1", 5), "query_string": b"secret=1"}
    pieces, sent = list(body) if left is None else left, []

    async def receive():
        if not pieces:
            return {"type": "http.request", "body": b"", "more_body": False}
        piece = pieces.pop(0)
        if piece is None:
            return {"type": "http.disconnect"}
        if isinstance(piece, float):
            await asyncio.sleep(piece)
            piece = b""
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message):
        sent.append(dict(message))

    asyncio.run(guard(app, settings or Settings(), observe)(scope, receive, send))
    return Answer(sent)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LOCALHOST:1",
        "localhost.",
        "127.0.0.1:8000",
        "[::1]:8000",
        "[::1]",
        "10.1.2.3:80",
    ],
)
def test_its_own_names_and_addresses_are_served(host):
    assert ask(host=host).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:8000", "", None, "localhost:x", "127.0.0.1.nip.io"]
)
def test_another_name_in_the_host_header_is_refused(host):
    """A name that someone makes point here (DNS rebinding) would make a browser take this server for theirs."""
    answer = ask(host=host)
    assert answer.status == 421 and "--allow-host" in answer.error


def test_names_that_were_asked_for_are_served():
    assert ask(Settings(hosts=("evil.example",)), host="Evil.example:80").status == 200
    assert ask(Settings(hosts=("*",)), host="any.example").status == 200
    assert ask(Settings(hosts=("*",)), host="").status == 421


SECRET = Settings(api_keys=("other", KEY))


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/v1/chat/completions", "/health/", "//"])
def test_everything_but_health_and_pages_wants_a_key(path):
    answer = ask(SECRET, path=path)
    assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer" and "Bearer KEY" in answer.error
    assert ask(SECRET, path=path, authorization=f"Bearer {KEY}").status == 200
    assert ask(SECRET, path=path, authorization="bearer other").status == 200


@pytest.mark.parametrize(
    "given", ["Bearer", "Bearer ", "Bearer sk-012345678", f"Bearer {KEY}0", f"Basic {KEY}", KEY, "Bearer é"]
)
def test_another_key_is_refused(given):
    assert ask(SECRET, authorization=given).status == 401


def test_health_and_pages_are_open():
    for path in ("/health", "/", "/docs"):
        assert ask(SECRET, path=path).status == 200
    assert ask(Settings(api_keys=(KEY,), page=False), path="/").status == 401


def test_keys_are_compared_in_constant_time(monkeypatch):
    """With every key, also after one that fits, and also where none was given."""
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(len(a) == len(b)) or a == b)
    for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "Bearer " + "x" * 1000}):
        compared.clear()
        ask(SECRET, **headers)
        assert compared == [True, True]


def test_a_body_above_the_limit_is_refused_before_it_is_parsed():
    small = Settings(max_body=10)
    assert ask(small, method="POST", body=[b"12345", b"67890"], content_length="10").body == b"/v1/models 1234567890"
    for length in ("11", "9" * 30, "-1", "1e3"):
        assert ask(small, method="POST", body=[b"1"], content_length=length).status == 413
    answer = ask(small, method="POST", body=[b"12345", b"678901", b"2" * 99], transfer_encoding="chunked")
    assert answer.status == 413 and answer.error == "body: expected at most 10 bytes"


def test_a_refused_client_may_finish_sending_within_bounds(monkeypatch):
    """Else its connection would break before it has read why."""
    for settings in (SECRET, Settings(max_body=10)):
        pieces = [b"1" * 2**20] * 3
        assert ask(settings, method="POST", body=pieces, content_length=str(3 * 2**20), left=pieces).status in (
            401,
            413,
        )
        assert pieces == []
    monkeypatch.setattr("mpt_eqx.serve.guards.DROP_SECONDS", 0.02)
    assert ask(SECRET, method="POST", body=[b"1", 9.0, b"2"], content_length="3").status == 401
    endless = [b"1" * 2**20] * 70
    assert ask(SECRET, method="POST", body=endless, content_length="99999999", left=endless).status == 401 and endless
    waits = [b"1"]
    assert ask(SECRET, method="POST", body=waits, content_length="1", expect="100-continue", left=waits).status == 401
    assert waits


def test_a_body_that_does_not_come_is_not_waited_for():
    answer = ask(Settings(timeout=0.02), method="POST", body=[b"1", 9.0, b"2"], content_length="2")
    assert answer.status == 408 and answer.error == "body: expected all of it within 0.02 seconds"
    assert ask(method="POST", body=[b"1", None], content_length="2").status is None


def test_pages_of_other_origins_read_nothing_and_ask_for_nothing():
    assert "access-control-allow-origin" not in ask(origin="https://evil.example").headers
    answer = ask(method="POST", origin="https://evil.example")
    assert answer.status == 403 and "--allow-origin" in answer.error
    assert ask(method="POST", origin="null").status == 403
    assert ask(method="POST", origin="http://localhost:8000").status == 200
    assert ask(method="OPTIONS", origin="https://evil.example", access_control_request_method="POST").status == 403


def test_pages_of_origins_that_were_asked_for_get_cors():
    ours = Settings(origins=("https://ours.example",), api_keys=(KEY,))
    preflight = ask(
        ours, method="OPTIONS", origin="https://ours.example", access_control_request_method="POST",
        access_control_request_headers="authorization, content-type",
    )  # fmt: skip
    assert preflight.status == 204 and preflight.body == b""
    assert preflight.headers["access-control-allow-headers"] == "authorization, content-type"
    answer = ask(ours, method="POST", origin="https://ours.example", authorization=f"Bearer {KEY}")
    assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "https://ours.example"
    assert answer.headers["vary"] == "Origin" and "access-control-allow-credentials" not in answer.headers
    assert ask(ours, method="POST", origin="https://ours.example").status == 401
    assert "access-control-allow-origin" not in ask(ours, origin="https://evil.example").headers


def test_every_answer_has_the_headers_of_security_and_does_not_tell_the_server():
    for answer in (ask(), ask(host="evil.example")):
        assert answer.headers["x-content-type-options"] == "nosniff" and "server" not in answer.headers
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_the_policy_of_a_page_names_its_script_and_no_other_place():
    for path in ("/", "/docs"):
        page, policy = read_page(path)
        assert page.count(b"<script>") == page.count(b"<style>") == 1 and b"://" not in page.replace(
            b"http://www.w3.org", b""
        )
        assert "unsafe" not in policy and "default-src 'none'" in policy and policy.count("sha256-") == 2
        assert b"innerHTML" not in page and b" style=" not in page and b" onclick=" not in page


def lines(caplog):
    return [json.loads(record.message) for record in caplog.records if record.name == "mpt_eqx.serve.access"]


def test_each_request_is_a_line_of_json(caplog):
    caplog.set_level(logging.INFO, "mpt_eqx.serve.access")
    ask(method="POST", path='/v1/"\n', body=[b"ab"], content_length="2")
    ask(host="evil.example")
    ask(method="POST", body=[None], content_length="2")
    first, refused, gone = lines(caplog)
    assert 0 <= first.pop("seconds") < 5 and first.pop("time").endswith("+00:00")
    assert first == {
        "method": "POST", "path": '/v1/"\n', "status": 200, "complete": True, "client": "127.0.0.1", "bytes": 9,
        "model": "base", "prompt_tokens": 7,
    }  # fmt: skip
    assert "secret" not in caplog.text and "\n" not in caplog.records[0].message
    assert refused["status"] == 421 and "model" not in refused
    assert (gone["status"], gone["complete"]) == (499, False)


def test_a_failure_tells_the_client_nothing_of_the_program(caplog):
    async def broken(scope, receive, send):
        raise RuntimeError("secret")

    answer = ask(app=broken)
    assert answer.status == 500 and answer.error == "the server failed at this request; its log has the reason"
    assert "secret" in caplog.text


def test_a_failure_in_the_middle_of_an_answer_closes_the_connection():
    async def broken(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        ask(app=broken)


def test_what_has_ended_is_observed():
    seen = []
    ask(observe=lambda *args: seen.append(args[:2]))
    ask(SECRET, path="/metrics", observe=lambda *args: seen.append(args[:2]))
    assert seen == [("/v1/models", 200), ("/metrics", 401)]


def test_only_http_gets_in():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(guard(echo, Settings())({"type": "websocket", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
