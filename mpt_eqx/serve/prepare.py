"""From what a client asks for to the engine's requests. This may take a while: it runs outside of the event loop."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mpt_eqx.generation.sampling_params import check_options
from mpt_eqx.interp import Add
from mpt_eqx.model.taps import Edit
from mpt_eqx.serve.constraints import Compile
from mpt_eqx.serve.errors import APIError
from mpt_eqx.serve.requests import Constraint, Request
from mpt_eqx.serve.schemas import ChatRequest, CompletionRequest, GenerationFields, Message, SteeringVector, given
from mpt_eqx.serve.settings import ServedModel, Settings
from mpt_eqx.text.tokenizer import Tokenizer, ends_in_stop

COMPLETION_TOKENS = 16
"""New tokens of a completion whose request does not say how many, as OpenAI has it."""

END_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""What ends an answer in a chat, beside the model's end-of-sequence tokens, if the tokenizer has them."""

STOP_CONTEXT = 256
"""So many tokens of a prompt are looked at for the text of the new tokens that follow it."""

OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "epsilon_cutoff": "epsilon_cutoff",
    "eta_cutoff": "eta_cutoff",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "min_tokens": "min_new_tokens",
}
"""Fields of a request, and the names that `generate` has for them."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request for completions or chat, as the engine takes it and as its answer is written.

    Attributes:
        model: the model that answers.
        prompts: token ids of each prompt.
        texts: of each prompt, where it came as text.
        requests: n for each prompt, those of the first come first.
        n: answers to each prompt.
        stops: texts before which an answer ends.
        ends: tokens that end an answer.
        logprobs: whether log-probabilities are wanted.
        top: how many of the likeliest tokens are.
        echo: whether prompts come before their continuations.
    """

    model: ServedModel
    prompts: list[list[int]]
    texts: list[str | None]
    requests: list[Request]
    n: int
    stops: list[str]
    ends: frozenset[int]
    logprobs: bool
    top: int
    echo: bool


@dataclasses.dataclass(frozen=True)
class Server:
    """What requests are prepared with.

    Attributes:
        models: by name.
        compilers: of `response_format`, by the name of a model.
        contexts: the most tokens of a prompt and its answer, by the name of a model.
        settings: how requests are treated.
    """

    models: Mapping[str, ServedModel]
    compilers: Mapping[str, Compile]
    contexts: Mapping[str, int]
    settings: Settings

    def model(self, name: str | None) -> ServedModel:
        """Returns the model of a name, the first one without.

        Raises:
            APIError: there is none of that name.
        """
        found = next(iter(self.models.values())) if name is None else self.models.get(name)
        if found is None:
            names = ", ".join(self.models)
            raise APIError(
                404, f"model: expected one of {names}, found {name!r:.100}", param="model", code="model_not_found"
            )
        return found


def prepare_completion(server: Server, fields: CompletionRequest, client: str) -> Asked:
    """Returns what a request for completions asks for.

    Raises:
        APIError, MPTError: something in it is not valid.
    """
    model = server.model(fields.model)
    prompt = fields.prompt
    several: list[Any] = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    prompts = [_encode(model.tokenizer, one) if isinstance(one, str) else one for one in several]
    texts = [one if isinstance(one, str) else None for one in several]
    room = server.contexts[model.name] - max(map(len, prompts))
    default = min(model.defaults.get("max_new_tokens", COMPLETION_TOKENS), max(room, 1))
    return _asked(
        server, fields, client, model, prompts, texts,
        max_new_tokens=default if fields.max_tokens is None else fields.max_tokens,
        ends=_ends(model), logprobs=fields.logprobs is not None, top=fields.logprobs or 0, echo=bool(fields.echo),
    )  # fmt: skip


def prepare_chat(server: Server, fields: ChatRequest, client: str) -> Asked:
    """Returns what a request to answer a conversation asks for.

    Raises:
        APIError, MPTError: something in it is not valid.
    """
    model = server.model(fields.model)
    if fields.top_logprobs and not fields.logprobs:
        raise APIError(400, "top_logprobs: expected logprobs=true with it, found none", param="top_logprobs")
    prompt = encode_messages(model, fields.messages)
    room = max(server.contexts[model.name] - len(prompt), 1)
    asked = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    ends = {*_ends(model), *model.tokenizer.ids_of(END_TOKENS)}
    return _asked(
        server, fields, client, model, [prompt], [None],
        max_new_tokens=min(model.defaults.get("max_new_tokens", room), room) if asked is None else asked,
        ends=sorted(ends), logprobs=bool(fields.logprobs), top=fields.top_logprobs or 0, echo=False,
    )  # fmt: skip


def encode_messages(
    model: ServedModel, messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> list[int]:
    """Returns the prompt of a conversation, in which special tokens are plain text.

    Raises:
        MPTError: there is no template, or it refuses the messages.
    """
    # "developer" is OpenAI's newer word for "system".
    said = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        for message in messages
    ]
    return model.tokenizer.apply_chat_template(
        said, chat_template=model.chat_template, add_generation_prompt=add_generation_prompt
    )


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the tokens of a prompt; of an empty one, the token that begins texts, else one that ends them."""
    starts = (*([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), *tokenizer.eos_token_ids)
    return tokenizer.encode(text) or list(starts[:1])


def _ends(model: ServedModel) -> list[int]:
    return sorted({*model.defaults.get("eos_token_ids", ()), *model.tokenizer.eos_token_ids})


def _asked(
    server: Server,
    fields: GenerationFields,
    client: str,
    model: ServedModel,
    prompts: list[list[int]],
    texts: list[str | None],
    *,
    max_new_tokens: int,
    ends: list[int],
    logprobs: bool,
    top: int,
    echo: bool,
) -> Asked:
    """Returns the engine's requests for n answers to each prompt."""
    context, size, tokenizer = server.contexts[model.name], model.config.vocab_size, model.tokenizer
    for number, prompt in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt[{number}]"
        if not prompt:
            raise APIError(400, f"{where}: expected at least one token, found none", param="prompt")
        _check_ids(where, prompt, size, "prompt")
        if (room := context - len(prompt)) < max_new_tokens:
            raise APIError(
                400,
                f"max_tokens: {where} has {len(prompt)} tokens of {context}, which leaves {max(room, 0)} for new ones, "
                f"found {max_new_tokens}",
                param="max_tokens" if room > 0 else "messages" if isinstance(fields, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
    _check_ids("stop_token_ids", fields.stop_token_ids or (), size, "stop_token_ids")
    if fields.min_tokens is not None and fields.min_tokens > max_new_tokens:
        raise APIError(
            400, f"min_tokens: expected at most max_tokens={max_new_tokens}, found {fields.min_tokens}",
            param="min_tokens",
        )  # fmt: skip
    ends = [] if fields.ignore_eos else sorted({*ends, *(fields.stop_token_ids or ())})
    options = {name: value for name, value in model.defaults.items() if name in {*OPTIONS.values(), "pad_token_id"}}
    options = {"temperature": 1.0, **options, **given(fields, OPTIONS), "eos_token_ids": ends}
    for name, off in (("top_k", (-1, 0)), ("no_repeat_ngram_size", (0,))):
        if options.get(name) in off:
            del options[name]
    if fields.min_tokens is None and "min_new_tokens" in options:
        options["min_new_tokens"] = min(options["min_new_tokens"], max_new_tokens)
    if tokenizer.vocab_size < size:
        options["vocab_size"] = tokenizer.vocab_size
    sampling = check_options(model.config, max_new_tokens, options, caller="the server", least=0)
    stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    n = fields.n or 1
    constrain = _constraint(server.compilers[model.name], fields, ends)
    seed = secrets.randbits(62) if fields.seed is None else fields.seed
    bias, edits = _bias(fields, size), _edits(server, fields.edits or [], model)
    deadline = time.monotonic() + server.settings.timeout
    requests = [
        Request(
            model=model.name, prompt=tuple(prompt), max_new_tokens=max_new_tokens, sampling=sampling, seed=seed,
            choice=place * n + number, bias=bias, top_logprobs=top, prompt_logprobs=echo and logprobs,
            until=_until(tokenizer, stops, prompt) if stops else None,
            constraint=None if constrain is None else constrain(), edits=edits, deadline=deadline, client=client,
        )
        for place, prompt in enumerate(prompts)
        for number in range(n)
    ]  # fmt: skip
    return Asked(model, prompts, texts, requests, n, stops, frozenset(ends), logprobs, top, echo)


def _check_ids(where: str, tokens: Sequence[int], size: int, param: str) -> None:
    if wrong := [token for token in tokens if not 0 <= token < size]:
        raise APIError(400, f"{where}: expected token ids from 0 to {size - 1}, found {wrong[0]}", param=param)


def _until(tokenizer: Tokenizer, stops: list[str], prompt: list[int]) -> Callable[[list[int]], bool]:
    context = prompt[-STOP_CONTEXT:]
    return lambda tokens: ends_in_stop(tokenizer, tokens, stops, context)


def _constraint(compile: Compile, fields: GenerationFields, ends: list[int]) -> Callable[[], Constraint] | None:
    return None if fields.response_format is None else compile(fields.response_format, ends)


def _bias(fields: GenerationFields, size: int) -> dict[int, float]:
    """Returns what is added to logits, by token.

    Raises:
        APIError: a key is no token id.
    """
    bias = {}
    for key, value in (fields.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < size):
            raise APIError(
                400, f"logit_bias: expected token ids from 0 to {size - 1}, found {key!r:.40}", param="logit_bias"
            )
        bias[int(key)] = value
    return bias


def _edits(server: Server, vectors: Sequence[SteeringVector], model: ServedModel) -> dict[str, Edit]:
    """Returns the edits of activations by place.

    Raises:
        APIError: the server does not allow them, or one does not fit the model.
    """
    if vectors and not server.settings.edits:
        raise APIError(400, "edits: not allowed by this server; start it with --edits", param="edits")
    edits: dict[str, Edit] = {}
    for number, asked in enumerate(vectors):
        layers, width = model.config.n_layers, model.config.d_model
        where = f"edits[{number}]"
        if asked.layer >= layers:
            raise APIError(400, f"{where}.layer: expected 0 to {layers - 1}, found {asked.layer}", param="edits")
        if len(asked.vector) != width:
            raise APIError(400, f"{where}.vector: expected {width} numbers, found {len(asked.vector)}", param="edits")
        place = f"blocks.{asked.layer}.hook_resid_post"
        if place in edits:
            raise APIError(400, f"{where}.layer: expected each layer once, found {asked.layer} again", param="edits")
        with np.errstate(over="ignore"):
            vector = np.asarray(asked.vector, np.float32)
        if not np.isfinite(vector).all():
            raise APIError(400, f"{where}.vector: expected numbers that fit float32, found larger ones", param="edits")
        edits[place] = Add(vector, positions=slice(asked.start, None))
    return edits
