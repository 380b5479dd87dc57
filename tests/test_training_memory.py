"""What a training step holds in memory, and that computing it in pieces changes neither values nor gradients."""

import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import one_in


def gradient(model, tokens, **options):
    from mpt_eqx.train import next_token_loss

    return eqx.filter_jit(eqx.filter_value_and_grad(lambda m: next_token_loss(m, tokens, **options)))(model)


def close(found, expected, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = max(float(jnp.abs(other).max()), 1e-6)
        np.testing.assert_allclose(one, other, atol=tolerance * scale, rtol=0)


def by_log_softmax(model, tokens, labels, z_loss):
    """The loss as it is defined, with all logits at once."""
    logits = jax.vmap(model)(tokens)[:, :-1].astype(jnp.float32)
    log_probs, targets = jax.nn.log_softmax(logits), labels[:, 1:]
    counted = targets != -100
    picked = jnp.take_along_axis(log_probs, jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    each = z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2 - picked
    return jnp.sum(jnp.where(counted, each, 0)) / jnp.sum(counted).astype(jnp.float32)


FORMS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "scaled and capped": {"logit_scale": 0.3, "final_logit_softcapping": 2.0},
}


@pytest.mark.parametrize("form", one_in(2, FORMS))
def test_the_loss_in_pieces_is_the_loss(tiny_config, form):
    """Value and gradients for 3 pieces of 7 positions of 3 rows, one with padding in it; also of a quantised head."""
    from mpt_eqx import MPT, quantize

    model = MPT(tiny_config(n_layers=1, **FORMS[form]), key=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (3, 7), 0, 61)
    labels = tokens.at[0, 2:4].set(-100)
    models = [model, quantize(model, "int8", embeddings=True)] if form == "untied" else [model]
    for one in models:
        found = gradient(one, tokens, labels=labels, z_loss=0.01, vocab_chunk=9)
        floating, rest = eqx.partition(one, eqx.is_inexact_array)
        plain = lambda f, r=rest: by_log_softmax(eqx.combine(f, r), tokens, labels, 0.01)  # noqa: E731
        wanted = jax.jit(jax.value_and_grad(plain))(floating)
        close(found, wanted)


@pytest.mark.slow
def test_derivatives_of_the_loss_of_any_kind(tiny_config):
    """Forward mode, a product with the Hessian, one gradient for each row, and a head that is not trained."""
    from mpt_eqx import MPT
    from mpt_eqx.train import next_token_loss

    model = MPT(tiny_config(n_layers=1), key=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 61)

    def ours(model):
        return next_token_loss(model, tokens, vocab_chunk=4)

    def plain(model):
        return by_log_softmax(model, tokens, tokens, 0.0)

    along = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), model)
    both = [
        jax.jit(lambda f=f: (jax.jvp(f, (model,), (along,)), jax.jvp(jax.grad(f), (model,), (along,))[1]))()
        for f in (ours, plain)
    ]
    close(*both, tolerance=1e-4)
    rows = jax.jit(jax.vmap(jax.grad(next_token_loss), in_axes=(None, 0)))(model, tokens[:, None])
    close(jax.tree.map(lambda g: g.mean(0), rows), jax.grad(ours)(model))

    def of_norm(norm):
        return ours(eqx.tree_at(lambda m: m.norm_f, model, norm))

    close(jax.grad(of_norm)(model.norm_f), jax.grad(ours)(model).norm_f)


@pytest.mark.optimized
def test_no_logits_of_all_tokens_are_held(tiny_config):
    """In the compiled gradient no array has a logit for each token; its temporary memory is below that."""
    from mpt_eqx import MPT
    from mpt_eqx.train import next_token_loss

    model = eqx.filter_eval_shape(MPT, tiny_config(n_layers=1, vocab_size=4096), key=jax.random.key(0))
    tokens = jnp.zeros((16, 64), jnp.int32)
    gradient = jax.jit(jax.grad(lambda m: next_token_loss(m, tokens, vocab_chunk=64))).lower(model).compile()
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", gradient.as_text())]
    assert max(sizes) < 16 * 64 * 4096
    assert gradient.memory_analysis().temp_size_in_bytes < 16 * 64 * 4096 * 4


KINDS = {
    "alibi": {"alibi": True},
    "window": {"alibi": True, "sliding_window_size": 5},
    "groups, capped": {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "attn_logit_softcapping": 2.0},
}


@pytest.mark.parametrize("kind", one_in(4, KINDS))
def test_blocks_of_queries_are_the_formula(tiny_config, monkeypatch, kind):
    """Value and gradients at 29 positions, one of them padding, in blocks of 3; no scores of all are held."""
    from mpt_eqx import MPT, AttnConfig
    from mpt_eqx.ops import query_blocks

    model = MPT(tiny_config(n_layers=1, attn_config=AttnConfig(**KINDS[kind])), key=jax.random.key(0))
    tokens, mask = jnp.arange(29)[None], (jnp.arange(29) != 7)[None]
    expected = gradient(model, tokens, mask=mask)
    monkeypatch.setattr(query_blocks, "BLOCK", 3)
    close(gradient(model, tokens, mask=mask), expected)
    trace = jax.make_jaxpr(jax.grad(lambda m: m(tokens[0], mask=mask[0]).sum()))(model)
    assert "f32[4,29,29]" not in str(trace)
    if kind != "window":  # the gradients of parts are put together, not padded and added
        assert " pad[" not in str(trace)


def test_of_an_activation_and_a_norm_only_the_input_is_kept():
    """For the gradient, in the input's type: nothing in float32 of a network in bfloat16."""
    from mpt_eqx.model import activations
    from mpt_eqx.model.norms import LayerNorm, RMSNorm

    x = jnp.linspace(-2, 2, 8, dtype=jnp.bfloat16)
    alone = {"silu", "selu", "mish", "tanh", "sigmoid", "logsigmoid", "hardsigmoid", "hardswish"}
    named = {name: activations.FUNCTIONS[name] for name in alone}
    named |= {"gelu": activations.gelu, "gelu_tanh": activations.gelu_tanh}
    norms = {kind.__name__: kind(8, 1e-5) for kind in (LayerNorm, RMSNorm)}
    for name, function in (named | norms).items():
        kept = jax.tree.leaves(jax.vjp(function, x)[1])
        expected = ["bfloat16[8]", *(["float32[8]"] if name in norms else [])]  # and the weight
        assert sorted(str(jax.typeof(k)) for k in kept if k.size > 1) == expected, name


def test_one_row_is_computed_without_an_axis_for_it(tiny_config):
    """XLA's CPU backend is slow where there is one; two rows have theirs, and the loss is that of each."""
    from mpt_eqx import MPT
    from mpt_eqx.train import next_token_loss

    model = MPT(tiny_config(n_layers=1), key=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 61)
    traces = [str(jax.make_jaxpr(jax.grad(next_token_loss))(model, tokens[:rows])) for rows in (1, 2)]
    assert ["f32[1,4,7,7]" in traces[0], "f32[2,4,7,7]" in traces[1]] == [False, True]
    found, each = gradient(model, tokens), [gradient(model, tokens[row : row + 1]) for row in range(2)]
    close(found, jax.tree.map(lambda a, b: (a + b) / 2, *each))


def test_what_compiling_a_step_has_freed_goes_back_before_it_runs(tiny_config, monkeypatch):
    """Once for each shape of batch, and the step is neither traced nor compiled again for it."""
    import optax

    from mpt_eqx import MPT, train
    from mpt_eqx.train import step as module

    done = []
    monkeypatch.setattr(module, "trim_memory", lambda: done.append("trimmed"))

    def loss(model, tokens, **rest):
        done.append("traced")
        return train.next_token_loss(model, tokens, **rest)

    optimizer = optax.sgd(0.1)
    state = train.TrainState.create(MPT(tiny_config(n_layers=1), key=jax.random.key(0)), optimizer)
    step = train.make_train_step(optimizer, loss=loss)
    for length, expected in ((5, ["traced", "trimmed"]), (5, []), (6, ["traced", "trimmed"])):
        done.clear()
        state, _ = step(state, {"tokens": np.ones((2, length), np.int32)})
        assert done == expected
    done.clear()
    eqx.filter_eval_shape(step, state, {"tokens": jnp.ones((2, 7), jnp.int32)})  # within a trace nothing is compiled
    assert done == ["traced"]


@pytest.mark.parametrize("bfloat16_dot", [True, False])
def test_the_gradient_of_a_bfloat16_weight_is_a_product_of_bfloat16(monkeypatch, bfloat16_dot):
    """Where the processor has one, XLA gets it as it wants; exported programs and derivatives are right."""
    from mpt_eqx.ops import cpu
    from mpt_eqx.ops.product import product

    monkeypatch.setattr(cpu, "has_bfloat16_dot", lambda: bfloat16_dot)
    draw = np.random.default_rng(0)
    weight, x, slope = (jnp.asarray(draw.normal(size=size), jnp.bfloat16) for size in ((24, 16), (40, 16), (40, 24)))

    def gradient(weight, x):
        return jax.vjp(product, weight, x)[1](slope.astype(jnp.float32))[0]

    compiled = jax.jit(gradient)
    expected = jnp.einsum("To,Ti->oi", slope, x, preferred_element_type=jnp.float32)
    np.testing.assert_allclose(compiled(weight, x).astype(jnp.float32), expected, rtol=2**-8)
    assert ("LayoutConstraint" in compiled.lower(weight, x).as_text()) == bfloat16_dot
    assert jax.export.export(compiled)(weight, x).mlir_module_serialized
    along = jax.jvp(lambda x: gradient(weight, x), (x,), (x,))[1]
    np.testing.assert_allclose(along.astype(jnp.float32), expected, rtol=2**-8)  # it is linear in x
