"""A model with its blocks as one, run by a scan, does what it does with single blocks; and remat, in both forms."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import some

TOKENS = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6], [0, 0, 6, 5, 3, 5, 8, 9]], jnp.int32)


@pytest.fixture(scope="module")
def model(tiny_config):
    from mpt_eqx import MPT, InitConfig

    return MPT(tiny_config(n_layers=2, init_config=InitConfig(emb_init_std=0.5)), key=jax.random.key(3))


def close(one, other, tolerance=1e-5):
    """Arrays that differ by at most a part of the largest of their numbers."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()), rtol=0)


def test_there_and_back(model):
    from mpt_eqx import stack, surgery, unstack

    stacked = stack(model)
    assert surgery.stack is stack and surgery.unstack is unstack
    assert stacked.config == model.config and len(stacked.blocks) == 2
    assert stacked.blocks.block.attn.Wqkv.weight.shape == (2, 96, 32)
    assert eqx.tree_equal(stacked.blocks[-1], model.blocks[1]) and len(tuple(stacked.blocks)) == 2
    assert eqx.tree_equal(unstack(stacked), model) and unstack(model) is model and stack(stacked) is stacked


def test_forward_and_hidden_states(model):
    from mpt_eqx import stack

    stacked, mask = stack(model), jnp.asarray([False, False] + [True] * 6)
    close(stacked(TOKENS[1], mask=mask)[2:], model(TOKENS[1], mask=mask)[2:])
    close(stacked.hidden_states(TOKENS[0]), model.hidden_states(TOKENS[0]))


@pytest.mark.slow
def test_a_cache(model):
    from mpt_eqx import KVCache, stack

    found, expected = [], []
    for form, rows in ((stack(model), found), (model, expected)):
        cache = KVCache.empty(model.config, 8, jnp.float32)
        for part in (TOKENS[0, :5], TOKENS[0, 5:]):
            x, cache = form.extend(part, cache)
            rows.append(x)
        rows.append(jax.tree.map(lambda leaf: leaf[:, :8], cache.layers))
    close(found, expected)


@pytest.mark.parametrize("remat", some(["none", "full"], ["full"]))
def test_captures_and_edits(model, remat):
    """Of some blocks, at some positions; also where parts of a block are computed again for its gradient."""
    from mpt_eqx import interp, stack, surgery

    def run(form):
        edits = {"blocks.1.hook_attn_out": interp.Add(jnp.linspace(0, 1, 32), positions=[2, 5])}
        wanted = ["blocks.1.hook_resid_pre", "blocks.0.hook_attn_out", "blocks.1.mlp.hook_post"]
        return interp.run(form, TOKENS[0], capture=wanted, edits=edits)

    expected = run(model)
    assert len(expected.activations) == 3 and float(jnp.abs(expected.logits - model(TOKENS[0])).max()) > 0.01
    for form in (surgery.remat(model, remat), surgery.remat(stack(model), remat)):
        found = run(form)
        close(found.logits, expected.logits)
        close(found.activations, expected.activations)


@pytest.mark.parametrize("dropout", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradients(tiny_config, model, dropout):
    """With dropout each block has its key, the same in both forms."""
    from mpt_eqx import MPT, stack, unstack
    from mpt_eqx.train import next_token_loss

    if dropout:
        model = MPT(dataclasses.replace(model.config, resid_pdrop=0.3, emb_pdrop=0.3), key=jax.random.key(3))
    key = jax.random.key(7) if dropout else None
    gradient = eqx.filter_jit(eqx.filter_value_and_grad(lambda m: next_token_loss(m, TOKENS, key=key)))
    (loss, found), (expected_loss, expected) = gradient(stack(model)), gradient(model)
    close(loss, expected_loss)
    close(unstack(found), expected)


KINDS = {
    "experts": {"ffn_config": {"ffn_type": "mb_dmoe", "moe_num_experts": 3, "moe_top_k": 2}},
    "GLU, rope, groups": {
        "ffn_config": {"ffn_type": "mptglu"},
        "attn_config": {"rope": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2, "qk_ln": True},
    },
    "learned": {"attn_config": {"attn_impl": "torch"}, "no_bias": False, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("kind", some(KINDS, ["GLU, rope, groups"]))
def test_kinds_of_blocks(kind):
    from mpt_eqx import MPT, MPTConfig, stack

    values = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 61, "max_seq_len": 64, **KINDS[kind]}
    model = MPT(MPTConfig.from_dict(values), key=jax.random.key(0))
    close(stack(model)(TOKENS[0]), model(TOKENS[0]))


@pytest.mark.parametrize("scheme", some(["int8", "int4"], ["int4"]))
def test_quantised(model, scheme):
    from mpt_eqx import quantize, stack

    quantized = quantize(model, scheme)
    stacked = stack(quantized)
    assert eqx.tree_equal(quantize(stack(model), scheme), stacked)
    close(stacked(TOKENS[0]), quantized(TOKENS[0]))


def test_under_vmap_and_jit(model):
    from mpt_eqx import stack

    rows = jax.jit(lambda m, t: jax.vmap(m)(t))
    close(rows(stack(model), TOKENS), rows(model, TOKENS))


@pytest.mark.slow
def test_a_model_for_each_row(model):
    from mpt_eqx import MPT, stack

    two = eqx.filter_vmap(lambda key: stack(MPT(model.config, key=key)))(jax.random.split(jax.random.key(0)))
    assert two.blocks.block.norm_1.weight.shape == (2, 2, 32)
    rows = eqx.filter_vmap(lambda m, t: m(t))(two, TOKENS)
    close(rows[0], jax.tree.map(lambda leaf: leaf[0], two)(TOKENS[0]))


def test_what_generates_takes_either_form(model, prompts):
    from mpt_eqx import generate, stack, stream, surgery

    stacked, two = surgery.remat(stack(model), "full"), prompts(3, 5)
    expected = generate(model, two, max_new_tokens=2).tokens
    np.testing.assert_array_equal(generate(stacked, two, max_new_tokens=2).tokens, expected)
    assert list(stream(stacked, two[0], max_new_tokens=2)) == expected[0].tolist()


@pytest.mark.slow
def test_what_else_generates_takes_either_form(model, prompts):
    from mpt_eqx import beam_search, generate, prefill, stack, warmup

    stacked, two = stack(model), prompts(3, 5)
    warmup(stacked, batch_sizes=[2], prompt_lengths=[5], max_new_tokens=5)
    expected = generate(model, two, max_new_tokens=5).tokens
    prefix = prefill(stacked, two[1][:3])
    np.testing.assert_array_equal(generate(stacked, [two[1][3:]], max_new_tokens=5, prefix=prefix).tokens, expected[1:])
    options = {"num_beams": 2, "max_new_tokens": 3}
    np.testing.assert_array_equal(
        beam_search(stacked, two, **options).tokens, beam_search(model, two, **options).tokens
    )


def test_saved_as_single_blocks(model, tmp_path):
    from mpt_eqx import from_pretrained, save_pretrained, stack

    save_pretrained(stack(model), tmp_path)
    assert eqx.tree_equal(from_pretrained(tmp_path), model)


def lines(function, *args):
    return jax.jit(function).lower(*args).as_text().count("\n")


def test_the_program_has_the_same_size_at_any_depth(tiny_config):
    """Operations of the forward pass and of the gradient, for 2 layers and for 24."""
    from mpt_eqx import MPT, stack
    from mpt_eqx.train import next_token_loss

    def sizes(n_layers):
        model = eqx.filter_eval_shape(lambda: stack(MPT(tiny_config(n_layers=n_layers), key=jax.random.key(0))))
        return lines(lambda m, t: m(t), model, TOKENS[0]), lines(jax.grad(next_token_loss), model, TOKENS)

    assert sizes(2) == sizes(24)


def kept(model, size="size"):
    """How many numbers (or with "nbytes" bytes) a gradient keeps of the forward pass, beside the model."""
    from mpt_eqx.train import next_token_loss

    tokens = jnp.zeros((2, 64), jnp.int32)
    backward = jax.eval_shape(lambda m: jax.vjp(lambda m: next_token_loss(m, tokens), m)[1], model)
    return sum(getattr(leaf, size, leaf.size * leaf.dtype.itemsize) for leaf in jax.tree.leaves(backward))


@pytest.mark.parametrize("form", some(["single", "stacked"], ["stacked"]))
def test_what_is_kept_for_a_gradient(tiny_config, form):
    from mpt_eqx import MPT, stack, surgery

    model = eqx.filter_eval_shape(lambda: MPT(tiny_config(n_layers=4), key=jax.random.key(0)))
    model = eqx.filter_eval_shape(stack, model) if form == "stacked" else model
    sizes = {how: kept(surgery.remat(model, how)) for how in ("none", "dots", "full")}
    assert sizes["full"] < sizes["dots"] < sizes["none"]
    # Of each of 4 blocks, for 2 rows of 64 positions, what Wqkv, out_proj and up_proj return.
    assert sizes["dots"] - sizes["full"] == 4 * 2 * 64 * (96 + 32 + 128)


def test_what_is_kept_in_16_bits_has_16_bits(tiny_config):
    """Results of linear maps, not their sums in float32."""
    from mpt_eqx import MPT, surgery

    model = eqx.filter_eval_shape(lambda: MPT(tiny_config(n_layers=2), key=jax.random.key(0)))
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model)
    sizes = {how: kept(surgery.remat(half, how), "nbytes") for how in ("dots", "full")}
    assert sizes["dots"] - sizes["full"] == 2 * 2 * 64 * (96 + 32 + 128) * 2


@pytest.mark.slow
@pytest.mark.optimized
def test_memory_of_a_gradient(tiny_config):
    """The program's temporary memory: stacked it needs no more than with single blocks, with remat less; equal values.

    The slices of the weights of one block come on top.
    """
    from mpt_eqx import MPT, stack, surgery, unstack
    from mpt_eqx.train import next_token_loss

    model = MPT(tiny_config(), key=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 128), 0, 61)
    forms = {"single": model, "stacked": stack(model), "full": surgery.remat(stack(model), "full")}
    forms["single dots"], forms["offload"] = surgery.remat(model, "dots"), surgery.remat(stack(model), "offload")
    memory, gradients = {}, {}
    for name, form in forms.items():
        program = jax.jit(jax.grad(next_token_loss)).lower(form, tokens).compile()
        memory[name] = program.memory_analysis().temp_size_in_bytes
        gradients[name] = surgery.remat(unstack(program(form, tokens)), "none")
    block = sum(leaf.nbytes for leaf in jax.tree.leaves(model.blocks[0]))
    assert memory["stacked"] <= memory["single"] + block and memory["full"] < 0.8 * memory["stacked"], memory
    assert memory["offload"] == memory["full"]  # a CPU's memory is the host's
    for name in ("stacked", "full", "offload", "single dots"):
        close(gradients[name], gradients["single"])


def test_what_is_offloaded_lies_in_the_hosts_memory(model):
    """In a program for a GPU the inputs of the blocks go there and come back, and nothing else does."""
    from mpt_eqx import stack
    from mpt_eqx.surgery import remat
    from mpt_eqx.train import next_token_loss

    tokens = jnp.zeros((2, 8), jnp.int32)
    program = jax.jit(jax.grad(next_token_loss)).trace(remat(stack(model), "offload"), tokens)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    moved = [line for line in text.splitlines() if "annotate_device_placement" in line]
    assert sorted("pinned_host" in line for line in moved) == [False, True]
    assert all(line.endswith("-> tensor<2x8x32xf32>") for line in moved)


def test_another_word_for_remat(model):
    from mpt_eqx import MPTError
    from mpt_eqx.surgery import remat
    from mpt_eqx.surgery.rematerialization import check_how

    assert remat(model, "full").remat == "full" and model.remat == "none"
    assert eqx.tree_equal(remat(remat(model, "dots"), "none"), model)
    for how in ("some", True, None):
        with pytest.raises(MPTError, match="how: expected 'none', 'full', 'dots', 'offload', found"):
            check_how(how)
