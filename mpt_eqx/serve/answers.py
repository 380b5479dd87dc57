"""The text of an answer while its tokens arrive: whole characters, up to a stop string, with log-probabilities."""

import codecs
import dataclasses
from collections.abc import Callable, Sequence

from mpt_eqx.serve.prepare import Asked
from mpt_eqx.serve.requests import Chunk, End, Prompt, Top
from mpt_eqx.text.stops import split_at_stop
from mpt_eqx.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        id: the token.
        logprob: its log-probability in nats; None for the first one of a prompt.
        top: the likeliest tokens in its place.
        offset: where it begins in the text, in characters.
        ends: whether it is the one that ended the answer, which has no text.
    """

    id: int
    logprob: float | None
    top: Top
    offset: int
    ends: bool = False


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: what is new; it may be empty.
        tokens: those that begin in it.
        finish_reason: "stop" or "length" in the last piece.
    """

    text: str
    tokens: list[Token]
    finish_reason: str | None = None


@dataclasses.dataclass
class Answer:
    """One answer to one prompt.

    Attributes:
        asked: what it answers.
        number: which of the requests.
        add: gives the text that a token adds.
        offset: where the next token begins.
        shown: characters of the text that were given out.
        held: text that may become a stop string.
        waiting: tokens of which nothing was given out yet.
        stopped: whether a stop string was found.
        cached: tokens of the prompt that were in the cache of prefixes.
        new_tokens: how many were decoded, up to the one that completed a stop string.
    """

    asked: Asked
    number: int
    add: Callable[[int | None], str]
    offset: int = 0
    shown: int = 0
    held: str = ""
    waiting: list[Token] = dataclasses.field(default_factory=list)
    stopped: bool = False
    cached: int = 0
    new_tokens: int = 0


def start_answer(asked: Asked, number: int) -> Answer:
    """Returns an answer of which nothing has arrived."""
    return Answer(asked, number, asked.model.tokenizer.decoder(asked.prompts[number // asked.n]))


def read_event(answer: Answer, event: Prompt | Chunk | End) -> Piece | None:
    """Returns what an event adds to an answer; None if nothing can be told yet."""
    if isinstance(event, Prompt):
        return _read_prompt(answer, event)
    if isinstance(event, End):
        if answer.stopped:
            return Piece("", [], "stop")
        ready, held, stopped = split_at_stop(answer.held + answer.add(None), answer.asked.stops)
        return _give(answer, ready + held, "stop" if stopped else event.reason)
    text = ""
    ends = answer.asked.ends
    for token, logprob, top in zip(event.tokens, event.logprobs, event.top or [[]] * len(event.tokens), strict=True):
        if answer.stopped:
            break
        answer.new_tokens += 1
        answer.waiting.append(Token(token, logprob, top, answer.offset, ends=token in ends))
        piece = "" if token in ends else answer.add(token)
        answer.offset += len(piece)
        ready, answer.held, answer.stopped = split_at_stop(answer.held + piece, answer.asked.stops)
        text += ready
    return _give(answer, text, None) if text else None


def _give(answer: Answer, text: str, finish_reason: str | None) -> Piece:
    """Returns a piece of text with the tokens that begin in it; the last piece has all that are left."""
    answer.shown += len(text)
    tokens = [token for token in answer.waiting if finish_reason is not None or token.offset < answer.shown]
    answer.waiting = [token for token in answer.waiting if token.offset >= answer.shown]
    return Piece(text, tokens, finish_reason)


def _read_prompt(answer: Answer, event: Prompt) -> Piece | None:
    """Returns the prompt, where it is to be repeated."""
    asked = answer.asked
    answer.cached = event.cached
    if not asked.echo:
        return None
    place = answer.number // asked.n
    prompt, text = asked.prompts[place], asked.texts[place]
    decoded, offsets = text_of_tokens(asked.model.tokenizer, prompt)
    text = decoded if text is None else text
    answer.offset = answer.shown = len(text)
    logprobs = [None, *event.logprobs] if event.logprobs else [None] * len(prompt)
    tops = [[], *event.top] if event.top else [[]] * len(prompt)
    return Piece(text, [Token(*token) for token in zip(prompt, logprobs, tops, offsets, strict=True)])


def text_of_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[str, list[int]]:
    """Returns the text of tokens, special ones included, and where each of them begins, in characters."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, offsets = "", []
    for token in tokens:
        offsets.append(len(text))
        text += decoder.decode(tokenizer.token_bytes(token))
    return text + decoder.decode(b"", final=True), offsets
