"""Attention to a cache of several layers, and of chunks of queries, by the CPU kernel and without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import examples, some
from hypothesis import given
from hypothesis import strategies as st
from test_kernel import exact


def layers(dtype):
    """Keys and values of three layers for each of two rows, as generation stores them."""
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(2, 3, 2, 512, 16)), dtype) for _ in range(2))
    return (k, v) if dtype == "float32" else tuple(jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (k, v))


@pytest.mark.parametrize("dtype", some(["float32", "bfloat16"], ["bfloat16"]))
@pytest.mark.parametrize("queries", [1, 12])
def test_a_layer_of_several_is_read_and_written_in_its_place(dtype, queries, way):
    """By number, under vmap over rows: the same bits as a cache of its own gives, and no other layer changes."""
    from mpt_eqx.ops.attend import attend
    from mpt_eqx.ops.layer_cache import KeysValues, LayerCache

    k, v = layers(dtype)
    rng = np.random.default_rng(1)
    q, new_k, new_v = (jnp.asarray(rng.normal(size=(2, n, queries, 16)), dtype) for n in (4, 2, 2))
    starts = jnp.asarray([40, 300])

    def row(number, k, v, q, new_k, new_v, start):
        places = start + jnp.arange(queries)
        cache = LayerCache(k, v, np.dtype(dtype), number).write(KeysValues(new_k, new_v), places)
        return attend(q, cache, places, scale=0.25, slopes=jnp.ones(4)), cache.k, cache.v

    rows = jax.jit(jax.vmap(row, (None, *[0] * 6)))
    for number in range(3):
        expected, alone_k, alone_v = rows(None, k[:, number], v[:, number], q, new_k, new_v, starts)
        found, all_k, all_v = rows(jnp.int32(number), k, v, q, new_k, new_v, starts)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(all_k, k.at[:, number].set(alone_k))
        np.testing.assert_array_equal(all_v, v.at[:, number].set(alone_v))


@pytest.mark.parametrize("axes", some([(None, None, 0), (0, 0, None)], [(None, None, 0)]))
def test_each_row_may_read_another_layer(axes, way):
    """A number with an axis of rows, and another axis around it or around the cache."""
    from mpt_eqx.ops.attend import attend
    from mpt_eqx.ops.layer_cache import LayerCache

    k, v = layers("float32")
    q = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 16)), jnp.float32)
    numbers = jnp.asarray([[2, 0], [1, 1]]) if axes[-1] == 0 else jnp.asarray([2, 0])

    def row(k, v, number):
        return attend(q, LayerCache(k, v, np.dtype("float32"), number), jnp.asarray([77]), scale=0.25)

    found = jax.jit(jax.vmap(jax.vmap(row, (None, None, 0) if axes[0] == 0 else 0), axes))(k, v, numbers)
    alone = jax.jit(lambda k, v: attend(q, LayerCache(k, v, np.dtype("float32")), jnp.asarray([77]), scale=0.25))
    for outer, inner in np.ndindex(2, 2):
        layer, number = (inner, numbers[outer, inner]) if axes[0] is None else (outer, numbers[inner])
        np.testing.assert_allclose(found[outer, inner], alone(k[layer, number], v[layer, number]), atol=1e-6)


@pytest.mark.optimized
@pytest.mark.parametrize("queries", [1, 12])
def test_a_loop_over_layers_copies_no_cache(queries, way):
    """Written and read in place, layer after layer: temporary memory is less than one layer of one row has."""
    from mpt_eqx.ops.attend import attend
    from mpt_eqx.ops.layer_cache import KeysValues, LayerCache

    rows, depth, capacity, dtype = 2, 4, 4096, np.dtype("bfloat16")
    stored = jax.ShapeDtypeStruct((rows, depth, 2, capacity, 16), jnp.uint16)
    q = jax.ShapeDtypeStruct((rows, 2, queries, 16), dtype)

    def loop(k, v, q, start):
        def row(k, v, q, start, number):
            places = start + jnp.arange(queries)
            cache = LayerCache(k, v, dtype, number).write(KeysValues(q, q), places)
            return cache.k, cache.v, attend(q, cache, places, scale=0.25)

        def one(carry, number):
            return jax.vmap(row, (0, 0, 0, 0, None))(*carry, start, number), None

        return jax.lax.scan(one, (k, v, q), jnp.arange(depth))[0]

    compiled = jax.jit(loop, donate_argnums=(0, 1)).lower(
        stored, stored, q, jax.ShapeDtypeStruct((rows,), jnp.int32)
    ).compile()  # fmt: skip
    assert compiled.memory_analysis().temp_size_in_bytes < capacity * 2 * 16 * 2


def chunk(dtype, groups, size, queries, start, seed=0):
    """Queries of two heads of keys, their keys and values in a cache of 512 as bits or numbers, slopes, positions."""
    from mpt_eqx.model.alibi import alibi_slopes

    rng, total = np.random.default_rng(seed), start + queries
    q = jnp.asarray(rng.normal(size=(2 * groups, queries, size)) * 2, dtype)
    k, v = (jnp.asarray(rng.normal(size=(2, 512, size)), dtype).at[:, total:].set(jnp.nan) for _ in range(2))
    return q, k, v, alibi_slopes(2 * groups, 8), jnp.arange(start, total)


def attended(q, k, v, slopes, places, window=None, softcap=None):
    from mpt_eqx.ops.attend import attend
    from mpt_eqx.ops.layer_cache import LayerCache

    cache = LayerCache(k, v, np.dtype(q.dtype))
    return attend(q, cache, places, scale=q.shape[-1] ** -0.5, slopes=slopes, window=window, softcap=softcap)


@examples(10, least=2)
@given(
    st.sampled_from(["float32", "bfloat16", "float16"]), st.integers(1, 3), st.sampled_from([1, 24, 64, 80]),
    st.sampled_from([2, 9, 31, 70]), st.integers(0, 430), st.sampled_from([None, 0, 7, 100]), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_a_chunk_of_queries_is_the_formula(dtype, groups, size, queries, start, window, alibi, seed):
    """Each query as the formula has it in float64; in 16 bits as near as its roundings leave it."""
    q, k, v, slopes, places = chunk(dtype, groups, size, queries, start, seed)
    found = jax.jit(attended, static_argnames="window")(q, k, v, slopes if alibi else None, places, window=window)
    assert found.dtype == q.dtype
    by_head = np.asarray(q, np.float64).reshape(2, groups, queries, size)
    for at, place in enumerate(places.tolist()):
        of_query = exact(
            by_head[None, :, :, at], k[None], v[None], slopes.reshape(2, -1) if alibi else None,
            np.asarray([place]), size**-0.5, window,
        )  # fmt: skip
        atol = {"float32": 1e-5, "bfloat16": 0.06, "float16": 0.008}[dtype]
        np.testing.assert_allclose(found[:, at], of_query.reshape(-1, size), atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", some(["float32", "bfloat16", "float16"], ["bfloat16"]))
@pytest.mark.parametrize("window", [None, 50])
def test_how_a_prompt_is_cut_does_not_show(dtype, window, kernel):
    """To the bit: 100 queries at once, in pieces of any size, and one by one, alone and in a batch."""
    q, k, v, slopes, places = chunk(dtype, 3, 24, 100, 200)
    function = jax.jit(attended, static_argnames="window")
    whole = function(q, k, v, slopes, places, window=window)
    for size in (1, 2, 7, 31, 64):
        for first in (0, 33, 100 - size):
            part = slice(first, first + size)
            found = function(q[:, part], k, v, slopes, places[part], window=window)
            np.testing.assert_array_equal(found, whole[:, part])
    twice = (jnp.stack([q, -q]), *(jnp.stack([x, x[::-1]]) for x in (k, v)))
    rows = jax.vmap(lambda q, k, v: attended(q, k, v, slopes, places, window))(*twice)
    np.testing.assert_array_equal(rows[0], whole)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_query_reads_only_what_it_sees(bad, kernel):
    """What is no number in keys and values shows in the queries that see it, and changes no bit of the others."""
    q, k, v, slopes, places = chunk("float32", 1, 24, 40, 100)
    clean = attended(q, k, v, slopes, places, 20)
    sees = (places >= 119) & (places <= 139)
    for name in ("k", "v"):
        bad_k, bad_v = (x.at[:, 119].set(bad) if name == place else x for place, x in (("k", k), ("v", v)))
        found = attended(q, bad_k, bad_v, slopes, places, 20)
        np.testing.assert_array_equal(found[:, ~sees], clean[:, ~sees])
        assert not np.isfinite(found[:, sees]).all(axis=(0, 2)).any()


def test_queries_outside_of_a_cache_get_nan(way):
    q, k, v, slopes, _ = chunk("float32", 1, 16, 4, 508)
    found = attended(q, k, v, slopes, jnp.asarray([-3, 7, 511, 512]))
    assert np.isnan(found).all(axis=(0, 2)).tolist() == [True, False, False, True]
    assert np.isfinite(found[:, 1:3]).all()


def test_what_the_kernel_has_not_goes_through_xla(kernel):
    """A cap on the scores, types of 64 bits, meshes, and every program of a derivative."""

    def calls(function, *arguments):
        return "mpt_eqx_attention" in jax.jit(function).lower(*arguments).as_text()

    arguments = chunk("float32", 1, 16, 12, 30)
    assert calls(attended, *arguments)
    assert not calls(lambda *a: attended(*a, softcap=30.0), *arguments)
    assert not calls(jax.grad(lambda q, *a: jnp.sum(attended(q, *a))), *arguments)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(arguments[1], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    assert not calls(attended, arguments[0], placed, placed, *arguments[3:])
