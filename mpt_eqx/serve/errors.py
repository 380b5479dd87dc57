"""Errors as clients see them: the body that OpenAI's interface has for all of them, and their status."""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from mpt_eqx.errors import MPTError, printable
from mpt_eqx.serve.requests import Failure, QueueFullError, UnavailableError

logger = logging.getLogger(__name__)

RETRY_AFTER = {"Retry-After": "1"}
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
"""The type of an error by its status; "invalid_request_error" for others below 500, "server_error" from there on."""

INTERNAL = "the server failed at this request; its log has the reason"


class APIError(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        """Makes an error.

        Args:
            status: of HTTP.
            message: what was wrong.
            param: the field that was.
            code: a name for programs, where OpenAI has one.
        """
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Returns the error as OpenAI's interface has it."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        # Paths of requests may have what no encoding takes.
        param = None if self.param is None else printable(self.param)
        message = self.message.encode(errors="replace").decode()
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def as_json(value: Any) -> bytes:
    """Returns a value as JSON on one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")


def error_response(error: APIError, headers: Mapping[str, str] | None = None) -> Response:
    """Returns the response that tells a client of an error."""
    retry = RETRY_AFTER if error.status in (429, 503) else {}
    return Response(
        as_json(error.body()), error.status, headers={**retry, **(headers or {})}, media_type="application/json"
    )


def api_error(error: Exception, fields: Mapping[str, Any] | None = None) -> APIError:
    """Returns an exception as clients see it; what is no error of theirs goes to the log.

    Args:
        error: the exception.
        fields: those of the request: the one that a message begins with is `param`.
    """
    if isinstance(error, APIError):
        return error
    if isinstance(error, QueueFullError):
        return APIError(429, f"{error}", code="queue_full")
    if isinstance(error, UnavailableError):
        return APIError(503, f"{error}", code="unavailable")
    if isinstance(error, MPTError):
        named = re.match(r"\w+", str(error))
        return APIError(400, str(error), param=named[0] if named and named[0] in (fields or {}) else None)
    logger.error("a request failed", exc_info=error)
    return APIError(500, INTERNAL)


def failure_error(failure: Failure) -> APIError:
    """Returns the end of a sequence that was not completed as clients see it."""
    status = {"invalid": 400, "deadline": 504, "cancelled": 499, "internal": 500, "unavailable": 503}[failure.kind]
    return APIError(status, failure.message, code=failure.kind)


def field_error(error: RequestValidationError) -> APIError:
    """Returns what is wrong with the first invalid field."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]
    if first["type"] == "model_attributes_type" or not place:
        return APIError(400, f"body: expected a JSON object (application/json), found {_shown(first.get('input'))}")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = "expected a value, found none"
    elif first["type"] != "value_error":
        message = f"{message[:1].lower()}{message[1:]}, found {_shown(first.get('input'))}"
    return APIError(400, f"{printable(param)}: {message}", param=param)


def _shown(value: Any) -> str:
    """Returns a short form of a value."""
    return type(value).__name__ if isinstance(value, (list, dict, bytes)) else printable(repr(value), limit=60)


def add_handlers(app: FastAPI) -> None:
    """Makes every error of an application one of this form."""

    async def known(_: HTTPRequest, error: Exception) -> Response:
        return error_response(api_error(error))

    async def invalid(_: HTTPRequest, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(field_error(error))

    async def http(request: HTTPRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"{request.method} {printable(request.url.path)}: {message}; see /openapi.json for what there is"
        return error_response(APIError(error.status_code, message), error.headers)

    async def unknown(_: HTTPRequest, error: Exception) -> Response:
        return error_response(APIError(500, INTERNAL))  # the exception goes on, to the server's log

    for kind in (APIError, MPTError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unknown)
