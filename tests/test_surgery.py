"""keep_blocks and replace, alone and with the other functions that change a model."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_family import configs

TOKENS = jnp.asarray([3, 1, 4, 1, 5], jnp.int32)


@pytest.fixture(scope="module")
def model(tiny_config):
    from mpt_eqx import MPT

    return MPT(tiny_config(n_layers=3), key=jax.random.key(0))


class Lora(eqx.Module):
    """As libraries for adapters wrap a linear map: with its own name for it."""

    base: eqx.Module
    a: jax.Array
    b: jax.Array

    def __call__(self, x, dtype=None):
        return self.base(x, dtype) + (x @ self.a.T) @ self.b.T


def lora(linear):
    out, columns = linear.weight.shape
    return Lora(linear, jnp.ones((2, columns)), jnp.zeros((out, 2)))


def test_blocks_in_any_order(model):
    from mpt_eqx.surgery import keep_blocks

    kept = keep_blocks(model, [2, 0, 2, -3])
    assert kept.config == dataclasses.replace(model.config, n_layers=4)
    assert eqx.tree_equal(kept.blocks, tuple(model.blocks[i] for i in (2, 0, 2, 0)))
    assert kept.wte is model.wte and model.config.n_layers == 3
    assert eqx.tree_equal(keep_blocks(model, range(3)), model)
    assert len(keep_blocks(model, np.array([1])).blocks) == 1
    longer = eqx.tree_at(lambda m: m.blocks, model, model.blocks * 2)
    assert keep_blocks(longer, range(6)).config.n_layers == 6


def test_of_a_stacked_model(model):
    from mpt_eqx import stack
    from mpt_eqx.surgery import keep_blocks, resize_vocab

    assert eqx.tree_equal(keep_blocks(stack(model), [2, 0]), stack(keep_blocks(model, [2, 0])))
    assert eqx.tree_equal(resize_vocab(stack(model), 50), stack(resize_vocab(model, 50)))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "indices: expected those of at least one block, found none"),
        ([0, 3], r"indices\[1\]: expected a whole number from 0 to 2, found 3"),
        ([-4], r"indices\[0\]: .* found -4"),
        ([True], r"indices\[0\]: .* found True"),
    ],
)
def test_indices_that_are_none(model, indices, message):
    from mpt_eqx import MPTError
    from mpt_eqx.surgery import keep_blocks

    with pytest.raises(MPTError, match=message):
        keep_blocks(model, indices)


def test_arguments_of_another_kind(model):
    from mpt_eqx import MPTError
    from mpt_eqx.surgery.blocks import check_index
    from mpt_eqx.surgery.replacement import check_function, make_matcher

    with pytest.raises(MPTError, match=r"indices\[1\]: expected a whole number from 0 to 2, found 0.5"):
        check_index(1, 0.5, 3)
    with pytest.raises(MPTError, match="fn: expected a function of a part of the model, found 3"):
        check_function(3)
    for where in (7, [7], []):
        with pytest.raises(MPTError, match="where: expected a name, a pattern such as .* or a function, found"):
            make_matcher(model, where)


def reading(name, *back):
    """A configuration whose blocks read others, so many places before them."""
    from mpt_eqx import AttnConfig, BlockOverride, MPTConfig

    return MPTConfig(
        d_model=16, n_heads=2, n_layers=len(back), vocab_size=31, max_seq_len=16,
        attn_config=AttnConfig(alibi=True, fused_qkv=False),
        block_overrides=tuple(BlockOverride(**{name: places}) for places in back),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["reuse_kv_layer_idx", "reuse_kv_x_layer_idx"])
def test_blocks_that_read_others(name):
    """Block 2 reads block 1, which reads block 0."""
    from mpt_eqx import MPT, MPTError, stack
    from mpt_eqx.surgery import keep_blocks

    model = MPT(reading(name, None, -1, -1, None), key=jax.random.key(0))
    field = {"reuse_kv_layer_idx": "kv_from", "reuse_kv_x_layer_idx": "kv_x_from"}[name]
    for indices, sources in (((0, 2), (None, 0)), ((3, 0, 2, 0, 1), (None, None, 1, None, 3)), ((3,), (None,))):
        kept = keep_blocks(model, indices)
        assert tuple(getattr(layer, field) for layer in kept.config.layers) == sources
    what = "keys and values" if field == "kv_from" else "input"
    with pytest.raises(MPTError, match=rf"indices\[1\]: block 2 reads the {what} of block 0, which is not kept before"):
        keep_blocks(model, [3, 2, 0])
    with pytest.raises(MPTError, match=f"blocks.1: expected a block that is by itself, found .* the {what} of block 0"):
        stack(model)
    fewer = eqx.tree_at(lambda m: m.blocks, model, model.blocks[:2])
    with pytest.raises(MPTError, match=r"blocks: expected 4, .* found 2; .*keep_blocks\(model, indices\) of the model"):
        keep_blocks(fewer, [0])


def test_blocks_that_are_not_alike(model):
    from mpt_eqx import MPT, BlockOverride, MPTError, stack, surgery

    overrides = (BlockOverride(), BlockOverride(sliding_window_size=3))
    config = dataclasses.replace(model.config, n_layers=2, block_overrides=overrides)
    with pytest.raises(
        MPTError, match="blocks.1.attn.sliding_window: expected None as blocks.0.attn.sliding_window, found 3; only"
    ):
        stack(MPT(config, key=jax.random.key(0)))
    with pytest.raises(MPTError, match="blocks.2.attn.Wqkv: expected Linear as blocks.0.attn.Wqkv, found Lora"):
        stack(surgery.replace(model, "blocks.2.attn.Wqkv", lora))
    with pytest.raises(MPTError, match="blocks.2.attn.Wqkv: .* leave the model as single blocks, with mpt_eqx.unstack"):
        surgery.replace(stack(model), "blocks.2.attn.Wqkv", lora)
    half = eqx.tree_at(lambda m: m.blocks[1].norm_1.weight, model, replace_fn=lambda x: x.astype(jnp.bfloat16))
    with pytest.raises(
        MPTError, match=r"blocks.1.norm_1.weight: expected float32\[32\] as blocks.0.norm_1.weight, found bfloat16"
    ):
        stack(half)


def names_of(model, where):
    """Which parts `where` matches, by the numbers of their parameters."""
    from mpt_eqx.surgery import replace

    found = []
    replace(model, where, lambda part: (found.append(part), part)[1])
    return found


def test_where(model):
    """Names, patterns, several of them, settings, and functions as for equinox.tree_at."""
    blocks = model.blocks
    assert names_of(model, "blocks.1.attn.Wqkv") == [blocks[1].attn.Wqkv]
    assert names_of(model, "blocks.*.attn.Wqkv") == [block.attn.Wqkv for block in blocks]
    projections = [part for block in blocks for part in (block.ffn.up_proj, block.ffn.down_proj)]
    assert names_of(model, "blocks.*.ffn.*_proj") == projections
    assert names_of(model, ["blocks.0.norm_?", "norm_f"]) == [blocks[0].norm_1, blocks[0].norm_2, model.norm_f]
    assert names_of(model, "blocks.*") == list(blocks) and names_of(model, "*.ffn.act") == [b.ffn.act for b in blocks]
    assert all(eqx.is_array(part) for part in names_of(model, "*.weight"))
    assert len(names_of(model, lambda m: [m.norm_f, m.wte])) == 2


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("blocks.*.atn.Wqkv", r"found 'blocks.\*.atn.Wqkv'; did you mean blocks.\*.attn.Wqkv"),
        ("Wqkv", "found 'Wqkv'; "),
        ("lm_head", "found 'lm_head'"),
        ("config", "found 'config'; .*a model has wte, wte.weight, "),
        (lambda m: [], "where: expected a function that returns parts of the model, found one that returns none"),
    ],
)
def test_what_matches_nothing(model, where, message):
    from mpt_eqx import MPTError
    from mpt_eqx.surgery import replace

    with pytest.raises(MPTError, match=message):
        replace(model, where, lambda part: part)


def test_replacements_that_would_not_agree(model):
    from mpt_eqx import MPTError
    from mpt_eqx.surgery import replace

    pruned = eqx.tree_at(lambda linear: linear.weight, model.blocks[0].ffn.up_proj, jnp.zeros((64, 32)))
    with pytest.raises(
        MPTError, match=r"blocks.0.ffn.up_proj.weight: expected \[128, 32\], a size .* found \[64, 32\]; resize_vocab"
    ):
        replace(model, "blocks.0.ffn.up_proj", lambda part: pruned)
    with pytest.raises(MPTError, match=r"expected \[61, 32\], a size that model.config says, found \[64, 32\]"):
        replace(model, lambda m: m.wte.weight, lambda weight: jnp.zeros((64, 32)))
    with pytest.raises(MPTError, match=r"blocks: expected 3, .* found 1; mpt_eqx.surgery.keep_blocks\(model, range"):
        replace(model, "blocks", lambda blocks: blocks[:1])


def test_other_modules_are_used(model):
    """A wrapper, another activation, and a pruned matrix, in single blocks and stacked ones."""
    from mpt_eqx import stack
    from mpt_eqx.surgery import replace

    plain = model(TOKENS)
    wrapped = replace(model, "blocks.*.attn.Wqkv", lora)
    np.testing.assert_array_equal(wrapped(TOKENS), plain)
    back = replace(wrapped, "blocks.*.attn.Wqkv", lambda wrapper: wrapper.base)
    assert eqx.tree_equal(back, model)
    assert eqx.tree_equal(replace(stack(model), "blocks.*.attn.Wqkv", lora), stack(wrapped))
    linear = replace(model, "blocks.*.ffn.act", lambda act: lambda x: x)
    by_hand = eqx.tree_at(lambda m: m.blocks[0].attn.Wqkv.weight, model, replace_fn=jnp.zeros_like)
    pruned = replace(model, "blocks.0.attn.Wqkv.weight", jnp.zeros_like)
    assert eqx.tree_equal(pruned, by_hand) and not np.allclose(linear(TOKENS), plain)
    assert model.blocks[0].ffn.act is not linear.blocks[0].ffn.act and eqx.tree_equal(model(TOKENS), plain)


@pytest.mark.slow
def test_a_wrapped_model_generates_trains_and_is_quantised(model):
    from mpt_eqx import generate, quantize, stack
    from mpt_eqx.ops.quantized import QuantizedWeight
    from mpt_eqx.surgery import replace
    from mpt_eqx.train import next_token_loss

    wrapped = replace(model, ["*.Wqkv", "*.up_proj"], lora)
    expected = generate(model, [[1, 2, 3]], max_new_tokens=3).tokens
    for form in (wrapped, stack(wrapped)):
        np.testing.assert_array_equal(generate(form, [[1, 2, 3]], max_new_tokens=3).tokens, expected)
        gradient = jax.grad(next_token_loss)(form, TOKENS[None])
        assert float(jnp.abs(gradient.blocks[0].attn.Wqkv.b).max()) > 0
    quantized = quantize(wrapped, "int8")
    assert isinstance(quantized.blocks[0].attn.Wqkv.base.weight, QuantizedWeight)
    np.testing.assert_allclose(quantized(TOKENS), quantize(model, "int8")(TOKENS), atol=1e-5)


def test_a_wrapped_embedding(model):
    """Its type is asked of another module; a tied output matrix is its `weight`."""
    from mpt_eqx import MPTError
    from mpt_eqx.surgery import replace, resize_vocab

    class Wrapped(eqx.Module):
        base: eqx.Module

        def __call__(self, tokens):
            return self.base(tokens)

    wrapped = replace(model, "wte", Wrapped)
    assert wrapped.dtype == np.float32
    np.testing.assert_array_equal(wrapped.hidden_states(TOKENS)[0], model.hidden_states(TOKENS)[0])
    with pytest.raises(MPTError, match="wte.weight: expected a matrix of floating-point numbers, found Wrapped"):
        resize_vocab(wrapped, 64)


@pytest.mark.parametrize("form", ["single", "stacked"])
@pytest.mark.parametrize("case", ["LoRA", "activation"])
def test_what_would_not_load_back_is_not_saved(model, tmp_path, case, form):
    from mpt_eqx import CheckpointError, save_pretrained, stack
    from mpt_eqx.surgery import replace

    where, fn, message = {
        "LoRA": ("blocks.*.attn.Wqkv", lora, "blocks.0.attn.Wqkv: expected a Linear, .* found .*Lora; .*merged weight"),
        "activation": (
            "*.ffn.act",
            lambda act: jnp.tanh,
            "blocks.0.ffn.act: expected .* found .*; put that there with",
        ),
    }[case]
    changed = replace(stack(model) if form == "stacked" else model, where, fn)
    with pytest.raises(CheckpointError, match=message):
        save_pretrained(changed, tmp_path / "m")
    fewer = eqx.tree_at(lambda m: m.blocks, model, model.blocks[:2])
    with pytest.raises(CheckpointError, match="blocks: expected 3, .* found 2 of them; take blocks with .*keep_blocks"):
        save_pretrained(fewer, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def by_hand(model, indices):
    """The last hidden state of blocks in this order, each reading the nearest one before it that it is to read."""
    from mpt_eqx.model.positions import Positions
    from mpt_eqx.model.taps import UNTAPPED

    place = jnp.arange(len(TOKENS))
    positions, layers = Positions(query=place, token=place, allowed=None), model.config.layers
    x, inputs, read = model._embed(TOKENS, place, None, None, UNTAPPED), {}, {}
    for index in indices:
        inputs[index], layer = x, layers[index]
        kv = None if layer.kv_from is None else read[layer.kv_from]
        x_kv = None if layer.kv_x_from is None else inputs[layer.kv_x_from]
        x, read[index] = model.blocks[index](x, positions, kv, x_kv)
    return model.norm_f(x)


@pytest.mark.slow
@examples(30, least=2)
@given(configs(), st.lists(st.integers(0, 3), min_size=1, max_size=4), st.sampled_from([28, 31, 40]))
def test_any_model_changed_and_put_together_again(tmp_path_factory, d, indices, n):
    """Kept blocks, another vocabulary, wrappers, stacked: it runs, generates, is saved and comes back."""
    from mpt_eqx import (
        MPT,
        KVCache,
        MPTConfig,
        MPTError,
        from_pretrained,
        generate,
        save_pretrained,
        stack,
        unstack,
    )  # fmt: skip
    from mpt_eqx.surgery import keep_blocks, replace, resize_vocab

    model = eqx.nn.inference_mode(MPT(MPTConfig.from_dict(d), key=jax.random.key(0)))
    indices = [index % model.config.n_layers for index in indices]
    sources = [(layer.kv_from, layer.kv_x_from) for layer in model.config.layers]
    lost = [i for at, i in enumerate(indices) if not {*sources[i]} - {None} <= {*indices[:at]}]
    if lost:
        with pytest.raises(MPTError, match=f"block {lost[0]} reads the .* which is not kept before"):
            keep_blocks(model, indices)
        indices = list(range(max(indices) + 1))
    kept = keep_blocks(model, indices)
    np.testing.assert_allclose(kept.hidden_states(TOKENS)[-1], by_hand(model, indices), atol=1e-6)

    changed = resize_vocab(kept, n)
    assert MPTConfig.from_dict(json.loads(json.dumps(changed.config.to_dict()))) == changed.config
    arrays = jax.tree.leaves(eqx.filter(changed, eqx.is_array))
    assert sum(leaf.size for leaf in arrays) == changed.config.num_parameters()
    logits = changed(TOKENS)
    np.testing.assert_allclose(logits[:, : min(n, 31)], kept(TOKENS)[:, :n], atol=1e-5)
    wrapped = replace(changed, "blocks.*.attn.out_proj", lora)
    np.testing.assert_allclose(wrapped(TOKENS), logits, atol=1e-6)
    assert eqx.tree_equal(replace(wrapped, "blocks.*.attn.out_proj", lambda wrapper: wrapper.base), changed)

    layers = changed.config.layers
    if len({*layers}) == 1 and layers[0].kv_from is None and layers[0].kv_x_from is None:
        stacked = stack(changed)
        assert eqx.tree_equal(unstack(stacked), changed)
        np.testing.assert_allclose(stacked(TOKENS), logits, atol=1e-4)
    else:
        with pytest.raises(MPTError, match="blocks"):
            stack(changed)
        stacked = changed
    cached, _ = stacked.extend(TOKENS, KVCache.empty(changed.config, 8, jnp.float32))
    np.testing.assert_allclose(stacked.unembed(cached), logits, atol=1e-4)
    if settings.get_current_profile_name() == "long":
        assert generate(stacked, TOKENS.tolist(), max_new_tokens=1).tokens[0, 0] == int(jnp.argmax(logits[-1]))
    directory = tmp_path_factory.mktemp("m")
    save_pretrained(stacked, directory)
    assert eqx.tree_equal(eqx.nn.inference_mode(from_pretrained(directory)), changed)
