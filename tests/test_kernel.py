"""Products of few rows: by the compiled kernel where there is one, by XLA where not; both are tested."""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import examples, is_long, one_in, some
from hypothesis import given
from hypothesis import strategies as st

KINDS = ("float32", "bfloat16", "float16", "int8", "int4")


def made(kind: str, out: int, columns: int, seed: int = 0):
    """A weight of this kind, and the numbers that it stands for."""
    from mpt_eqx.ops.quantized import QuantizedWeight, dequantize

    rng = np.random.default_rng(seed)
    if not kind.startswith("int"):
        weight = jnp.asarray(rng.normal(size=(out, columns)), kind)
        return weight, np.asarray(weight, np.float64)
    if kind == "int8":
        values = jnp.asarray(rng.integers(-127, 128, size=(out, columns)), jnp.int8)
        scale = jnp.asarray(rng.random((out, 1)), jnp.float32)
    else:
        values = jnp.asarray(rng.integers(0, 256, size=(out, columns // 2)), jnp.uint8)
        scale = jnp.asarray(rng.random((out, columns // 32)), jnp.bfloat16)
    return QuantizedWeight(values, scale, np.dtype("float32")), np.asarray(dequantize(values, scale), np.float64)


def rows_of(weight, x):
    """W x for every row of a batch, as the model asks for it: one position under vmap."""
    from mpt_eqx.ops.matmul import matmul

    return jax.jit(jax.vmap(lambda weight, row: matmul(weight, row[None])[0], (None, 0)))(weight, x)


def program(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


@examples(25, least=2)
@given(
    st.sampled_from(KINDS), st.integers(1, 80), st.sampled_from([1, 15, 16, 33, 64, 100]), st.integers(1, 20),
    st.integers(0, 2**31),
)  # fmt: skip
def test_the_kernel_is_the_product(kind, out, columns, rows, seed):
    """For any size: rows that fill no register, columns that fill no share."""
    from mpt_eqx.ops import cpu

    if not cpu.available():
        pytest.skip(f"no kernel: {cpu.missing()}")
    weight, numbers = made(kind, out, 64 if kind == "int4" else columns, seed)
    x = np.random.default_rng(seed + 1).normal(size=(rows, numbers.shape[1])).astype(np.float32)
    exact = x.astype(np.float64) @ numbers.T
    size = np.abs(x).astype(np.float64) @ np.abs(numbers).T
    assert (np.abs(rows_of(weight, jnp.asarray(x)) - exact) <= 1e-6 * size).all()


@pytest.mark.optimized
@pytest.mark.parametrize("kind", some(KINDS, ["float32", "int4"]))
@pytest.mark.parametrize("dtype", some(["float32", "bfloat16", "float16"], ["bfloat16"]))
@pytest.mark.parametrize("way", some(["kernel", "XLA"], ["kernel"]), indirect=True)
def test_a_rows_result_does_not_depend_on_the_rest_of_the_batch(kind, dtype, way, monkeypatch):
    """To the bit where the kernel runs, whose own code sums each row alone; in plain XLA within the error of a sum."""
    from mpt_eqx.ops import matmul

    monkeypatch.setattr(matmul, "PART_SIZE", 64 * 50)  # several parts, the last of them not whole
    weight, numbers = made(kind, 370, 64)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(20, 64)), dtype)
    everything = rows_of(weight, x)
    np.testing.assert_allclose(everything, np.asarray(x, np.float64) @ numbers.T, atol=2e-3, rtol=1e-5)
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(numbers).T
    for rows in (1, 2, 3, 7, 8, 9, 16):
        off = np.abs(rows_of(weight, x[:rows]) - everything[:rows])
        assert (off <= (0 if way == "kernel" else 1e-6 * size[:rows])).all()


@pytest.mark.parametrize("kind", some(KINDS, ["bfloat16", "int4"]))
def test_a_positions_result_does_not_depend_on_how_many_more_there_are(kind, kernel):
    """To the bit, beyond MAX_DECODE_ROWS of them, alone and under vmap, in one piece of them or in several."""
    from mpt_eqx.ops import cpu
    from mpt_eqx.ops.matmul import matmul

    if kind == "bfloat16" and cpu.has_bfloat16_dot():
        pytest.skip("XLA multiplies bfloat16 here, or tiles do")
    weight, numbers = made(kind, 50, 288)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1100, 288)), "bfloat16")
    everything = matmul(weight, x)
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(numbers).T
    assert (np.abs(everything - np.asarray(x, np.float64) @ numbers.T) <= 1e-6 * size).all()
    for first, rows in ((0, 9), (5, 10), (100, 31), (500, 257), (3, 512), (70, 513)):
        np.testing.assert_array_equal(matmul(weight, x[first : first + rows]), everything[first : first + rows])
    rows = jax.vmap(matmul, (None, 0))(weight, x.reshape(100, 11, 288))
    np.testing.assert_array_equal(rows.reshape(1100, 50), everything)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rows", [2, 20])
def test_what_is_no_number_stays_visible_in_a_product(bad, rows, way):
    """In x it is seen in every output of its position, and in a weight in every position; nowhere else."""
    from mpt_eqx.ops.matmul import matmul

    weight, x = jnp.full((40, 64), 0.5), jnp.ones((rows, 64))
    for seen, wrong in (
        (np.arange(rows)[:, None] == 1, matmul(weight, x.at[1, 7].set(bad))),
        (np.arange(40) == 3, matmul(weight.at[3, 63].set(bad), x)),
    ):
        np.testing.assert_array_equal(np.isfinite(wrong), np.broadcast_to(~seen, (rows, 40)))


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_and_many_agree(kind, way):
    """Steps of decoding and prompts are multiplied in different ways; in float32 they agree closely."""
    from mpt_eqx.ops.matmul import matmul
    from mpt_eqx.ops.platform import MAX_DECODE_ROWS

    weight, numbers = made(kind, 96, 128)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(MAX_DECODE_ROWS + 1, 128)), jnp.float32)
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(numbers).T
    assert (
        np.abs(matmul(weight, x)[:MAX_DECODE_ROWS] - matmul(weight, x[:MAX_DECODE_ROWS]))
        <= 1e-6 * size[:MAX_DECODE_ROWS]
    ).all()


def layer_weights(kind, out, columns, count=3):
    """Weights of `count` layers, and the numbers that they stand for."""
    made_layers = [made(kind, out, columns, seed) for seed in range(count)]
    return tuple(weight for weight, _ in made_layers), [numbers for _, numbers in made_layers]


@pytest.mark.parametrize("kind", some(KINDS, ["bfloat16", "int8", "int4"]))
@pytest.mark.parametrize("rows", [3, 20])
def test_the_weight_of_a_layer_is_chosen_by_its_number(kind, rows, way):
    """In a loop, whether few positions or many; a number beside the layers means the nearest of them."""
    from mpt_eqx.ops.matmul import LayerWeight, matmul

    layers, numbers = layer_weights(kind, 40, 64)
    x = jnp.asarray(np.random.default_rng(9).normal(size=(rows, 64)), jnp.float32)

    @jax.jit
    def found(layers, which):
        return jax.lax.map(lambda number: matmul(LayerWeight(layers, number), x), which)

    for number, y in zip([0, 1, 2, 2, 0], found(layers, jnp.asarray([0, 1, 2, 7, -5])), strict=True):
        size = np.abs(np.asarray(x, np.float64)) @ np.abs(numbers[number]).T
        assert (np.abs(y - np.asarray(x, np.float64) @ numbers[number].T) <= 1e-6 * size).all()
        if way == "kernel":
            np.testing.assert_array_equal(y, matmul(layers[number], x))


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_a_loop_over_layers_copies_no_weight(kind, way):
    """Neither one layer's nor all layers', neither as they are nor widened, in a loop over tokens around it."""
    from mpt_eqx.ops.matmul import LayerWeight, matmul

    weight, _ = made(kind, 1024, 512)
    layers = tuple(jax.tree.map(jnp.copy, weight) for _ in range(4))

    def steps(layers, x):
        def step(x, _):
            def layer(x, number):
                return matmul(LayerWeight(layers, number), x)[:, :512].astype(x.dtype), None

            return jax.lax.scan(layer, x, jnp.arange(4))[0], None

        return jax.lax.scan(step, x, length=3)[0]

    compiled = jax.jit(steps).lower(layers, jnp.ones((1, 512), jnp.bfloat16)).compile()
    # Without the kernel a part of one weight is widened at a time.
    assert compiled.memory_analysis().temp_size_in_bytes <= (2e4 if way == "kernel" else 1.1 * 4 * 2**18 + 1e5)
    if way == "kernel":
        assert compiled.as_text().count('custom_call_target="mpt_eqx_matmul"') == 1


def test_a_layers_weight_under_vmap_and_its_gradient(way):
    """Rows under vmap become positions; numbers under vmap, and derivatives, go through XLA."""
    from mpt_eqx.ops.matmul import LayerWeight, matmul

    layers, numbers = layer_weights("float32", 24, 32)
    x = jnp.asarray(np.random.default_rng(9).normal(size=(3, 2, 32)), jnp.float32)

    def product(number, x):
        return matmul(LayerWeight(layers, number), x)

    for which, axis in ((jnp.int32(1), None), (jnp.asarray([2, 0, 1]), 0)):
        exact = np.einsum("btc,boc->bto", x, np.stack(numbers)[np.broadcast_to(which, 3)])
        np.testing.assert_allclose(jax.vmap(product, (axis, 0))(which, x), exact, atol=1e-4)
    grad = jax.grad(lambda layers: jnp.sum(matmul(LayerWeight(layers, jnp.int32(1)), x[0])))(layers)
    np.testing.assert_allclose(grad[1], np.broadcast_to(np.asarray(x[0]).sum(0), (24, 32)), atol=1e-5)
    assert not grad[0].any() and not grad[2].any()


def test_layers_that_are_not_alike_are_refused():
    from mpt_eqx import MPTError
    from mpt_eqx.ops.matmul import LayerWeight, matmul

    layers = (jnp.ones((4, 8)), jnp.ones((4, 8)), jnp.ones((4, 8), jnp.bfloat16))
    end = "; loop over blocks that are alike"
    for wrong, found in (
        (layers, "((4, 8), 'bfloat16') in layer 2 and ((4, 8), 'float32') in layer 0"),
        ((), "no layer"),
    ):
        with pytest.raises(MPTError) as error:
            matmul(LayerWeight(wrong, jnp.int32(0)), jnp.ones((1, 8)))
        assert str(error.value) == f"weight: expected layers of one shape and type, found {found}{end}"


def isas():
    """The instruction sets of the kernel that this processor has."""
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text())) if Path("/proc/cpuinfo").exists() else set()
    needs = {"default": set(), "v3": {"avx2", "fma"}, "v4": {"avx512f", "avx512bw", "avx512vl"}}
    return [isa for isa, need in needs.items() if need <= flags]


def copies(name: str):
    """A function of the kernel for each instruction set that this processor has."""
    from mpt_eqx.ops import cpu
    from mpt_eqx.ops.cpu.build import LIBRARY

    if not cpu.available():
        pytest.skip(f"no kernel: {cpu.missing()}")
    library = ctypes.cdll.LoadLibrary(str(LIBRARY))
    found = [isa for isa in isas() if hasattr(library, f"{name}_{isa}")]
    assert found
    return [getattr(library, f"{name}_{isa}") for isa in found]


def structure(pointers, numbers, last=()):
    """A structure of the kernel's header: its kind, pointers to arrays, whole numbers of 64 bits, and the rest."""
    names = [chr(ord("a") + i) for i in range(1 + len(pointers) + len(numbers) + len(last))]
    types = [ctypes.c_int32, *[ctypes.c_void_p] * len(pointers), *[ctypes.c_int64] * len(numbers), *last]
    made = type("Structure", (ctypes.Structure,), {"_fields_": list(zip(names, types, strict=True))})
    return functools.partial(made)


def matmul_by(copy, kind, values, scale, x):
    """What one copy of the products makes of arrays."""
    y = np.zeros((len(x), len(values)), np.float32)
    arrays = [None if array is None else array.ctypes.data for array in (values, scale, x, y)]
    sizes = (len(values), x.shape[1], len(x))
    copy(
        ctypes.byref(structure(arrays, sizes)(KINDS.index(kind), *arrays, *sizes)),
        *map(ctypes.c_int64, (0, len(values))),
    )
    return y


def gemm_by(copy, pack, kind, values, scale, x):
    """What one copy of the products with many vectors makes of arrays, in shares of 8 rows."""
    rows = -(-len(x) // 16) * 16
    panels, y = np.full((rows, x.shape[1]), np.nan, np.float32), np.full((len(x), len(values)), np.nan, np.float32)
    buffer = np.full(48 * (256 + 16 + rows), np.nan, np.float32)
    arrays = [None if array is None else array.ctypes.data for array in (values, scale, x, panels, y)]
    sizes = (len(values), x.shape[1], len(x))
    x_kind = KINDS.index(x.dtype.name)
    # Two kinds stand in the place of one and of what fills it up.
    both = np.array([KINDS.index(kind), x_kind], np.int32).view(np.int64)[0]
    args = structure_of_words(both, *arrays, *sizes)
    pack(ctypes.byref(args), *map(ctypes.c_int64, (0, rows // 16)))
    for first in range(0, len(values), 8):
        copy(
            ctypes.byref(args), *map(ctypes.c_int64, (first, min(first + 8, len(values)))),
            ctypes.c_void_p(buffer.ctypes.data),
        )  # fmt: skip
    return y


def structure_of_words(*words):
    """A structure of words of 64 bits: pointers and whole numbers."""
    return (ctypes.c_int64 * len(words))(*(0 if word is None else int(word) for word in words))


@examples(20)
@given(
    st.sampled_from(KINDS), st.integers(1, 40), st.sampled_from([1, 15, 16, 33, 100, 256, 257, 530]),
    st.integers(1, 50), st.sampled_from(["float32", "bfloat16", "float16"]), st.integers(0, 2**31),
)  # fmt: skip
def test_the_product_with_many_vectors_is_the_product(kind, out, columns, rows, dtype, seed):
    """By every instruction set, for any size; a position's sum is the same to the bit in any company."""
    columns = -(-columns // 32) * 32 if kind == "int4" else columns
    weight, numbers = made(kind, out, columns, seed)
    values, scale = (weight.values, weight.scale) if kind.startswith("int") else (weight, None)
    values, scale = np.asarray(values), None if scale is None else np.asarray(scale)
    x = np.asarray(jnp.asarray(np.random.default_rng(seed + 1).normal(size=(rows, columns)), dtype))
    exact = x.astype(np.float64) @ numbers.T
    size = np.abs(x).astype(np.float64) @ np.abs(numbers).T
    for copy, pack in zip(copies("gemm"), copies("pack"), strict=True):
        found = gemm_by(copy, pack, kind, values, scale, x)
        assert (np.abs(found - exact) <= 1e-6 * size).all()
        some_rows = np.random.default_rng(seed).permutation(rows)[: -(-rows // 2)]
        again = gemm_by(copy, pack, kind, values, scale, np.ascontiguousarray(x[some_rows]))
        np.testing.assert_array_equal(again, found[some_rows])


@pytest.fixture(scope="module")
def tiles():
    """Skips a test of products by Intel's tiles."""
    from mpt_eqx.ops import cpu

    if not cpu.has_tiles():
        pytest.skip("no tiles for bfloat16 in this processor, or in this compiler")


TILED = ("bfloat16", "int8", "int4")


@pytest.mark.usefixtures("tiles")
@examples(12)
@given(
    st.sampled_from(TILED), st.integers(1, 3), st.sampled_from([1, 2, 8, 17]), st.integers(1, 70), st.integers(0, 2**31)
)
def test_the_product_by_tiles_is_the_formula(kind, out, columns, rows, seed):
    """Weights of 4 bits are rounded to bfloat16; a position's sum is the same to the bit in any company."""
    from mpt_eqx.ops.matmul import _kernel_matmul

    weight, numbers = made(kind, 32 * out, 32 * columns, seed)
    numbers = np.asarray(jnp.asarray(numbers, jnp.bfloat16), np.float64) if kind == "int4" else numbers
    x = jnp.asarray(np.random.default_rng(seed + 1).normal(size=(rows, 32 * columns)), jnp.bfloat16)
    exact, size = (np.asarray(a, np.float64) @ b.T for a, b in ((x, numbers), (abs(x), np.abs(numbers))))
    found = _kernel_matmul(weight, x)
    assert (np.abs(found - exact) <= 1e-6 * size).all()
    some_rows = np.random.default_rng(seed).permutation(rows)[: -(-rows // 2)]
    np.testing.assert_array_equal(_kernel_matmul(weight, x[some_rows]), found[some_rows])


@pytest.mark.parametrize("kind", TILED)
def test_more_positions_than_are_multiplied_at_a_time_by_tiles(tiles, kind):
    """And what is no number stays in its position, or in its row of the weight."""
    from mpt_eqx.ops.matmul import _kernel_matmul

    weight, _ = made(kind, 96, 288)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1100, 288)), jnp.bfloat16)
    everything = _kernel_matmul(weight, x)
    for first, rows in ((0, 9), (100, 31), (500, 257), (3, 512), (70, 513)):
        np.testing.assert_array_equal(_kernel_matmul(weight, x[first : first + rows]), everything[first : first + rows])
    wrong = _kernel_matmul(weight, x.at[5, 7].set(np.nan).at[900, 3].set(np.inf))
    np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(wrong).all(axis=1)), [5, 900])
    if kind == "bfloat16":
        wrong = _kernel_matmul(weight.at[40, 3].set(np.nan), x)
        np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(wrong).all(axis=0)), [40])


@pytest.mark.parametrize(("out", "columns", "has_tiles"), [(64, 96, True), (40, 96, False), (64, 80, False)])
def test_bfloat16_goes_to_xla_where_there_is_no_tile_for_it(monkeypatch, out, columns, has_tiles):
    from mpt_eqx.ops import cpu
    from mpt_eqx.ops.matmul import _suits_xla

    weight, x = jnp.ones((out, columns), jnp.bfloat16), jnp.ones((40, columns), jnp.bfloat16)
    monkeypatch.setattr(cpu, "has_bfloat16_dot", lambda: True)
    for found in (True, False):
        monkeypatch.setattr(cpu, "has_tiles", lambda found=found: found)
        assert _suits_xla(weight, x) != (found and has_tiles)
    monkeypatch.setattr(cpu, "has_bfloat16_dot", lambda: False)
    assert not _suits_xla(weight, x)


@pytest.mark.slow
def test_a_compiler_that_knows_no_tiles_makes_the_rest(tmp_path, monkeypatch):
    from mpt_eqx.ops.cpu import build

    monkeypatch.setattr(build, "TILES", ("-mno-such-instructions",))
    assert build.compile_kernel(tmp_path / "libkernel.so") is None
    assert ctypes.CDLL(str(tmp_path / "libkernel.so")).mpt_eqx_has_tiles() == 0


def test_every_number_of_16_bits_is_read_right():
    """Subnormal numbers, infinities and NaN too: sixteen times each, and once where a row is shorter than that."""
    bits = np.arange(2**16, dtype=np.uint16)
    for kind, dtype in (("float16", np.float16), ("bfloat16", jnp.bfloat16)):
        numbers = bits.view(dtype)
        expected = numbers.astype(np.float32)
        for columns in (1, 16):
            weight = np.repeat(numbers[:, None], columns, axis=1)
            for copy in copies("matmul"):
                found = matmul_by(copy, kind, weight, None, np.ones((1, columns), np.float32))[0]
                with np.errstate(over="ignore", invalid="ignore"):
                    np.testing.assert_array_equal(found, expected * columns)
            for copy, pack in zip(copies("gemm"), copies("pack"), strict=True):
                ones = np.ones((columns, columns), np.float32)
                found = gemm_by(copy, pack, kind, weight, None, ones)[0]
                found_of_x = gemm_by(copy, pack, "float32", ones, None, weight)[:, 0]
                with np.errstate(over="ignore", invalid="ignore"):
                    np.testing.assert_array_equal(found, expected * columns)
                    np.testing.assert_array_equal(found_of_x, expected * columns)


def test_every_instruction_set_gives_the_matmul():
    for kind in KINDS:
        weight, numbers = made(kind, 21, 96)
        values, scale = (weight.values, weight.scale) if kind.startswith("int") else (weight, None)
        values, scale = np.asarray(values), None if scale is None else np.asarray(scale)
        x = np.random.default_rng(1).normal(size=(11, 96)).astype(np.float32)
        for copy in copies("matmul"):
            np.testing.assert_allclose(matmul_by(copy, kind, values, scale, x), x @ numbers.T, atol=2e-3, rtol=1e-5)


def step(dtype, groups, size, capacity, positions, window, seed, slopes=True):
    """Arguments of the attention of a step, for two heads of keys; keys that no query sees hold NaN."""
    from mpt_eqx.model.alibi import alibi_slopes

    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(len(positions), 2, groups, size)) * 2, dtype)
    k, v = (jnp.asarray(rng.normal(size=(len(positions), 2, capacity, size)), dtype) for _ in range(2))
    keys, at = np.arange(capacity), np.asarray(positions)[:, None]
    seen = (keys <= at) & (keys >= (0 if window is None else at - window))
    k, v = (jnp.where(seen[:, None, :, None], x, jnp.nan) for x in (k, v))
    return (
        q,
        k,
        v,
        alibi_slopes(2 * groups, 8).reshape(2, groups) if slopes else None,
        jnp.asarray(positions, jnp.int32),
    )


def exact(q, k, v, slopes, positions, scale, window):
    """The formula in float64, row by row, without any rounding."""
    found = np.zeros(q.shape)
    for row, position in enumerate(positions.tolist()):
        first = 0 if window is None else max(position - window, 0)
        for head, group in np.ndindex(q.shape[1:3]):
            keys = np.asarray(k[row, head, first : position + 1], np.float64)
            scores = keys @ np.asarray(q[row, head, group], np.float64) * scale
            if slopes is not None:
                scores += float(slopes[head, group]) * np.arange(first - position, 1)
            weights = np.exp(scores - scores.max())
            found[row, head, group] = (
                weights / weights.sum() @ np.asarray(v[row, head, first : position + 1], np.float64)
            )
    return found


@examples(25, least=2)
@given(
    st.sampled_from(["float32", "bfloat16", "float16"]), st.integers(1, 3), st.sampled_from([1, 8, 16, 24, 80, 128]),
    st.lists(st.integers(0, 511), min_size=1, max_size=3), st.sampled_from([None, 0, 1, 7, 300]), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_the_attention_of_a_step_is_the_formula(dtype, groups, size, positions, window, slopes, seed):
    """By the kernel, of rows of other lengths under vmap; in 16 bits as near as its roundings leave it."""
    from mpt_eqx.ops import cpu
    from mpt_eqx.ops.attend import attend
    from mpt_eqx.ops.layer_cache import LayerCache

    if not cpu.available():
        pytest.skip(f"no kernel: {cpu.missing()}")
    q, k, v, slopes, positions = step(dtype, groups, size, 512, positions, window, seed, slopes)

    def row(q, k, v, position):
        cache, of_heads = LayerCache(k, v, np.dtype(dtype)), None if slopes is None else slopes.reshape(-1)
        h = attend(
            q.reshape(-1, 1, size), cache, position[None], scale=size**-0.5, slopes=of_heads, window=window
        )  # fmt: skip
        return h.reshape(q.shape)

    stored = [x if dtype == "float32" else jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (k, v)]
    found = jax.jit(jax.vmap(row))(q, *stored, positions)
    assert found.dtype == q.dtype
    atol = {"float32": 1e-5, "bfloat16": 0.06, "float16": 0.008}[dtype]
    np.testing.assert_allclose(found, exact(q, k, v, slopes, positions, size**-0.5, window), atol=atol, rtol=0)
    for number in range(len(q)):
        alone = jax.jit(row)(q[number], *(x[number] for x in stored), positions[number])
        np.testing.assert_array_equal(alone, found[number])


def attention_by(copy, dtype):
    """What one copy of the attention makes of arrays, and what the formula makes of them."""
    positions = np.asarray([[180, 181, 182, 183, 184], [3, 150, 7, 90, 91]], np.int32)
    q, k, v, slopes, _ = step(dtype, 10, 40, 192, [184, 150], None, 0)
    q, slopes = q.reshape(2, 2, 2, 5, 40), slopes[:, :2]
    layers = [np.stack([np.full_like(x, np.nan), x], axis=1) for x in map(np.asarray, (k, v))]
    numbers = np.asarray([1, 1], np.int32)
    arrays = [np.ascontiguousarray(x) for x in (np.asarray(q, np.float32), *layers, slopes, numbers, positions)]
    y = np.zeros(q.shape, np.float32)
    pointers, sizes = [array.ctypes.data for array in (*arrays, y)], (2, 2, 2, 5, 192, 40, 100)
    kind = ("float32", "bfloat16", "float16").index(dtype)
    copy(
        ctypes.byref(structure(pointers, sizes, [ctypes.c_float])(kind, *pointers, *sizes, 0.2)),
        *map(ctypes.c_int64, (0, 4)),
    )
    return y, np.stack([exact(q[..., t, :], k, v, slopes, positions[:, t], 0.2, 100) for t in range(5)], axis=3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_instruction_set_gives_the_attention(dtype):
    for copy in copies("attention"):
        found, expected = attention_by(copy, dtype)
        np.testing.assert_allclose(
            found, expected, atol={"float32": 1e-5, "bfloat16": 0.06, "float16": 0.008}[dtype], rtol=0
        )


@pytest.mark.parametrize(
    ("file", "part", "other"),
    one_in(
        6,
        [
            ("attention", "p.window < 0 ? 0 : std::max<int64_t>(position - p.window, 0)", "0"),
            ("attention", "* scale) + slope * distance", "* scale)"),
            ("attention", "* scale) + slope", ") + slope"),
            ("attention", "load<Register>(&scores[at]) / sum", "load<Register>(&scores[at])"),
            ("attention", "head % p.heads * p.groups + (start", "(start"),
            ("attention", "row = head / p.heads", "row = 0"),
            ("attention", "(start + i) % p.queries", "0"),
            ("attention", "(start + i) / p.queries", "0"),
            ("attention", "alone(j, high, std::min(to, last[j]))", "alone(j, high, high)"),
            ("attention", "low >= high ? last[j] : low", "low"),
            ("attention", "std::min(to, before)", "before"),
            ("attention", "high - low, width, found", "high - low - kKeysTogether, width, found"),
            ("attention", "row * p.layers + layer", "row * p.layers"),
            ("attention", "distance <= 0 ? score", "distance < 0 ? score"),
            ("attention", "n * 0.693359375f", "n * 0.7f"),
            ("attention", "sum * r + factor", "sum * r"),
            ("matmul", "total(sums[r][v]) * scale", "total(sums[r][v])"),
            ("matmul", "(from[i] & 15) - 8", "(from[i] & 15)"),
            ("matmul", "columns + i * (32 / kParts)", "columns"),
            ("matmul", "if (whole < p.in)", "if (false)"),
            ("gemm", "? static_cast<const float*>(p.scale)[first + r + i] : 1.0f", "? 1.0f : 1.0f"),
            ("gemm", "(pairs[i] >> 4) - 8", "(pairs[i] >> 4) - 7"),
            ("gemm", "(pairs[i] & 15) - 8", "(pairs[i] & 7) - 8"),
            ("gemm", "at == 0", "true"),
            ("gemm", "r < rows)", "r + 1 < rows)"),
            ("gemm", "(ab, cd, 2, 3, 6, 7)", "(ab, cd, 3, 2, 6, 7)"),
            ("gemm", "((panel + n) * p.in + at)", "((panel + n) * p.in)"),
        ],
    ),
)
def test_a_mutation_of_the_kernel_is_noticed(file, part, other, tmp_path):
    from mpt_eqx.ops.cpu import build

    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = (build.SOURCES / f"{file}.cc").read_text()
    assert part in source
    (tmp_path / "mutated.cc").write_text(source.replace(part, other))
    flags = ["-O0", "-std=c++17", "-fPIC", "-w", "-shared", "-DMPT_EQX_ISA=default", f"-I{build.SOURCES}"]
    subprocess.run([compiler, *flags, str(tmp_path / "mutated.cc"), "-o", str(tmp_path / "mutated.so")], check=True)
    library = ctypes.cdll.LoadLibrary(str(tmp_path / "mutated.so"))
    copy = getattr(library, f"{file}_default")
    if file == "attention":
        found, expected = attention_by(copy, "float32")
        assert not np.allclose(found, expected, atol=1e-4)
        return
    wrong = []
    for kind, columns in (("float32", 37), ("int8", 272), ("int4", 64)):
        weight, numbers = made(kind, 5, columns)
        values, scale = (weight.values, weight.scale) if kind.startswith("int") else (weight, None)
        values, scale = np.asarray(values), None if scale is None else np.asarray(scale)
        x = np.random.default_rng(1).normal(size=(2, columns)).astype(np.float32)
        if file == "gemm":
            y = gemm_by(copy, library.pack_default, kind, values, scale, x)
        else:
            y = matmul_by(copy, kind, values, scale, x)
        wrong.append(not np.allclose(y, x @ numbers.T, atol=1e-2))
    assert any(wrong) if file == "gemm" else sum(wrong) == 1


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["default", "v3", "v4"])
def test_the_kernel_stays_inside_its_arrays(isa, tmp_path):
    """Under AddressSanitizer and UBSan, with odd sizes, any bits, and queries that stand outside of the cache."""
    from mpt_eqx.ops.cpu import build

    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-O1", "-std=c++17", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += [*build.X86.get(isa, ()), f"-DMPT_EQX_ISA={isa}", f"-I{build.SOURCES}"]
    flags += [f"-DMPT_EQX_{name.upper()}={name}_{isa}" for name in ("matmul", "pack", "gemm", "attention")]
    sources = [build.SOURCES / f"{name}.cc" for name in ("matmul", "gemm", "attention")]
    sources += [Path(__file__).parent / "sanitized.cc"]
    program = tmp_path / "sanitized"
    if isa not in isas():
        pytest.skip("not this processor's")
    subprocess.run([compiler, *flags, *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1920 calls\n"), done.stderr


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_visible_in_a_step(bad, way):
    """In a key or in a value that is seen: never a token out of nothing."""
    from mpt_eqx.ops.attend import attend
    from mpt_eqx.ops.layer_cache import LayerCache

    for place in ("k", "v"):
        q, k, v, slopes, positions = step("float32", 1, 16, 256, [30], None, 0)
        k, v = (x[0].at[:, 11].set(bad) if name == place else x[0] for name, x in (("k", k), ("v", v)))
        cache = LayerCache(
            jnp.nan_to_num(k, nan=bad, posinf=bad), jnp.nan_to_num(v, nan=bad, posinf=bad), np.dtype("float32")
        )
        assert not np.isfinite(attend(q[0], cache, positions, scale=0.25, slopes=slopes.reshape(-1))).all()


KINDS_OF_MODELS = {
    "groups": {"alibi": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2},
    "window": {"alibi": False, "sliding_window_size": 5},
    "ALiBi": {"alibi": True},
    "softcap": {"alibi": True, "attn_logit_softcapping": 2.0},
    "rope": {"rope": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("n_layers", some([1, 2], [1]))
@pytest.mark.parametrize("kind", some(KINDS_OF_MODELS, ("groups",)))
def test_a_model_writes_the_same_with_the_kernel_and_without(tiny_config, prompts, kind, n_layers):
    """Logits of each step, with what the kernel has (groups, windows, ALiBi or none) and has not."""
    from mpt_eqx import MPT, AttnConfig, InitConfig, generate
    from mpt_eqx.ops import cpu

    if not cpu.available():
        pytest.skip(f"no kernel: {cpu.missing()}")
    attn = AttnConfig(**KINDS_OF_MODELS[kind])
    config = tiny_config(n_layers=n_layers, attn_config=attn, init_config=InitConfig(emb_init_std=0.5))
    model = MPT(config, key=jax.random.key(1))
    found = generate(model, prompts(3, 20), max_new_tokens=12, return_logits=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "available", lambda: False)
        jax.clear_caches()
        expected = generate(model, prompts(3, 20), max_new_tokens=12, return_logits=True)
    jax.clear_caches()
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logits, expected.logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_goes_through_xla(kind):
    """With respect to x, for one row and for a batch; the program of the gradient does not call the kernel."""
    weight, numbers = made(kind, 40, 64)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 64)), jnp.float32)

    def loss(x):
        return jnp.sum(rows_of(weight, x) ** 2)

    exact = 2 * (np.asarray(x, np.float64) @ numbers.T) @ numbers
    np.testing.assert_allclose(jax.grad(loss)(x), exact, rtol=1e-4, atol=1e-2)
    assert "mpt_eqx_matmul" not in program(jax.grad(loss), x)


def test_weights_on_a_mesh_go_through_xla():
    """XLA can split its own products among devices, and would gather the weight for the kernel's."""
    from mpt_eqx.ops import cpu

    weight, _ = made("bfloat16", 64, 64)
    x = jnp.ones((2, 64), jnp.bfloat16)
    if cpu.available():
        assert "mpt_eqx_matmul" in program(rows_of, weight, x)
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((1,), ("model",), axis_types=(kind,))
        for spec in (jax.sharding.PartitionSpec("model", None), jax.sharding.PartitionSpec()):
            placed = jax.device_put(weight, jax.sharding.NamedSharding(mesh, spec))
            assert "mpt_eqx_matmul" not in program(rows_of, placed, x)


def test_a_weight_for_each_row_goes_through_xla(way):
    from mpt_eqx.ops.matmul import matmul

    weights = jnp.stack([made("float32", 20, 32, seed)[0] for seed in range(3)])
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 1, 32)), jnp.float32)
    np.testing.assert_allclose(
        jax.vmap(matmul)(weights, x)[:, 0], jnp.einsum("boi,bi->bo", weights, x[:, 0]), atol=1e-5
    )


def test_several_calls_at_once_end(way):
    """Each call works with what threads of the pool come in time; none waits for one that waits itself."""
    weights = [made("bfloat16", 3000, 256, seed)[0] for seed in range(16)]
    x = jnp.ones((2, 256), jnp.bfloat16)

    def all_of_them(weights, x):
        return sum(jnp.sum(rows_of(weight, x)) for weight in weights)

    expected = sum(np.asarray(weight, np.float64).sum() * 2 for weight in weights)
    for _ in range(20):
        np.testing.assert_allclose(jax.jit(all_of_them)(weights, x), expected, rtol=1e-3, atol=1)


@pytest.mark.optimized
@pytest.mark.parametrize("kind", some(KINDS, ["bfloat16"]))
@pytest.mark.parametrize("way", some(["kernel", "XLA"], ["kernel"]), indirect=True)
def test_a_step_makes_no_copy_of_the_weights(kind, way):
    """In no type, neither widened nor turned: what a step needs for itself is small beside the weights."""
    from mpt_eqx import MPT, AttnConfig, MPTConfig, quantize
    from mpt_eqx.generation import SamplingParams
    from mpt_eqx.generation.state import empty_state
    from mpt_eqx.generation.steps import decode_chunk

    config = MPTConfig(
        d_model=1024, n_heads=16, n_layers=6, vocab_size=4096, max_seq_len=512, no_bias=True,
        attn_config=AttnConfig(alibi=True),
    )  # fmt: skip
    dtype = "bfloat16" if kind.startswith("int") else kind
    shapes = eqx.filter_eval_shape(MPT, config, key=jax.random.key(0))
    model = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), shapes)
    if kind.startswith("int"):
        model = quantize(model, kind, embeddings=True)
    size = sum(x.nbytes for x in jax.tree.leaves(model))
    for rows in (1, 4) if is_long() and kind == "bfloat16" else (1,):
        state = empty_state(model, rows, 512)
        fixed = (model, SamplingParams(max_new_tokens=64).of_rows(rows), jax.random.key(0), ())
        compiled = decode_chunk.lower(fixed, state, 8, False).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= 0.05 * size
        # Fusions aside, which read what they widen number by number, no array of a weight's shape is made.
        entry = re.sub(r"(?ms)^%?\S*(fused|wrapped)_computation.*?^}", "", compiled.as_text())
        assert not re.findall(r"= f32\[(?:4096,1024|1024,4096|3072,1024|1024,3072)\]\S* (?:copy|convert|fusion)", entry)


def test_the_program_says_why_there_is_no_kernel(monkeypatch, tmp_path):
    from mpt_eqx.ops.cpu import call

    why = call.missing.__wrapped__
    monkeypatch.setenv("MPT_EQX_KERNEL", "0")
    assert why() == "it is switched off by MPT_EQX_KERNEL=0"
    monkeypatch.delenv("MPT_EQX_KERNEL")
    monkeypatch.setattr(call, "LIBRARY", tmp_path / "libkernel.so")
    assert why() == "it was not compiled when mpt_eqx was installed; do so with python -m mpt_eqx.ops.cpu.build"
    (tmp_path / "libkernel.so").write_bytes(b"no library")
    assert re.fullmatch(
        r".*libkernel.so cannot be used \(.*\); make it anew with python -m mpt_eqx.ops.cpu.build", why()
    )


def test_a_kernel_compiled_with_a_newer_jax_is_refused(kernel, monkeypatch):
    from mpt_eqx.ops.cpu import call

    monkeypatch.setattr(call, "_ffi_minor", lambda: 0)
    assert re.fullmatch(
        r".*cannot be used \(expected one compiled with this JAX or an older one, found interface 0.\d+ > 0.0\); .*",
        call.missing.__wrapped__(),
    )


def test_a_kernel_of_an_older_version_is_refused(kernel, monkeypatch, tmp_path):
    """One that lacks a function which is called now; else the first long prompt would find out."""
    from mpt_eqx.ops.cpu import call

    source, library = tmp_path / "older.cc", tmp_path / "libkernel.so"
    source.write_text('extern "C" const int mpt_eqx_ffi_minor = 0;')
    subprocess.run([shutil.which("c++") or "g++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    monkeypatch.setattr(call, "LIBRARY", library)
    assert re.fullmatch(
        r".*cannot be used \(.*mpt_eqx_has_tiles.*\); make it anew with python -m mpt_eqx.ops.cpu.build",
        call.missing.__wrapped__(),
    )


@pytest.mark.slow
def test_generation_is_the_same_without_the_kernel(tiny_model, prompts):
    """In a process of its own, by the switch that users have."""
    script = """
import jax
from mpt_eqx import MPT, AttnConfig, MPTConfig, generate
from mpt_eqx.ops import cpu
attn = AttnConfig(alibi=True)
config = MPTConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=61, max_seq_len=64, attn_config=attn)
model = MPT(config, key=jax.random.key(0))
print(cpu.available(), generate(model, [1, 2, 3], max_new_tokens=20).tokens.tolist())
"""

    def run(**environment: str) -> list[str]:
        command = [sys.executable, "-c", script]
        return subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
        ).stdout.split(maxsplit=1)

    without, with_it = run(MPT_EQX_KERNEL="0"), run()
    assert without[0] == "False" and without[1] == with_it[1]


def test_without_a_compiler_the_build_says_so(monkeypatch, tmp_path):
    from mpt_eqx.ops.cpu.build import compile_kernel

    library = tmp_path / "libkernel.so"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compile_kernel(library) == (
        "no C++ compiler was found (looked for no-such-compiler); install one, or set CXX"
    )
    monkeypatch.setenv("CXX", "false")
    assert re.match(r"false .* -c .*kernel.cc .* failed: ", compile_kernel(library))
    monkeypatch.setitem(sys.modules, "jaxlib", None)
    assert compile_kernel(library) == "jaxlib, whose headers are needed, is not installed"
    assert not library.exists()
