"""resize_vocab, and models whose weights and configuration disagree."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def small(tiny_config):
    from mpt_eqx import MPT

    return MPT(tiny_config(n_layers=1, tie_word_embeddings=False, eos_token_id=7), key=jax.random.key(0))


def rows(model):
    return [model.wte.weight, *([] if model.lm_head is None else [model.lm_head.weight])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [61, 64, 50])
@pytest.mark.parametrize("tied", [True, False])
def test_old_rows_stay_and_new_ones_are_the_mean(small, dtype, n, tied):
    from mpt_eqx.surgery import resize_vocab

    config = dataclasses.replace(small.config, tie_word_embeddings=tied)
    model = eqx.tree_at(lambda m: m.lm_head, small, None) if tied else small
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), model)
    object.__setattr__(model, "config", config)
    resized = resize_vocab(model, n)
    assert resized.config == dataclasses.replace(config, vocab_size=n) and model.config == config
    for new, old in zip(rows(resized), rows(model), strict=True):
        assert new.shape == (n, 32) and new.dtype == dtype
        np.testing.assert_array_equal(new[:61], old[:n])
        mean = jnp.mean(old.astype(jnp.float32), axis=0).astype(dtype)
        np.testing.assert_array_equal(new[61:], jnp.broadcast_to(mean, new[61:].shape))
    assert eqx.tree_equal(resized.blocks, model.blocks)


def test_with_a_key_new_rows_are_drawn_about_the_mean(small):
    from mpt_eqx.surgery import resize_vocab

    resized = resize_vocab(small, 4061, key=jax.random.key(1))
    for new, old in zip(rows(resized), rows(small), strict=True):
        new, mean = np.asarray(new[61:], np.float64), np.mean(old, axis=0)
        wanted = 1e-5 * np.cov(np.asarray(old, np.float64).T, bias=True)
        np.testing.assert_allclose(new.mean(axis=0), mean, atol=5 * np.sqrt(wanted.max() / 4000))
        np.testing.assert_allclose(np.cov(new.T), wanted, atol=0.15 * wanted.max())
        assert len(np.unique(new, axis=0)) == 4000
    again = resize_vocab(small, 4061, key=jax.random.key(1))
    assert eqx.tree_equal(again, resized)
    assert not eqx.tree_equal(resize_vocab(small, 4061, key=jax.random.key(2)), resized)


@pytest.mark.parametrize("scheme", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_quantised_rows_stay_to_the_bit(small, scheme):
    from mpt_eqx import quantize
    from mpt_eqx.surgery import resize_vocab

    model = quantize(small, scheme, embeddings=True)
    resized = resize_vocab(model, 64)
    for new, old in zip(rows(resized), rows(model), strict=True):
        assert new.dtype == old.dtype and jax.tree.all(jax.tree.map(lambda a, b: bool((a[:61] == b).all()), new, old))
        every = old.rows(jnp.arange(61))
        np.testing.assert_allclose(new.rows(jnp.array([63]))[0], every.mean(axis=0), atol=0.1 * np.abs(every).max())
    assert eqx.tree_equal(resize_vocab(resized, 61), model)


def test_a_resized_model_runs_generates_its_new_tokens_and_is_saved(small, tmp_path):
    from mpt_eqx import from_pretrained, generate, save_pretrained
    from mpt_eqx.surgery import resize_vocab

    resized = resize_vocab(small, 64)
    # The head's new row is the sum of what it answers to, so that its token is chosen.
    loud = eqx.tree_at(lambda m: m.lm_head.weight, resized, resized.lm_head.weight.at[:63].set(0).at[63].mul(1e3))
    hidden = loud.hidden_states(jnp.array([62]))[-1][0]
    loud = eqx.tree_at(lambda m: m.lm_head.weight, loud, loud.lm_head.weight.at[63].set(hidden))
    result = generate(loud, [62], max_new_tokens=1, return_logits=True)
    assert result.tokens.tolist() == [[63]] and result.logits.shape == (1, 1, 64)
    save_pretrained(loud, tmp_path)
    assert eqx.tree_equal(from_pretrained(tmp_path), loud)


def test_on_a_mesh(small):
    from mpt_eqx import sharding
    from mpt_eqx.surgery import resize_vocab

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    resized = resize_vocab(sharding.shard(small, mesh, sharding.FSDP_TP), 64)
    assert resized.layout is not None and isinstance(resized.wte.weight.sharding, jax.sharding.NamedSharding)
    np.testing.assert_array_equal(resized.wte.weight, resize_vocab(small, 64).wte.weight)


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "64", None, 2**31])
def test_numbers_of_tokens_that_are_none(n):
    from mpt_eqx import MPTError
    from mpt_eqx.surgery.vocabulary import check_count

    with pytest.raises(MPTError, match="n: expected a whole number from 1 to 2147483647, found"):
        check_count(n)


def test_tokens_that_would_be_cut_off_and_weights_that_cannot_be_resized(small):
    from mpt_eqx import MPTError
    from mpt_eqx.surgery import resize_vocab

    with pytest.raises(MPTError, match="n: expected more than 7, which is config.eos_token_id, found 7; load .*None"):
        resize_vocab(small, 7)
    wrapped = eqx.tree_at(lambda m: m.wte.weight, small, {"base": small.wte.weight})
    with pytest.raises(MPTError, match="wte.weight: expected a matrix of floating-point numbers, found dict; resize"):
        resize_vocab(wrapped, 64)


@pytest.mark.parametrize("name", ["wte", "lm_head"])
def test_an_embedding_with_other_rows_than_the_configuration_says(small, name):
    """Rows beyond vocab_size would never be generated, and return_logits has no room for them."""
    from mpt_eqx import GenerationError, MPTError, beam_search, generate, prefill, stream
    from mpt_eqx.surgery import resize_vocab

    longer = eqx.tree_at(lambda m: getattr(m, name).weight, small, jnp.zeros((64, 32)))
    message = rf"{name}.weight: expected 61 rows, as config.vocab_size says, found 64; .*resize_vocab\(model, 64\)"
    for call in (
        lambda: longer(jnp.arange(3)),
        lambda: jax.jit(lambda tokens: longer(tokens))(jnp.arange(3)),
        lambda: jax.vmap(longer)(jnp.ones((2, 3), int)),
    ):
        with pytest.raises(MPTError, match=message):
            call()
    for call in (
        lambda: generate(longer, [1], max_new_tokens=1, return_logits=True),
        lambda: stream(longer, [1], max_new_tokens=1),
        lambda: beam_search(longer, [1], max_new_tokens=1, num_beams=2),
        lambda: prefill(longer, [1]),
    ):
        with pytest.raises(GenerationError, match=message):
            call()
    fixed = resize_vocab(longer, 64)
    assert fixed(jnp.array([63])).shape == (1, 64)


def test_other_sizes_than_the_configuration_says(small, tiny_config):
    from mpt_eqx import MPT, AttnConfig, MPTError

    with pytest.raises(
        MPTError, match=r"blocks: expected 1, .* found 2; mpt_eqx.surgery.keep_blocks\(model, range\(2\)"
    ):
        eqx.tree_at(lambda m: m.blocks, small, small.blocks * 2)(jnp.arange(3))
    learned = MPT(tiny_config(n_layers=1, attn_config=AttnConfig()), key=jax.random.key(0))
    with pytest.raises(
        MPTError, match="wpe.weight: expected 256 rows, as config.max_seq_len says, found 9; make an MPT"
    ):
        eqx.tree_at(lambda m: m.wpe.weight, learned, learned.wpe.weight[:9])(jnp.arange(3))
