"""Random requests, valid and not, made from the server's own description: none of them makes it fail."""

import json

import httpx
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import ScriptedEngine, on_port, saying, shipped

AS_JSON = {"Content-Type": "application/json"}
OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/tokenizer_info"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
]


@pytest.fixture(scope="module")
def url():
    from mpt_eqx.serve.app import create_app
    from mpt_eqx.serve.settings import Settings

    model = shipped()
    engine = ScriptedEngine(saying([*model.tokenizer.encode("Hello"), 0]))
    with on_port(create_app(engine, {"pydoc": model}, Settings(edits=True))) as url:
        yield url


@pytest.fixture(scope="module")
def description(url):
    schemathesis = pytest.importorskip("schemathesis")
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def check_answer(response):
    """No failure, and every error has the shape of OpenAI's."""
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(json.loads(response.content)["error"]) == {"message", "type", "param", "code"}


def test_every_operation_is_described(description):
    found = {(one.ok().method.upper(), one.ok().path) for one in description.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_makes_the_server_fail(description, method, path, mode):
    from schemathesis import GenerationMode

    operation = description[path][method]
    if mode == "negative" and method == "GET":
        pytest.skip("nothing can be wrong with it")
    strategy = operation.as_strategy(generation_mode=GenerationMode(mode))

    @settings(examples(60), suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(case):
        check_answer(case.call())

    run()


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "stream": st.booleans(),
        "max_tokens": st.integers(0, 40),
        "n": st.integers(1, 3),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0.01, 1),
        "top_k": st.integers(-1, 100),
        "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "logit_bias": st.dictionaries(st.integers(0, 4095).map(str), st.floats(-100, 100), max_size=3),
        "response_format": st.fixed_dictionaries({"type": st.just("regex"), "regex": st.text(max_size=8)}),
    },
)
PROMPTS = st.one_of(
    st.text(max_size=30),
    st.lists(st.integers(0, 4095), min_size=1, max_size=20),
    st.lists(st.text(), min_size=1, max_size=3),
)


@examples(150, least=15)
@given(fields=FIELDS, prompt=PROMPTS, echo=st.booleans(), logprobs=st.none() | st.integers(0, 20))
def test_every_valid_completion_is_answered(url, fields, prompt, echo, logprobs):
    body = {**fields, "prompt": prompt, "echo": echo, "logprobs": logprobs}
    response = httpx.post(
        f"{url}/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    check_answer(response)
    if response.status_code == 200 and not fields.get("stream"):
        for choice in response.json()["choices"]:
            if logprobs is not None:
                lengths = {len(values) for values in choice["logprobs"].values()}
                offsets = choice["logprobs"]["text_offset"]
                assert len(lengths) == 1 and offsets == sorted(offsets)
                assert all(0 <= at <= len(choice["text"]) for at in offsets)
    if response.status_code == 400:
        assert response.json()["error"]["param"] in ("response_format", "max_tokens", "prompt"), response.text
