"""Options of each row and functions of the logits: rows may differ, nothing compiles again, the order is fixed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import counting_compiles

V = 61
ROWS_OF_ONE = [[5], [7], [8]]
# One row each; none of them changes what the others get.
ROWS = (
    {},
    {"temperature": 3.0, "top_k": 5, "min_p": 0.02},
    {"temperature": 8.0, "top_p": 0.8, "typical_p": 0.9},
    {"temperature": 4.0, "epsilon_cutoff": 0.01, "eta_cutoff": 0.02, "repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "no_repeat_ngram_size": 1, "vocab_size": 40},
    {"eos_token_ids": list(range(0, 60, 2)), "min_new_tokens": 3, "pad_token_id": 60},
)


def in_one_batch(*options):
    """The options of a batch of rows."""
    from mpt_eqx import SamplingParams

    rows = [{"eos_token_ids": [61 + i for i in range(20)], **row} for row in options]  # ends of one shape
    return jax.tree.map(lambda *x: np.stack(x), *(SamplingParams(**row) for row in rows))


@pytest.fixture(scope="module")
def decoded(tiny_model):
    """Decodes eight tokens of a prompt for each row."""
    from mpt_eqx.generation.prompts import prefill_chunk
    from mpt_eqx.generation.state import empty_state
    from mpt_eqx.generation.steps import decode_chunk

    prompt = np.random.default_rng(0).integers(V, size=32)

    def decode(*options):
        rows = len(options)
        state = empty_state(tiny_model, rows, 512)
        state = prefill_chunk(tiny_model, state, jnp.asarray(np.stack([prompt] * rows)), jnp.full(rows, 32))
        return decode_chunk((tiny_model, in_one_batch(*options), jax.random.key(4), ()), state, 8, True)[1]

    return decode


@pytest.mark.optimized
def test_rows_with_different_options_do_not_change_each_other(decoded):
    """Each row of a mixed batch is what it is where all others have no options, and no other row changes it."""
    mixed = decoded(*ROWS)
    for i, row in enumerate(ROWS):
        alone = decoded(*({},) * i, row, *({},) * (len(ROWS) - 1 - i))
        np.testing.assert_array_equal(alone.tokens[:, i], mixed.tokens[:, i])
        np.testing.assert_array_equal(alone.logprobs[:, i], mixed.logprobs[:, i])
    # Every option did something.
    assert len({tuple(row) for row in mixed.tokens.T.tolist()}) == len(ROWS)
    assert mixed.tokens[:, 4].max() < 40 and len(set(mixed.tokens[:, 4].tolist())) == 8
    ended = mixed.tokens[:, 5].tolist()
    assert all(token % 2 for token in ended[:3]) and ended[-1] == 60


@pytest.mark.optimized
@pytest.mark.slow
def test_a_row_that_asks_for_nothing_keeps_every_bit():
    from mpt_eqx.generation.sampling import process_logits, sample

    logits = jnp.asarray(np.random.default_rng(1).normal(size=(len(ROWS), V)), jnp.float32).at[:, 3].set(-jnp.inf)
    tokens, lengths = jnp.tile(jnp.arange(20), (len(ROWS), 1)), jnp.full(len(ROWS), 20)
    params = in_one_batch(*ROWS)
    processed = process_logits(logits, params, tokens, lengths, jnp.zeros_like(lengths))
    changed = (np.asarray(processed) != np.asarray(logits)).any(axis=1)
    assert changed.tolist() == [False, False, False, True, True, True]
    assert int(sample(processed, params, jax.random.key(0), jnp.zeros_like(lengths))[0]) == int(jnp.argmax(logits[0]))


@pytest.mark.slow
def test_epsilon_and_eta_filter_what_is_drawn(one_block_model):
    """After temperature: no token of less probability is drawn, and without them some are."""
    from mpt_eqx import generate

    def drawn(**options):
        """The probability of each token that was drawn, and the entropy of what it was drawn from."""
        result = generate(
            one_block_model, ROWS_OF_ONE, max_new_tokens=48, temperature=4.0, key=jax.random.key(0), return_logits=True,
            **options,
        )  # fmt: skip
        weights = np.exp(result.logits / 4)
        probs = weights / weights.sum(axis=-1, keepdims=True)
        assert len(np.unique(result.tokens)) > 8
        return np.take_along_axis(probs, result.tokens[..., None], -1)[..., 0], -(probs * np.log(probs)).sum(axis=-1)

    def eta(entropy):
        return np.minimum(0.05, np.sqrt(0.05) * np.exp(-entropy))

    probs, entropy = drawn()
    assert probs.min() < 0.02 and (probs < eta(entropy)).any()
    assert drawn(epsilon_cutoff=0.02)[0].min() >= 0.02
    probs, entropy = drawn(eta_cutoff=0.05)
    assert (probs >= eta(entropy)).all()


def test_parameters_take_numbers_and_traced_values():
    from mpt_eqx import GenerationError, SamplingParams
    from mpt_eqx.generation.sampling_params import SamplingOptions

    names = set(SamplingOptions.__annotations__) | {"max_new_tokens"}
    assert names == set(SamplingParams.__dataclass_fields__)
    default, same = SamplingParams(), SamplingParams(**dict.fromkeys(names - {"eos_token_ids"}))
    assert eqx.tree_equal(default, same)
    given = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(2**40), eos_token_ids={3}, max_new_tokens=9)
    assert given.temperature == np.float32(0.5) and given.top_k == 2**31 - 1 and given.max_new_tokens == 9
    assert given.eos_token_ids.tolist() == [3, *[-1] * 7]
    traced = jax.jit(jax.vmap(lambda t, k: SamplingParams(temperature=t, top_k=k)))(jnp.arange(3.0), jnp.arange(3))
    assert traced.temperature.tolist() == [0, 1, 2] and traced.top_k.dtype == np.int32
    for options, message in (
        ({"temperature": -1}, "temperature: expected a finite number ≥ 0, found -1"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number ≥ 1, found 0"),
        ({"eos_token_ids": [-1]}, "eos_token_ids: expected token ids ≥ 0, found -1"),
        ({"num_beams": 3}, "num_beams: expected an option of SamplingParams, found an unknown name; there are rep"),
    ):
        with pytest.raises(GenerationError, match=message):
            SamplingParams(**options)


def successor(logits, tokens, length):
    """Allows only the token after the last one."""
    return jnp.where(jnp.arange(logits.shape[0]) == (tokens[length - 1] + 1) % V, logits, -jnp.inf)


def test_a_processor_sees_the_tokens_of_its_row_and_is_compiled_once(one_block_model):
    """In generate, stream and beam_search, for prompts of different lengths, after a prefix, and past a chunk."""
    from mpt_eqx import beam_search, generate, prefill, stream

    traced, rows = [], [[5], [9, 9, 9, 20], [1] * 40]

    def counted(logits, tokens, length):
        traced.append(1)
        return successor(logits, tokens, length)

    options = {"max_new_tokens": 10, "logits_processors": [counted]}
    with_logits = {**options, "return_logits": True}
    wanted = [[(row[-1] + i) % V for i in range(1, 11)] for row in rows]

    def check():
        assert generate(one_block_model, rows, **with_logits).tokens.tolist() == wanted
        # As a tuple, with another number of tokens and another option.
        other = {**with_logits, "max_new_tokens": 12, "logits_processors": (counted,), "top_k": 3}
        assert generate(one_block_model, rows, **other).tokens[:, :10].tolist() == wanted
        prefix = prefill(one_block_model, [9, 9, 9])
        assert generate(one_block_model, [[20]] * 3, prefix=prefix, **with_logits).tokens[0].tolist() == wanted[1]
        assert list(stream(one_block_model, rows[1], **options)) == wanted[1]
        assert beam_search(one_block_model, rows, num_beams=2, **options).tokens.tolist() == wanted
        sampled = generate(one_block_model, rows, temperature=1.0, key=jax.random.key(0), **with_logits)
        assert sampled.tokens.tolist() == wanted

    check()
    before = len(traced)
    with counting_compiles() as compiles:
        check()
    assert len(traced) == before and compiles == []


def test_results_have_the_logits_of_the_model(one_block_model):
    from mpt_eqx import generate

    options = {"max_new_tokens": 10, "return_logits": True}
    free = generate(one_block_model, ROWS_OF_ONE, **options)
    forced = generate(one_block_model, ROWS_OF_ONE, logits_processors=[successor], **options)
    np.testing.assert_array_equal(forced.logits[:, 0], free.logits[:, 0])
    logprobs = jax.nn.log_softmax(forced.logits)
    np.testing.assert_allclose(forced.logprobs[0, 0], logprobs[0, 0, 6], rtol=1e-6)


def halved(logits, tokens, length):
    return logits / 2


def without_the_best(logits, tokens, length):
    return logits.at[jnp.argmax(logits)].set(-jnp.inf)


def test_processors_come_after_penalties_and_before_the_temperature(one_block_model):
    from mpt_eqx import generate
    from mpt_eqx.generation.sampling import process_logits

    logits = jnp.asarray(np.random.default_rng(2).normal(size=(2, V)), jnp.float32)
    arguments = (in_one_batch(*ROWS[3:5]), jnp.ones((2, 9), jnp.int32), jnp.full(2, 9), jnp.zeros(2, jnp.int32))
    built_in = process_logits(logits, *arguments)
    both = process_logits(logits, *arguments, (halved, without_the_best))
    for row, found in zip(np.asarray(built_in) / 2, np.asarray(both), strict=True):
        np.testing.assert_array_equal(found, np.where(np.arange(V) == row.argmax(), -np.inf, row))

    rows, options = ROWS_OF_ONE, {"max_new_tokens": 10, "key": jax.random.key(3), "return_logits": True}
    wanted = generate(one_block_model, rows, temperature=8.0, **options).tokens
    assert len(np.unique(wanted)) > 8
    found = generate(one_block_model, rows, temperature=4.0, logits_processors=[halved], **options).tokens
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
def test_what_is_drawn_after_processors_is_the_likeliest_they_left(one_block_model):
    from mpt_eqx import generate

    rows, options = ROWS_OF_ONE, {"max_new_tokens": 10, "key": jax.random.key(3), "return_logits": True}
    second = generate(one_block_model, rows, temperature=1.0, top_k=1, logits_processors=(without_the_best,), **options)
    greedy = generate(one_block_model, rows, logits_processors=(without_the_best,), **options)
    np.testing.assert_array_equal(second.tokens, greedy.tokens)
    np.testing.assert_array_equal(greedy.tokens, np.argsort(greedy.logits, axis=-1)[..., -2])


class Bias(eqx.Module):
    """A processor with an array."""

    bias: jax.Array

    def __call__(self, logits, tokens, length):
        return logits + self.bias


def test_another_array_of_a_processor_compiles_nothing(one_block_model):
    from mpt_eqx import generate

    rows = ROWS_OF_ONE
    biases = [Bias(jnp.zeros(V).at[token].set(1e4)) for token in (3, 4)]
    found = []
    with counting_compiles() as compiles:
        for bias in biases:
            found.append(generate(one_block_model, rows, max_new_tokens=10, logits_processors=[bias]).tokens)
            compiles.append("end")
    assert (found[0] == 3).all() and (found[1] == 4).all()
    assert compiles[compiles.index("end") :] == ["end", "end"]


class After4(eqx.Module):
    """A processor that writes a value over all logits from the fifth token on."""

    value: jax.Array

    def __call__(self, logits, tokens, length):
        return jnp.where(length > 4, self.value, logits)


def test_what_a_processor_may_not_leave(one_block_model):
    """No token at all, or NaN."""
    from mpt_eqx import GenerationError, beam_search, generate

    options = {"max_new_tokens": 10, "logits_processors": [After4(jnp.asarray(-jnp.inf))]}
    with pytest.raises(GenerationError, match="no token is left to choose from for new token 3; .*logits_processors"):
        generate(one_block_model, [[1, 2]], **options)
    with pytest.raises(GenerationError, match=r"prompts\[0\]: found 0 of num_return_sequences=1 .*logits_processors"):
        beam_search(one_block_model, [[1, 2]], num_beams=2, **options)
    options = {"max_new_tokens": 10, "logits_processors": [After4(jnp.asarray(jnp.nan))]}
    message = "the logits of new token 3 are not finite; look for NaN or infinity in what logits_processors return"
    with pytest.raises(GenerationError, match=message):
        generate(one_block_model, [[1, 2]], **options)
    with pytest.raises(GenerationError, match=message):
        beam_search(one_block_model, [[1, 2]], num_beams=2, **options)


def lowered(logits, tokens, length):
    return logits - 1


def test_a_search_goes_by_what_a_processor_makes_of_log_probabilities(one_block_model):
    from mpt_eqx import beam_search

    search = {"num_beams": 2, "max_new_tokens": 10, "length_penalty": 0.0, "num_return_sequences": 2}
    free, found = (
        beam_search(one_block_model, ROWS_OF_ONE, logits_processors=processors, **search)
        for processors in ((), (lowered,))
    )
    np.testing.assert_array_equal(found.tokens, free.tokens)
    np.testing.assert_allclose(found.scores, free.scores - 10, rtol=1e-5)
    np.testing.assert_allclose(found.logprobs, free.logprobs, rtol=1e-5)
