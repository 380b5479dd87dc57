"""A text is read once and continued many times."""

import jax
import numpy as np
import pytest
from conftest import some


@pytest.mark.parametrize("at", some([1, 30, 256, 299], [256]))
def test_a_prefix_and_the_rest_equal_the_whole(tiny_config, prompts, at):
    from mpt_eqx import MPT, InitConfig, generate, prefill

    model = MPT(tiny_config(max_seq_len=700, init_config=InitConfig(emb_init_std=0.5)), key=jax.random.key(3))
    (text,) = prompts(300)
    whole = generate(model, text, max_new_tokens=12, return_logits=True)
    prefix = prefill(model, text[:at])
    assert len(prefix) == at and prefix.tokens.tolist() == text[:at]
    rest = generate(model, text[at:], max_new_tokens=12, return_logits=True, prefix=prefix)
    np.testing.assert_array_equal(rest.tokens, whole.tokens)
    np.testing.assert_allclose(rest.logits, whole.logits, atol=2e-5)


def test_it_can_be_kept_and_continued_again(one_block_model, prompts):
    """No call changes it: the second gives what the first gave, in a batch and by streaming too."""
    from mpt_eqx import generate, prefill, stream

    start, a, b = prompts(50, 7, 3)
    prefix = prefill(one_block_model, start)
    before = [np.array(leaf) for leaf in jax.tree.leaves(prefix)]
    first = generate(one_block_model, [a, b, []], max_new_tokens=9, prefix=prefix)
    second = generate(one_block_model, [a, b, []], max_new_tokens=9, prefix=prefix)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    for row, rest in enumerate((a, b, [])):
        whole = generate(one_block_model, [*start, *rest], max_new_tokens=9)
        np.testing.assert_array_equal(first.tokens[row], whole.tokens[0])
        assert list(stream(one_block_model, rest, max_new_tokens=9, prefix=prefix)) == whole.tokens[0].tolist()
    for leaf, old in zip(jax.tree.leaves(prefix), before, strict=True):
        np.testing.assert_array_equal(leaf, old)


def test_it_can_be_extended_and_the_shorter_one_stays(tiny_model, prompts):
    from mpt_eqx import generate, prefill

    a, b = prompts(20, 30)
    short = prefill(tiny_model, a)
    long = prefill(tiny_model, b, prefix=short)
    assert (len(short), len(long)) == (20, 50) and long.tokens.tolist() == [*a, *b]
    for prefix, text in ((short, a), (long, [*a, *b]), (prefill(tiny_model, [], prefix=long), [*a, *b])):
        np.testing.assert_array_equal(
            generate(tiny_model, [[]], max_new_tokens=6, prefix=prefix).tokens,
            generate(tiny_model, text, max_new_tokens=6).tokens,
        )


def test_penalties_count_it(tiny_model, prompts):
    from mpt_eqx import generate, prefill

    (text,) = prompts(40)
    options = {"max_new_tokens": 15, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    with_prefix = generate(tiny_model, text[33:], prefix=prefill(tiny_model, text[:33]), **options)
    np.testing.assert_array_equal(with_prefix.tokens, generate(tiny_model, text, **options).tokens)


def test_it_can_be_written_and_read(tiny_model, prompts, tmp_path):
    import equinox as eqx

    from mpt_eqx import generate, prefill

    a, b = prompts(20, 20)
    prefix, other = prefill(tiny_model, a), prefill(tiny_model, b)
    eqx.tree_serialise_leaves(tmp_path / "prefix.eqx", prefix)
    again = eqx.tree_deserialise_leaves(tmp_path / "prefix.eqx", other)
    result = generate(tiny_model, [[]], max_new_tokens=6, prefix=again)
    np.testing.assert_array_equal(result.tokens, generate(tiny_model, a, max_new_tokens=6).tokens)


def test_what_is_refused(tiny_model, tiny_config):
    from mpt_eqx import MPT, GenerationError, generate, prefill

    prefix = prefill(tiny_model, [1, 2, 3])
    other = MPT(tiny_config(n_layers=1), key=jax.random.key(0))
    with pytest.raises(GenerationError, match="prefix: expected one of this model, .*another configuration"):
        generate(other, [1], max_new_tokens=1, prefix=prefix)
    half = jax.tree.map(lambda x: x.astype("bfloat16"), tiny_model)
    with pytest.raises(GenerationError, match="found that of a model in float32 instead of bfloat16"):
        generate(half, [1], max_new_tokens=1, prefix=prefix)
    with pytest.raises(GenerationError, match=r"prefix: expected what prefill\(model, tokens\) returns, found str"):
        generate(tiny_model, [1], max_new_tokens=1, prefix="x")
    with pytest.raises(
        GenerationError, match="a prefix of 3 tokens, 250 tokens and max_new_tokens=4 exceed max_seq_len"
    ):
        generate(tiny_model, [1] * 250, max_new_tokens=4, prefix=prefix)
    with pytest.raises(GenerationError, match=r"prompts\[0\]: expected at least one token, found an empty prompt"):
        prefill(tiny_model, [])
    with pytest.raises(GenerationError, match="expected token ids from 0 to 60, found 61"):
        prefill(tiny_model, [61])
    with pytest.raises(GenerationError, match="prompt: expected the token ids of one prompt, found list in it"):
        prefill(tiny_model, [[1]])
