"""Answers of a given form: what a grammar allows token by token, and grammars that are refused."""

import json
import re

import numpy as np
import pytest
from serving import shipped

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def model():
    return shipped()


@pytest.fixture(scope="module")
def make(model):
    """Returns a constraint of a `response_format`."""
    from mpt_eqx.serve.constraints import compiler
    from mpt_eqx.serve.schemas import ResponseFormat

    compile = compiler(model)

    def make(ends=(0,), **asked):
        return compile(ResponseFormat.model_validate(asked), ends)

    return make


def schema(**what):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": what}}


def drawn(make, model, seed, **asked):
    """Returns the text of an answer whose tokens are drawn from those that are allowed."""
    constraint, tokens, random = make(**asked)(), [], np.random.default_rng(seed)
    while True:
        mask = constraint.mask()
        assert mask.shape == (model.config.vocab_size,) and mask.dtype == bool and mask.any()
        if mask[0]:
            constraint.accept(0)
            return model.tokenizer.decode(tokens)
        tokens.append(int(random.choice(np.flatnonzero(mask))))
        constraint.accept(tokens[-1])
        assert len(tokens) < 500


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["a", "b"]}},
    "required": ["x", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_answers_are_what_the_schema_says(make, model, seed):
    found = json.loads(drawn(make, model, seed, **schema(**POINT)))
    assert set(found) == {"x", "kind"} and 0 <= found["x"] <= 99 and found["kind"] in ("a", "b")


def test_answers_match_a_regular_expression(make, model):
    for seed in range(5):
        assert re.fullmatch(
            "(yes|no), [0-9]{1,3}ö", drawn(make, model, seed, type="regex", regex="(yes|no), [0-9]{1,3}ö")
        )


def test_an_object_begins_as_one(make, model):
    constraint = make(type="json_object")()
    first = {model.tokenizer.token_bytes(int(token))[:1] for token in np.flatnonzero(constraint.mask())}
    assert first == {b"{"}


def test_what_ends_the_grammar_ends_the_answer(make):
    constraint = make(ends=(0, 7), type="regex", regex="a")()
    (first,) = np.flatnonzero(constraint.mask())
    constraint.accept(int(first))
    assert np.flatnonzero(constraint.mask()).tolist() == [0, 7]


def test_each_answer_stands_for_itself(make):
    new = make(type="regex", regex="ab")
    first, second = new(), new()
    first.accept(int(np.flatnonzero(first.mask())[0]))
    assert not np.array_equal(first.mask(), second.mask())


def test_no_grammar_for_plain_text(make):
    assert make(type="text") is None


def test_a_token_that_is_not_allowed_is_an_error(make):
    from mpt_eqx import GenerationError

    with pytest.raises(GenerationError, match="response_format: the grammar failed: "):
        make(type="regex", regex="a")().accept(0)


def test_a_model_with_more_rows_than_tokens(model):
    import dataclasses

    from mpt_eqx.serve.constraints import compiler
    from mpt_eqx.serve.schemas import ResponseFormat

    wide = dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_size=4200))
    mask = compiler(wide)(ResponseFormat(type="regex", regex="[^x]+"), [0])().mask()
    assert mask.shape == (4200,) and mask[:4096].any() and not mask[4096:].any()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"type": "regex", "regex": "(a"}, "expected a valid grammar, found: .*unclosed group"),
        ({"type": "regex"}, r"response_format.regex: expected a value with response_format.type='regex', found none"),
        ({"type": "json_schema"}, "response_format.json_schema: expected a value"),
        (schema(type="nothing"), "expected a valid grammar, found: .*nothing"),
        (schema(unevaluatedProperties=False), "expected a valid grammar, found: .*unevaluatedProperties"),
        (schema(**{"$ref": "http://localhost/secret"}), "expected a valid grammar"),
        (schema(const="\ud800"), "expected a valid grammar"),
    ],
)
def test_grammars_that_are_refused(make, asked, message):
    from mpt_eqx.serve.errors import APIError

    with pytest.raises(APIError) as caught:
        make(**asked)
    assert caught.value.status == 400 and re.search(message, caught.value.message)
    assert caught.value.param.startswith("response_format")


def test_a_schema_that_is_too_deep(make):
    from mpt_eqx.serve.errors import APIError

    deep = {"type": "string"}
    for _ in range(900):
        deep = {"type": "array", "items": deep}
    with pytest.raises(APIError, match="expected a valid grammar"):
        make(**schema(**deep))


def test_without_an_end_there_is_no_grammar(make):
    from mpt_eqx.serve.errors import APIError

    with pytest.raises(APIError, match="expected a model with a token that ends answers"):
        make(ends=(), type="json_object")


def test_without_llguidance(make, monkeypatch):
    import sys

    from mpt_eqx.serve.errors import APIError

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(APIError, match=r"install it there with pip install 'mpt_eqx\[serve,grammar\]'"):
        make(type="json_object")
