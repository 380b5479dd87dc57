"""What stands before the application: who may ask, from where, how much; and a line for each request."""

import asyncio
import contextlib
import datetime
import hashlib
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from mpt_eqx.serve.errors import INTERNAL, APIError, as_json
from mpt_eqx.serve.settings import Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Respond = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[MutableMapping[str, Any], Receive, Respond], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

OPEN = {"/health"}
"""What may be asked for without a key."""
PAGES = {"/", "/docs"}
"""The same, where there are pages: they are files without secrets, which ask for the key."""
SECURITY_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cache-control": b"no-store",
}
NOT_ANSWERED = 499
"""In the log: the client went away before there was an answer."""
DROP_BYTES, DROP_SECONDS = 64 * 2**20, 10.0
"""So much of the body of a refused request is waited for."""
LOGGED = ("model", "prompt_tokens", "completion_tokens")

access = logging.getLogger("mpt_eqx.serve.access")
log = logging.getLogger("mpt_eqx.serve")


def guard(app: ASGIApp, settings: Settings, observe: Callable[[str, int, float], None] | None = None) -> ASGIApp:
    """Returns the application with everything before it that a request has to pass.

    Refusals have the shape of OpenAI's errors. Each request is a line of JSON on the logger `mpt_eqx.serve.access`, in
    which `model`, `prompt_tokens` and `completion_tokens` are what the application puts into `scope["state"]`.

    Args:
        app: the application, which sees only requests that passed.
        settings: hosts, origins, keys and the limit of a body.
        observe: called with the path, the status and the seconds of each request when it has ended.
    """
    digests = [_digest(key.encode()) for key in settings.api_keys]

    async def respond(scope: MutableMapping[str, Any], receive: Receive, send: Respond) -> None:
        if scope["type"] == "lifespan":
            return await app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        scope.setdefault("state", {})
        answer = _Answer(send, _shared_with(scope, settings))
        started = time.perf_counter()
        try:
            refusal = _refusal(scope, settings, digests)
            if refusal is None:
                inner = await _read_body(scope, receive, settings, answer)
                if inner is not None:
                    await app(scope, inner, answer.send)
            else:
                await _drop_body(scope, receive)
                await answer.refuse(*refusal)
        except Exception:
            log.exception("a request failed")
            if answer.status is None:
                await answer.refuse(500, INTERNAL, "internal_error")
            elif not answer.complete:
                raise  # the connection closes, so that half an answer does not look like all of it
        finally:
            seconds = time.perf_counter() - started
            _write_line(scope, answer, seconds)
            if observe is not None:
                observe(scope["path"], answer.status or NOT_ANSWERED, seconds)

    return respond


class _Answer:
    """What goes back: adds headers, and takes note of what was sent."""

    def __init__(self, send: Respond, headers: dict[bytes, bytes]):
        self._send, self._headers = send, headers
        self.status: int | None = None
        self.bytes, self.complete = 0, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(name, value) for name, value in message.get("headers", ()) if name.lower() != b"server"]
            names = {name.lower() for name, _ in own}
            message["headers"] = own + [pair for pair in self._headers.items() if pair[0] not in names]
        elif message["type"] == "http.response.body":
            self.bytes += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
        await self._send(message)

    async def refuse(self, status: int, message: str, code: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Sends an error."""
        body = b"" if status == 204 else as_json(APIError(status, message, code=code).body())
        own = [] if status == 204 else [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self.send({"type": "http.response.start", "status": status, "headers": own + list(headers)})
        await self.send({"type": "http.response.body", "body": body})


def _values(scope: MutableMapping[str, Any], name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


Refusal = tuple[int, str, str, Headers]


def _refusal(scope: MutableMapping[str, Any], settings: Settings, digests: list[bytes]) -> Refusal | None:
    """Returns the answer to a request that does not get to the application, or None."""
    host = b" ".join(_values(scope, b"host")).decode("latin-1")
    if not _is_known(host, settings.hosts):
        known = ", ".join(settings.hosts)
        message = f"Host: expected one of {known}, found {host!r:.100}; start the server with --allow-host to allow it"
        return 421, message, "unknown_host", []
    method, origins = scope["method"], _values(scope, b"origin")
    if origins:
        origin = origins[0].decode("latin-1")
        allowed = _is_allowed(origin, settings)
        if method == "OPTIONS" and allowed and _values(scope, b"access-control-request-method"):
            asked = b", ".join(_values(scope, b"access-control-request-headers"))
            granted = [(b"access-control-allow-methods", b"GET, POST"), (b"access-control-max-age", b"600")]
            return 204, "", "", granted + ([(b"access-control-allow-headers", asked)] if asked else [])
        # A page of another site could make this computer compute, even if its browser did not show it the answer.
        if not allowed and method not in ("GET", "HEAD") and urlsplit(origin).netloc.lower() != host.lower():
            message = f"Origin: expected this server's own pages, found {origin!r:.100}; start the server with "
            return 403, f"{message}--allow-origin to allow it", "unknown_origin", []
    public = OPEN | PAGES if settings.page else OPEN
    if digests and scope["path"] not in public and not _has_key(scope, digests):
        message = "Authorization: expected 'Bearer KEY' with one of the server's API keys"
        return 401, message, "invalid_api_key", [(b"www-authenticate", b"Bearer")]
    lengths = _values(scope, b"content-length")
    if lengths and (not lengths[0].isdigit() or len(lengths[0]) > 18 or int(lengths[0]) > settings.max_body):
        return _too_large(settings)
    return None


def _too_large(settings: Settings) -> Refusal:
    return 413, f"body: expected at most {settings.max_body} bytes", "request_too_large", []


def _is_known(host: str, hosts: tuple[str, ...]) -> bool:
    """Returns whether a Host header is one of `hosts`, or an address: only a name can be made to point elsewhere."""
    name = host.lower()
    if not name.endswith("]"):
        name, colon, port = name.rpartition(":") if ":" in name else (name, "", "")
        if colon and not port.isdigit():
            return False
    name = name.removesuffix(".")
    if name in {known.lower() for known in hosts} or ("*" in hosts and name):
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        return True
    except ValueError:
        return False


def _is_allowed(origin: str, settings: Settings) -> bool:
    return origin in settings.origins or "*" in settings.origins


def _shared_with(scope: MutableMapping[str, Any], settings: Settings) -> dict[bytes, bytes]:
    """Returns the headers of every answer, with those for a page of another origin that may read it."""
    origins = _values(scope, b"origin")
    cors = {b"vary": b"Origin"} if settings.origins else {}
    if origins and _is_allowed(origins[0].decode("latin-1"), settings):
        cors |= {b"access-control-allow-origin": origins[0], b"access-control-expose-headers": b"Retry-After"}
    return SECURITY_HEADERS | cors


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _has_key(scope: MutableMapping[str, Any], digests: list[bytes]) -> bool:
    """Returns whether there is a valid key; the time depends neither on the key nor on which one it is."""
    values = _values(scope, b"authorization")
    scheme, _, key = (values[0] if len(values) == 1 else b"").partition(b" ")
    found = _digest(key.strip())
    valid = [hmac.compare_digest(found, digest) for digest in digests]
    return any(valid) and scheme.lower() == b"bearer"


async def _drop_body(scope: MutableMapping[str, Any], receive: Receive) -> None:
    """Takes what a client still sends, within bounds: most read an answer only after that, and none if cut off."""
    if not _has_body(scope) or _values(scope, b"expect"):
        return
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DROP_SECONDS):
            while dropped < DROP_BYTES:
                message = await receive()
                dropped += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


def _has_body(scope: MutableMapping[str, Any]) -> bool:
    return bool(_values(scope, b"content-length") or _values(scope, b"transfer-encoding"))


async def _read_body(
    scope: MutableMapping[str, Any], receive: Receive, settings: Settings, answer: _Answer
) -> Receive | None:
    """Returns a `receive` that gives the whole body first; None where the request has ended because of it."""
    if not _has_body(scope):
        return receive
    body = bytearray()
    try:
        async with asyncio.timeout(settings.timeout):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > settings.max_body:
                    body.clear()
                    await _drop_body(scope, receive)
                    await answer.refuse(*_too_large(settings))
                    return None
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        late = f"body: expected all of it within {settings.timeout:g} seconds"
        await answer.refuse(408, late, "timeout", [(b"connection", b"close")])
        return None
    whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def inner() -> Message:
        return whole.pop() if whole else await receive()

    return inner


def _write_line(scope: MutableMapping[str, Any], answer: _Answer, seconds: float) -> None:
    if not access.isEnabledFor(logging.INFO):
        return
    client = scope.get("client")
    state = scope["state"]
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "method": scope["method"],
        "path": scope["path"],
        "status": answer.status or NOT_ANSWERED,
        "complete": answer.complete,
        "seconds": round(seconds, 4),
        "client": client[0] if client else None,
        "bytes": answer.bytes,
        **{name: state[name] for name in LOGGED if name in state},
    }
    access.info(json.dumps(line))
