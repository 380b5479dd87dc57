"""Optimizers and schedules against the rules they cite; a step of training against the whole batch's gradient."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import some

from mpt_eqx import MPTError, interp, train
from mpt_eqx.surgery import stack
from mpt_eqx.train import loop
from mpt_eqx.train.loss import balance_loss


@pytest.fixture
def small(tiny_config):
    from mpt_eqx import MPT

    return MPT(tiny_config(n_layers=1), key=jax.random.key(1))


@pytest.fixture
def batch():
    """Four rows, of which one has few tokens that count, and one none."""
    tokens = np.random.default_rng(0).integers(61, size=(4, 12))
    mask = np.ones((4, 12), bool)
    mask[1, 4:] = mask[2] = False
    return {"tokens": tokens, "mask": mask}


RATES = {"steady": 0.01, "scheduled": train.cosine_with_warmup(0.01, 6, warmup_steps=2, floor=0.1)}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", ["adamw", "lionw"])
def test_decoupled_optimizers_are_composers(kind, rate):
    """In float64, as their source has it: the weights shrink first, by the schedule and not by the rate."""
    rng, decay, b1, b2, eps = np.random.default_rng(0), 0.1, 0.9, 0.95, 1e-8
    w = {"decays": rng.normal(size=5), "stays": rng.normal(size=5)}
    with jax.enable_x64(True):
        make = {"adamw": train.decoupled_adamw, "lionw": train.decoupled_lionw}[kind]
        mask = {"decays": True, "stays": False}
        optimizer = make(RATES[rate], b1=b1, b2=b2, weight_decay=decay, peak=0.01, mask=mask)
        weights = jax.tree.map(jnp.asarray, w)
        state = optimizer.init(weights)
        m, v = ({name: np.zeros(5) for name in w} for _ in range(2))
        for step in range(6):
            gradient = {name: rng.normal(size=5) for name in w}
            lr = float(RATES[rate](step)) if rate == "scheduled" else 0.01
            for name, g in gradient.items():
                w[name] = w[name] * (1 - lr / 0.01 * decay * (name == "decays"))
                if kind == "adamw":
                    m[name], v[name] = b1 * m[name] + (1 - b1) * g, b2 * v[name] + (1 - b2) * g * g
                    root = np.sqrt(v[name]) / np.sqrt(1 - b2 ** (step + 1)) + eps
                    w[name] = w[name] - lr / (1 - b1 ** (step + 1)) * m[name] / root
                else:
                    w[name] = w[name] - lr * np.sign(b1 * m[name] + (1 - b1) * g)
                    m[name] = b2 * m[name] + (1 - b2) * g
            updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, weights)
            weights = optax.apply_updates(weights, updates)
            # The rate is a number of 32 bits.
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), weights, w)
            assert float(state.learning_rate) == pytest.approx(lr, rel=1e-6) and int(state.step) == step + 1


def test_schedules():
    cosine = train.cosine_with_warmup(2.0, 110, warmup_steps=10, floor=0.1)
    line = train.linear_with_warmup(2.0, 110, warmup_steps=10)
    for rate, middle, end in ((cosine, 2 * (0.1 + 0.9 / 2), 0.2), (line, 1.0, 0.0)):
        found = [float(rate(step)) for step in (0, 5, 10, 60, 110, 500)]
        np.testing.assert_allclose(found, [0, 1, 2, middle, end, end], atol=1e-6)
        np.testing.assert_allclose(jax.jit(rate)(jnp.asarray(60)), middle, rtol=1e-6)
    assert float(train.linear_with_warmup(2.0, 10)(0)) == 2.0


@pytest.mark.parametrize("accumulate", some([2, 4], [2]))
def test_micro_batches_are_the_batch(small, batch, accumulate):
    """However many tokens count in each, loss, norm and weights are those of the whole batch."""
    optimizer = optax.sgd(0.5)
    whole, parts = (
        train.make_train_step(optimizer, accumulate=n)(train.TrainState.create(copy(small), optimizer), batch)
        for n in (1, accumulate)
    )
    np.testing.assert_allclose(whole[1]["loss"], eqx.filter_jit(train.next_token_loss)(small, **batch), rtol=1e-6)
    assert int(whole[1]["tokens"]) == int(parts[1]["tokens"]) == 11 + 3 + 0 + 11
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(parts[1][name], whole[1][name], rtol=1e-5)
    for one, other in zip(
        *(jax.tree.leaves(eqx.filter(s.model, eqx.is_array)) for s, _ in (whole, parts)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)


def copy(model):
    return jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, model)


def test_the_memory_of_a_step_is_that_of_a_micro_batch(tiny_config):
    from mpt_eqx import MPT

    model, optimizer = MPT(tiny_config(n_layers=1), key=jax.random.key(1)), optax.sgd(0.1)

    def temporary(rows, accumulate):
        step = train.make_train_step(optimizer, accumulate=accumulate)
        state = train.TrainState.create(model, optimizer)
        one = step.__wrapped__.__closure__
        jitted = next(cell.cell_contents for cell in one if hasattr(cell.cell_contents, "lower"))
        batch = {"tokens": jnp.ones((rows, 64), jnp.int32)}
        return jitted.lower(batch, state).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16, 8) < 1.2 * temporary(2, 1) + 100_000


def test_gradients_are_clipped_to_a_norm(small, batch):
    optimizer = optax.sgd(1.0)
    state, metrics = train.make_train_step(optimizer, max_grad_norm=0.01)(
        train.TrainState.create(copy(small), optimizer), batch
    )
    moved = jax.tree.map(lambda a, b: a - b, eqx.filter(state.model, eqx.is_array), eqx.filter(small, eqx.is_array))
    assert metrics["grad_norm"] > 0.02 and optax.tree.norm(moved) == pytest.approx(0.01, rel=1e-4)


def test_weights_of_16_bits_become_masters_and_computations_keep_the_type(small, batch):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, small)
    optimizer, seen = train.decoupled_adamw(1e-5, weight_decay=0.0), []

    def loss(model, tokens, **rest):
        seen.append(model.dtype)
        return train.next_token_loss(model, tokens, **rest)

    with pytest.warns(UserWarning, match="weights in bfloat16 are trained in float32"):
        state = train.TrainState.create(narrow, optimizer)
    before = np.array(state.model.norm_f.weight)
    state, metrics = train.make_train_step(optimizer, loss=loss, compute_dtype="bfloat16")(state, batch)
    assert set(seen) == {np.dtype(jnp.bfloat16)} and metrics["loss"].dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(eqx.filter(state.model, eqx.is_array))} == {np.dtype(np.float32)}
    assert np.all(np.asarray(state.model.norm_f.weight) != before)
    assert float(metrics["learning_rate"]) == pytest.approx(1e-5)


def test_only_what_is_trainable_moves_and_is_kept_by_the_optimizer(small, batch):
    optimizer = train.decoupled_adamw(0.1, weight_decay=0.1, mask=train.not_named("*norm*"))
    state = train.TrainState.create(copy(small), optimizer, trainable=train.named("*.attn.*", "norm_f.weight"))
    kept = sum(x.size for x in jax.tree.leaves(state.opt_state.momentum))
    after, _ = train.make_train_step(optimizer)(state, batch)
    names = []
    for (path, one), (_, other) in zip(
        *(jax.tree_util.tree_leaves_with_path(eqx.filter(model, eqx.is_array)) for model in (small, after.model)),
        strict=True,
    ):
        if np.any(one != other):
            names.append(jax.tree_util.keystr(path, simple=True, separator="."))
    assert names == ["blocks.0.attn.Wqkv.weight", "blocks.0.attn.out_proj.weight", "norm_f.weight"]
    assert kept == 96 * 32 + 32 * 32 + 32


def test_steps_are_compiled_once_and_counted(small, batch):
    """Stacked, with remat and micro-batches; the keys of dropout are those of the step."""
    model = stack(small)
    optimizer = train.decoupled_lionw(train.linear_with_warmup(1e-3, 10, warmup_steps=2))
    traced = []

    def loss(model, tokens, *, key, **rest):
        traced.append(1)
        return train.next_token_loss(model, tokens, key=key, **rest) + jax.random.uniform(key)

    step = train.make_train_step(optimizer, loss=loss, accumulate=2, remat="full")
    state, losses = train.TrainState.create(model, optimizer, key=jax.random.key(5)), []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 3 and len(set(losses)) == 3
    first = len(traced)
    step(state, batch)
    assert len(traced) == first <= 2


def test_what_a_step_refuses(small, batch):
    optimizer = optax.sgd(0.1)
    cases = [
        (lambda: train.make_train_step(optimizer, accumulate=0), "accumulate: expected a whole number ≥ 1, found 0"),
        (lambda: train.make_train_step(optimizer, max_grad_norm=0), "max_grad_norm: expected a number > 0 or None"),
        (lambda: train.make_train_step(optimizer, compute_dtype="int8"), "compute_dtype: expected a floating type"),
        (
            lambda: train.make_train_step(optimizer, remat="half"),
            "how: expected 'none', 'full', 'dots', 'offload', found 'half'",
        ),
    ]
    cases += [
        (
            lambda: train.next_token_loss(small, [[1, 2]], vocab_chunk=0),
            "vocab_chunk: expected a whole number ≥ 1, found 0",
        ),
        (lambda: train.next_token_loss(small, [[1, 2]], z_loss=-1.0), "z_loss: expected a number ≥ 0, found -1.0"),
    ]
    step, one = (train.make_train_step(optimizer, accumulate=n) for n in (3, 1))
    state = train.TrainState.create(small, optimizer)
    cases += [
        (
            lambda: step(state, {"labels": batch["tokens"]}),
            r"batch: expected a mapping with tokens, .* found \['labels'\]",
        ),
        (lambda: step(state, {**batch, "weight": 1}), "batch: expected a mapping with tokens"),
        (lambda: step(state, batch), "tokens: expected a multiple of accumulate=3 rows, found 4"),
        (lambda: one(state, {**batch, "mask": np.ones((4, 3))}), r"mask: expected the shape of tokens, \(4, 12\)"),
    ]
    create = train.TrainState.create
    cases += [
        (lambda: create(small, optimizer, trainable={}), "trainable: expected a tree of booleans like the model"),
        (
            lambda: create(small, optimizer, trainable=jax.tree.map(lambda _: False, small)),
            "expected floating arrays, found none",
        ),
        (lambda: create(small, optimizer, trainable=train.named("*.bias")), "found '\\*.bias'; there is 'wte.weight'"),
    ]
    for call, message in cases:
        with pytest.raises(MPTError, match=message):
            call()


def test_what_optimizers_refuse():
    rate = train.cosine_with_warmup(0.1, 10)
    for call, message in [
        (lambda: train.decoupled_adamw(rate), "peak: expected the learning rate before its schedule"),
        (lambda: train.decoupled_adamw(0.0), "learning_rate: expected a number > 0"),
        (lambda: train.decoupled_adamw(0.1, b2=1.0), "b2: expected a number with 0 ≤ b2 < 1, found 1.0"),
        (lambda: train.decoupled_lionw(0.1, weight_decay=-1), "weight_decay: expected a number ≥ 0, found -1"),
        (lambda: train.cosine_with_warmup(0, 10), "peak: expected a number > 0, found 0"),
        (lambda: train.cosine_with_warmup(1, 10, floor=2), "floor: expected a number from 0 to 1, found 2"),
        (
            lambda: train.linear_with_warmup(1, 10, warmup_steps=10),
            "warmup_steps: expected a whole number from 0 to total_steps − 1 = 9, found 10",
        ),
    ]:
        with pytest.raises(MPTError, match=re.escape(message)):
            call()
    optimizer = train.decoupled_adamw(0.1)
    with pytest.raises(MPTError, match="update: expected the weights as the third argument, found None"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))


@pytest.fixture
def mixture(tiny_config):
    """Makes a model of two mixtures of experts; keywords are more of their configuration."""
    from mpt_eqx import MPT, FFNConfig

    def make(**ffn):
        ffn = {"ffn_type": "mb_dmoe", "moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 16, **ffn}
        return MPT(tiny_config(d_model=16, ffn_config=FFNConfig(**ffn)), key=jax.random.key(1))

    return make


def balance(scores, mask, top_k):
    """megablocks' formula without its weight, over real tokens, of the probabilities [L, B, T, E]."""
    scores = [np.asarray(layer)[mask] for layer in scores]
    n_experts = scores[0].shape[-1]
    tokens_of = [np.bincount(np.argsort(-layer)[:, :top_k].ravel(), minlength=n_experts) for layer in scores]
    dots = [counts @ layer.mean(axis=0) for counts, layer in zip(tokens_of, scores, strict=True)]
    return sum(dots) * n_experts / (len(scores) * mask.sum() * top_k)


def test_megablocks_mixtures_are_balanced(mixture, batch):
    """The value against the formula in float64, the gradient against its central differences: counts have none."""
    with jax.enable_x64(True):
        model = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), mixture(moe_loss_weight=0.5))
        routers = lambda m: [block.ffn.router.layer.weight for block in m.blocks]  # noqa: E731
        rng = np.random.default_rng(0)
        ways = [jnp.asarray(rng.normal(size=w.shape)) for w in routers(model)]
        places = [f"blocks.{i}.mlp.hook_expert_weights" for i in range(2)]

        @jax.jit
        @functools.partial(jax.grad, has_aux=True)
        def added(by):
            moved = eqx.tree_at(routers, model, [w + by * way for w, way in zip(routers(model), ways, strict=True)])
            plain, balanced = (train.next_token_loss(moved, **batch, moe_loss_weight=weight) for weight in (0.0, None))
            run = jax.vmap(lambda row, mask: interp.run(moved, row, mask=mask, capture=places).activations)
            found = run(jnp.asarray(batch["tokens"]), jnp.asarray(batch["mask"]))
            return balanced - plain, (balanced - plain, [found[place] for place in places])

        slope, (value, scores) = added(0.0)
        np.testing.assert_allclose(value, 0.5 * balance(scores, batch["mask"], 2), atol=1e-6)
        after, before = (balance(added(by)[1][1], batch["mask"], 2) for by in (1e-6, -1e-6))
        np.testing.assert_allclose(slope, 0.5 * (after - before) / 2e-6, rtol=1e-6)


def test_equal_experts_have_a_balance_of_one():
    """And a router that is sure of the same k for every token has one of E / k, its largest."""
    loss = jax.jit(lambda p, real: balance_loss([p, p], real, 2))
    real, sure = np.asarray([[True, True, False]]), [0.5, 0.5, 0, 0]
    padded = np.float32([[sure, sure, [np.nan] * 4]])
    assert [loss(p, real) for p in (np.full_like(padded, 0.25), padded)] == [1, 2]
    assert loss(padded, ~np.ones_like(real)) == 0


def test_without_a_weight_and_in_an_evaluation_nothing_is_balanced(mixture, batch):
    """Each of two routers chooses once, and nothing counts what it chose."""
    off = jax.make_jaxpr(lambda m: train.next_token_loss(m, **batch))(mixture(moe_loss_weight=0))
    evaluated = jax.make_jaxpr(lambda m: loop._loss_and_count(m, batch, None))(mixture())
    assert [str(program).count("top_k[") for program in (off, evaluated)] == [2, 2]
