"""score: the plain formula, independent of batch and order, in little memory, with an error for each bad argument."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import some
from test_generate import counting_compiles


@pytest.fixture(scope="module")
def small(tiny_config):
    from mpt_eqx import MPT, InitConfig

    config = tiny_config(n_layers=1, max_seq_len=1024, init_config=InitConfig(emb_init_std=0.5))
    return MPT(config, key=jax.random.key(3))


@pytest.fixture
def sequences(prompts):
    return prompts(2, 17, 33, 300, 5, 34)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_scores_are_those_of_the_formula(small, sequences, dtype):
    from mpt_eqx import score

    model = jax.tree.map(lambda x: x.astype(dtype), small)
    atol = 2e-5 if dtype == "float32" else 0.15
    forward = eqx.filter_jit(lambda model, tokens: model(tokens, logits_dtype="float32"))
    for tokens, found in zip(sequences, score(model, sequences), strict=True):
        logits = forward(model, jnp.asarray(tokens + [0] * (300 - len(tokens))))[: len(tokens) - 1]
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(found.logprobs, expected, atol=atol)
        assert found.total == pytest.approx(found.logprobs.sum(), abs=1e-3)
        assert found.logprobs.dtype == np.float32 and found.is_greedy.dtype == bool
        if dtype == "float32":
            np.testing.assert_array_equal(found.is_greedy, np.asarray(logits).argmax(-1) == tokens[1:])


@pytest.mark.parametrize(
    "name", some(["f_mha_alibi", "f_gqa_kv2", "f_rope_dynamic", "f_torch_dmoe", "hf_untied"], ["f_gqa_kv2"])
)
def test_scores_give_the_loss_of_the_reference(golden, name):
    """The mean over the tokens that its labels count."""
    from mpt_eqx import score

    case = golden(name)
    tokens, labels = case.expected["input_ids"], case.expected["labels"]
    counted = labels[:, 1:] != -100
    assert (labels[:, 1:] == tokens[:, 1:])[counted].all()
    found = np.stack([each.logprobs for each in score(case.model, tokens)])
    np.testing.assert_allclose(-found[counted].mean(), case.expected["loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["int8", "stacked"])
def test_models_of_every_form(small, sequences, form):
    from mpt_eqx import quantize, score, stack

    model = stack(small) if form == "stacked" else quantize(small, "int8")
    tokens = sequences[0][:20]
    logits = jax.jit(lambda tokens: model(tokens, logits_dtype="float32"))(jnp.asarray(tokens))[:-1]
    expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(score(model, [tokens])[0].logprobs, expected, atol=2e-5)


@pytest.mark.optimized
@pytest.mark.parametrize("way", some(["kernel", "XLA"], ["kernel"]), indirect=True)
def test_neither_order_nor_batch_nor_neighbours_change_a_bit(small, sequences, way):
    from mpt_eqx import score

    together = score(small, sequences, prefix_lengths=[1, 9, 2, 270, 4, 1])
    orders = [np.random.default_rng(seed).permutation(len(sequences)) for seed in range(2)]
    for order in [*orders, [3], [4, 3]]:
        prefixes = np.asarray([1, 9, 2, 270, 4, 1])[order]
        some = score(small, [sequences[i] for i in order], prefix_lengths=prefixes, batch_tokens=1 + order[0])
        for i, found in zip(order, some, strict=True):
            np.testing.assert_array_equal(found.logprobs, together[i].logprobs)
            np.testing.assert_array_equal(found.is_greedy, together[i].is_greedy)


def test_what_follows_a_prefix_is_scored_and_a_shared_prefix_is_read_once(small, prompts, monkeypatch):
    import sys

    from mpt_eqx import score

    module = sys.modules["mpt_eqx.evaluation.score"]
    question, *answers = prompts(40, 3, 7, 2)
    whole = score(small, [question + answer for answer in answers])
    calls, read_chunk = [], module.read_chunk
    monkeypatch.setattr(module, "read_chunk", lambda *args: (calls.append(args[3] is None), read_chunk(*args))[1])
    found = score(small, [question + answer for answer in answers], prefix_lengths=[40] * 3)
    assert calls == [True, True, False, False, False]
    for part, every in zip(found, whole, strict=True):
        np.testing.assert_allclose(part.logprobs, every.logprobs[39:], atol=2e-5)


def test_rows_read_together_have_the_same_scores(small, sequences, monkeypatch):
    """As on a GPU: sequences of several lengths and prefixes in a batch, and fewer of them than rows."""
    import sys

    from mpt_eqx import score

    prefixes = [1, 9, 2, 270, 4, 1]
    alone = score(small, sequences, prefix_lengths=prefixes)
    monkeypatch.setattr(sys.modules["mpt_eqx.evaluation.score"], "on_one_cpu", lambda x: False)
    for one, other in zip(score(small, sequences, prefix_lengths=prefixes, batch_tokens=2048), alone, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)
        np.testing.assert_array_equal(one.is_greedy, other.is_greedy)


def test_other_lengths_compile_nothing(small, prompts):
    from mpt_eqx import score

    score(small, prompts(300, 300, 40), prefix_lengths=[290, 1, 2])
    with counting_compiles() as compiles:
        score(small, prompts(2, 33, 257, 380, 477), prefix_lengths=[1, 32, 5, 290, 3])
    assert compiles == []


def test_prefixes_of_the_longest_sequences_share_a_cache_size(small):
    """Also where padding goes beyond max_seq_len: each size would compile its own programs."""
    from mpt_eqx.evaluation.score import _job

    row = np.ones(small.config.max_seq_len + 1, np.int64)
    assert {_job(small.config, 0, row, prefix).capacity for prefix in range(1, len(row))} == {1024, 1024 + 32}


def test_the_last_token_may_stand_beyond_max_seq_len(tiny_config):
    """It is not read; also where positions are learned and there is none for it."""
    from mpt_eqx import MPT, AttnConfig, score

    config = tiny_config(n_layers=1, max_seq_len=16, learned_pos_emb=True, attn_config=AttnConfig(alibi=False))
    model = MPT(config, key=jax.random.key(0))
    tokens = np.arange(17) % 7 + 1
    logits = model(jnp.asarray(tokens[:-1]), logits_dtype="float32")
    expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(16), tokens[1:]]
    np.testing.assert_allclose(score(model, [tokens])[0].logprobs, expected, atol=2e-5)


@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_memory_is_that_of_the_cache_and_of_256_rows_of_logits(tiny_config):
    """The program's, at any length: no logits of a whole text, and no scores of all queries and keys."""
    from mpt_eqx import MPT
    from mpt_eqx.evaluation.chunks import read_chunk
    from mpt_eqx.generation.state import empty_state

    model = MPT(tiny_config(n_layers=1, vocab_size=4096, max_seq_len=8192), key=jax.random.key(0))
    temporary = []
    for rows, capacity in ((1, 512), (1, 8192), (4, 2048)):
        layers, ints = empty_state(model, rows, capacity).cache.layers, jnp.zeros((rows, 256), jnp.int32)
        lowered = read_chunk.lower(model, layers, ints, ints, jnp.zeros(rows, jnp.int32))
        temporary.append(lowered.compile().compiled.memory_analysis().temp_size_in_bytes)
    logits = 256 * 4096 * 4
    assert temporary[1] <= temporary[0] + 2**16 and temporary[0] <= 2.5 * logits
    assert temporary[2] <= 4 * temporary[0]


def test_a_score_that_is_not_finite_is_an_error(small, prompts):
    from mpt_eqx import GenerationError, score

    broken = eqx.tree_at(lambda m: m.norm_f.weight, small, small.norm_f.weight.at[0].set(jnp.nan))
    with pytest.raises(GenerationError, match=r"sequences\[0\]: logits are not finite; look for NaN .* a wider dtype"):
        score(broken, prompts(5))


def test_nothing_and_one(small, prompts):
    from mpt_eqx import score

    assert score(small, []) == []
    (tokens,) = prompts(5)
    np.testing.assert_array_equal(score(small, tokens)[0].logprobs, score(small, np.asarray([tokens]))[0].logprobs)


def test_progress_is_counted_in_tokens(small, prompts, monkeypatch):
    """By the bar of generate."""
    import sys

    from mpt_eqx import score

    bars, module = [], sys.modules["mpt_eqx.evaluation.score"]
    bar = module.progress_bar
    monkeypatch.setattr(module, "progress_bar", lambda *args: (bars.append((args, bar(*args))), bars[-1][1])[1])
    score(small, prompts(5, 2), progress=True)
    score(small, prompts(5, 2))
    assert [args for args, _ in bars] == [(7, True, "scoring"), (7, None, "scoring")]
    assert bars[0][1].n == 7 and bars[0][1].desc == "scoring"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequences": [[1, 2], []]}, r"sequences\[1\]: expected at least two tokens, the first of which is given, "
         "found 0"),
        ({"sequences": [[1]]}, r"sequences\[0\]: expected at least two tokens, .*, found 1; put the token that begins"),
        ({"sequences": [[1, 61]]}, r"sequences\[0\]: expected token ids from 0 to 60, found 61"),
        (
            {"sequences": [[1] * 1026]},
            r"sequences\[0\]: expected at most max_seq_len=1024 tokens before the last, found 1025; shorten",
        ),
        ({"sequences": "text"}, "sequences: expected token ids, found text; encode it"),
        ({"sequences": 5}, "sequences: expected a list of token ids for each sequence, found int"),
        ({"sequences": [[1.5, 2]]}, r"sequences\[0\]: expected a list of whole numbers, found an array of shape"),
        ({"sequences": [[[1], [2, 3]]]}, r"sequences\[0\]: expected a list of whole numbers, found lists in it"),
        ({"prefix_lengths": [3]}, r"prefix_lengths\[0\]: expected a whole number from 1 to 2, because .* 3 tokens, "
         "found 3"),
        ({"prefix_lengths": [0]}, r"prefix_lengths\[0\]: expected a whole number from 1 to 2, .*, found 0"),
        ({"prefix_lengths": [1.5]}, r"prefix_lengths\[0\]: expected a whole number from 1 to 2, .*, found 1.5"),
        ({"prefix_lengths": [1, 1]}, "prefix_lengths: expected 1 numbers, one for each sequence, found 2"),
        ({"prefix_lengths": 1}, "prefix_lengths: expected 1 numbers, one for each sequence, found int"),
        ({"batch_tokens": 0}, "batch_tokens: expected a whole number ≥ 1, found 0"),
    ],
)  # fmt: skip
def test_bad_arguments(small, arguments, message):
    from mpt_eqx import GenerationError, score

    with pytest.raises(GenerationError, match=message):
        score(small, **{"sequences": [[1, 2, 3]], **arguments})


def test_a_traced_model_is_refused(small):
    from mpt_eqx import GenerationError, score

    with pytest.raises(GenerationError, match="model: expected arrays, found traced ones; call score outside of jit"):
        eqx.filter_eval_shape(lambda m: score(m, [[1, 2]])[0].logprobs, small)
