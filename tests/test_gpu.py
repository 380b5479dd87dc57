"""What programs for GPUs compute, checked on a CPU: the functions by their values, the programs by their text."""

from functools import partial

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import some

GROUP = 32


@pytest.fixture
def as_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def weight_of(kind, out=24, columns=2 * GROUP):
    from mpt_eqx.ops.quantized import QuantizedWeight

    numbers = np.random.default_rng(0)
    if kind == "int8":
        values, groups = numbers.integers(-127, 128, (out, columns), np.int8), 1
    elif kind == "int4":
        values, groups = numbers.integers(0, 256, (out, columns // 2), np.uint8), columns // GROUP
    else:
        return jnp.asarray(numbers.normal(size=(out, columns)), kind)
    scale = jnp.asarray(numbers.uniform(0.5, 1, (out, groups)), "float32" if kind == "int8" else "bfloat16")
    return QuantizedWeight(jnp.asarray(values), scale, np.dtype("bfloat16"))


def for_cuda(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_products_on_gpus_are_those_of_the_weight(kind, positions):
    from mpt_eqx.ops.matmul import _on_gpu
    from mpt_eqx.ops.quantized import QuantizedWeight, dequantize

    weight, dtype = weight_of(kind), "float32" if kind == "float32" else "bfloat16"
    x = jnp.asarray(np.random.default_rng(1).normal(size=(positions, 2 * GROUP)), dtype)
    plain = dequantize(weight.values, weight.scale) if isinstance(weight, QuantizedWeight) else weight
    if kind == "int4" and positions > 1:  # rounded to the type of x, as the formula says
        plain = plain.astype(dtype)
    want = np.asarray(x, np.float64) @ np.asarray(plain, np.float64).T
    np.testing.assert_allclose(_on_gpu(weight, x), want, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    ("positions", "columns"), [(1, 2048), (1, 4096), (1, 16384), (2, 2048), (17, 2048), (40, 2048)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_kernels_for_4_bits_are_the_formula(dtype, positions, columns):
    """In JAX's interpreter: sums differ by their order only, and rows that fill up a block change nothing."""
    from mpt_eqx.ops.int4_gpu import int4_matmul
    from mpt_eqx.ops.quantized import dequantize

    weight = weight_of("int4", out=128, columns=columns)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(positions, columns)), dtype)
    found = int4_matmul(weight, x, interpret=True)
    weights = dequantize(weight.values, weight.scale)
    weights = weights if positions == 1 else weights.astype(dtype)
    want = np.asarray(x, np.float64) @ np.asarray(weights, np.float64).T
    assert found.dtype == jnp.float32 and found.shape == want.shape
    np.testing.assert_allclose(found, want, atol=2e-6 * np.abs(want).max())


def test_fractions_of_bytes_are_their_halves():
    from mpt_eqx.ops.int4_gpu import fractions

    values = np.arange(256, dtype=np.uint8)[None]
    lower, upper = (np.asarray(half * 16 - 16) for half in fractions(jnp.asarray(values)))
    np.testing.assert_array_equal(lower, values & 15)
    np.testing.assert_array_equal(upper, values >> 4)


def run_ptx(code, operands):
    """Executes the few instructions of PTX that the package writes; operands by their numbers, results as uint32."""
    registers = {f"${number}": value for number, value in operands.items()}

    def value(name, kind):
        if name.startswith("0f"):
            found = np.uint32(int(name[2:], 16))
        else:
            found = registers[name] if name in registers else np.uint32(int(name, 0))
        return found.view(kind)

    for line in filter(None, (part.strip(" \n{}") for part in code.split(";"))):
        name, _, rest = line.partition(" ")
        to, *given = rest.replace(" ", "").split(",")
        kind = "float32" if name.endswith("f32") else "uint32"
        if name == ".reg":
            continue
        x = [value(each, kind) for each in given]
        if name == "lop3.b32":
            assert given[3] == "0xEA"  # the table of (a & b) | c: 0xF0 & 0xCC | 0xAA
        results = {
            "mov.f32": lambda x=x: x[0], "mov.b32": lambda x=x: x[0], "add.f32": lambda x=x: x[0] + x[1],
            "shl.b32": lambda x=x: x[0] << x[1], "shr.u32": lambda x=x: x[0] >> x[1],
            "lop3.b32": lambda x=x: (x[0] & x[1]) | x[2],
            "fma.rn.f32": lambda x=x: np.float32(np.float64(x[0]) * np.float64(x[1]) + np.float64(x[2])),
        }  # fmt: skip
        registers[to] = results[name]().view("uint32")
    return registers


def test_the_code_for_a_group_is_its_formula():
    """Every byte at every place, executed here; the program for a GPU has that code."""
    from mpt_eqx.ops.int4_gpu import group_sums, group_sums_ptx, int4_matmul

    code, constraints = group_sums_ptx()
    kinds, numbers = constraints.split(","), np.random.default_rng(0)
    assert kinds == ["=r"] * 16 + ["r"] * 4 + ["f"] * 32
    for first in range(256):
        values = ((first + 17 * np.arange(16)) % 256).astype(np.uint8)
        x = numbers.normal(size=(2, 16)).astype(np.float32)
        registers = run_ptx(code, dict(enumerate([*values.view("<u4"), *x.reshape(-1)], 16)))
        assert [registers[f"${other}"] for other in range(1, 16)] == [0] * 15
        want = np.asarray(group_sums(jnp.asarray(values)[None, None], *jnp.asarray(x)[:, None, None]))[0, 0]
        np.testing.assert_allclose(registers["$0"].view("float32"), want, atol=2e-3)
    weight = weight_of("int4", out=64, columns=4096)
    program = str(jax.make_jaxpr(int4_matmul)(weight, jnp.ones((1, 4096), "bfloat16")))
    assert "int4_matvec" in program and program.count("lop3.b32") == code.count("lop3.b32") == 32


@pytest.fixture
def as_hopper(monkeypatch):
    from mpt_eqx.ops import matmul

    monkeypatch.setattr(matmul, "nvidia_capability", lambda: (9, 0))


UNSUITED = {
    "many positions": {"positions": 65},
    "float32": {"dtype": "float32"},
    "8 bits": {"kind": "int8"},
    "columns": {"columns": 2048 + GROUP},
    "rows": {"out": 120},
}


@pytest.mark.parametrize("why", [None, "one position", "older GPU", "no Triton", *UNSUITED])
def test_which_products_the_kernel_for_4_bits_computes(as_hopper, monkeypatch, why):
    from mpt_eqx.ops import int4_gpu, matmul

    case = {"kind": "int4", "out": 128, "columns": 2048, "positions": 3, "dtype": "bfloat16"} | UNSUITED.get(why, {})
    case |= {"positions": 1} if why == "one position" else {}
    if why == "older GPU":
        monkeypatch.setattr(matmul, "nvidia_capability", lambda: (7, 5))
    if why == "no Triton":
        monkeypatch.setattr(int4_gpu, "triton", None)
    weight = weight_of(case["kind"], case["out"], case["columns"])
    x = jnp.ones((case["positions"], case["columns"]), case["dtype"])
    found = matmul._gpu_kernel(weight, x)
    assert found is (int4_gpu.int4_matmul if why in (None, "one position") else None)


def test_programs_for_a_gpu_here_have_the_kernel_and_exported_ones_do_not(as_hopper, monkeypatch):
    from mpt_eqx.ops import int4_gpu
    from mpt_eqx.ops import matmul as module

    called = []
    monkeypatch.setattr(int4_gpu, "int4_matmul", lambda weight, x: called.append(x.shape) or module._matmul(weight, x))
    weight, x = weight_of("int4", 128, 2048), jnp.ones((5, 1, 2048), "bfloat16")
    many = jax.vmap(module.matmul, in_axes=(None, 0))
    jax.export.export(jax.jit(many), platforms=("cuda",))(weight, x)
    jax.jit(many).trace(weight, x).lower(lowering_platforms=("rocm",))
    assert not called
    for_cuda(many, weight, x)  # rows are more positions of one product
    assert called == [(5, 2048)]


def test_one_position_on_a_gpu_is_a_sum_of_products():
    from mpt_eqx.ops.matmul import matmul

    for kind in ("bfloat16", "int8", "int4"):
        text = for_cuda(matmul, weight_of(kind), jnp.ones((1, 2 * GROUP), "bfloat16"))
        assert "stablehlo.reduce" in text and "dot_general" not in text, kind
    assert "dot_general" in for_cuda(matmul, weight_of("int8"), jnp.ones((2, 2 * GROUP), "bfloat16"))


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_a_program_for_gpus_takes_any_number_of_rows(kind):
    from mpt_eqx.ops.matmul import matmul

    rows, dtype = jax.export.symbolic_shape("b")[0], jnp.bfloat16
    x = jax.ShapeDtypeStruct((rows, 1, 2 * GROUP), dtype)
    many = jax.jit(jax.vmap(matmul, in_axes=(None, 0)))
    exported = jax.export.export(many, platforms=("cuda",))(weight_of(kind), x)
    assert exported.out_avals[0].shape == (rows, 1, 24)


def cached(capacity=512, length=300, heads=2, size=8, groups=2, queries=1):
    from mpt_eqx.ops.layer_cache import LayerCache

    parts = jax.random.split(jax.random.key(0), 3)
    k, v = (jax.random.normal(key, (heads, capacity, size)) for key in parts[:2])
    # What is behind the tokens may be anything.
    k, v = (x.at[:, length:].set(jnp.nan) for x in (k, v))
    q = jax.random.normal(parts[2], (heads * groups, queries, size))
    return q, LayerCache(k, v, np.dtype("float32")), jnp.arange(length - queries, length)


def attended(q, cache, places):
    from mpt_eqx.ops.attend import attend

    slopes = jnp.asarray([0.5, 0.25, 0.125, 0.0625])
    return attend(q, cache, places, scale=0.3, slopes=slopes, window=200)


@pytest.mark.parametrize("queries", some([1, 3], [1]))
def test_a_gpu_takes_the_whole_cache_without_a_loop(queries, as_gpu, monkeypatch):
    from mpt_eqx.ops import attend as attend_module

    monkeypatch.setattr(attend_module, "supports_cpu_kernel", lambda *_: False)
    operands = cached(queries=queries)
    in_blocks = attended(*operands)
    assert "stablehlo.while" not in for_cuda(attended, *operands)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, **_: cuda(*args))
    np.testing.assert_allclose(attended(*operands), in_blocks, rtol=2e-6, atol=2e-6)


def test_cudnn_is_called_outside_of_what_chooses_by_platform(monkeypatch):
    from mpt_eqx.ops import attend as attend_module

    # JAX tells a program's devices to those operations alone that it sees when it traces.
    calls = []
    monkeypatch.setattr(attend_module, "supports_cudnn", lambda *_: True)
    monkeypatch.setattr(attend_module, "cudnn_attention", lambda q, *_: calls.append(q.shape) or q)
    monkeypatch.setattr(attend_module, "supports_cpu_kernel", lambda *_: True)
    jax.make_jaxpr(attended)(*cached(queries=40))
    assert calls == [(2, 80, 8)]


def test_prompts_are_prefilled_in_wide_chunks_on_gpus(as_gpu):
    from mpt_eqx.generation.buckets import prefill_buckets, prefill_chunks

    assert list(prefill_buckets(5000, 1)) == [2048, 2048, 512, 512]
    assert list(prefill_buckets(20, 1)) == [32]
    assert prefill_chunks(4)[0] == 2048 and prefill_chunks(5)[0] == 512


def test_a_gpu_makes_its_own_caches(tiny_model, monkeypatch):
    from mpt_eqx.generation.state import empty_state

    want = empty_state(tiny_model, 2, 512)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    made = empty_state(tiny_model, 2, 512)
    assert jax.tree.structure(made) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def test_a_gpu_has_its_next_chunk_before_the_host_reads_one(tiny_model, monkeypatch):
    """And no more is begun once a chunk is read in which all rows have ended."""
    from mpt_eqx import generate
    from mpt_eqx.generation import steps

    happened, decode_chunk, device_get = [], steps.decode_chunk, jax.device_get
    free = generate(tiny_model, [5, 6, 7], max_new_tokens=40)
    monkeypatch.setattr(steps, "is_default", lambda _: False)
    monkeypatch.setattr(steps, "decode_chunk", lambda *args: (happened.append("begin"), decode_chunk(*args))[1])
    monkeypatch.setattr(jax, "device_get", lambda tree: (happened.append("read"), device_get(tree))[1])
    ahead = generate(tiny_model, [5, 6, 7], max_new_tokens=40)
    np.testing.assert_array_equal(ahead.tokens, free.tokens)
    assert happened == ["begin", *["begin", "read"] * 4, "read"]
    happened.clear()
    ended = generate(tiny_model, [5, 6, 7], max_new_tokens=40, eos_token_ids=[int(free.tokens[0, 10])])
    read = -(-int(ended.lengths[0]) // steps.DECODE_CHUNK)
    assert happened == ["begin", *["begin", "read"] * read]


def test_steps_are_begun_without_waiting_for_them(tiny_model, monkeypatch):
    """Of decoding and of training. `eqx.filter_jit` waits for results, which leaves a GPU without work until then."""
    import optax

    from mpt_eqx import train
    from mpt_eqx.generation import SamplingParams
    from mpt_eqx.generation.state import empty_state
    from mpt_eqx.generation.steps import decode_chunk

    step = train.make_train_step(optax.sgd(0.1))
    training = train.TrainState.create(jax.tree.map(jnp.copy, tiny_model), optax.sgd(0.1))
    batch = {"tokens": jnp.ones((1, 8), jnp.int32)}
    state, fixed = empty_state(tiny_model, 1, 256), (tiny_model, SamplingParams().of_rows(1), jax.random.key(0), ())
    waits, array = [], type(jnp.zeros(1))
    wait = array.block_until_ready
    monkeypatch.setattr(array, "block_until_ready", lambda x: waits.append(x.shape) or wait(x))
    eqx.filter_jit(lambda x: x + 1)(jnp.zeros(1))
    assert len(waits) == 1
    _, output = decode_chunk(fixed, state, 2, False)
    training, metrics = step(training, batch)
    assert len(waits) == 1
    assert np.asarray(output.tokens).shape == (2, 1) and float(metrics["loss"]) > 0


OPTIONS = {
    "temperature": 0.8, "top_k": 9, "top_p": 0.7, "min_p": 0.1, "typical_p": 0.8, "epsilon_cutoff": 0.02,
    "eta_cutoff": 0.03, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "vocab_size": 50,
}  # fmt: skip


@pytest.mark.parametrize("names", [(), ("temperature",), ("min_new_tokens",), ("temperature", "top_p"), tuple(OPTIONS)])
def test_options_that_the_host_knows_choose_the_same_tokens_without_a_branch(names):
    """One row asks for them, the other for none. Only no_repeat_ngram_size has a loop of as many steps as it says."""
    from mpt_eqx.generation.sampling import process_logits, sample
    from mpt_eqx.generation.sampling_params import SamplingParams

    rows = SamplingParams(**{name: OPTIONS[name] for name in names}, eos_token_ids=[1]), SamplingParams()
    params = jax.tree.map(lambda *x: np.stack(x), *rows)
    asked = params.asked(64)
    assert asked == set(names)

    @partial(jax.jit, static_argnames="asked")
    def choose(logits, tokens, key, asked):
        step = jnp.asarray([2, 2])
        processed = process_logits(logits, params, tokens, jnp.asarray([12, 9]), step, asked=asked)
        return processed, sample(processed, params, key, step, asked=asked)

    draw = np.random.default_rng(0)
    for seed in range(20):
        given = draw.normal(size=(2, 64)).astype(np.float32) * 3, draw.integers(0, 64, (2, 12), np.int32)
        given = *given, jax.random.key(seed)
        for x, y in zip(choose(*given, asked), choose(*given, None), strict=True):
            np.testing.assert_array_equal(x, y)
    text = choose.lower(*given, asked).compile().as_text()
    loops = [line for line in text.splitlines() if " while(" in line and "known_trip_count" not in line]
    assert " conditional(" not in text and len(loops) == ("no_repeat_ngram_size" in names)
