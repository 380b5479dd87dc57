"""Blocks within a program of generation: in a loop where they are alike, else each kind traced once."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import some

from mpt_eqx import MPT, AttnConfig, FFNConfig, MPTConfig, generate, quantize, surgery
from mpt_eqx.generation import SamplingParams, layers, state
from mpt_eqx.generation.steps import decode_chunk
from mpt_eqx.model.block import Block


def made(**kwargs) -> MPT:
    attn = kwargs.pop("attn_config", AttnConfig(alibi=True))
    config = MPTConfig(
        **{"d_model": 32, "n_heads": 4, "n_layers": 3, "vocab_size": 61, "max_seq_len": 256, **kwargs}, attn_config=attn
    )
    return MPT(config, key=jax.random.key(0))


def lowered(model: MPT, capacity: int = 256):
    """A step of decoding, before XLA."""
    fixed = (model, SamplingParams().of_rows(1), jax.random.key(0), ())
    return decode_chunk.lower(fixed, state.empty_state(model, 1, capacity), 2, False)


@pytest.mark.parametrize("form", some(["float32", "bfloat16", "int8", "int4"], ["int4"]))
@pytest.mark.slow
def test_a_loop_computes_what_single_blocks_do(form, kernel, monkeypatch):
    model = made()
    model = quantize(model, form) if form.startswith("int") else jax.tree.map(lambda x: x.astype(form), model)
    assert layers.has_layer_loop(model)
    found = []
    for loops in (True, False):
        monkeypatch.setattr(state, "has_layer_loop", lambda model, loops=loops: loops)
        found.append(generate(model, [[1, 2, 3], list(range(40))], max_new_tokens=4, return_logits=True).logits)
    np.testing.assert_allclose(*found, rtol=0, atol=0.02 if form == "bfloat16" else 1e-5)


def wrapped(model: MPT) -> MPT:
    class Twice(eqx.Module):
        inner: eqx.Module
        factor: jax.Array

        def __call__(self, x, *args):
            return self.inner(x, *args) * self.factor.sum()

    return surgery.replace(model, "blocks.*.ffn.up_proj", lambda inner: Twice(inner, jnp.ones((2, 2)) / 4))


NOT_ALIKE = {
    "one block in another type": lambda: eqx.tree_at(
        lambda m: m.blocks[1].ffn, made(), replace_fn=lambda ffn: jax.tree.map(lambda x: x.astype("bfloat16"), ffn)
    ),
    "experts": lambda: made(ffn_config=FFNConfig(ffn_type="torch_dmoe", moe_num_experts=2, moe_top_k=1)),
    "wrappers that hold matrices": lambda: wrapped(made()),
}


@pytest.mark.parametrize("kind", NOT_ALIKE)
def test_other_blocks_are_by_themselves(kind):
    assert not layers.has_layer_loop(NOT_ALIKE[kind]())


@pytest.mark.parametrize("name", ["f_reuse_kv", "f_overrides_sw_nope"])
def test_blocks_of_other_settings_or_inputs_are_by_themselves(golden, name):
    assert not layers.has_layer_loop(golden(name).model)


def test_the_prefix_of_a_model_of_other_blocks_is_refused(kernel):
    from mpt_eqx import GenerationError, prefill

    prefix = prefill(made(), [1, 2, 3])
    with pytest.raises(GenerationError, match="prefix: expected one of this model, whose blocks differ"):
        generate(NOT_ALIKE["one block in another type"](), [4], max_new_tokens=2, prefix=prefix)


def test_without_the_kernel_there_is_no_loop(monkeypatch):
    from mpt_eqx.ops import cpu

    model = made()
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert not layers.has_layer_loop(model)


def test_a_program_does_not_grow_with_its_layers(kernel):
    """But for the weights that are its arguments and those of its products."""

    def operations(n_layers: int) -> int:
        text = lowered(made(n_layers=n_layers)).as_text()
        return len(re.findall(r"stablehlo\.(?!concatenate|reshape|broadcast_in_dim)\w+", text))

    assert operations(2) == operations(6)


@pytest.mark.parametrize("loops", [True, False])
def test_alike_blocks_are_traced_once(loops, kernel, monkeypatch):
    traced = []
    call = Block.__call__
    monkeypatch.setattr(
        Block, "__call__", lambda self, *args, **kwargs: traced.append(1) or call(self, *args, **kwargs)
    )
    monkeypatch.setattr(state, "has_layer_loop", lambda _: loops)
    lowered(made(n_layers=5, d_model=36))
    # A scan traces its body, and the scan around it its own, more than once: what counts is that layers do not.
    assert len(traced) <= 2


@pytest.mark.parametrize("loops", some([True, False], [True]))
def test_a_cache_is_written_in_place(loops, kernel, monkeypatch):
    monkeypatch.setattr(state, "has_layer_loop", lambda _: loops)
    compiled = lowered(made(n_layers=2), 4096).compile()
    cache = 2 * 2 * 4096 * 32 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < cache / 4
