"""Length: prompts in pieces, a cache that grows, what is compiled, memory and time that follow the tokens there are."""

import ctypes
import mmap
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import examples, is_long, one_in, some
from hypothesis import given
from hypothesis import strategies as st
from mutate import mutant
from test_generate import counting_compiles


@pytest.mark.parametrize(
    ("length", "capacity"),
    [(1, 512), (512, 512), (513, 2048), (2048, 2048), (2049, 4096), (5000, 8192), (9000, 10_000), (10_000, 10_000)],
)
def test_sizes_of_the_cache(tiny_config, length, capacity):
    from mpt_eqx.generation.buckets import cache_bucket

    assert cache_bucket(tiny_config(max_seq_len=10_000), length) == capacity


@pytest.mark.parametrize(("rows", "length", "capacity"), [(7, 256, 512), (8, 256, 256), (8, 257, 512), (8, 513, 2048)])
def test_many_rows_begin_with_a_smaller_cache(tiny_config, rows, length, capacity):
    from mpt_eqx.generation.buckets import cache_bucket

    assert cache_bucket(tiny_config(max_seq_len=10_000), length, rows) == capacity


def test_many_rows_of_a_prefix_take_no_more_of_its_cache_than_they_need(tiny_config, prompts):
    """A prefix has one row, with room for 512."""
    from mpt_eqx import MPT, prefill
    from mpt_eqx.generation.prefix import initial_state

    model = MPT(tiny_config(n_layers=1, max_seq_len=1024), key=jax.random.key(0))
    prefix = prefill(model, prompts(40)[0])
    assert prefix.state.cache.capacity == 512
    state = initial_state(model, prefix, 8, 48)
    assert state.cache.capacity == state.tokens.shape[1] == 256


@pytest.mark.slow
def test_many_rows_of_a_prefix_write_what_one_does(tiny_config, prompts):
    from mpt_eqx import MPT, generate, prefill

    model = MPT(tiny_config(n_layers=1, max_seq_len=1024), key=jax.random.key(0))
    prefix = prefill(model, prompts(40)[0])
    one, eight = (generate(model, [[]] * rows, prefix=prefix, max_new_tokens=8, return_logits=True) for rows in (1, 8))
    np.testing.assert_array_equal(eight.tokens, np.repeat(one.tokens, 8, axis=0))
    np.testing.assert_allclose(eight.logits[7], one.logits[0], atol=1e-5)


def test_freed_memory_goes_back_before_a_large_cache_is_made(tiny_model, monkeypatch):
    from mpt_eqx.generation import state as states
    from mpt_eqx.generation.prefix import initial_state
    from mpt_eqx.ops import platform

    calls = []
    monkeypatch.setattr(platform.sys, "platform", "linux")
    monkeypatch.setattr(platform.ctypes, "CDLL", lambda _: type("C", (), {"malloc_trim": calls.append}))
    cache = initial_state(tiny_model, None, 1, 10).cache
    assert calls == []  # it is small
    size = sum(x.nbytes for x in jax.tree.leaves(cache.layers))
    monkeypatch.setattr(states, "LARGE_CACHE", size + 1)
    initial_state(tiny_model, None, 1, 10)
    assert calls == []
    monkeypatch.setattr(states, "LARGE_CACHE", size)
    initial_state(tiny_model, None, 1, 10)
    assert len(calls) == 1
    monkeypatch.setattr(platform.ctypes, "CDLL", lambda _: object())  # a C library that has no such function
    initial_state(tiny_model, None, 1, 10)
    assert len(calls) == 1


@pytest.mark.parametrize("how", some(["prompts", "prefix", "several", "stream"], ["stream"]))
def test_the_program_is_compiled_before_a_large_cache_is_made(tiny_config, prompts, monkeypatch, how):
    """Once: the call finds it. What compiling takes and what the cache takes do not add up."""
    import sys

    from mpt_eqx import MPT, generate, prefill, stream
    from mpt_eqx.generation import state as states

    generating = sys.modules["mpt_eqx.generation.generate"]
    model = MPT(tiny_config(n_layers=1, max_seq_len=512, d_model=64), key=jax.random.key(0))
    options = {
        "prompts": {"prompts": prompts(5, 9)},
        "stream": {"prompt": prompts(5)[0]},
        "prefix": {"prompts": [[], []], "prefix": prefill(model, prompts(7)[0])},
        "several": {"prompts": prompts(5), "num_return_sequences": 2, "temperature": 1.0, "key": jax.random.key(1)},
    }[how]
    happened, compile_decode, initial_state = [], generating.compile_decode, generating.initial_state
    for function in (compile_decode, initial_state):

        def noted(*args, function=function, **how):
            happened.append(function.__name__)
            return function(*args, **how)

        monkeypatch.setattr(generating, function.__name__, noted)
    found = []
    for size in (states.LARGE_CACHE, 1):
        monkeypatch.setattr(states, "LARGE_CACHE", size)
        jax.clear_caches()
        with counting_compiles() as compiles:
            if how == "stream":
                tokens = list(stream(model, max_new_tokens=6, **options))
            else:
                tokens = generate(model, max_new_tokens=6, **options).tokens.tolist()
            found.append((tokens, len(compiles)))
    assert happened == ["initial_state", "compile_decode", "initial_state"]
    assert found[0] == found[1]


def resident(array):
    """The share of an array's pages that are in memory."""
    start = array.unsafe_buffer_pointer()
    first = -(-start // mmap.PAGESIZE)
    pages = (start + array.nbytes) // mmap.PAGESIZE - first
    found = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first * mmap.PAGESIZE), pages * mmap.PAGESIZE, found) == 0
    return sum(page & 1 for page in found) / pages


@pytest.fixture
def one_layer(tiny_config):
    """A model whose keys for 4,096 tokens are 4 MB."""
    from mpt_eqx import MPT

    return MPT(tiny_config(n_layers=1, max_seq_len=4096, d_model=256, n_heads=4), key=jax.random.key(0))


def test_a_new_state_can_be_donated(one_layer):
    """However long its arrays are, and wherever numpy finds memory for them."""
    from mpt_eqx.generation.state import empty_state

    write = jax.jit(lambda state: jax.tree.map(lambda x: x.at[0].set(jnp.ones((), x.dtype)), state), donate_argnums=0)
    for capacity in (256, 512, 2048, 4096) * 3:
        state = empty_state(one_layer, 2, capacity)
        before = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}
        assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(write(state))} == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not asked to take memory back")
def test_a_cache_takes_memory_for_the_tokens_that_it_holds(one_layer, prompts):
    from mpt_eqx.generation.prefix import Prefix, initial_state
    from mpt_eqx.generation.prompts import prefill_chunk

    state = initial_state(one_layer, None, 1, 4096)
    layers = jax.tree.leaves(state.cache.layers)
    assert [resident(x) for x in layers] == [0, 0] and not any(np.any(np.asarray(x)) for x in layers)
    state = initial_state(one_layer, None, 1, 4096)  # looking at the other has touched its pages
    chunk, ends = jnp.asarray([prompts(32)[0]], jnp.int32), jnp.asarray([32], jnp.int32)
    state = prefill_chunk(one_layer, state, chunk, ends)
    assert all(0 < resident(x) < 0.1 for x in jax.tree.leaves(state.cache.layers))
    rows = initial_state(one_layer, Prefix(state, one_layer.config), 3, 4096)
    assert all(0 < resident(x) < 0.1 for x in jax.tree.leaves(rows.cache.layers))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("copies", "capacity"), [(1, 2048), (3, 512), (2, 256)])
def test_a_resized_cache_holds_the_same_tokens(one_layer, prompts, dtype, copies, capacity):
    """Written in place, of which there is no other copy."""
    from mpt_eqx import prefill
    from mpt_eqx.generation import state as states

    model = jax.tree.map(lambda x: x.astype(dtype), one_layer)
    one = prefill(model, prompts(200)[0]).state
    assert one.cache.capacity == 512
    found, formula = (resize(one, copies, capacity) for resize in (states.repeat_and_resize, states.by_formula))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), formula)
    for x, y in zip(*(jax.tree.leaves(each.cache.layers) for each in (found, formula)), strict=True):
        np.testing.assert_array_equal(x[..., :200, :], y[..., :200, :])
    rest = (eqx.tree_at(lambda s: s.cache.layers, each, ()) for each in (found, formula))
    jax.tree.map(np.testing.assert_array_equal, *rest)
    empty = jax.tree.map(jnp.zeros_like, found.cache.layers)
    memory = states.copied_into.lower(one, empty, copies).compile().compiled.memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(empty))
    assert memory.temp_size_in_bytes < 1000


@given(st.integers(1, 5000))
def test_pieces_cover_a_prompt_with_little_to_spare(length):
    from mpt_eqx.generation.buckets import PREFILL_CHUNKS, prefill_buckets

    sizes = list(prefill_buckets(length, 1))
    assert set(sizes) <= set(PREFILL_CHUNKS) and sizes == sorted(sizes, reverse=True)
    assert length <= sum(sizes) < length + PREFILL_CHUNKS[0] / 2


@pytest.mark.slow
def test_thirty_lengths_of_prompts_compile_at_most_twelve_times(tiny_config):
    """Everything that XLA compiles is counted, helpers included."""
    from mpt_eqx import MPT, generate

    model = MPT(tiny_config(max_seq_len=4096, n_layers=1), key=jax.random.key(0))
    rng = np.random.default_rng(0)
    jax.clear_caches()
    with counting_compiles() as compiles:
        for length in rng.integers(1, 2001, size=30):
            generate(model, rng.integers(61, size=length).tolist(), max_new_tokens=24)
    assert len(compiles) <= 12


def test_after_a_warmup_nothing_is_compiled(tiny_config, prompts):
    """Of three rows in `just test-all`."""
    from mpt_eqx import MPT, GenerationError, generate, stream, warmup

    model = MPT(tiny_config(max_seq_len=1500, n_layers=1), key=jax.random.key(0))
    jax.clear_caches()
    seconds = warmup(model, batch_sizes=[1, 3] if is_long() else [1], prompt_lengths=[10, 300], max_new_tokens=300)
    assert set(seconds) == {(1, 10), (1, 300), *([(3, 10), (3, 300)] if is_long() else [])}
    assert all(second > 0 for second in seconds.values())
    (a, b, c), key = prompts(40, 300, 9), jax.random.key(0)
    with counting_compiles() as compiles:
        generate(model, [a, b, c] if is_long() else [b], max_new_tokens=300)
        list(stream(model, c, max_new_tokens=290, temperature=1.0, key=key))
    assert compiles == []
    with pytest.raises(GenerationError, match="batch_sizes: expected a whole number ≥ 1, found 0"):
        warmup(model, batch_sizes=[0], prompt_lengths=[10], max_new_tokens=5)
    with pytest.raises(GenerationError, match="1496 tokens and max_new_tokens=5 exceed max_seq_len=1500"):
        warmup(model, batch_sizes=[1], prompt_lengths=[1496], max_new_tokens=5)


@pytest.mark.parametrize("n_layers", some([1, 2], [1]))
def test_a_growing_cache_changes_nothing(tiny_config, prompts, n_layers):
    """From 500 to 560 tokens the cache grows once; the same with room for all from the start."""
    from mpt_eqx import MPT, InitConfig, generate
    from mpt_eqx.generation import buckets

    config = tiny_config(n_layers=n_layers, max_seq_len=3000, init_config=InitConfig(emb_init_std=0.5))
    model = MPT(config, key=jax.random.key(3))
    (prompt,) = prompts(500)
    grown = generate(model, prompt, max_new_tokens=60, return_logits=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "MIN_CACHE", 1024)
        patch.setattr("mpt_eqx.generation.prefix.cache_bucket", lambda *_: 2048)
        roomy = generate(model, prompt, max_new_tokens=60, return_logits=True)
    np.testing.assert_array_equal(grown.logits, roomy.logits)
    full = np.asarray(eqx.filter_jit(model)(jnp.asarray([*prompt, *grown.tokens[0].tolist()])))
    np.testing.assert_allclose(grown.logits[0], full[499:-1], atol=2e-5)


@pytest.mark.parametrize("dtype", some(["float32", "bfloat16", "float16"], ["bfloat16"]))
@pytest.mark.parametrize("rows", some([1, 3], [3]))
def test_the_size_of_the_cache_does_not_count_what_a_step_costs(tiny_model, rows, dtype):
    """The loop over keys ends at the longest row, whatever the capacity."""
    from mpt_eqx.generation.state import empty_state
    from mpt_eqx.generation.steps import decode_step

    model = jax.tree.map(lambda x: x.astype(dtype), tiny_model)

    def flops(capacity: int) -> float:
        state = empty_state(model, rows, capacity)
        step = jax.jit(lambda state: decode_step(model, state, jnp.zeros(rows, jnp.int32)), donate_argnums=0)
        return step.lower(state).compile().cost_analysis()["flops"]

    assert flops(8192) == flops(1024)


@pytest.mark.parametrize("n_layers", some([1, 2], [1]))
def test_blocks_of_keys_equal_the_formula_at_4096_tokens(tiny_config, n_layers):
    """Logits of a prompt read in pieces against those of the full forward pass, with ALiBi's largest slopes."""
    from mpt_eqx import MPT, AttnConfig, InitConfig, prefill

    attn = AttnConfig(alibi=True, alibi_bias_max=16)
    sizes = {"n_layers": n_layers, "max_seq_len": 4096}
    config = tiny_config(attn_config=attn, init_config=InitConfig(emb_init_std=0.5), **sizes)
    model = MPT(config, key=jax.random.key(3))
    tokens = np.random.default_rng(0).integers(61, size=4096)
    full = model.unembed(eqx.filter_jit(lambda t: model.hidden_states(t)[-1][-1:])(jnp.asarray(tokens)))
    read = model.unembed(prefill(model, tokens.tolist()).state.hidden)
    np.testing.assert_allclose(read, full, atol=1e-4, rtol=0)


def difference(blockwise_attention, seed, seen, asked, window):
    """How far the formula read from a cache is from the formula, for `asked` queries after `seen` keys."""
    from mpt_eqx.model.alibi import alibi_slopes
    from mpt_eqx.ops.attention import alibi_bias, attention
    from mpt_eqx.ops.layer_cache import KeysValues, LayerCache

    rng, total = np.random.default_rng(seed), seen + asked
    q, k, v = (jnp.asarray(rng.normal(size=(3, n, 8)), jnp.float32) for n in (asked, total, total))
    places = jnp.arange(seen, total)

    def bias_and_mask(keys):
        mask = keys[None] <= places[:, None]
        if window is not None:
            mask &= keys[None] >= places[:, None] - window
        return alibi_bias(alibi_slopes(3, 8), places, keys), mask

    # What a cache holds beyond its length may be anything finite.
    rubbish = [jnp.full((3, -(-total // 256) * 256 + 512, 8), 7.0)] * 2
    cache = LayerCache(*rubbish, np.dtype("float32")).write(KeysValues(k, v), jnp.arange(total))
    blocks = blockwise_attention(q, cache, bias_and_mask, jnp.asarray(total), 0.3)
    return np.abs(blocks - attention(q, k, v, *bias_and_mask(jnp.arange(total)), 0.3)).max()


@examples(12, least=2)
@given(
    st.integers(0, 2**31), st.sampled_from([1, 255, 700]), st.sampled_from([1, 5, 256]), st.sampled_from([None, 3, 40])
)
def test_blockwise_attention_is_attention(seed, seen, asked, window):
    """For any number of keys and queries, in float32."""
    from mpt_eqx.ops.blockwise_attention import blockwise_attention

    assert difference(blockwise_attention, seed, seen, asked, window) < 1e-5


@pytest.mark.parametrize(
    ("function", "part", "other"),
    one_in(
        3,
        [
            ("measure", "A * jnp.exp(B - C) + D", "A + D"),
            ("measure", "jnp.exp(A - B[..., None])", "jnp.exp(A)"),
            ("gather", "A / B[..., None]", "A + 0 * B[..., None]"),
            ("blockwise_attention", "jnp.minimum(A, B) + C - 1", "jnp.minimum(A, B)"),
            ("scores", "bias_and_mask(A * BLOCK + B)", "bias_and_mask(B)"),
            (
                *("measure", "jax.lax.dynamic_update_index_in_dim(A, B, C, 0)"),
                "jax.lax.dynamic_update_index_in_dim(A, B, 0, 0)",
            ),
            (
                *("gather", "A + jnp.einsum(B, C, D, preferred_element_type=E)"),
                "jnp.einsum(B, C, D, preferred_element_type=E)",
            ),
        ],
    ),
)
def test_the_formula_notices_a_mutation_of_its_blocks(function, part, other):
    from mpt_eqx.ops import blockwise_attention

    module = mutant(blockwise_attention, function, part, other)
    assert not difference(module.blockwise_attention, 0, 700, 5, None) < 1e-3


def fused_difference(cudnn_attention, seed, seen, asked, window, dtype="float32", alibi=True):
    """As `difference`, for the arguments that the kernel is given, and for two rows of other lengths under vmap."""
    from mpt_eqx.model.alibi import alibi_slopes
    from mpt_eqx.ops.attention import alibi_bias, attention

    capacity, rng = 1024, np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 3, n, 8)), dtype) for n in (asked, capacity, capacity))
    # What a cache holds beyond its length may be anything.
    totals = jnp.asarray([seen + asked, max(seen - 7, 0) + asked])
    beyond = (jnp.arange(capacity) >= totals[:, None])[:, None, :, None]
    k, v = jnp.where(beyond, jnp.nan, k), jnp.where(beyond, jnp.inf, v)

    def bias_and_mask(total, keys):
        places = total - asked + jnp.arange(asked)
        mask = keys[None] <= places[:, None]
        if window is not None:
            mask &= keys[None] >= places[:, None] - window
        return alibi_bias(alibi_slopes(3, 8), places, keys) if alibi else None, mask

    def row(q, k, v, total):
        how = None if jax.default_backend() == "gpu" else "xla"
        chosen = {} if how is None else {"implementation": how}
        return cudnn_attention(q, k, v, *bias_and_mask(total, jnp.arange(capacity)), total, 0.3, **chosen)

    found = [*jax.vmap(row)(q, k, v, totals), row(q[0], k[0], v[0], totals[0])]
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    expected = [
        attention(q, k[:, :n], v[:, :n], *bias_and_mask(n, jnp.arange(n)), 0.3)
        for q, k, v, n in zip(*wide, totals.tolist(), strict=True)
    ]
    return max(np.abs(a - b).max() for a, b in zip(found, [*expected, expected[0]], strict=True))


@examples(12, least=1)
@given(
    st.integers(0, 2**31), st.sampled_from([0, 255, 700]), st.sampled_from([32, 256]), st.sampled_from([None, 3]),
    st.booleans(),
)  # fmt: skip
def test_what_the_fused_kernel_is_asked_for_is_attention(seed, seen, asked, window, alibi):
    """By XLA's implementation of the same function with the same arguments; on a GPU by cuDNN itself, in 16 bits."""
    from mpt_eqx.ops.cudnn_attention import cudnn_attention

    dtype, atol = ("bfloat16", 0.05) if jax.default_backend() == "gpu" else ("float32", 1e-5)
    assert fused_difference(cudnn_attention, seed, seen, asked, window, dtype, alibi) < atol


@pytest.mark.parametrize(
    ("part", "other"),
    one_in(
        2,
        [
            ("jnp.where(A, v, 0)", "v"),
            ("jnp.where(mask, A, B)", "jnp.where(mask, 0, B)"),
            ("jnp.where(mask, A, B)", "bias"),
            (
                "jax.nn.dot_product_attention(A, B, C, D, key_value_seq_lengths=E, scale=F, implementation=G)",
                "jax.nn.dot_product_attention(A, B, C, D, key_value_seq_lengths=E, implementation=G)",
            ),
        ],
    ),
)
def test_a_mutation_of_those_arguments_is_noticed(part, other):
    from mpt_eqx.ops import cudnn_attention

    module = mutant(cudnn_attention, "cudnn_attention", part, other)
    assert not fused_difference(module.cudnn_attention, 0, 700, 32, 3) < 1e-3


def test_the_fused_kernel_is_chosen_for_what_it_takes(monkeypatch):
    """On a GPU of NVIDIA's; that and its compute capability are played here."""
    from types import SimpleNamespace

    from mpt_eqx.ops.cudnn_attention import supports_cudnn

    def takes(n=4, t=256, h=128, keys=2048, dtype="bfloat16", softcap=None):
        return supports_cudnn(jnp.zeros((n, t, h), dtype), keys, softcap)

    def gpu(platform="cuda 12090", capability="8.0"):
        device = SimpleNamespace(client=SimpleNamespace(platform_version=platform), compute_capability=capability)
        monkeypatch.setattr(jax, "local_devices", lambda backend: [device])
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    if jax.default_backend() != "gpu":
        assert not takes()
    gpu()
    assert takes() and takes(dtype="float16") and takes(t=32) and takes(h=8)
    assert not takes(dtype="float32") and not takes(h=12) and not takes(h=136) and not takes(softcap=30.0)
    assert not takes(t=2), "a step of decoding reads the blocks that are filled"
    assert not takes(n=64, keys=16384), "the bias would be too large"
    gpu(capability="7.5")
    assert not takes()
    gpu(platform="rocm 60")
    assert not takes()


LONG = """
import jax, numpy as np
from mpt_eqx import MPT, AttnConfig, InitConfig, MPTConfig, generate
attn = AttnConfig(alibi=True, alibi_bias_max=16, clip_qkv=6)
config = MPTConfig(
    d_model=32, n_heads=2, n_layers=2, vocab_size=101, max_seq_len={length} + 16, no_bias=True, attn_config=attn,
    init_config=InitConfig(emb_init_std=0.5),
)
model = MPT(config, key=jax.random.key(0))
prompt = np.random.default_rng(0).integers(101, size={length}).tolist()
result = generate(model, prompt, max_new_tokens=16)
assert result.tokens.shape == (1, 16) and np.isfinite(result.logprobs).all()
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize("length", [16_384, 65_536])
def test_a_long_prompt_needs_less_than_a_gigabyte(length):
    """The whole process, JAX included, where one float32 matrix of scores of 16,384 tokens alone has 1.07 GB."""
    done = subprocess.run(
        [sys.executable, "-c", LONG.replace("{length}", str(length))], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 1e9


def test_what_does_not_fit_into_a_cache(tiny_model):
    from mpt_eqx import KVCache, MPTError

    cache = KVCache.empty(tiny_model.config, 10, jnp.float32)
    assert cache.capacity == 256 and cache.resized(300).capacity == 512 and cache.resized(5).capacity == 256
    _, cache = tiny_model.extend(jnp.arange(61), cache)
    with pytest.raises(MPTError, match="expected ids from 0 to 60 .*, found 61"):
        tiny_model.extend(jnp.asarray([61]), cache)
    with pytest.raises(MPTError, match=r"expected at most max_seq_len=256, found 261; .*'max_seq_len': 261"):
        tiny_model.extend(jnp.zeros(200, jnp.int32), cache)


def test_a_full_cache_says_how_to_make_room(tiny_config):
    from mpt_eqx import MPT, KVCache, MPTError

    model = MPT(tiny_config(max_seq_len=600, n_layers=1), key=jax.random.key(0))
    _, cache = model.extend(jnp.zeros(250, jnp.int32), KVCache.empty(model.config, 256, jnp.float32))
    with pytest.raises(
        MPTError, match=r"expected at most 6, which fit .*, found 7; make room with cache.resized\(257\)"
    ):
        model.extend(jnp.zeros(7, jnp.int32), cache)
    x, cache = model.extend(jnp.zeros(7, jnp.int32), cache.resized(257))
    assert int(cache.length) == 257 and bool(jnp.isfinite(x).all())


def test_learned_positions_end_where_they_end(tiny_config):
    from mpt_eqx import MPT, AttnConfig, GenerationError, KVCache, MPTError, generate

    config = tiny_config(attn_config=AttnConfig(alibi=False), learned_pos_emb=True, max_seq_len=16, n_layers=1)
    model = MPT(config, key=jax.random.key(0))
    with pytest.raises(MPTError, match="expected at most max_seq_len=16, found 17; learned positions end there"):
        model.extend(jnp.zeros(17, jnp.int32), KVCache.empty(config, 32, jnp.float32))
    with pytest.raises(GenerationError, match="exceed max_seq_len=16; learned positions end there"):
        generate(model, [1] * 10, max_new_tokens=7)
    assert generate(model, [1] * 10, max_new_tokens=6).tokens.shape == (1, 6)
