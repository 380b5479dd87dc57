"""Attention to a cache of several layers, and of chunks of queries, by the CPU kernel and without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import some


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
