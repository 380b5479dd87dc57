"""lm-evaluation-harness asks the server, and gets the numbers of `score` offline."""

from types import SimpleNamespace

import numpy as np
import pytest
from serving import one_layer_served

CONTEXTS = ["Return a new list containing", "The zip() function", "Raise", "If the argument ö is 🙂 given, it must"]
ANSWERS = [
    " all items from the iterable.",
    " is called.",
    " an exception\n",
    "<|endoftext|> be a function of one argument",
]


@pytest.fixture(scope="module")
def url(one_layer):
    for name in ("lm_eval", "tenacity", "aiohttp", "requests"):
        pytest.importorskip(name)
    with one_layer_served(one_layer) as (url, _, _):
        yield url


@pytest.fixture(scope="module")
def asked(url):
    """The harness's model that asks a server; its tokenizer is the server's, too."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model="pydoc", max_length=128, batch_size=3, max_retries=1,
        num_concurrent=1, tokenizer_backend="auto",
    )  # fmt: skip


@pytest.fixture(scope="module")
def offline(url, one_layer):
    from mpt_eqx.lm_eval import MPTLM

    return MPTLM(one_layer, dtype="float32", max_length=126)


def instances(*args):
    return [SimpleNamespace(args=one, arguments=one) for one in args]


def test_log_likelihoods_are_those_of_score(asked, offline):
    """Of answers to questions, whether greedy decoding gives them, and of whole texts in windows."""
    assert asked.tokenizer_backend == "remote" and asked.eot_token_id == 0
    pairs = [(context, answer) for context in CONTEXTS for answer in ANSWERS]
    options = {"until": ["\n\n"], "max_gen_toks": 6}
    greedy = offline.generate_until(instances(*((context, options) for context in CONTEXTS)), disable_tqdm=True)
    pairs += [pair for pair in zip(CONTEXTS, greedy, strict=True) if pair[1]]
    found, expected = (lm.loglikelihood(instances(*pairs), disable_tqdm=True) for lm in (asked, offline))
    np.testing.assert_allclose([total for total, _ in found], [total for total, _ in expected], atol=1e-3, rtol=0)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert {is_greedy for _, is_greedy in found} == {True, False}
    texts = instances((" ".join(CONTEXTS) * 8,), (CONTEXTS[1],))
    found, expected = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in (asked, offline))
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)


def test_texts_are_those_of_generate(asked, offline):
    options = {"until": [".", " a "], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    requests = instances(*((context, options) for context in CONTEXTS))
    found, expected = (lm.generate_until(requests, disable_tqdm=True) for lm in (asked, offline))
    assert found == expected and any(found)
