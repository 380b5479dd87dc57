"""The HTTP interface with OpenAI's own client, and without: what comes back for each field, and what is refused."""

import json
import re

import httpx
import openai
import pytest
from serving import ScriptedEngine, on_port, saying, shipped

SAID = "Hello wörld 🙂, and <stop> beyond"
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model():
    return shipped()


@pytest.fixture(scope="module")
def said(model):
    return model.tokenizer.encode(SAID)


@pytest.fixture(scope="module")
def engine(said):
    """Says the same to everybody, and then ends."""
    return ScriptedEngine(saying([*said, 0]))


@pytest.fixture(scope="module")
def url(engine, model):
    from mpt_eqx.serve.app import create_app
    from mpt_eqx.serve.settings import Settings

    with on_port(create_app(engine, {"pydoc": model, "pydoc:other": shipped("pydoc:other")}, Settings())) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def post(url):
    """Posts a body, as JSON unless it is bytes, and returns the response."""
    with httpx.Client(base_url=url, timeout=30) as http:

        def post(path, body):
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return http.post(path, content=content, headers={"Content-Type": "application/json"})

        yield post


def refused(response, status=400):
    """Returns the message and the field of an error, whose shape is OpenAI's."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "Traceback" not in error["message"]
    return error["message"], error["param"]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["pydoc", "pydoc:other"]
    found = client.models.retrieve("pydoc:other")
    assert (found.id, found.created, found.owned_by, found.max_model_len) == (
        "pydoc:other", 1_700_000_000, "mpt_eqx", 256
    )  # fmt: skip
    with pytest.raises(openai.NotFoundError, match="expected one of pydoc, pydoc:other, found 'gpt'"):
        client.models.retrieve("gpt")


def test_a_completion(client, engine, model):
    found = client.completions.create(model="pydoc", prompt="The zip", max_tokens=64)
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (SAID, "stop", 0, None)
    assert found.object == "text_completion" and found.model == "pydoc" and found.id.startswith("cmpl-")
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2, 23, 25)
    assert usage.prompt_tokens_details.cached_tokens == 2
    assert engine.requests[-1].prompt == tuple(model.tokenizer.encode("The zip"))


def test_a_streamed_completion(client):
    chunks = list(client.completions.create(model="pydoc", prompt="The zip", max_tokens=64, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == SAID and len(chunks) > 4
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1 and all(chunk.usage is None for chunk in chunks)


def test_a_chat(client, engine, model):
    found = client.chat.completions.create(model="pydoc", messages=MESSAGES)
    (choice,) = found.choices
    assert choice.message.role == "assistant" and choice.message.content == SAID and choice.finish_reason == "stop"
    assert found.object == "chat.completion" and found.usage.completion_tokens == 23
    assert engine.requests[-1].prompt == tuple(model.tokenizer.apply_chat_template(MESSAGES))
    assert engine.requests[-1].max_new_tokens == 256 - 2  # what is left of the context


def test_a_streamed_chat_with_usage(client):
    chunks = list(
        client.chat.completions.create(
            model="pydoc", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    *answer, last = chunks
    assert answer[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == SAID
    assert answer[-1].choices[0].finish_reason == "stop" and {chunk.object for chunk in chunks} == {
        "chat.completion.chunk"
    }
    assert last.choices == [] and last.usage.completion_tokens == 23 and answer[0].usage is None


def test_what_a_stream_is(post):
    response = post("/v1/chat/completions", {"messages": MESSAGES, "stream": True})
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["X-Accel-Buffering"] == "no"
    *events, last, rest = response.text.split("\n\n")
    assert rest == "" and last == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events)


def test_several_prompts_and_answers_keep_their_order(client, engine):
    """Answer i to prompt p has the randomness of row n·p + i of `generate`."""
    before = len(engine.requests)
    found = client.completions.create(model="pydoc", prompt=["The zip", "Return"], n=2, max_tokens=3, seed=5)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.finish_reason for choice in found.choices] == ["length"] * 4
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (2 + 1, 12)
    asked = engine.requests[before:]
    assert [request.choice for request in asked] == [0, 1, 2, 3] and {request.seed for request in asked} == {5}
    assert asked[0].prompt == asked[1].prompt != asked[2].prompt
    texts = [""] * 4
    for chunk in client.completions.create(model="pydoc", prompt=[[5], [6]], n=2, max_tokens=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["Hello w"] * 4


def test_what_is_asked_for_by_default(client, engine):
    for _ in range(2):
        client.completions.create(model="pydoc", prompt="x")
    first, second = engine.requests[-2:]
    assert first.max_new_tokens == 16 and first.seed != second.seed and first.deadline > 0
    assert float(first.sampling.temperature) == 0  # the checkpoint's
    assert first.sampling.eos_token_ids.tolist()[0] == 0 and first.until is None and first.top_logprobs == 0


def test_defaults_are_those_of_the_checkpoint_then_openais(said):
    from mpt_eqx.serve.prepare import Server, prepare_chat, prepare_completion
    from mpt_eqx.serve.schemas import ChatRequest, CompletionRequest
    from mpt_eqx.serve.settings import Settings

    def server(**defaults):
        model = shipped(defaults=defaults)
        return Server({"pydoc": model}, {"pydoc": lambda asked, ends: None}, {"pydoc": 100}, Settings())

    def sampling(server, **fields):
        (request,) = prepare_completion(server, CompletionRequest(prompt=[1], **fields), "").requests
        return request.max_new_tokens, request.sampling

    count, plain = sampling(server())
    assert count == 16 and float(plain.temperature) == 1 and float(plain.top_p) == 1
    count, own = sampling(server(temperature=0.5, top_p=0.9, max_new_tokens=40, num_return_sequences=3))
    assert count == 40 and float(own.temperature) == 0.5 and float(own.top_p) == pytest.approx(0.9)
    count, asked = sampling(server(temperature=0.5, top_k=3, min_new_tokens=9), temperature=2.0, top_k=-1, max_tokens=4)
    assert count == 4 and float(asked.temperature) == 2 and int(asked.top_k) > 4096 and int(asked.min_new_tokens) == 4
    (request,) = prepare_chat(server(max_new_tokens=40), ChatRequest(messages=MESSAGES), "").requests
    assert request.max_new_tokens == 40
    (request,) = prepare_completion(server(), CompletionRequest(prompt=[1] * 95), "").requests
    assert request.max_new_tokens == 5  # a default gives way to the context


def test_options_of_sampling_reach_the_engine(client, engine):
    extra = {
        "top_k": 7, "min_p": 0.1, "typical_p": 0.8, "epsilon_cutoff": 0.1, "eta_cutoff": 0.2, "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 3, "min_tokens": 2, "stop_token_ids": [9],
    }  # fmt: skip
    client.completions.create(
        model="pydoc:other", prompt="x", max_tokens=5, temperature=0.7, top_p=0.9, logit_bias={"17": -100, "5": 1.5},
        seed=-3, extra_body=extra,
    )  # fmt: skip
    request = engine.requests[-1]
    options = {**extra, "min_new_tokens": 2, "temperature": 0.7, "top_p": 0.9}
    for name in set(options) - {"min_tokens", "stop_token_ids"}:
        assert getattr(request.sampling, name).item() == pytest.approx(options[name]), name
    assert request.model == "pydoc:other" and request.bias == {17: -100, 5: 1.5} and request.seed == -3
    assert {0, 9} <= set(request.sampling.eos_token_ids.tolist())
    client.completions.create(model="pydoc", prompt="x", extra_body={"ignore_eos": True})
    assert set(engine.requests[-1].sampling.eos_token_ids.tolist()) <= {-1}


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("<stop>", "Hello wörld 🙂, and ", 18),
        (["nothing", " 🙂"], "Hello wörld", 12),
        ("o", "Hell", 2),
        ("beyond and", SAID, 23),
    ],
)
def test_a_stop_string_ends_the_text_before_it(client, stop, text, tokens):
    """Wherever tokens and chunks begin and end, and half of one at the end stays."""
    ask = {"model": "pydoc", "prompt": "x", "max_tokens": 64, "stop": stop, "logprobs": 0}
    found = client.completions.create(**ask)
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason, found.usage.completion_tokens) == (text, "stop", tokens)
    assert all(at < len(text) for at in choice.logprobs.text_offset) or text == SAID
    chunks = list(client.completions.create(**ask, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "stop"
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens]
    assert streamed == choice.logprobs.tokens


def test_no_chunk_has_half_of_a_character(client, said):
    chunks = client.completions.create(model="pydoc", prompt="x", max_tokens=10, stream=True)
    texts = [chunk.choices[0].text for chunk in chunks]
    assert "\ufffd" not in "".join(texts[:-1]) and texts[-1] == "\ufffd"  # the answer ends within one


def test_log_probabilities_of_a_completion(client, said, model):
    (choice,) = client.completions.create(model="pydoc", prompt="x", max_tokens=64, logprobs=2).choices
    found = choice.logprobs
    assert found.token_logprobs == [-float(at) for at in range(23)]
    assert found.tokens[:5] == ["Hel", "lo", " w", "bytes:\\xc3", "bytes:\\xb6"] and found.tokens[-1] == "<|endoftext|>"
    assert found.text_offset[:6] == [0, 3, 5, 7, 7, 8] and found.text_offset[-1] == len(SAID)
    assert found.top_logprobs[1] == {"<|endoftext|>": -0.5, "!": -1.5, "lo": -1.0}


def test_log_probabilities_of_a_chat(client):
    ask = {"model": "pydoc", "messages": MESSAGES, "logprobs": True, "top_logprobs": 1}
    (choice,) = client.chat.completions.create(**ask).choices
    content = choice.logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode() == SAID
    assert content[3].token == "\ufffd" and content[3].bytes == [0xC3] and content[1].logprob == -1
    assert [(top.token, top.logprob) for top in content[1].top_logprobs] == [("<|endoftext|>", -0.5)]
    chunks = client.chat.completions.create(**ask, stream=True)
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert streamed == content


@pytest.mark.parametrize("as_ids", [True, False])
def test_echo_tells_of_the_prompt(client, engine, model, as_ids):
    """As the evaluation harness asks for it: the first token has no log-probability."""
    prompt = "zip🙂 <|endoftext|> it"
    ids = model.tokenizer.encode(prompt)
    ask = {"model": "pydoc", "prompt": [ids] if as_ids else prompt, "echo": True, "logprobs": 1}
    (choice,) = client.completions.create(**ask, max_tokens=0).choices
    assert engine.requests[-1].prompt_logprobs and engine.requests[-1].max_new_tokens == 0
    assert choice.text == prompt and choice.finish_reason == "length"
    found = choice.logprobs
    assert len(found.tokens) == len(found.text_offset) == len(ids)
    assert found.token_logprobs == [None] + [-1.0] * (len(ids) - 1)
    assert found.top_logprobs[0] is None and found.top_logprobs[-1] == {"<|endoftext|>": -0.5, " it": -1.0}
    assert [prompt[at] for at in found.text_offset[-3:]] == [" ", "<", " "]
    (longer,) = client.completions.create(**ask, max_tokens=1).choices
    assert longer.text == prompt + "Hel" and longer.logprobs.tokens == [*found.tokens, "Hel"]
    assert longer.logprobs.text_offset[-1] == len(prompt)
    chunks = list(client.completions.create(**ask, max_tokens=1, stream=True))
    assert chunks[0].choices[0].text == prompt and chunks[1].choices[0].text == "Hel"


def test_special_tokens_in_messages_are_plain_text(client, engine):
    parts = [{"type": "text", "text": "a<|endoftext|>"}, {"type": "text", "text": "b"}]
    client.chat.completions.create(model="pydoc", messages=[{"role": "developer", "content": parts}])
    assert 0 not in engine.requests[-1].prompt
    client.completions.create(model="pydoc", prompt="a<|endoftext|>")
    assert 0 in engine.requests[-1].prompt  # as in `generate`


def test_an_empty_prompt_is_the_token_that_ends_texts(client, engine):
    client.completions.create(model="pydoc", prompt="")
    assert engine.requests[-1].prompt == (0,)


def test_what_does_nothing_is_ignored(client, engine):
    client.chat.completions.create(
        model="pydoc",
        messages=[{"role": "user", "content": "a", "name": "A"}, {"role": "assistant", "content": "", "refusal": None}],
        user="u", metadata={"a": "b"}, store=True, presence_penalty=0, frequency_penalty=0.0, tools=[],
        tool_choice="none", parallel_tool_calls=True, service_tier="auto", n=1, modalities=["text"],
        safety_identifier="s", extra_body={"best_of": 1, "functions": None}, response_format={"type": "text"},
    )  # fmt: skip


def test_tokens_of_texts_and_conversations(post, model):
    found = post("/tokenize", {"model": "pydoc", "prompt": "Hello <|endoftext|>"}).json()
    assert found["tokens"][-1] == 0 and found["count"] == len(found["tokens"]) and found["max_model_len"] == 256
    assert post("/tokenize", {"prompt": "zip", "add_special_tokens": False}).json()["count"] == 1
    found = post("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}).json()["tokens"]
    assert found == model.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False)
    assert post("/detokenize", {"tokens": model.tokenizer.encode(SAID)}).json() == {"prompt": SAID}
    message, field = refused(post("/tokenize", {"prompt": "a", "messages": MESSAGES}))
    assert message == "prompt: expected either prompt or messages, found both" and field == "prompt"


def test_health(url, engine):
    assert (found := httpx.get(f"{url}/health")).status_code == 200 and found.json() == {"status": "ready"}
    for state in ("starting", "draining", "stopped", "dead", "stuck"):
        engine._health = state
        try:
            found = httpx.get(f"{url}/health")
        finally:
            engine._health = "ready"
        assert found.status_code == 503 and found.json() == {"status": state}


def test_pages_and_figures_are_there_when_asked_for(engine, model):
    from types import SimpleNamespace

    from mpt_eqx.serve.app import create_app
    from mpt_eqx.serve.settings import Settings

    app = create_app(engine, {"pydoc": model}, Settings(page=False))
    paths = {"/", "/docs", "/metrics"}
    assert not paths & {route.path for route in app.routes}
    metrics = SimpleNamespace(render=lambda: b"figures")
    app = create_app(engine, {"pydoc": model}, Settings(), metrics)
    assert paths <= {route.path for route in app.routes}


def test_edits_reach_an_engine_that_may_have_them(engine, model):
    import numpy as np

    from mpt_eqx.interp import Add
    from mpt_eqx.serve.app import create_app
    from mpt_eqx.serve.settings import Settings

    edits = [{"layer": 3, "vector": [0.5] * 192, "start": 2}, {"layer": 0, "vector": [1] * 192}]
    with on_port(create_app(engine, {"pydoc": model}, Settings(edits=True))) as url:
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x", "edits": edits}).status_code == 200
    found = engine.requests[-1].edits
    expected = {3: Add(np.full(192, 0.5, np.float32), positions=slice(2, None)), 0: Add(np.ones(192, np.float32))}
    assert set(found) == {f"blocks.{layer}.hook_resid_post" for layer in expected}
    for layer, edit in expected.items():
        one = found[f"blocks.{layer}.hook_resid_post"]
        assert one.change is edit.change and one.start == edit.start and one.value.dtype == np.float32
        np.testing.assert_array_equal(one.value, edit.value)


CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
REFUSED = [
    (COMPLETE, {}, "prompt", "prompt: expected a value, found none"),
    (COMPLETE, {"prompt": 1}, "prompt", "prompt: expected a text, a list of texts, token ids, or a list of token ids"),
    (COMPLETE, {"prompt": []}, "prompt", "prompt: expected a text"),
    (COMPLETE, {"prompt": [[]]}, "prompt", "prompt: expected a text"),
    (COMPLETE, {"prompt": ["a", 1]}, "prompt", "prompt: expected a text"),
    (COMPLETE, {"prompt": [True]}, "prompt", "prompt: expected a text"),
    (COMPLETE, {"prompt": ["a"] * 1025}, "prompt", "prompt: expected at most 1024 prompts, found 1025"),
    (COMPLETE, {"prompt": [4096]}, "prompt", "prompt: expected token ids from 0 to 4095, found 4096"),
    (COMPLETE, {"prompt": [[1], [-1]]}, "prompt", r"prompt\[1\]: expected token ids from 0 to 4095, found -1"),
    (COMPLETE, {"temperature": -1}, "temperature", "temperature: .* greater than or equal to 0, found -1"),
    (COMPLETE, {"temperature": "hot"}, "temperature", "temperature: .* valid number, found 'hot'"),
    (COMPLETE, {"top_p": 0}, "top_p", "top_p: .* greater than 0, found 0"),
    (COMPLETE, {"n": 0}, "n", "n: .*found 0"),
    (COMPLETE, {"n": True}, "n", "n: .*found True"),
    (COMPLETE, {"seed": 2**63}, "seed", "seed: "),
    (COMPLETE, {"max_tokens": -1}, "max_tokens", "max_tokens: .*found -1"),
    (COMPLETE, {"max_tokens": 256}, "max_tokens", "max_tokens: prompt has 1 tokens of 256, which leaves 255 for new"),
    (COMPLETE, {"prompt": [1] * 300}, "prompt", "max_tokens: prompt has 300 tokens of 256, which leaves 0 for new"),
    (CHAT, {"messages": [{"role": "user", "content": "a " * 300}]}, "messages", "which leaves 0 for new ones"),
    (COMPLETE, {"min_tokens": 20}, "min_tokens", "min_tokens: expected at most max_tokens=16, found 20"),
    (COMPLETE, {"logprobs": 21}, "logprobs", "logprobs: .* less than or equal to 20, found 21"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "top_logprobs: expected logprobs=true with it, found none"),
    (COMPLETE, {"stop": ""}, "stop", "stop: expected at most 16 texts of 1 to 256 characters"),
    (COMPLETE, {"stop": ["a"] * 17}, "stop", "stop: expected at most 16 texts"),
    (COMPLETE, {"stop": [1]}, "stop", "stop: expected a text or a list of texts"),
    (COMPLETE, {"stop_token_ids": [5000]}, "stop_token_ids", "stop_token_ids: expected token ids from 0 to 4095"),
    (COMPLETE, {"logit_bias": {"x": 1}}, "logit_bias", "logit_bias: expected token ids from 0 to 4095, found 'x'"),
    (COMPLETE, {"logit_bias": {"1": 101}}, "logit_bias.1", "logit_bias.1: .*found 101"),
    (COMPLETE, {"best_of": 3}, "best_of", "best_of: not supported by this server; expected the value of n"),
    (COMPLETE, {"suffix": "x"}, "suffix", "suffix: not supported"),
    (COMPLETE, {"presence_penalty": 0.5}, "presence_penalty", "not supported.*; repetition_penalty is supported"),
    (COMPLETE, {"frequency_penalty": -1}, "frequency_penalty", "frequency_penalty: not supported"),
    (COMPLETE, {"tempature": 1}, "tempature", "tempature: not supported by this server; did you mean temperature?"),
    (COMPLETE, {"stream_options": {"x": 1}}, "stream_options.x", "stream_options.x: not supported"),
    (COMPLETE, {"edits": [{"layer": 0, "vector": [0.0]}]}, "edits", "edits: not allowed by this server; .*--edits"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools", "tools: not supported by this server; this model has no format"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "tool_choice: not supported"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions", "functions: not supported"),
    (CHAT, {"audio": {"voice": "a"}}, "audio", "audio: not supported"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", "reasoning_effort: not supported"),
    (CHAT, {"messages": []}, "messages", "messages: list should have at least 1 item"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", r"messages\[0\].role: .*found 'tool'"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "expected a value, found none"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content", "expected a text, or a list"),
    (
        CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content", "expected parts of type 'text', found one of type 'image_url'; this model reads text",
    ),
    (
        CHAT, {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "a"}]}]},
        "messages[0].tool_calls", r"messages\[0\].tool_calls: not supported",
    ),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "response_format.type: .*found 'xml'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "fields", "field", "message"), REFUSED, ids=[f"{number}-{case[2]}" for number, case in enumerate(REFUSED)]
)
def test_what_is_not_valid_or_not_supported_is_refused_by_name(post, path, fields, field, message):
    needed = {"messages": MESSAGES} if path == CHAT else {"prompt": "x"} if fields else {}
    found, param = refused(post(path, {"model": "pydoc", **needed, **fields}))
    assert re.search(message, found) and param == field


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected a JSON object .*, found None"),
        (b"[]", "expected a JSON object .*, found list"),
        (b"{", "expected valid JSON in UTF-8, found Expecting property name"),
        (b'{"prompt": NaN}', "found NaN, which is no JSON"),
        (b'{"prompt": "x", "metadata": {"a": -Infinity}}', "found -Infinity, which is no JSON"),
        (b'{"prompt": "\xff"}', "expected valid JSON in UTF-8, found .*invalid start byte"),
        (b'{"prompt": "\\ud800"}', "found half of a character, '.ud800'"),
        (b'{"prompt": "x", "stop": "\\uDC00"}', "found half of a character"),
        (b"[" * 100_000, "found one that is too deep"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "expected valid JSON"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature: .*found inf"),
    ],
    ids=range(11),
)
def test_bodies_that_are_no_json(post, body, message):
    found, _ = refused(post(COMPLETE, body))
    assert re.search(message, found)


def test_a_body_of_another_type_is_no_json(url):
    """A page of another site can send texts to a server on this machine, and no JSON."""
    response = httpx.post(f"{url}{COMPLETE}", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert "expected a JSON object (application/json)" in refused(response)[0]


def test_paths_methods_and_models_that_are_not_there(url, post):
    message, _ = refused(httpx.get(f"{url}/v1/nothing"), 404)
    assert message == "GET /v1/nothing: Not Found; see /openapi.json for what there is"
    assert "Method Not Allowed" in refused(httpx.get(f"{url}{COMPLETE}"), 405)[0]
    message, field = refused(post(COMPLETE, {"model": "gpt", "prompt": "x"}), 404)
    assert message == "model: expected one of pydoc, pydoc:other, found 'gpt'" and field == "model"
