"""generate and stream: exact, independent of the batch, compiled once, and with an error for each bad argument."""

import contextlib
import itertools
import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import examples, is_long, one_in, some
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

SAMPLED = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}


@contextlib.contextmanager
def counting_compiles():
    """Counts what XLA compiles inside the block."""
    from jax._src import monitoring

    events: list[str] = []

    def listen(event: str, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    "sampling", [pytest.param({}, marks=pytest.mark.slow), {**SAMPLED, "key": jax.random.key(5)}],
    ids=["greedy", "sampled"],
)  # fmt: skip
@pytest.mark.parametrize("way", ["XLA", pytest.param("kernel", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("blocks", some(["one", "two"], ["one"]))
def test_a_row_alone_equals_the_row_in_a_batch(one_block_model, tiny_model, prompts, sampling, blocks, way):
    """Its tokens, and its logits to 1e-5: in float32, with the kernel and without."""
    from mpt_eqx import generate

    model = one_block_model if blocks == "one" else tiny_model
    rows, options = prompts(3, 17, 1, 40), {"max_new_tokens": 12, "return_logits": True, **sampling}
    together, alone = generate(model, rows, **options), generate(model, rows[:1], **options)
    np.testing.assert_array_equal(alone.tokens, together.tokens[:1])
    np.testing.assert_allclose(alone.logits, together.logits[:1], atol=1e-5)
    np.testing.assert_allclose(alone.logprobs, together.logprobs[:1], atol=1e-5)
    others = generate(model, [rows[0], *prompts(1, 40, 17, seed=1)], **options)
    np.testing.assert_array_equal(others.tokens[0], together.tokens[0])


def test_the_scan_equals_a_python_loop_over_the_full_forward(tiny_model, prompts):
    from mpt_eqx import generate

    key, (prompt,) = jax.random.key(2), prompts(5)
    result = generate(tiny_model, prompt, max_new_tokens=20, temperature=0.8, key=key, return_logits=True)
    tokens = list(prompt)

    @jax.jit
    def drawn(tokens, at, step):
        logits = tiny_model(tokens)[at]
        draw = jax.random.fold_in(jax.random.fold_in(key, 0), step)
        return logits, jax.random.categorical(draw, logits / 0.8), jax.nn.log_softmax(logits)

    for step in range(20):
        logits, token, logprobs = drawn(jnp.asarray([*tokens, *[0] * (25 - len(tokens))]), len(tokens) - 1, step)
        np.testing.assert_allclose(result.logits[0, step], logits, atol=2e-5)
        tokens.append(int(token))
        assert result.tokens[0, step] == tokens[-1]
        np.testing.assert_allclose(result.logprobs[0, step], logprobs[tokens[-1]], atol=2e-5)


def test_the_end_of_a_row(one_block_model, prompts):
    from mpt_eqx import generate

    rows = prompts(4, 6)
    options = {"max_new_tokens": 40, "return_logits": True}
    free = generate(one_block_model, rows, **options)
    eos = int(free.tokens[0, 5])
    result = generate(one_block_model, rows, eos_token_ids=[eos], pad_token_id=60, **options)
    for row in range(2):
        at = np.flatnonzero(free.tokens[row] == eos)
        length = at[0] + 1 if len(at) else 40
        assert result.lengths[row] == length and result.finish_reasons[row] == ("stop" if len(at) else "length")
        np.testing.assert_array_equal(result.tokens[row, :length], free.tokens[row, :length])
        assert (result.tokens[row, length:] == 60).all()
        assert (result.logprobs[row, length:] == 0).all() and (result.logits[row, length:] == 0).all()
    assert result.finish_reasons[0] == "stop" and result.logits.shape == (2, 40, 61)


def test_an_end_equal_to_the_padding_counts_once(one_block_model, prompts):
    from mpt_eqx import generate

    (prompt,) = prompts(4)
    eos = int(generate(one_block_model, prompt, max_new_tokens=8).tokens[0, 2])
    result = generate(one_block_model, prompt, max_new_tokens=8, eos_token_ids=[eos], pad_token_id=eos)
    assert result.lengths[0] <= 3 and result.finish_reasons == ["stop"]


def test_until_ends_rows_where_it_says(one_block_model, prompts):
    """As an end-of-sequence token does: what stands after is padding, in whatever batch."""
    from mpt_eqx import generate

    rows, ends = prompts(4, 9, 5), [3, None, 12]
    options = {"max_new_tokens": 20, "pad_token_id": 7, "return_logits": True}
    whole = generate(one_block_model, rows, **options)
    eos = int(whole.tokens[1, 15])
    asked = []

    def until(row, tokens):
        asked.append((row, len(tokens)))
        assert tokens == whole.tokens[row, : len(tokens)].tolist()
        return len(tokens) == ends[row]

    found = generate(one_block_model, rows, until=until, eos_token_ids=[eos], **options)
    first_eos = whole.tokens[1].tolist().index(eos) + 1
    lengths = [min(end or 20, [*whole.tokens[i].tolist(), eos].index(eos) + 1) for i, end in enumerate(ends)]
    assert lengths[1] == first_eos and found.lengths.tolist() == lengths and found.finish_reasons == ["stop"] * 3
    for row, n in enumerate(lengths):
        for name, rest in (("tokens", 7), ("logprobs", 0), ("logits", 0)):
            np.testing.assert_array_equal(getattr(found, name)[row, :n], getattr(whole, name)[row, :n])
            assert (getattr(found, name)[row, n:] == rest).all()
    assert max(n for _, n in asked) <= max(lengths) and len(asked) == len(set(asked))


def test_where_until_never_ends_a_row_its_length_does(one_block_model, prompts):
    from mpt_eqx import generate

    found = generate(one_block_model, prompts(4, 9), max_new_tokens=9, until=lambda row, tokens: row == 1)
    assert found.lengths.tolist() == [9, 1] and found.finish_reasons == ["length", "stop"]


def test_keys(one_block_model, prompts):
    from mpt_eqx import generate

    (prompt,) = prompts(4)
    one, again, other = (
        generate(one_block_model, [prompt, prompt], max_new_tokens=16, temperature=3.0, key=jax.random.key(k)).tokens
        for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any() and (one[0] != one[1]).any()
    legacy = generate(one_block_model, [prompt, prompt], max_new_tokens=16, temperature=3.0, key=jax.random.PRNGKey(1))
    np.testing.assert_array_equal(legacy.tokens, one)


def test_a_row_with_a_key_of_its_own_draws_the_same_beside_any_others(one_block_model, prompts):
    from mpt_eqx import generate

    rows, options = prompts(4, 9), {"max_new_tokens": 16, "temperature": 3.0}
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), np.arange(2))
    together = generate(one_block_model, rows, key=keys, **options).tokens
    np.testing.assert_array_equal(together, generate(one_block_model, rows, key=jax.random.key(1), **options).tokens)
    np.testing.assert_array_equal(
        generate(one_block_model, rows[::-1], key=keys[::-1], **options).tokens[::-1], together
    )
    legacy = generate(one_block_model, rows, key=jax.random.key_data(keys), **options).tokens
    np.testing.assert_array_equal(legacy, together)


def test_nothing_compiles_again(one_block_model, prompts):
    """For another prompt of the same bucket, other values of every option, other seeds and lengths."""
    from mpt_eqx import generate

    a, b, c = prompts(5, 30, 17)
    key = jax.random.key(1)
    generate(one_block_model, [a, b], max_new_tokens=20)
    with counting_compiles() as compiles:
        generate(one_block_model, [b, c], max_new_tokens=20)
        generate(one_block_model, [c, a], max_new_tokens=25, temperature=0.5, key=jax.random.key(9))
        generate(one_block_model, [c, a], max_new_tokens=20, temperature=1.7, top_k=3, top_p=0.5, key=key)
        generate(one_block_model, [c, a], max_new_tokens=20, eos_token_ids=[1, 2, 3], pad_token_id=4)
        generate(one_block_model, [a, b], max_new_tokens=9, repetition_penalty=1.3, no_repeat_ngram_size=3)
        generate(one_block_model, [b, a], max_new_tokens=30, repetition_penalty=0.7, no_repeat_ngram_size=1)
        generate(one_block_model, [b, a], max_new_tokens=9, temperature=0.7, min_p=0.1, typical_p=0.9, key=key)
        generate(
            one_block_model, [b, a], max_new_tokens=9, temperature=0.7, epsilon_cutoff=0.01, eta_cutoff=0.1, key=key
        )
        generate(one_block_model, [b, a], max_new_tokens=9, min_new_tokens=4, eos_token_ids=[3], vocab_size=50)
    assert compiles == []
    with counting_compiles() as compiles:
        generate(one_block_model, [a, b, c], max_new_tokens=20)
    assert compiles


@pytest.mark.parametrize("rows", some([1, 4], [4]))
@pytest.mark.parametrize("dtype", some(["float32", "bfloat16", "float16"], ["bfloat16"]))
def test_a_step_needs_the_cache_and_little_else(tiny_model, rows, dtype):
    """The cache is donated and written in place, in every type; a step needs little memory besides, at any capacity."""
    from mpt_eqx import SamplingParams
    from mpt_eqx.generation.state import empty_state
    from mpt_eqx.generation.steps import decode_chunk

    model = jax.tree.map(lambda x: x.astype(dtype), tiny_model)
    fixed = (model, SamplingParams(max_new_tokens=8).of_rows(rows), jax.random.key(0), ())
    temporary = []
    for capacity in (1024, 8192):
        state = empty_state(model, rows, capacity)
        memory = decode_chunk.lower(fixed, state, 8, False).compile().memory_analysis()
        cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
        assert memory.alias_size_in_bytes > 0.99 * cache_bytes
        temporary.append(memory.temp_size_in_bytes)
    assert temporary[1] <= temporary[0] + 16 * rows * 8192


def test_numbers_of_numpy_are_numbers(one_block_model, prompts):
    from mpt_eqx import generate, stream

    (prompt,) = prompts(5)
    key = jax.random.key(0)
    plain = generate(
        one_block_model, [prompt], max_new_tokens=9, temperature=1.0, top_k=7, num_return_sequences=2, key=key
    )
    numpys = generate(
        one_block_model, np.asarray([prompt]), max_new_tokens=np.int64(9), temperature=np.float32(1), top_k=np.int32(7),
        num_return_sequences=np.int64(2), eos_token_ids=np.asarray([], np.int64), key=key,
    )  # fmt: skip
    np.testing.assert_array_equal(numpys.tokens, plain.tokens)
    tokens = list(stream(one_block_model, jnp.asarray(prompt), max_new_tokens=np.int32(9), chunk_size=np.int64(4)))
    assert tokens == generate(one_block_model, prompt, max_new_tokens=9).tokens[0].tolist()


def test_no_prompts_no_rows(one_block_model):
    from mpt_eqx import generate

    result = generate(one_block_model, [], max_new_tokens=3)
    assert result.tokens.shape == (0, 3) and result.finish_reasons == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, r"prompts\[1\]: expected at least one token, found an empty prompt"),
        ({"prompts": [[1, -1]]}, r"prompts\[0\]: expected token ids from 0 to 60, found .*-1"),
        ({"prompts": [[61]]}, r"prompts\[0\]: expected token ids from 0 to 60, found 61$"),
        ({"prompts": [[2**31 - 1]]}, r"prompts\[0\]: expected token ids from 0 to 60"),
        ({"prompts": "text"}, "prompts: expected token ids, found text; encode it with mpt_eqx.text.load_tokenizer"),
        ({"prompts": ["text"]}, "prompts: expected token ids, found text"),
        ({"prompts": [[1.5]]}, r"prompts\[0\]: expected a list of whole numbers, found an array of shape \(1,\)"),
        ({"prompts": [[[1]]]}, r"prompts\[0\]: expected a list of whole numbers"),
        ({"prompts": [[1] * 200], "max_new_tokens": 57}, r"200 tokens and max_new_tokens=57 exceed max_seq_len=256; .*"
         r"config_overrides={'max_seq_len': 257}"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected a whole number ≥ 0, found -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: expected a whole number ≥ 0, found 1.5"),
        ({"temperature": -1}, "temperature: expected a finite number ≥ 0, found -1"),
        ({"temperature": float("nan")}, "temperature: expected a finite number ≥ 0, found nan"),
        ({"temperature": float("inf")}, "temperature: expected a finite number ≥ 0, found inf"),
        ({"temperature": "hot"}, "temperature: expected a finite number ≥ 0, found 'hot'"),
        ({"temperature": 0.7}, r"key: expected a key, such as jax.random.key\(0\), with temperature=0.7$"),
        ({"top_k": 0}, "top_k: expected a whole number ≥ 1, found 0"),
        ({"top_p": 0}, "top_p: expected a number with 0 < top_p ≤ 1, found 0"),
        ({"top_p": 1.1}, "top_p: expected a number with 0 < top_p ≤ 1, found 1.1"),
        ({"min_p": -0.1}, "min_p: expected a number with 0 ≤ min_p ≤ 1, found -0.1"),
        ({"min_p": True}, "min_p: expected a number with 0 ≤ min_p ≤ 1, found True"),
        ({"typical_p": 0}, "typical_p: expected a number with 0 < typical_p ≤ 1, found 0"),
        ({"epsilon_cutoff": 1}, "epsilon_cutoff: expected a number with 0 ≤ epsilon_cutoff < 1, found 1"),
        ({"eta_cutoff": -0.1}, "eta_cutoff: expected a number with 0 ≤ eta_cutoff < 1, found -0.1"),
        ({"temprature": 1.0}, "temprature: expected an option of generate, found an unknown name; did you mean temper"),
        ({"repeat_penalty": 1.0}, r"repeat_penalty: .*; did you mean repetition_penalty\?"),
        ({"xyz": 1.0}, "xyz: expected an option of generate, found an unknown name; there are .*eta_cutoff"),
        ({"logits_processors": 5}, "logits_processors: expected a list of functions, found int"),
        ({"logits_processors": [5]}, r"logits_processors\[0\]: expected a function of logits, tokens and length, "
         "found int"),
        ({"logits_processors": [lambda logits, tokens, length: logits[1:]]}, r"logits_processors\[0\]: expected logits "
         r"of shape \(61,\) in floating point, as it was given, found an array of shape \(60,\) and type float32"),
        ({"logits_processors": [lambda logits, tokens, length: tokens[:61]]}, r"found an array of shape \(61,\) and "
         "type int32"),
        ({"logits_processors": [lambda logits, tokens, length: None]}, "as it was given, found NoneType"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a finite number > 0, found 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty: expected a finite number > 0, found inf"),
        ({"no_repeat_ngram_size": 0}, "no_repeat_ngram_size: expected a whole number ≥ 1, found 0"),
        ({"min_new_tokens": -1}, "min_new_tokens: expected a whole number ≥ 0, found -1"),
        ({"min_new_tokens": 5}, "min_new_tokens: expected at most max_new_tokens=4, found 5"),
        ({"vocab_size": 0}, "vocab_size: expected a whole number ≥ 1, found 0"),
        ({"vocab_size": 62}, "vocab_size: expected at most the model's 61, found 62; the tokenizer is not this"),
        ({"num_return_sequences": 0}, "num_return_sequences: expected a whole number ≥ 1, found 0"),
        ({"num_return_sequences": 2}, "num_return_sequences: expected 1 with temperature=0, found 2; .* beam_search"),
        ({"temperature": 1e39}, "temperature: expected a finite number ≥ 0, found 1e"),
        ({"repetition_penalty": 1e300}, "repetition_penalty: expected a finite number > 0, found 1e"),
        ({"until": 5}, "until: expected a function of a row's number and tokens, found int"),
        ({"key": 5}, r"key: expected one key, such as jax.random.key\(0\), or 1, one for each row, found int"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, r"key: expected one key, such as .*, or 1, one for each row, "
         r"found an array of shape \(3,\) and type key<fry>"),
        ({"key": np.array([0, 5])}, r"key: expected one key, .*, found an array of shape \(2,\) and type int64"),
        ({"eos_token_ids": 5}, "eos_token_ids: expected a list of token ids, found 5"),
        ({"eos_token_ids": None}, "eos_token_ids: expected a list of token ids, found None"),
        ({"eos_token_ids": ["x"]}, "eos_token_ids: expected token ids from 0 to 60, found 'x'"),
        ({"prompts": None}, "prompts: expected a list of token ids for each prompt, found NoneType"),
        ({"prompts": 5}, "prompts: expected a list of token ids for each prompt, found int"),
        ({"prompts": {1, 2}}, "prompts: expected a list of token ids for each prompt, found set"),
        ({"prompts": [1, [2]]}, r"prompts\[0\]: expected a list of whole numbers, found lists in it"),
        ({"prompts": [[1, [2]]]}, r"prompts\[0\]: expected a list of whole numbers, found lists in it"),
        ({"eos_token_ids": [61]}, "eos_token_ids: expected token ids from 0 to 60, found 61"),
        ({"pad_token_id": -1}, "pad_token_id: expected token ids from 0 to 60, found -1"),
    ],
)  # fmt: skip
def test_bad_arguments(one_block_model, arguments, message):
    from mpt_eqx import GenerationError, generate

    with pytest.raises(GenerationError, match=message):
        generate(one_block_model, **{"prompts": [[1]], "max_new_tokens": 4, **arguments})


def test_bad_arguments_of_stream_are_found_at_once(one_block_model):
    from mpt_eqx import GenerationError, stream

    with pytest.raises(GenerationError, match="chunk_size: expected a whole number ≥ 1, found 0"):
        stream(one_block_model, [1], max_new_tokens=4, chunk_size=0)
    with pytest.raises(GenerationError, match="found an empty prompt"):
        stream(one_block_model, [], max_new_tokens=4)
    with pytest.raises(GenerationError, match="prompt: expected a list of token ids, found NoneType"):
        stream(one_block_model, None, max_new_tokens=4)
    with pytest.raises(GenerationError, match="prompt: expected the token ids of one prompt, found list in it"):
        stream(one_block_model, [[1], [2]], max_new_tokens=4)


def test_logits_that_are_not_finite_are_an_error_and_not_a_token(one_block_model):
    from mpt_eqx import GenerationError, generate

    broken = eqx.tree_at(lambda m: m.norm_f.weight, one_block_model, replace_fn=lambda w: w.at[3].set(jnp.nan))
    with pytest.raises(GenerationError, match="logits of new token 0 are not finite; .*check_finite=True"):
        generate(broken, [[1, 2]], max_new_tokens=4)


def test_a_step_that_is_not_finite_is_named(tiny_config):
    """The embedding of the fourth new token is NaN: the fifth cannot be chosen, except where the row has ended."""
    from mpt_eqx import MPT, GenerationError, InitConfig, generate

    config = tiny_config(n_layers=1, tie_word_embeddings=False, init_config=InitConfig(emb_init_std=0.5))
    model, rows = MPT(config, key=jax.random.key(3)), [[5], [9]]
    tokens = generate(model, rows, max_new_tokens=6).tokens[1].tolist()
    fourth = tokens.index(tokens[3])
    for value in (jnp.nan, jnp.inf):
        broken = eqx.tree_at(lambda m: m.wte.weight, model, model.wte.weight.at[tokens[3]].set(value))
        with pytest.raises(GenerationError, match=f"the logits of new token {fourth + 1} are not finite"):
            generate(broken, rows, max_new_tokens=6)
        ended = generate(broken, [[9]] * 2, max_new_tokens=6, eos_token_ids=[tokens[3]])
        assert ended.finish_reasons == ["stop"] * 2 and ended.lengths[0] == fourth + 1


def test_what_fills_a_piece_of_a_prompt_is_not_seen(tiny_config):
    """Token 0, with which prompts are padded, makes NaN: only a prompt with it in it fails."""
    from mpt_eqx import MPT, GenerationError, generate

    model = MPT(tiny_config(n_layers=1, tie_word_embeddings=False), key=jax.random.key(1))
    broken = eqx.tree_at(lambda m: m.wte.weight, model, model.wte.weight.at[0].set(jnp.nan))
    sound = generate(model, [[1, 2, 3], [4] * 40], max_new_tokens=4)
    np.testing.assert_array_equal(generate(broken, [[1, 2, 3], [4] * 40], max_new_tokens=4).tokens, sound.tokens)
    with pytest.raises(GenerationError, match="the logits of new token 0 are not finite"):
        generate(broken, [[1, 0, 3], [4] * 40], max_new_tokens=4)


@pytest.mark.parametrize(
    "kind", [tuple, set, frozenset, np.array, jnp.array, dict.fromkeys, iter],
    ids=["tuple", "set", "frozenset", "numpy", "jax", "dict", "iterator"],
)  # fmt: skip
def test_ends_in_any_collection(one_block_model, kind):
    from mpt_eqx import generate, stream

    free = generate(one_block_model, [1, 2, 3], max_new_tokens=9).tokens[0].tolist()
    result = generate(one_block_model, [1, 2, 3], max_new_tokens=9, eos_token_ids=kind([free[4]]))
    assert result.finish_reasons == ["stop"] and result.lengths[0] == free.index(free[4]) + 1
    made = list(stream(one_block_model, [1, 2, 3], max_new_tokens=9, eos_token_ids=kind([free[4]])))
    assert made == free[: result.lengths[0]]


SHARDED = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mpt_eqx import SHIPPED_MODEL, from_pretrained, generate
model = from_pretrained(SHIPPED_MODEL, dtype="float32")
mesh = Mesh(np.array(jax.devices()), ("x",))
place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
rows = [[5, 6, 7], [8] * 40]
options = {"max_new_tokens": 24, "temperature": 1.0, "top_k": 50, "key": jax.random.key(0)}
alone = generate(model, rows, **options).tokens
split = jax.tree.map(lambda x: place(x, P(None, "x") if x.ndim == 2 else P()), model)
np.testing.assert_array_equal(generate(split, rows, **options).tokens, alone)
print(len(jax.devices()))
"""


@pytest.mark.slow
def test_weights_that_somebody_has_placed_write_the_same():
    """Without rules: columns on each of four devices."""
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=300,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "4\n", done.stderr


def test_no_token_is_left(one_block_model):
    """Every token of a vocabulary of three was there, and none may come again."""
    from mpt_eqx import GenerationError, generate

    with pytest.raises(GenerationError, match="no token is left to choose from for new token 1; loosen no_repeat_ngr"):
        generate(one_block_model, [[0, 1]], max_new_tokens=4, no_repeat_ngram_size=1, vocab_size=3)


def test_ids_that_the_tokenizer_does_not_have_are_not_chosen(one_block_model, prompts):
    from mpt_eqx import generate

    rows = prompts(4, 9)
    free = generate(one_block_model, rows, max_new_tokens=30)
    bound = int(free.tokens.max())
    barred = generate(one_block_model, rows, max_new_tokens=30, vocab_size=bound, return_logits=True)
    assert barred.tokens.max() < bound
    assert np.isfinite(barred.logits).all()  # they are the model's, whatever is barred


def test_repetitions_count_the_prompt_and_what_was_made(one_block_model, prompts):
    from mpt_eqx import generate

    rows = prompts(20, 30)
    no_pairs = generate(one_block_model, rows, max_new_tokens=30, no_repeat_ngram_size=2).tokens
    for row, made in zip(rows, no_pairs.tolist(), strict=True):
        new = list(itertools.pairwise([row[-1], *made]))
        assert len(set(new)) == len(new) and not set(new) & set(itertools.pairwise(row))
    strict = generate(one_block_model, rows, max_new_tokens=20, repetition_penalty=1e4).tokens
    for row, made in zip(rows, strict.tolist(), strict=True):
        assert len(set(made)) == 20 and not set(made) & set(row)


def test_several_rows_of_one_prompt(one_block_model, prompts):
    """They are those of the prompt repeated: the same keys, one after the other."""
    from mpt_eqx import generate

    a, b = prompts(3, 40)
    options = {"max_new_tokens": 12, "temperature": 1.0, "key": jax.random.key(4)}
    several = generate(one_block_model, [a, b], num_return_sequences=3, **options)
    repeated = generate(one_block_model, [a, a, a, b, b, b], **options)
    np.testing.assert_array_equal(several.tokens, repeated.tokens)
    assert len({tuple(row) for row in several.tokens.tolist()}) == 6


def test_an_interrupted_call_keeps_what_was_made(one_block_model, prompts, monkeypatch):
    from mpt_eqx import Interrupted, generate
    from mpt_eqx.generation import steps

    (prompt,) = prompts(9)
    whole = generate(one_block_model, [prompt], max_new_tokens=40).tokens
    calls, decode_chunk = [], steps.decode_chunk

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode_chunk(*args)

    monkeypatch.setattr(steps, "decode_chunk", interrupted)
    with pytest.raises(Interrupted) as error:
        generate(one_block_model, [prompt], max_new_tokens=40, pad_token_id=60)
    result = error.value.result
    assert isinstance(error.value, KeyboardInterrupt) and result.finish_reasons == ["interrupted"]
    assert result.lengths.tolist() == [16] and (result.tokens[0, 16:] == 60).all()
    np.testing.assert_array_equal(result.tokens[0, :16], whole[0, :16])


def test_generation_ends_within_one_chunk_of_the_last_end(one_block_model, prompts, monkeypatch):
    from mpt_eqx import generate
    from mpt_eqx.generation import steps

    rows = prompts(5, 7)
    free = generate(one_block_model, rows, max_new_tokens=60)
    ends = [int(row[10]) for row in free.tokens]
    lengths = generate(one_block_model, rows, max_new_tokens=60, eos_token_ids=ends).lengths
    calls, decode_chunk = [], steps.decode_chunk
    monkeypatch.setattr(steps, "decode_chunk", lambda *args: (calls.append(1), decode_chunk(*args))[1])
    generate(one_block_model, rows, max_new_tokens=60, eos_token_ids=ends)
    assert len(calls) == -(-lengths.max() // steps.DECODE_CHUNK)


def in_bfloat16(model):
    return jax.tree.map(lambda x: x.astype("bfloat16"), model)


BITS = [(1, "bfloat16", 0), *itertools.product([2], ["bfloat16", "float16", "float32"], [0, 1, 3])]


@pytest.mark.optimized
@pytest.mark.parametrize(("blocks", "dtype", "at"), one_in(len(BITS), BITS))
@settings(max_examples=3, deadline=None, phases=list(Phase) if is_long() else [Phase.explicit])
@example([5, 17, 40, 2], {})
@given(
    st.lists(st.integers(1, 60), min_size=4, max_size=4),
    st.sampled_from([{}, {**SAMPLED, "min_p": 0.01, "repetition_penalty": 1.1, "key": jax.random.key(5)}]),
)
def test_a_row_is_the_same_in_every_bit(kernel, tiny_model, one_block_model, blocks, dtype, at, lengths, sampling):
    """Alone or in a batch, first or padded, with long neighbours or short: logits are equal exactly."""
    from mpt_eqx import generate

    model = jax.tree.map(lambda x: x.astype(dtype), {1: one_block_model, 2: tiny_model}[blocks])
    rng = np.random.default_rng(lengths)
    rows = [rng.integers(61, size=n).tolist() for n in (*lengths, 200)]
    options = {"max_new_tokens": 10, "return_logits": True, **sampling}
    together = generate(model, rows, **options)
    others = generate(model, [*[[1]] * at, rows[at]], **options)
    np.testing.assert_array_equal(others.logits[at], together.logits[at])
    np.testing.assert_array_equal(others.logprobs[at], together.logprobs[at])
    np.testing.assert_array_equal(others.tokens[at], together.tokens[at])


@pytest.mark.optimized
@pytest.mark.slow
def test_the_shipped_model_decodes_a_row_independently_of_the_batch(kernel, shipped):
    """A hundred tokens of eight prompts, each alone and all together."""
    from mpt_eqx import generate

    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 4000, size=n).tolist() for n in (3, 17, 40, 100, 5, 60, 33, 1)]
    model = in_bfloat16(shipped)
    together = generate(model, rows, max_new_tokens=100)
    for row, tokens, logprobs in zip(rows, together.tokens, together.logprobs, strict=True):
        alone = generate(model, row, max_new_tokens=100)
        np.testing.assert_array_equal(alone.tokens[0], tokens)
        np.testing.assert_array_equal(alone.logprobs[0], logprobs)


OTHERS = ["f_torch_dmoe", "f_gqa_kv2", "f_rope_dynamic", "f_reuse_kv", "f_qk_ln"]


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", some(OTHERS, ["f_reuse_kv"]))
def test_a_row_of_another_kind_of_model_does_not_depend_on_the_batch(name, way):
    """Experts, shared keys, rotation, another block's keys, normed queries: equal bits with the kernel, else 1e-5."""
    from conftest import GOLDEN

    from mpt_eqx import from_pretrained, generate

    dtype, atol = ("bfloat16", 0) if way == "kernel" else ("float32", 1e-5)
    model, options = from_pretrained(GOLDEN / name, dtype=dtype), {"max_new_tokens": 8, "return_logits": True}
    together, alone = generate(model, [[5, 6, 7], [8] * 9, [3]], **options), generate(model, [5, 6, 7], **options)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[0])
    np.testing.assert_allclose(alone.logits[0], together.logits[0], atol=atol, rtol=0)


@examples(16)
@given(
    st.integers(1, 30), st.sampled_from([1, 7, 21]), st.sampled_from([1, 3, 8, 50]), st.integers(0, 61),
    st.sampled_from([
        {}, {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2}, {**SAMPLED, "key": jax.random.key(1)}
    ]),
)  # fmt: skip
def test_stream_gives_the_tokens_of_generate(one_block_model, length, n, chunk_size, eos, options):
    from mpt_eqx import generate, stream

    prompt = np.random.default_rng(length).integers(61, size=length).tolist()
    options = {"max_new_tokens": n, "eos_token_ids": [eos] if eos < 61 else [], "min_new_tokens": n // 3, **options}
    whole = generate(one_block_model, prompt, **options)
    tokens = list(stream(one_block_model, prompt, chunk_size=chunk_size, **options))
    assert tokens == whole.tokens[0, : whole.lengths[0]].tolist()


def test_drawn_tokens_have_the_warped_frequencies(one_block_model):
    """A chi-square test of 4,000 first tokens against the softmax after temperature and top_k."""
    from mpt_eqx import generate

    n = 4000
    result = generate(
        one_block_model, [5, 6], num_return_sequences=n, max_new_tokens=1, temperature=2.0, top_k=6,
        key=jax.random.key(0), return_logits=True,
    )  # fmt: skip
    logits = result.logits[0, 0].astype(np.float64) / 2.0
    likeliest = np.argsort(logits)[::-1][:6]
    probs = np.exp(logits[likeliest]) / np.exp(logits[likeliest]).sum()
    counts = np.array([(result.tokens[:, 0] == token).sum() for token in likeliest])
    assert counts.sum() == n
    chi_square = ((counts - n * probs) ** 2 / (n * probs)).sum()
    assert chi_square < 20.5  # the 0.999 quantile with five degrees of freedom


def test_limits_of_sampling_are_greedy(one_block_model, prompts):
    from mpt_eqx import generate

    rows = prompts(3, 8)
    greedy = generate(one_block_model, rows, max_new_tokens=10).tokens
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}):
        drawn = generate(
            one_block_model, rows, max_new_tokens=10, key=jax.random.key(3), **{"temperature": 1.0, **options}
        )
        np.testing.assert_array_equal(drawn.tokens, greedy)
