"""JAX's transformations, one in the other: derivatives through a cache, vmap of vmap, jax.export."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import examples, some
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from test_kernel import KINDS, made, step

TOKENS = jnp.asarray([3, 1, 4, 1, 5, 9], jnp.int32)


@pytest.fixture(scope="module")
def small(tiny_config):
    """Makes a model of one layer; keywords are those of its attention."""
    from mpt_eqx import MPT, AttnConfig, InitConfig

    def build(n_layers=1, **attn):
        config = tiny_config(
            n_layers=n_layers,
            attn_config=AttnConfig(**{"alibi": True, **attn}),
            init_config=InitConfig(emb_init_std=0.5),
        )
        return MPT(config, key=jax.random.key(3))

    return build


def through_a_cache(model):
    """The last logits, of tokens that are read into a cache of NaN in two parts, the second of one token."""
    from mpt_eqx import KVCache

    cache = KVCache.empty(model.config, 8, model.dtype)
    cache = eqx.tree_at(lambda c: c.layers, cache, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache.layers))
    _, cache = model.extend(TOKENS[:-1], cache)
    x, _ = model.extend(TOKENS[-1:], cache)
    return model.unembed(x)[0]


CACHES = {
    "float32": ("float32", None, {}),
    "bfloat16": ("bfloat16", None, {}),
    "float16": ("float16", None, {}),
    "int8": ("float32", "int8", {}),
    "int4": ("float32", "int4", {}),
    "int4 in bfloat16": ("bfloat16", "int4", {}),
    "groups, window, softcap": (
        "float32", None,
        {
            "attn_type": "grouped_query_attention", "kv_n_heads": 2, "sliding_window_size": 3,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "rope": ("float32", None, {"alibi": False, "rope": True}),
}  # fmt: skip
FAST = (("bfloat16", "kernel"),)


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        pytest.param(kind, way, marks=() if (kind, way) in FAST else pytest.mark.slow)
        for kind in CACHES
        for way in ("kernel", "XLA")
    ],
    indirect=["way"],
)
def test_derivatives_through_a_cache_are_those_of_the_forward_pass(small, kind, way):
    """Of every floating array of the model, backward and forward."""
    from mpt_eqx import quantize

    dtype, scheme, attn = CACHES[kind]
    model = jax.tree.map(lambda x: x.astype(dtype), small(**attn))
    model = quantize(model, scheme) if scheme else model
    floating, rest = eqx.partition(model, eqx.is_inexact_array)
    # Derivatives of scales in bfloat16 would be rounded to that, once for each part of the tokens.
    floating = jax.tree.map(lambda x: x.astype(dtype), floating)
    toward = jnp.asarray(np.random.default_rng(0).normal(size=61), jnp.float32)

    @jax.jit
    def derivatives(floating, direction):
        def both(logits_of):
            def loss(floating):
                return toward @ logits_of(eqx.combine(floating, rest)).astype(jnp.float32)

            return jax.grad(loss)(floating), jax.jvp(loss, (floating,), (direction,))[1]

        return both(lambda model: model(TOKENS)[-1]), both(through_a_cache)

    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: x * jnp.asarray(rng.normal(size=x.shape), x.dtype), floating)
    (expected, along), (found, along_cache) = derivatives(floating, direction)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    tolerance = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.004}[dtype]
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), atol=tolerance * scale, rtol=0
        )
    size = sum(
        float(jnp.sum(jnp.abs(g.astype(jnp.float32) * d.astype(jnp.float32))))
        for g, d in zip(jax.tree.leaves(expected), jax.tree.leaves(direction), strict=True)
    )
    np.testing.assert_allclose(along_cache, along, atol=tolerance * size, rtol=0)
    assert abs(along) > 10 * tolerance * size or dtype != "float32"


def test_a_cache_of_bits_refuses_derivatives_by_name(small):
    from mpt_eqx import KVCache, MPTError

    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small())
    cache = KVCache.empty(model.config, 8, jnp.bfloat16, as_bits=True)

    def loss(floating):
        return jnp.sum(floating.extend(TOKENS, cache)[0].astype(jnp.float32))

    for transformed in (jax.grad(loss), jax.grad(jax.jit(loss)), lambda m: jax.jvp(loss, (m,), (m,))):
        with pytest.raises(MPTError, match=r"cache: expected one of KVCache.empty\(.*, found one of generation"):
            jax.make_jaxpr(transformed)(model)


def test_a_cache_of_another_type_is_refused(small):
    from mpt_eqx import KVCache, MPTError

    model = small()
    with pytest.raises(MPTError, match=r"expected one of float32, .*, found bfloat16; make it with .*'float32'\)"):
        model.extend(TOKENS, KVCache.empty(model.config, 8, jnp.bfloat16))


@pytest.mark.parametrize("way", some(["kernel", "XLA"], ["kernel"]), indirect=True)
def test_queries_outside_of_a_cache_are_nan(small, way):
    """Any length, under jit, where it cannot be seen; of a row whose end is outside, what is inside is right."""
    from mpt_eqx import KVCache

    model = small()
    cache = KVCache.empty(model.config, 256, jnp.float32)
    _, cache = model.extend(jnp.arange(12), cache)

    @jax.jit
    def logits(tokens, length):
        return model.extend(tokens, eqx.tree_at(lambda c: c.length, cache, length))[0]

    expected = {n: logits(jnp.arange(n), jnp.int32(12)) for n in (1, 3)}

    @examples(40)
    @given(st.one_of(st.integers(-5, 260), st.integers(-(2**31), 2**31 - 1)))
    def of_any_length(length):
        for n in (1, 3):
            found = np.asarray(logits(jnp.arange(n), jnp.int32(length)))
            with np.errstate(over="ignore"):
                places = np.int32(length) + np.arange(n, dtype=np.int32)
            inside = (places >= 0) & (places < 256)
            assert np.isnan(found[~inside]).all() and np.isfinite(found[inside]).all()

    of_any_length()
    assert all(np.isfinite(x).all() for x in expected.values())
    np.testing.assert_allclose(logits(jnp.arange(12), jnp.int32(0)), model.hidden_states(jnp.arange(12))[-1], atol=2e-5)


NESTED = {
    "vmap of vmap": lambda f: jax.vmap(jax.vmap(f)),
    "vmap of vmap of vmap": lambda f: lambda x: jax.vmap(jax.vmap(jax.vmap(f)))(x[None])[0],
    "vmap of jit of vmap": lambda f: jax.vmap(jax.jit(jax.vmap(f))),
    "vmap of scan": lambda f: jax.vmap(lambda xs: jax.lax.map(f, xs)),
    "scan of vmap": lambda f: lambda xs: jax.lax.map(jax.vmap(f), xs),
    "vmap of vmap of checkpoint": lambda f: jax.vmap(jax.vmap(jax.checkpoint(f))),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=() if (name, way) == ("vmap of vmap", "kernel") else pytest.mark.slow)
        for name in NESTED
        for way in ("kernel", "XLA")
    ],
    indirect=["way"],
)
def test_transformations_nest(name, way):
    """Around the product and the attention of a step: values and gradients are those of each row by itself."""
    from mpt_eqx.ops.attend import attend
    from mpt_eqx.ops.layer_cache import LayerCache
    from mpt_eqx.ops.matmul import matmul

    weight, _ = made("bfloat16", 12, 16)
    _, k, v, _, _ = step("float32", 1, 16, 256, [255], None, 0)
    cache = LayerCache(k[0], v[0], np.dtype("float32"))

    def function(x):
        q = x.reshape(2, 1, 16)
        mixed = attend(q, cache, jnp.asarray([40]), scale=0.25)
        return matmul(weight, mixed[:, 0].astype(jnp.bfloat16))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 32)), jnp.float32)
    nested = NESTED[name](function)
    each = jnp.stack([jnp.stack([jax.jit(function)(x[i, j]) for j in range(3)]) for i in range(2)])
    np.testing.assert_allclose(jax.jit(nested)(x), each, atol=1e-5)
    if name in ("vmap of vmap", "vmap of scan"):
        grads = jax.jit(jax.grad(lambda x: jnp.sum(nested(x) ** 2)))(x)
        alone = jax.jit(jax.grad(lambda x: jnp.sum(function(x) ** 2)))(x[1, 2])
        np.testing.assert_allclose(grads[1, 2], alone, atol=0.05 * float(jnp.abs(alone).max()))


@pytest.mark.parametrize("kind", ["float32", pytest.param("int4", marks=pytest.mark.slow)])
def test_a_forward_pass_is_exported_for_any_length(small, kind):
    """Once, without a flag; what is exported has no call of the kernel, since other machines have none."""
    from mpt_eqx import quantize

    model = small()
    model = quantize(model, "int4", embeddings=True) if kind == "int4" else model
    (length,) = export.symbolic_shape("T")
    exported = export.export(jax.jit(lambda tokens, mask: model(tokens, mask=mask)))(
        jax.ShapeDtypeStruct((length,), jnp.int32), jax.ShapeDtypeStruct((length,), bool)
    )
    forward = jax.jit(lambda tokens, mask: model(tokens, mask=mask))
    for n in (1, 8, 40):
        tokens = jnp.arange(n)
        np.testing.assert_allclose(exported.call(tokens, tokens >= 0), forward(tokens, tokens >= 0), atol=1e-4)
    assert "mpt_eqx_matmul" not in str(exported.mlir_module())


def test_a_step_of_decoding_is_exported(small):
    """With a cache; what is not exported still goes through the kernel."""
    from mpt_eqx import KVCache
    from mpt_eqx.ops import cpu

    model = small()
    cache = KVCache.empty(model.config, 256, jnp.float32)
    function = jax.jit(
        lambda tokens, layers, n: model.extend(tokens, dataclasses.replace(cache, layers=layers, length=n))[0]
    )
    arguments = (jnp.asarray([7]), cache.layers, jnp.int32(0))
    exported = export.export(function)(*arguments)
    np.testing.assert_allclose(exported.call(*arguments), function(*arguments), atol=1e-5)
    assert "mpt_eqx_" not in str(exported.mlir_module())
    assert ("mpt_eqx_attention" in function.lower(*arguments).as_text()) == cpu.available()


def test_a_length_that_is_known_to_be_too_large_is_refused(small):
    from mpt_eqx import MPTError

    (length,) = export.symbolic_shape("T", constraints=["T >= 300"])
    with pytest.raises(MPTError, match="tokens: expected at most max_seq_len=256, found T"):
        jax.eval_shape(small(), jax.ShapeDtypeStruct((length,), jnp.int32))


@pytest.mark.parametrize("dtype", some(["float32", "bfloat16", "float16"], ["bfloat16"]))
def test_a_score_of_minus_infinity_has_no_weight(dtype, way):
    """The same in the kernel, in blocks and in the formula; NaN where there is nothing else."""
    from mpt_eqx.ops.attend import attend
    from mpt_eqx.ops.layer_cache import KeysValues, LayerCache

    # Products overflow to −∞ for the keys of the first three places, and for all of them.
    largest = float(jnp.finfo(dtype).max)
    v = jnp.asarray(np.random.default_rng(0).normal(size=(1, 256, 16)), dtype)
    for bad in (jnp.arange(256) < 3, jnp.arange(256) < 256):
        k = jnp.where(bad[:, None], -largest / 4, 0.5).astype(dtype) * jnp.ones((1, 1, 16), dtype)
        q = jnp.full((1, 1, 16), largest / 4, dtype) if bad.all() else jnp.full((1, 1, 16), 8.0, dtype)
        q = q.at[..., 0].set(largest / 4) if not bad.all() else q
        k = k.at[..., 0].set(jnp.where(bad, -largest / 4, 0).astype(dtype)) if not bad.all() else k
        cache, at = LayerCache(k, v, np.dtype(dtype)), jnp.asarray([9])
        cached = jax.jit(lambda q, cache, at=at: attend(q, cache, at, scale=0.25))(q, cache)
        rows = KeysValues(k[:, :10], v[:, :10])
        places = jnp.arange(10)
        full = jax.jit(lambda q, rows, p=places: attend(q, rows, p, scale=0.25))(jnp.tile(q, (1, 10, 1)), rows)[:, -1:]
        expected = np.full(16, np.nan) if bad.all() else np.asarray(v[0, 3:10], np.float32).mean(0)
        for found in (cached, full):
            np.testing.assert_allclose(np.asarray(found, np.float32)[0, 0], expected, atol=0.02)


def test_the_kernel_refuses_operands_that_do_not_fit():
    """The last check, in the kernel itself, of types and sizes: nothing is read or written beside an array."""
    from mpt_eqx.ops import cpu

    if not cpu.available():
        pytest.skip(f"no kernel: {cpu.missing()}")

    def refused(target, shape, *operands, **attributes):
        call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, jnp.float32))
        with pytest.raises(jax.errors.JaxRuntimeError, match="mpt_eqx: "):
            jax.block_until_ready(call(*operands, **attributes))

    def refused_product(shape, values, scale, x, layers=1, many=False, number=0):
        operands = (jnp.int32(number), x, *[values] * layers, *[scale for _ in range(layers) if scale is not None])
        refused("mpt_eqx_matmul", shape, *operands, layers=np.int64(layers), many=many)

    x, none = jnp.ones((2, 32)), None
    for kind in KINDS:
        weight, _ = made(kind, 6, 32)
        values, scale, wrong = weight, none, [(weight, jnp.ones((6, 1)), x)]
        if kind.startswith("int"):
            values, scale = weight.values, weight.scale
            other = scale.astype(jnp.bfloat16 if kind == "int8" else jnp.float32)
            wrong = [(values, none, x), (values, other, x), (values, scale[:5], x), (values, scale.reshape(-1), x)]
        for operands in (*wrong, (values, scale, x[:, :16]), (values, scale, jnp.ones((2, 33))), (values[0], scale, x)):
            for many in (False, True):
                refused_product((2, 6), *operands, many=many)
        refused_product((2, 5), values, scale, x, layers=2)
    refused_product((2, 6), jnp.ones((6, 32), jnp.int32), none, x)
    refused("mpt_eqx_matmul", (2, 6), jnp.int32(0), x, jnp.ones((6, 32)), layers=np.int64(2), many=False)
    refused(
        "mpt_eqx_matmul", (2, 6), jnp.int32(1), x, jnp.ones((6, 32)), jnp.ones((6, 31)), layers=np.int64(2), many=False
    )
    refused("mpt_eqx_matmul", (2, 6), jnp.int32(0), x, layers=np.int64(0), many=False)

    q, k, v, slopes, positions = step("float32", 2, 16, 256, [3, 5], None, 0)
    q, k, v, positions = q[:, :, :, None], k[:, None], v[:, None], positions[:, None]
    right = {"q": q, "k": k, "v": v, "slopes": slopes, "layer": jnp.zeros(2, jnp.int32), "position": positions}
    for change in (
        {"k": k[:1]}, {"v": v[:, :, :, :255]}, {"v": v[:, :, :1]}, {"k": k[:, 0]}, {"k": k[..., :8]}, {"q": q[0]},
        {"slopes": slopes[:, :1]}, {"position": positions[:1]}, {"layer": jnp.zeros(1, jnp.int32)},
        {"k": k.astype(jnp.bfloat16)}, {"k": k.astype(jnp.int8), "v": v.astype(jnp.int8)},
    ):  # fmt: skip
        refused(
            "mpt_eqx_attention", q.shape, *{**right, **change}.values(),
            kind=np.int32(0), scale=np.float32(1), window=np.int64(-1),
        )  # fmt: skip
    refused("mpt_eqx_attention", q.shape, *right.values(), kind=np.int32(7), scale=np.float32(1), window=np.int64(-1))


SWITCHES = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "transfers": lambda: jax.transfer_guard("disallow"),
    "leaks": jax.checking_leaks,
    "NaN": lambda: jax.debug_nans(True),
    "x64": lambda: jax.enable_x64(True),
    "no jit": jax.disable_jit,
}


@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES)
def test_everything_runs_under_a_switch_of_jax(small, switch, prompts):
    """Forward, gradient, a step with a cache, generate and beams; the tokens are those without it."""
    from mpt_eqx import KVCache, beam_search, generate
    from mpt_eqx.train import next_token_loss

    model, batch, rows = small(), jax.device_put(TOKENS[None]), prompts(3, 5)
    cache, key = KVCache.empty(model.config, 256, jnp.float32), jax.random.key(0)
    options = {"max_new_tokens": 4, "temperature": 1.0, "top_k": 5, "top_p": 0.9, "key": key}

    def everything():
        yield eqx.filter_jit(lambda model, batch: jax.vmap(model)(batch))(model, batch)
        yield eqx.filter_jit(eqx.filter_grad(next_token_loss))(model, batch).norm_f.weight
        yield eqx.filter_jit(lambda cache: model.extend(TOKENS[:1], cache))(cache)[0]
        yield generate(model, rows, **options).tokens
        yield beam_search(model, rows, num_beams=2, max_new_tokens=4).tokens

    expected = [np.asarray(x) for x in everything()]
    # Positions of 64 bits meet a length of 32.
    with SWITCHES[switch](), jax.numpy_dtype_promotion("standard" if switch == "x64" else "strict"):
        found = list(everything())
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_filters_of_logits_run_without_jit():
    from mpt_eqx.generation import sampling

    logits = jnp.asarray([0.1, 3.0, -2.0, 2.5, 1.0])
    for function, option in ((sampling.top_k, 2), (sampling.top_p, 0.8), (sampling.typical_p, 0.7)):
        with jax.disable_jit():
            found = function(logits, option)
        np.testing.assert_array_equal(found, function(logits, option))


def test_only_the_function_that_a_program_needs_is_traced():
    """For the platform it is lowered for, with the precision of products around the call; all of them for several."""
    from mpt_eqx.ops.platform import by_platform

    traced = []

    def product(name):
        return lambda x, y: (traced.append(name), x @ y)[1]

    @jax.jit
    def rows(x, y):
        def row(x):
            with jax.default_matmul_precision("float32"):
                return by_platform(
                    jax.ShapeDtypeStruct((2,), jnp.float32), x, y,
                    default=product("default"), cpu=product("cpu"), kernel=product("kernel"),
                )  # fmt: skip

        return jax.vmap(row)(x)

    def programs(x, y, **lowered_for):
        traced.clear()
        return rows.trace(x, y).lower(**lowered_for).as_text(), sorted(set(traced))

    x, y = jnp.ones((3, 4)), jnp.ones((4, 2))
    with jax.default_matmul_precision("bfloat16"):
        assert programs(x, y)[1] == ["kernel"]
        text, names = programs(x, y, lowering_platforms=("cuda",))
        assert names == ["default"] and "precision = [HIGHEST, HIGHEST]" in text
        for platforms, expected in (("cpu",), ["cpu"]), (("cpu", "cuda"), ["cpu", "default"]):
            traced.clear()
            exported = export.export(rows, platforms=platforms)(x, y)
            assert sorted(set(traced)) == expected
            np.testing.assert_array_equal(exported.call(x, y), x @ y)
    with jax.disable_jit():
        np.testing.assert_array_equal(rows(x, y), x @ y)
