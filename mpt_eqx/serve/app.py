"""The HTTP interface: OpenAI's, with a few extensions."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

import mpt_eqx
from mpt_eqx.errors import MPTError
from mpt_eqx.serve.answers import Answer
from mpt_eqx.serve.constraints import compiler
from mpt_eqx.serve.engine import Engine
from mpt_eqx.serve.errors import APIError, add_handlers, api_error, as_json
from mpt_eqx.serve.events import client_of, follow
from mpt_eqx.serve.metrics import CONTENT_TYPE, Metrics
from mpt_eqx.serve.pages import add_pages
from mpt_eqx.serve.prepare import Asked, Server, encode_messages, prepare_chat, prepare_completion
from mpt_eqx.serve.responses import streamed, whole
from mpt_eqx.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationFields,
    TokenizeRequest,
    check_others,
)
from mpt_eqx.serve.settings import ServedModel, Settings

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Proxies are to pass events on at once."""


class StrictRequest(HTTPRequest):
    """A request whose body is JSON as its standard has it: without NaN and Infinity, and not too deep."""

    async def json(self) -> Any:
        """Returns the body."""
        body = await self.body()
        try:
            return await asyncio.to_thread(parse_json, body)
        except (ValueError, RecursionError) as error:
            found = "one that is too deep" if isinstance(error, RecursionError) else error
            raise HTTPException(400, f"body: expected valid JSON in UTF-8, found {found}") from None


class StrictRoute(APIRoute):
    """A route that reads such requests."""

    def get_route_handler(self) -> Callable[[HTTPRequest], Coroutine[Any, Any, Response]]:
        """Returns what answers a request."""
        handle = super().get_route_handler()

        async def handle_strictly(request: HTTPRequest) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


def parse_json(body: bytes) -> Any:
    """Returns what a JSON document says.

    Raises:
        ValueError, RecursionError: it is not valid.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name}, which is no JSON")

    value = json.loads(body.decode(), parse_constant=refuse)
    if re.search(rb"\\u[dD][89a-fA-F]", body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half of a character, {error.object[error.start]!r}") from None
    return value


def create_app(
    engine: Engine, models: Mapping[str, ServedModel], settings: Settings, metrics: Metrics | None = None
) -> FastAPI:
    """Returns the application that serves an engine's models.

    Args:
        engine: started, now or later.
        models: by the names that clients call them; the first one answers requests without a name.
        settings: how requests are treated.
        metrics: what `/metrics` shows, which is not there without.
    """
    server = Server(
        models, {name: compiler(model) for name, model in models.items()},
        {name: engine.context(name) for name in models}, settings,
    )  # fmt: skip
    app = FastAPI(title="mpt_eqx", version=mpt_eqx.__version__, docs_url=None, redoc_url=None)
    app.router.route_class = StrictRoute
    add_handlers(app)
    if settings.page:
        add_pages(app)
    _add_generation(app, engine, server, metrics)
    _add_texts(app, server)

    @app.get("/health")
    async def health() -> Response:
        """Tells whether requests are answered: 200 if so, 503 if not."""
        state = engine.health()
        return _json({"status": state}, 200 if state == "ready" else 503)

    if metrics is not None:

        @app.get("/metrics")
        async def show_metrics() -> Response:
            """Returns figures for Prometheus."""
            return Response(metrics.render(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def list_models() -> Response:
        """Lists the models."""
        return _json({"object": "list", "data": [_about(server, model) for model in models.values()]})

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        """Describes a model."""
        return _json(_about(server, server.model(name)))

    return app


def _add_generation(app: FastAPI, engine: Engine, server: Server, metrics: Metrics | None) -> None:
    """Adds the two endpoints that generate."""

    async def answer(
        http: HTTPRequest, fields: GenerationFields, prepare: Callable[..., Asked], chat: bool
    ) -> Response:
        try:
            check_others(fields)
            asked = await asyncio.to_thread(prepare, server, fields, client_of(http))
            http.state.model, http.state.prompt_tokens = asked.model.name, sum(map(len, asked.prompts))  # for the log
            answers: list[Answer] = []
            pieces = follow(http, engine, asked, answers, metrics)
            if not fields.stream:
                return _json(await whole(pieces, asked, answers, chat=chat))
            options = fields.stream_options
            with_usage = options is not None and bool(options.include_usage)
            chunks = streamed(pieces, asked, answers, chat=chat, with_usage=with_usage)
            # Until the first piece comes, an error has a status of its own.
            first = await anext(chunks)
        except Exception as error:
            raise api_error(error, type(fields).model_fields) from error
        return StreamingResponse(_chain(first, chunks), media_type="text/event-stream", headers=STREAM_HEADERS)

    @app.post("/v1/completions")
    async def completions(http: HTTPRequest, fields: CompletionRequest) -> Response:
        """Continues prompts."""
        return await answer(http, fields, prepare_completion, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: HTTPRequest, fields: ChatRequest) -> Response:
        """Answers a conversation."""
        return await answer(http, fields, prepare_chat, chat=True)


def _add_texts(app: FastAPI, server: Server) -> None:
    """Adds the endpoints for tokens and texts, as vLLM has them."""

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """Describes the first model's tokenizer: lm-evaluation-harness needs no other one then."""
        model = server.model(None)
        tokenizer = model.tokenizer
        begin, end = tokenizer.bos_token_id, next(iter(tokenizer.eos_token_ids), None)
        try:
            template = tokenizer.chat_template(model.chat_template)
        except MPTError:
            template = None
        names = {
            name: None if id_ is None else tokenizer.token_bytes(id_).decode(errors="replace")
            for name, id_ in (("bos_token", begin), ("eos_token", end))
        }
        return _json({**names, "pad_token": None, "chat_template": template})

    @app.post("/tokenize")
    async def tokenize(fields: TokenizeRequest) -> Response:
        """Returns the tokens of a text or a conversation."""
        check_others(fields)
        model = server.model(fields.model)
        if (fields.prompt is None) == (fields.messages is None):
            found = "none" if fields.prompt is None else "both"
            raise APIError(400, f"prompt: expected either prompt or messages, found {found}", param="prompt")

        def tokens() -> list[int]:
            if fields.prompt is not None:
                return model.tokenizer.encode(fields.prompt, add_special_tokens=fields.add_special_tokens is not False)
            return encode_messages(
                model, fields.messages or [], add_generation_prompt=fields.add_generation_prompt is not False
            )

        ids = await asyncio.to_thread(tokens)
        return _json({"tokens": ids, "count": len(ids), "max_model_len": server.contexts[model.name]})

    @app.post("/detokenize")
    async def detokenize(fields: DetokenizeRequest) -> Response:
        """Returns the text of tokens."""
        check_others(fields)
        tokenizer = server.model(fields.model).tokenizer
        return _json({"prompt": await asyncio.to_thread(tokenizer.decode, fields.tokens)})


def _about(server: Server, model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "mpt_eqx",
        "max_model_len": server.contexts[model.name],
        "chat_template": _template_of(model),
    }


def _template_of(model: ServedModel) -> str | None:
    """Returns "given" for a template of the adapter or the command line, "checkpoint" for the checkpoint's, or None."""
    try:
        model.tokenizer.chat_template(model.chat_template)
    except MPTError:
        return None
    return "checkpoint" if model.chat_template is None else "given"


def _json(value: Any, status: int = 200) -> Response:
    return Response(as_json(value), status, media_type="application/json")


async def _chain(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk
