"""Answers as OpenAI's interface has them: one JSON object, or server-sent events."""

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import mpt_eqx
from mpt_eqx.serve.answers import Answer, Piece, Token
from mpt_eqx.serve.errors import api_error, as_json
from mpt_eqx.serve.prepare import Asked
from mpt_eqx.text.tokenizer import Tokenizer

LOWEST = -9999.0
"""In the place of −∞, which JSON does not have."""

Pieces = AsyncGenerator[tuple[int, Piece], None]
JSON = dict[str, Any]


def new_head(asked: Asked, *, chat: bool, stream: bool) -> JSON:
    """Returns what every object of an answer begins with."""
    kind = "chat.completion" if chat else "text_completion"
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": f"{kind}.chunk" if chat and stream else kind,
        "created": int(time.time()),
        "model": asked.model.name,
        "system_fingerprint": f"mpt_eqx-{mpt_eqx.__version__}",
    }


async def whole(pieces: Pieces, asked: Asked, answers: list[Answer], *, chat: bool) -> JSON:
    """Returns the answer as one object."""
    texts, tokens = [""] * len(asked.requests), [list[Token]() for _ in asked.requests]
    reasons: list[str | None] = [None] * len(asked.requests)
    async with contextlib.aclosing(pieces):
        async for number, piece in pieces:
            texts[number] += piece.text
            tokens[number] += piece.tokens
            reasons[number] = piece.finish_reason
    choices = []
    for number, text in enumerate(texts):
        said: JSON = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
        choice = {"index": number, **said, "logprobs": _logprobs(asked, tokens[number], chat=chat)}
        choices.append({**choice, "finish_reason": reasons[number]})
    return {**new_head(asked, chat=chat, stream=False), "choices": choices, "usage": usage(asked, answers)}


async def streamed(
    pieces: Pieces, asked: Asked, answers: list[Answer], *, chat: bool, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Yields the answer as server-sent events; the last one is [DONE], or an error after the first.

    Raises:
        Exception: the first piece is an error.
    """
    head, begun = new_head(asked, chat=chat, stream=True), set[int]()
    extra: JSON = {"usage": None} if with_usage else {}
    try:
        async with contextlib.aclosing(pieces):
            async for number, piece in pieces:
                for choice in _choices(asked, number, piece, first=number not in begun, chat=chat):
                    begun.add(number)
                    yield _event({**head, "choices": [choice], **extra})
    except Exception as error:
        if not begun:
            raise
        yield _event(api_error(error).body())
        return
    if with_usage:
        yield _event({**head, "choices": [], "usage": usage(asked, answers)})
    yield b"data: [DONE]\n\n"


def usage(asked: Asked, answers: list[Answer]) -> JSON:
    """Returns the numbers of tokens; a prompt counts once, however many answers it has."""
    prompts = sum(map(len, asked.prompts))
    new = sum(answer.new_tokens for answer in answers)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": new,
        "total_tokens": prompts + new,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached for answer in answers[:: asked.n])},
    }


def _choices(asked: Asked, number: int, piece: Piece, *, first: bool, chat: bool) -> Iterator[JSON]:
    """Yields a piece as chunks have it; in a chat, the role comes first, and the reason of the end by itself."""
    logprobs = _logprobs(asked, piece.tokens, chat=chat) if piece.tokens else None
    if not chat:
        reason = piece.finish_reason
        yield {"index": number, "text": piece.text, "logprobs": logprobs, "finish_reason": reason}
        return
    said: list[tuple[JSON, Any, str | None]] = []
    if first:
        said.append(({"role": "assistant", "content": "", "refusal": None}, None, None))
    if piece.text or piece.tokens:
        said.append(({"content": piece.text}, logprobs, None))
    if piece.finish_reason is not None:
        said.append(({}, None, piece.finish_reason))
    for delta, shown, reason in said:
        yield {"index": number, "delta": delta, "logprobs": shown, "finish_reason": reason}


def _logprobs(asked: Asked, tokens: list[Token], *, chat: bool) -> JSON | None:
    """Returns the log-probabilities of tokens as the two interfaces have them."""
    if not asked.logprobs:
        return None
    tokenizer = asked.model.tokenizer
    if chat:
        # The tokens of the message: what ended it is none.
        shown = [token for token in tokens if not token.ends]
        content = [
            {
                **_chat_token(tokenizer, token.id, token.logprob),
                "top_logprobs": [_chat_token(tokenizer, *one) for one in token.top],
            }
            for token in shown
        ]
        return {"content": content, "refusal": None}
    return {
        "tokens": [_name(tokenizer, token.id) for token in tokens],
        "token_logprobs": [_number(token.logprob) for token in tokens],
        "top_logprobs": [_top(tokenizer, token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _top(tokenizer: Tokenizer, token: Token) -> dict[str, float | None] | None:
    """Returns the likeliest tokens and the one that came, by their texts; of two with the same text, the likelier."""
    if token.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for id_, logprob in (*token.top, (token.id, token.logprob)):
        # The same number as in token_logprobs: clients compare them.
        found.setdefault(_name(tokenizer, id_), _number(token.logprob if id_ == token.id else logprob))
    return found


def _chat_token(tokenizer: Tokenizer, token: int, logprob: float | None) -> JSON:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode(errors="replace"), "logprob": _number(logprob), "bytes": list(data)}


def _name(tokenizer: Tokenizer, token: int) -> str:
    """Returns the text of a token; of a part of a character its bytes, as OpenAI writes them."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(float(logprob), LOWEST)


def _event(value: JSON) -> bytes:
    return b"data: " + as_json(value) + b"\n\n"
