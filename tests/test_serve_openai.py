"""The real engine behind OpenAI's client: answers are those of `generate` and `score`."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import openai
import pytest
from serving import one_layer_served, shipped

PROMPTS = ["The zip() function", "Return a new list", "If the argument is", "A class that"]
LENGTH = 24


@pytest.fixture(scope="module")
def served(one_layer):
    return shipped(place=one_layer)


@pytest.fixture(scope="module")
def running(one_layer):
    """The address of a server, its model and its engine."""
    with one_layer_served(one_layer) as (url, engine, model):
        yield url, model, engine
        stats = engine.stats()
        assert stats.active == stats.queued == 0 and engine.health() == "ready"


@pytest.fixture(scope="module")
def model(running):
    return running[1]


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, prompt, **fields):
    return client.completions.create(model="pydoc", prompt=prompt, max_tokens=LENGTH, **fields)


def test_answers_are_those_of_generate_whoever_else_is_served(client, served, model):
    """At temperature 0 and with a seed, one by one and all at once, streamed or not."""
    from mpt_eqx import generate

    ids = [served.tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = []
    for options in ({"temperature": 0.0}, {"temperature": 0.9, "key": jax.random.key(7)}):
        for row in ids:
            found = generate(model, [row], max_new_tokens=LENGTH, eos_token_ids=(0,), **options)
            expected.append(served.tokenizer.decode(found.tokens[0, : found.lengths[0]], prompt=row))

    def ask(number, stream=False):
        options = {"temperature": 0} if number < 4 else {"temperature": 0.9, "seed": 7}
        found = complete(client, PROMPTS[number % 4], stream=stream, **options)
        return "".join(chunk.choices[0].text for chunk in found) if stream else found.choices[0].text

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(8))) == expected
        assert list(pool.map(ask, [*range(8)] * 2, [True, False] * 8)) == expected * 2
    assert ask(5) == expected[5]
    assert len(set(expected)) > 4


def test_rows_of_one_request_are_those_of_one_call(client, served, model):
    """Of `generate` with num_return_sequences, whose row i draws with fold_in(key, i)."""
    from mpt_eqx import generate

    ids = [served.tokenizer.encode(prompt) for prompt in PROMPTS[:2]]
    rows = []
    for row in range(4):
        key = jax.random.fold_in(jax.random.key(3), row)[None]
        prompt = ids[row // 2]
        rows.append(generate(model, [prompt], max_new_tokens=LENGTH, eos_token_ids=(0,), temperature=1.0, key=key))
    texts = [
        served.tokenizer.decode(found.tokens[0, : found.lengths[0]], prompt=ids[row // 2])
        for row, found in enumerate(rows)
    ]
    found = complete(client, ids, n=2, seed=3, temperature=1)
    assert [choice.text for choice in found.choices] == texts
    assert [choice.finish_reason for choice in found.choices] == [row.finish_reasons[0] for row in rows]
    assert found.usage.completion_tokens == sum(row.lengths[0] for row in rows)


def test_more_answers_than_ever_have_room_are_refused_for_good(client):
    with pytest.raises(openai.BadRequestError, match="requests: expected at most 68 together, as have room, found 69"):
        complete(client, PROMPTS[:1] * 69)


def test_without_a_seed_answers_differ(client):
    assert len({complete(client, PROMPTS[0], temperature=1.5).choices[0].text for _ in range(4)}) > 1


def test_log_probabilities_are_those_of_score(client, served, model):
    """Of the prompt and of new tokens, and whether each is the likeliest."""
    from mpt_eqx import generate, score

    ids = served.tokenizer.encode("Return a new list containing all items from the iterable.")
    ask = {"model": "pydoc", "prompt": ids, "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 3}
    (choice,) = client.completions.create(**ask).choices
    found = choice.logprobs
    new = generate(model, [ids], max_new_tokens=4).tokens[0].tolist()
    (expected,) = score(model, [[*ids, *new]])
    np.testing.assert_allclose(found.token_logprobs[1 : len(ids)], expected.logprobs[: len(ids) - 1], atol=1e-4)
    np.testing.assert_allclose(found.token_logprobs[len(ids) :], expected.logprobs[len(ids) - 1 :], atol=1e-4)
    greedy = [
        logprob == max(top.values())
        for logprob, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True)
    ]
    assert greedy == expected.is_greedy.tolist() and all(greedy[-4:])


def test_the_second_reading_of_a_prompt_is_cached(client):
    prompt = "Raise an error if the two arguments are not of the same length, and return None otherwise. " * 4
    first, second = (complete(client, prompt).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens < second.prompt_tokens_details.cached_tokens <= first.prompt_tokens


def test_stop_strings_end_the_sequence_early(client):
    whole = complete(client, PROMPTS[0], temperature=0)
    text = whole.choices[0].text
    stop = text[len(text) // 2 :][:4]
    found = complete(client, PROMPTS[0], temperature=0, stop=stop)
    assert found.choices[0].text == text[: text.index(stop)] and found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens < whole.usage.completion_tokens


def test_a_stream_that_is_closed_frees_its_slots(client, running):
    engine = running[2]
    before = engine.stats().ended.get("cancelled", 0)
    for _ in range(3):
        ask = {
            "model": "pydoc",
            "prompt": PROMPTS,
            "max_tokens": 200,
            "temperature": 1,
            "extra_body": {"ignore_eos": True},
        }
        with client.completions.create(**ask, stream=True) as stream:
            assert next(stream).choices[0].text
    deadline = time.monotonic() + 20
    while (stats := engine.stats()).active or stats.queued:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert stats.ended["cancelled"] > before and complete(client, PROMPTS[0]).choices[0].text


def test_chat_streams_what_it_answers(client):
    ask = {"model": "pydoc", "messages": [{"role": "user", "content": "What does zip do?"}], "temperature": 0}
    found = client.chat.completions.create(**ask, max_completion_tokens=LENGTH)
    chunks = client.chat.completions.create(**ask, max_completion_tokens=LENGTH, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == found.choices[0].message.content != ""


def test_a_bias_bans_and_forces_tokens(client, served):
    (token,) = served.tokenizer.encode("zip")
    found = client.completions.create(model="pydoc", prompt="The", max_tokens=3, logit_bias={str(token): 100})
    assert found.choices[0].text == "zipzipzip"
    first = client.completions.create(model="pydoc", prompt="The", max_tokens=1, temperature=0, logprobs=1)
    (word,) = first.choices[0].logprobs.tokens
    (token,) = served.tokenizer.encode(word)
    other = client.completions.create(
        model="pydoc", prompt="The", max_tokens=1, temperature=0, logprobs=1, logit_bias={str(token): -100}
    )
    assert other.choices[0].logprobs.tokens != [word]


def test_answers_of_a_schema(client):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["zip", "map"]}, "arguments": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
    found = client.chat.completions.create(
        model="pydoc", messages=[{"role": "user", "content": "zip"}], n=2, temperature=1,
        response_format={"type": "json_schema", "json_schema": {"name": "f", "schema": schema, "strict": True}},
    )  # fmt: skip
    for choice in found.choices:
        answer = json.loads(choice.message.content)
        assert answer["name"] in ("zip", "map") and 1 <= answer["arguments"] <= 9 and choice.finish_reason == "stop"


@pytest.mark.slow
def test_edits_steer_the_answer_as_in_generate(client, served, model):
    from mpt_eqx import generate
    from mpt_eqx.interp import Add

    vector = np.random.default_rng(0).normal(size=192).astype(np.float32) * 8
    ids = served.tokenizer.encode(PROMPTS[0])
    edits = {"blocks.0.hook_resid_post": Add(vector, positions=slice(2, None))}
    expected = generate(model, [ids], max_new_tokens=8, edits=edits, eos_token_ids=(0,))
    ask = {"model": "pydoc", "prompt": ids, "max_tokens": 8, "temperature": 0}
    steered = {"edits": [{"layer": 0, "vector": vector.tolist(), "start": 2}]}
    found = client.completions.create(**ask, extra_body=steered)
    text = served.tokenizer.decode(expected.tokens[0, : expected.lengths[0]], prompt=ids)
    assert found.choices[0].text == text != client.completions.create(**ask).choices[0].text


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"layer": 1, "vector": [0.0] * 192}, r"edits\[0\].layer: expected 0 to 0, found 1"),
        ({"layer": 0, "vector": [0.0] * 4}, r"edits\[0\].vector: expected 192 numbers, found 4"),
        ({"layer": 0, "vector": [1e300] * 192}, r"edits\[0\].vector: expected numbers that fit float32"),
    ],
)
def test_edits_that_do_not_fit(client, edit, message):
    with pytest.raises(openai.BadRequestError, match=message):
        complete(client, "x", extra_body={"edits": [edit]})
    twice = {"layer": 0, "vector": [0.0] * 192}
    with pytest.raises(openai.BadRequestError, match=r"edits\[1\].layer: expected each layer once, found 0 again"):
        complete(client, "x", extra_body={"edits": [twice, twice]})
