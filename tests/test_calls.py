"""Calls as people type them: lists for arrays, batches for rows, nothing to do, and messages that say what to type."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import python
from conftest import some

SETUP = (
    "import jax, jax.numpy as jnp, numpy as np; from mpt_eqx import *; from mpt_eqx.train import next_token_loss\n"
    "model = MPT(MPTConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=61, max_seq_len=32), key=jax.random.key(0))\n"
    "def said(call):\n"
    "    try: print(call())\n"
    "    except MPTError as error: print(error)\n"
)


FORMS = [list, tuple, np.asarray, lambda x: np.asarray(x, np.int64), jnp.asarray]


@pytest.mark.parametrize("kind", some(FORMS, [list, jnp.asarray]))
def test_ids_come_in_any_form(tiny_model, kind):
    from mpt_eqx import KVCache

    ids = [5, 6, 7]
    expected = tiny_model(jnp.asarray(ids, jnp.int32))
    np.testing.assert_array_equal(tiny_model(kind(ids)), expected)
    masked = tiny_model(kind(ids), mask=kind([0, 1, 1]))
    np.testing.assert_array_equal(masked, tiny_model(jnp.asarray(ids), mask=jnp.asarray([False, True, True])))
    x, _ = tiny_model.extend(kind(ids), KVCache.empty(tiny_model.config, 8, jnp.float32))
    np.testing.assert_allclose(tiny_model.unembed(x), expected, atol=1e-5)


def test_a_call_that_cannot_be_meant_says_what_to_type():
    """Without the type checks of these tests, as for users; nothing is compiled."""
    calls = {
        "model(jnp.ones((2, 4), int))": "found an array of shape (2, 4); use jax.vmap(model)(tokens) for a batch",
        "model([[1, 2], [3, 4]])": "found an array of shape (2, 2); use jax.vmap(model)(tokens) for a batch",
        "model.hidden_states(jnp.ones((2, 4), int))": "use jax.vmap(model)(tokens) for a batch",
        "model.extend(jnp.ones((2, 4), int), KVCache.empty(model.config, 8, jnp.float32))": "jax.vmap(model.extend)(",
        "jax.vmap(model)(jnp.ones(4, int))": "found an array of shape (); use model(tokens) without jax.vmap",
        "model(jnp.ones(4))": "tokens: expected whole numbers, found float32; use tokens.astype(int)",
        "model('The')": "tokens: expected numbers, found text; encode it with mpt_eqx.text.load_tokenizer",
        "model([[1], [2, 3]])": "tokens: expected a list or an array of numbers, found list (",
        "model([1, None])": "tokens: expected numbers, found other objects",
        "model([1, 61])": "tokens: expected ids from 0 to 60 (vocab_size), found 61",
        "model([1, 2], mask=[1])": "mask: expected the shape of tokens, (2,), found (1,)",
        "next_token_loss(model, jnp.ones(4, int))": "found an array of shape (4,); use tokens[None] for one sequence",
        "next_token_loss(model, 3)": "tokens: expected a batch of sequences, found an array of shape ()",
        "next_token_loss(model, [[1], [2, 3]])": "tokens: expected a list or an array of numbers, found list (",
        "next_token_loss(model, [[1, 2]], mask=[1, 1])": "mask: expected the shape of tokens, (1, 2), found (2,)",
        "next_token_loss(model, [[1, 2]], labels=[[1]])": "labels: expected the shape of tokens, (1, 2), found (1, 1)",
    }
    found = python(SETUP + "".join(f"said(lambda: {call})\n" for call in calls)).splitlines()
    assert len(found) == len(calls)
    for (call, message), line in zip(calls.items(), found, strict=True):
        assert message in line, call


def test_a_loss_of_lists(tiny_model):
    from mpt_eqx.train import next_token_loss

    rows = [[5, 6, 7, 8], [1, 2, 3, 4]]
    mask = [[1, 1, 1, 0], [1, 1, 1, 1]]
    loss = eqx.filter_jit(next_token_loss)
    found = loss(tiny_model, rows, mask=mask)
    assert found == loss(tiny_model, jnp.asarray(rows), mask=jnp.asarray(mask))


def test_no_new_tokens(tiny_model, prompts):
    """Nothing runs and nothing compiles, and arguments are still checked."""
    from mpt_eqx import GenerationError, generate, stream, warmup

    rows = prompts(3, 256)
    result = generate(tiny_model, rows, max_new_tokens=0, return_logits=True, eos_token_ids=[3])
    assert result.tokens.shape == result.logprobs.shape == (2, 0) and result.logits.shape == (2, 0, 61)
    assert result.lengths.tolist() == [0, 0] and result.finish_reasons == ["length", "length"]
    several = {"num_return_sequences": 3, "temperature": 1.0, "key": jax.random.key(0)}
    assert generate(tiny_model, rows, max_new_tokens=np.int64(0), **several).tokens.shape == (6, 0)
    assert list(stream(tiny_model, rows[0], max_new_tokens=0)) == []
    assert warmup(tiny_model, batch_sizes=[1, 2], prompt_lengths=[5], max_new_tokens=0) == {(1, 5): 0.0, (2, 5): 0.0}
    with pytest.raises(GenerationError, match=r"prompts\[0\]: expected token ids from 0 to 60, found 61"):
        generate(tiny_model, [[61]], max_new_tokens=0)
    with pytest.raises(GenerationError, match="min_new_tokens: expected at most max_new_tokens=0, found 2"):
        generate(tiny_model, [[6]], max_new_tokens=0, min_new_tokens=2)


def test_logits_in_float32(tiny_model):
    """Of a model in bfloat16 they are not rounded: log-probabilities are those of the same sums in float32."""
    import equinox as eqx

    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, tiny_model)
    tokens = jnp.arange(12)
    rounded, exact = half(tokens), half(tokens, logits_dtype=jnp.float32)
    assert rounded.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
    np.testing.assert_array_equal(exact.astype(jnp.bfloat16), rounded)
    x = half.hidden_states(tokens)[-1].astype(jnp.float32)
    expected = np.asarray(x) @ np.asarray(half.wte.weight.astype(jnp.float32)).T
    np.testing.assert_allclose(exact, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(rounded.astype(jnp.float32)) - expected).max() > 0.01
