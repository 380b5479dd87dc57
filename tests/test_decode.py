"""decode: what `generate` does, inside any transformation; derivatives; an error for each bad argument."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import counting_compiles

KEY, NEW = jax.random.key(5), 10
OPTIONS = {"temperature": 1.0, "top_k": 20, "eos_token_ids": [39], "pad_token_id": 3}


@pytest.fixture(scope="module")
def small(tiny_config):
    from mpt_eqx import MPT, InitConfig

    config = tiny_config(n_layers=1, max_seq_len=512, init_config=InitConfig(emb_init_std=0.5))
    return MPT(config, key=jax.random.key(3))


def padded(rows, size):
    """Tokens on the left, and on the right what is no token."""
    return jnp.asarray([[*row, *[-7] * (size - len(row))] for row in rows]), jnp.asarray([len(row) for row in rows])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_vmap_over_prompts_gives_the_rows_of_generate(small, prompts, dtype):
    """Tokens, log-probabilities and lengths, with ends and draws; one of them is read in two chunks."""
    from mpt_eqx import SamplingParams, decode, generate

    model = jax.tree.map(lambda x: x.astype(dtype), small)
    rows = prompts(3, 17, 1, 290)
    wanted = generate(model, rows, max_new_tokens=NEW, key=KEY, **OPTIONS)
    assert 1 < wanted.lengths.min() < NEW
    one = functools.partial(decode, max_new_tokens=NEW, sampling=SamplingParams(**OPTIONS), key=KEY)
    batch = eqx.filter_jit(eqx.filter_vmap(lambda m, t, n, i: one(m, t, n, row=i), in_axes=(None, 0, 0, 0)))
    found = batch(model, *padded(rows, 300), jnp.arange(4))
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.length, wanted.lengths)
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)


@pytest.mark.slow
def test_vmap_over_models_and_keys(small, prompts):
    """Each is as in `generate`, where the row is 0; keys are independent."""
    from mpt_eqx import MPT, SamplingParams, decode, generate

    models, (prompt,), keys = [small, MPT(small.config, key=jax.random.key(8))], prompts(6), jax.random.split(KEY, 3)
    sampling = SamplingParams(temperature=3.0)

    def draw(model, key):
        return decode(model, jnp.asarray(prompt), 6, max_new_tokens=NEW, sampling=sampling, key=key).tokens

    of_keys = eqx.filter_vmap(draw, in_axes=(None, 0))
    found = eqx.filter_jit(eqx.filter_vmap(of_keys, in_axes=(eqx.if_array(0), None)))(
        jax.tree.map(lambda *x: jnp.stack(x), *models), keys
    )
    for model, rows in zip(models, found, strict=True):
        for key, tokens in zip(keys, rows, strict=True):
            wanted = generate(model, prompt, max_new_tokens=NEW, temperature=3.0, key=key).tokens[0]
            np.testing.assert_array_equal(tokens, wanted)
        assert len({tuple(tokens.tolist()) for tokens in rows}) == 3


def test_a_scan_over_turns(small, prompts):
    """Each turn continues what the one before it made, and a token of the user's."""
    from mpt_eqx import decode, generate

    (prompt,), users = prompts(4), jnp.asarray([7, 11, 13])
    tokens = jnp.zeros(40, jnp.int32).at[:4].set(jnp.asarray(prompt))

    @jax.jit
    def conversation(tokens, length):
        def turn(state, user):
            tokens, length = state
            answer = decode(small, tokens, length, max_new_tokens=NEW)
            tokens = jax.lax.dynamic_update_slice(tokens, answer.tokens, (length,))
            return (tokens.at[length + NEW].set(user), length + NEW + 1), answer.tokens

        return jax.lax.scan(turn, (tokens, length), users)[1]

    context = list(prompt)
    for answer, user in zip(conversation(tokens, jnp.asarray(4)), users, strict=True):
        wanted = generate(small, context, max_new_tokens=NEW).tokens[0].tolist()
        assert answer.tolist() == wanted
        context += [*wanted, int(user)]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_derivatives_are_those_of_the_log_probabilities_of_the_tokens(small, prompts, dtype):
    """Of the model, in reverse, as `model` has them for the prompt with the new tokens; zero after the end."""
    from mpt_eqx import SamplingParams, decode

    model, (prompt,) = jax.tree.map(lambda x: x.astype(dtype), small), prompts(6)
    sampling = SamplingParams(temperature=1.0, max_new_tokens=3, repetition_penalty=1.2, no_repeat_ngram_size=2)

    def policy(model):
        decoded = decode(model, jnp.asarray(prompt), 6, max_new_tokens=4, sampling=sampling, key=KEY)
        return decoded.logprobs.sum(), decoded.tokens

    def plain(model, tokens):
        log_probs = jax.nn.log_softmax(model(tokens).astype(jnp.float32))
        return log_probs[jnp.arange(5, 8), tokens[6:9]].sum()

    (total, tokens), found = jax.jit(jax.value_and_grad(policy, has_aux=True))(model)
    wanted = jax.jit(jax.value_and_grad(plain))(model, jnp.asarray([*prompt, *tokens.tolist()]))
    tolerance = {"float32": 1e-5, "bfloat16": 0.03}[dtype]
    np.testing.assert_allclose(total, wanted[0], rtol=tolerance)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted[1]))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), atol=tolerance * scale, rtol=0
        )


@pytest.mark.filterwarnings("ignore:Some donated buffers")
@pytest.mark.parametrize(
    ("dtype", "rows", "size"),
    [("bfloat16", 2, 1536), *(pytest.param("float32", *x, marks=pytest.mark.slow) for x in ((1, 6144), (4, 1536)))],
)
@pytest.mark.slow
def test_memory_is_that_of_generate(tiny_config, dtype, rows, size):
    """The cache and the larger of what a chunk of the prompt and of the steps need, within 5 %."""
    from mpt_eqx import MPT, SamplingParams, decode
    from mpt_eqx.generation.prompts import prefill_chunk
    from mpt_eqx.generation.state import empty_state
    from mpt_eqx.generation.steps import decode_chunk

    def temporary(function, *args):
        compiled = function.lower(*args).compile()
        return getattr(compiled, "compiled", compiled).memory_analysis().temp_size_in_bytes

    model = MPT(tiny_config(n_layers=1, max_seq_len=8192), key=jax.random.key(0))
    model, new = jax.tree.map(lambda x: x.astype(dtype), model), 512
    ints, state = functools.partial(jnp.zeros, dtype=jnp.int32), empty_state(model, rows, size + new)
    fixed = (model, SamplingParams().of_rows(rows), KEY, ())
    theirs = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + max(
        temporary(decode_chunk, fixed, state, 8, False),
        temporary(prefill_chunk, model, state, ints((rows, 256)), ints(rows)),
    )
    batch = eqx.filter_jit(eqx.filter_vmap(functools.partial(decode, max_new_tokens=new), in_axes=(None, 0, 0)))
    assert temporary(batch, model, ints((rows, size)), ints(rows)) <= 1.05 * theirs


def test_what_is_traced_and_not_valid_gives_nan(small):
    """Lengths, weights, and options that leave no token: 0 to 13 are allowed, and 12 of them are in the prompt.

    Other weights, tokens, lengths, options and keys compile nothing.
    """
    from mpt_eqx import SamplingParams, decode

    @jax.jit
    def logprobs(model, tokens, lengths, sampling, key):
        def one(length):
            return decode(model, tokens, length, max_new_tokens=4, sampling=sampling, key=key).logprobs

        return jax.vmap(one)(lengths)

    def nan(model, lengths=(0, 1, 12, 13, -1), first=0, key=KEY, **options):
        sampling = jax.tree.map(jnp.asarray, SamplingParams(**options))
        return np.isnan(logprobs(model, first + np.arange(12), np.asarray(lengths), sampling, key)).tolist()

    none, every = [False] * 4, [True] * 4
    assert nan(small) == [every, none, none, every, every]
    broken = eqx.tree_at(lambda m: m.norm_f.weight, small, small.norm_f.weight.at[0].set(jnp.nan))
    others = {"temperature": 0.7, "top_p": 0.5, "eos_token_ids": [1, 2], "min_new_tokens": 2}
    with counting_compiles() as compiles:
        banned = nan(small, no_repeat_ngram_size=1, vocab_size=14)
        assert banned == [every, none, [False, False, True, True], every, every]
        assert nan(broken) == [every] * 5
        assert nan(small, (1, 5, 9, 4, 12), 3, jax.random.key(6), **others) == [none] * 5
    assert compiles == []


def test_no_new_tokens(small):
    from mpt_eqx import decode

    decoded = jax.eval_shape(lambda: decode(small, [1, 2, 3], 3, max_new_tokens=0))
    assert decoded.tokens.shape == decoded.logprobs.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": jnp.ones((2, 3), int)}, r"tokens: expected the ids of one sequence, whole numbers, found an array "
         r"of shape \(2, 3\) and type int32; use jax.vmap for a batch"),
        ({"tokens": [1.5]}, r"tokens: expected .*, found an array of shape \(1,\) and type float64"),
        ({"tokens": [[1], [2, 3]]}, "tokens: expected the ids of one sequence, whole numbers, found list"),
        ({"tokens": "text"}, "tokens: expected the ids of one sequence, whole numbers, found str"),
        ({"tokens": []}, "tokens: expected the ids of one sequence, whole numbers, found an array"),
        ({"tokens": np.zeros(0, int)}, "tokens: expected at least one token, found none"),
        ({"tokens": [1, 61, 2]}, "tokens: expected token ids from 0 to 60, found 61"),
        ({"length": 4}, "length: expected how many of the 3 tokens are real, from 1 on, found 4"),
        ({"length": 0}, "length: expected how many of the 3 tokens are real, from 1 on, found 0"),
        ({"length": 1.5}, "length: expected a whole number, found float"),
        ({"length": jnp.asarray([1, 2])}, r"length: expected a whole number, .* use jax.vmap for a batch"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected a whole number ≥ 0, found -1"),
        ({"max_new_tokens": 510}, r"length: 3 tokens and max_new_tokens=510 exceed max_seq_len=512; "
         r".*'max_seq_len': 513"),
        ({"sampling": {"temperature": 1.0}}, r"sampling: expected SamplingParams\(…\), found dict"),
        ({"sampling": {"temperature": 1.0, "of_rows": 2}}, "sampling: expected the options of one row, found those of "
         "2; use jax.vmap"),
        ({"sampling": {"eos_token_ids": [61]}}, "eos_token_ids: expected token ids from 0 to 60, found 61"),
        ({"sampling": {"pad_token_id": 61}}, "pad_token_id: expected token ids from 0 to 60, found 61"),
        ({"sampling": {"min_new_tokens": 5}}, "min_new_tokens: expected at most max_new_tokens=4, found 5"),
        ({"sampling": {"vocab_size": 62}}, "vocab_size: expected at most the model's 61, found 62"),
        ({"key": 5, "sampling": {"temperature": 1.0}}, "key: expected one key, such as .*, found int"),
        ({"sampling": {"temperature": 1.0}, "key": None}, r"key: expected a key, such as .*, with temperature=1.0"),
        ({"row": 0.5}, "row: expected a whole number, found float"),
    ],
)  # fmt: skip
def test_bad_arguments(small, arguments, message):
    from mpt_eqx import GenerationError, SamplingParams, decode

    sampling = arguments.get("sampling")
    if sampling and "expected SamplingParams" not in message:
        rows = sampling.pop("of_rows", None)
        arguments["sampling"] = SamplingParams(**sampling).of_rows(rows) if rows else SamplingParams(**sampling)
    with pytest.raises(GenerationError, match=message):
        decode(small, **{"tokens": [1, 2, 3], "length": 3, "max_new_tokens": 4, **arguments})


def test_a_traced_temperature_needs_a_key(small):
    from mpt_eqx import GenerationError, SamplingParams, decode

    def traced(t):
        return decode(small, [1], 1, max_new_tokens=1, sampling=SamplingParams(temperature=t))

    with pytest.raises(GenerationError, match=r"key: expected a key, .*, with a traced temperature, found None"):
        jax.eval_shape(traced, 1.0)
