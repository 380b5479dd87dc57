"""What clients send: the fields of requests, and those that are refused by name."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mpt_eqx.errors import printable
from mpt_eqx.serve.errors import APIError
from mpt_eqx.serve.requests import TOP

MAX_PROMPTS = 1024
MAX_STOPS = 16
MAX_STOP = 256
MAX_BIAS = 1024
INT64 = 2**63

IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "prompt_cache_options"),
}
"""Fields that change no answer of this server."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "use_beam_search": (False,),
    "annotations": ([],),
    "tool_calls": ([],),
}
"""Fields that are not supported, with the values that change nothing; null never does."""

INSTEAD = {
    "presence_penalty": "repetition_penalty is supported",
    "frequency_penalty": "repetition_penalty is supported",
    "best_of": "expected the value of n",
    "tools": "this model has no format for tools",
    "functions": "this model has no format for functions",
}


def _text_or_texts(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if value is not None and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise ValueError("expected a text or a list of texts")
    if value is not None and not (len(texts) <= MAX_STOPS and all(0 < len(text) <= MAX_STOP for text in texts)):
        raise ValueError(f"expected at most {MAX_STOPS} texts of 1 to {MAX_STOP} characters")
    return value


def _prompt(value: Any) -> Any:
    kinds = {type(item) for item in value} if isinstance(value, list) else set()
    if isinstance(value, str) or kinds == {int}:
        return value
    if kinds == {str} or (kinds == {list} and all({type(token) for token in item} == {int} for item in value)):
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"expected at most {MAX_PROMPTS} prompts, found {len(value)}")
        return value
    raise ValueError("expected a text, a list of texts, token ids, or a list of token ids for each prompt")


def _content(value: Any) -> Any:
    if value is None or not isinstance(value, (str, list)):
        raise ValueError("expected a text, or a list of parts of type 'text'")
    for part in value if isinstance(value, list) else []:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            found = f"one of type {printable(repr(kind), limit=40)}"
            raise ValueError(f"expected parts of type 'text', found {found}; this model reads text only")
    return value


class Fields(BaseModel):
    """Fields that are not named here are kept, for `check_others` to refuse."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class StreamOptions(Fields):
    """How an answer is streamed."""

    include_usage: bool | None = None
    """Whether a last chunk tells the numbers of tokens."""
    include_obfuscation: bool | None = None
    """Does nothing."""


class JSONSchema(Fields):
    """A JSON schema by name."""

    schema_: dict[str, Any] = Field(alias="schema")
    """What the answer must be."""
    name: str | None = None
    """Does nothing."""
    description: str | None = None
    """Does nothing."""
    strict: bool | None = None
    """Does nothing: answers always are what the schema says."""


class ResponseFormat(Fields):
    """What an answer must be; anything but "text" needs the extra `grammar` on the server."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    """`regex` is an extension."""
    json_schema: JSONSchema | None = None
    """With the type `json_schema`."""
    regex: str | None = None
    """With the type `regex`: a regular expression for all of the answer."""


class SteeringVector(Fields):
    """A vector that is added to the activations after a block."""

    layer: int = Field(ge=0)
    """The block's number, from 0."""
    vector: list[float]
    """As many numbers as the model is wide (`d_model`)."""
    start: int = Field(default=0, ge=0, lt=2**31)
    """The first position that is changed; the prompt begins at 0."""


class GenerationFields(Fields):
    """What requests for completions and for chat have in common."""

    model: str | None = None
    """The model's name; the first of `/v1/models` without."""
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    """The most new tokens."""
    stream: bool | None = None
    """Whether the answer comes in pieces, as server-sent events."""
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    """How many answers to each prompt."""
    stop: Annotated[str | list[str] | None, BeforeValidator(_text_or_texts)] = None
    """Texts before which an answer ends."""
    stop_token_ids: list[int] | None = Field(default=None, max_length=16)
    """An extension: tokens that end an answer, beside the model's own."""
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    """The same seed gives the same answer; without one it is random."""
    temperature: float | None = Field(default=None, ge=0)
    """0 takes the likeliest token each time."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    """An extension; −1 and 0 do nothing."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """An extension."""
    typical_p: float | None = Field(default=None, gt=0, le=1)
    """An extension."""
    epsilon_cutoff: float | None = Field(default=None, ge=0, lt=1)
    """An extension."""
    eta_cutoff: float | None = Field(default=None, ge=0, lt=1)
    """An extension."""
    repetition_penalty: float | None = Field(default=None, gt=0)
    """An extension; 1 does nothing."""
    no_repeat_ngram_size: int | None = Field(default=None, ge=0, lt=2**31)
    """An extension; 0 does nothing."""
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    """An extension: the fewest new tokens."""
    ignore_eos: bool | None = None
    """An extension: whether end-of-sequence tokens do not end the answer."""
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=MAX_BIAS)
    """What is added to the logits of tokens, by their ids."""
    response_format: ResponseFormat | None = None
    edits: list[SteeringVector] | None = None
    """An extension, where the server was started with it: vectors that steer the answer."""


class CompletionRequest(GenerationFields):
    """A request to continue prompts."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_prompt)]
    echo: bool | None = None
    """Whether prompts come before their continuations; with `logprobs`, those of the prompts, too."""
    logprobs: Annotated[int | None, BeforeValidator(lambda value: None if value is False else value)] = Field(
        default=None, ge=0, le=TOP
    )
    """How many of the likeliest tokens to tell at each place, beside the one that came."""


class Message(Fields):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[Any], BeforeValidator(_content)]
    name: str | None = None
    """Does nothing."""


class ChatRequest(GenerationFields):
    """A request to answer a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    """The most new tokens."""
    logprobs: bool | None = None
    """Whether to tell the log-probability of each token."""
    top_logprobs: int | None = Field(default=None, ge=0, le=TOP)
    """How many of the likeliest tokens to tell at each place; with `logprobs`."""


class TokenizeRequest(Fields):
    """A text, or a conversation, whose tokens are wanted."""

    model: str | None = None
    prompt: str | None = None
    """The text."""
    messages: list[Message] | None = Field(default=None, min_length=1)
    """The conversation, in place of a text."""
    add_special_tokens: bool | None = None
    """Whether a text gets the tokens that begin and end texts, where the tokenizer has such; true without."""
    add_generation_prompt: bool | None = None
    """Whether a conversation ends where an answer begins; true without."""


class DetokenizeRequest(Fields):
    """Tokens whose text is wanted."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


def check_others(fields: Fields, where: str = "") -> None:
    """Raises unless the fields that have no meaning here do nothing; `where` is what stands before their names.

    Raises:
        APIError: one would change the answer.
    """
    for name, value in (fields.model_extra or {}).items():
        allowed = NEUTRAL.get(name, ())
        if name == "best_of":
            allowed = (getattr(fields, "n", None) or 1,)
        if value is None or name in IGNORED or any(value == neutral for neutral in allowed):
            continue
        param = f"{where}{name}"
        if name in NEUTRAL or name in INSTEAD:
            hint = INSTEAD.get(name, "leave it out")
        else:
            near = difflib.get_close_matches(name, type(fields).model_fields)
            hint = f"did you mean {' or '.join(near)}?" if near else "leave it out"
        raise APIError(400, f"{printable(param)}: not supported by this server; {hint}", param=param)
    for name, field in dict(fields).items():
        if name in type(fields).model_fields:
            _check_nested(field, f"{where}{name}")


def _check_nested(value: Any, where: str) -> None:
    if isinstance(value, Fields):
        check_others(value, f"{where}.")
    elif isinstance(value, list):
        for at, item in enumerate(value):
            if isinstance(item, Fields):
                check_others(item, f"{where}[{at}].")


def given(fields: Fields, names: Mapping[str, str]) -> dict[str, Any]:
    """Returns those of some fields that a request has, under other names."""
    values = {other: getattr(fields, name) for name, other in names.items()}
    return {name: value for name, value in values.items() if value is not None}
