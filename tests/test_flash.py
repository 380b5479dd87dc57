"""Attention by cuDNN's fused kernel: it trains in linear memory, with ALiBi in dimensions of queries and keys."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import one_in


def drawn(n, k, t, h, dtype, rows=()):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(*rows, heads, t, h) for heads in (n, k, k)]
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def formula(q, k, v, slopes, scale, window):
    """Attention as it is defined, in the widest type there is."""
    wide = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    q, k, v = (x.astype(wide) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[0] // k.shape[0], axis=0) for x in (k, v))
    away = jnp.arange(q.shape[1]) - jnp.arange(q.shape[1])[:, None]
    scores = scale * jnp.einsum("nth,nsh->nts", q, k)
    if slopes is not None:
        scores += slopes[:, None, None].astype(wide) * away.astype(wide)
    seen = (away <= 0) & (away >= -(q.shape[1] if window is None else window))
    return jnp.einsum("nts,nsh->nth", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)


def in_more_dimensions(q, k, v, slopes, scale, window):
    """The same, from queries and keys that have ALiBi in them."""
    from mpt_eqx.ops.flash_attention import with_alibi

    return formula(*with_alibi(q, k, slopes, scale), v, None, scale, window)


def both(way, q, k, v, *how):
    """The value and derivatives of what weighs its numbers differently."""
    value, back = jax.vjp(lambda *x: way(*x, *how), q, k, v)
    return value, *back(jnp.cos(jnp.arange(value.size)).reshape(value.shape).astype(value.dtype))


def furthest(found, expected):
    wide = [np.asarray(x, np.float64) for x in (*found, *expected)]
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(wide[:4], wide[4:], strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), one_in(3, [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 1e-5)]))
def test_alibi_in_more_dimensions_is_alibi(dtype, tolerance):
    """Value and gradients; of 6 heads in 2 groups, whose slopes need all pieces, with a window and without.

    In bfloat16 what is compared is the bias and sums in float32: the dimensions are exact, as everything else was.
    Their gradients are rounded to bfloat16.
    """
    from mpt_eqx.model.alibi import alibi_slopes

    with jax.enable_x64(dtype == "float64"):
        q, k, v = drawn(6, 2, 300, 8, dtype)
        slopes = alibi_slopes(6, 8)
        for window in (None, 40):
            how = (slopes, 0.3, window)
            ways = (in_more_dimensions, formula)
            found, expected = (jax.jit(lambda *x, w=w, how=how: both(w, *x, *how))(q, k, v) for w in ways)
            if dtype == "bfloat16":
                assert furthest(found[:1] * 4, expected[:1] * 4) < tolerance
                tolerance = 2**-7
            assert furthest(found, expected) < tolerance


@pytest.mark.slow
def test_alibi_in_more_dimensions_of_a_long_sequence():
    """Of 8,192 tokens: the middle, from which keys are counted, is 4,096 away. Errors are those that are documented."""
    from mpt_eqx.model.alibi import alibi_slopes

    q, k, v = drawn(2, 1, 8192, 4, "bfloat16")
    how = (alibi_slopes(32, 8)[jnp.asarray([0, 31])], 0.3, None)
    with jax.enable_x64(True):
        expected = jax.jit(lambda *x: both(formula, *x, *how))(q, k, v)
    found = jax.jit(lambda *x: both(in_more_dimensions, *x, *how))(q, k, v)
    assert furthest(found[:1] * 4, expected[:1] * 4) < 2.4e-4
    assert furthest(found, expected) < 2**-7


def test_the_pieces_stay_when_they_are_compiled():
    """A cast to bfloat16 and back may be left out by XLA; then the second and third piece would be zero."""
    from mpt_eqx.model.alibi import alibi_slopes
    from mpt_eqx.ops.flash_attention import with_alibi

    slopes, places = alibi_slopes(16, 8), jnp.arange(70000) - 35000
    q, k = jax.jit(lambda: with_alibi(*jnp.zeros((2, 16, 70000, 0), jnp.bfloat16), slopes, 128**-0.5))()
    pieces, places_of_keys = (np.asarray(x[:, ::999], np.float64) for x in (q, k))
    np.testing.assert_allclose(pieces[..., ::2].sum(-1) * 128**-0.5, np.tile(slopes[:, None], 71), rtol=2**-22)
    np.testing.assert_array_equal(places_of_keys[..., :2].sum(-1), np.tile(places[::999], (16, 1)))


@pytest.mark.parametrize("alibi", [True, False])
def test_what_the_kernel_is_asked_for_is_attention(alibi):
    """By XLA's implementation of the same function with the same arguments, under vmap."""
    from mpt_eqx.model.alibi import alibi_slopes
    from mpt_eqx.ops.flash_attention import flash_attention

    slopes = alibi_slopes(6, 8) if alibi else None
    for window, t in ((9, 40), (40, 41)) if alibi else ((38, 41),):
        rows = drawn(6, 2, t, 12, "float32", rows=(2,))

        def row(*x, w=window):
            return flash_attention(*x, slopes, 0.3, w, implementation="xla"), formula(*x, slopes, 0.3, w)

        found, expected = jax.jit(jax.vmap(row))(*rows)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture
def gpu(monkeypatch):
    """Plays a GPU: programs can be lowered for it, and not be compiled."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    devices = jax.local_devices

    def play(capability="9.0", platform="cuda 12090"):
        device = SimpleNamespace(client=SimpleNamespace(platform_version=platform), compute_capability=capability)

        def local_devices(*args, backend=None, **rest):
            return [device] if backend == "gpu" else devices(*args, backend=backend, **rest)

        monkeypatch.setattr(jax, "local_devices", local_devices)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
        monkeypatch.setattr(fused, "check_compute_capability", lambda _: capability >= "9.0")
        monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda _: False)

    return play


def test_which_attention_goes_to_cudnn(gpu):
    """In 16 bits, on chips and with head sizes that it takes; the rest goes through blocks of queries."""
    from mpt_eqx.ops.flash_attention import supports_flash_attention

    def takes(t=256, h=128, dtype="bfloat16", alibi=True, allowed=None, softcap=None):
        q = jax.ShapeDtypeStruct((4, t, h), jnp.dtype(dtype))
        found = []

        def ask(q):
            found.append(supports_flash_attention(q, q, jnp.ones(4) if alibi else None, allowed, softcap, None))
            return q

        jax.eval_shape(ask, q)
        return found[0]

    assert not takes(), "there is no GPU"
    gpu("9.0")
    assert takes() and takes(h=250) and takes(h=50) and takes(t=513) and takes(t=65536)
    assert takes(dtype="float16", alibi=False) and takes(h=256, alibi=False) and takes(t=65537, alibi=False)
    assert not takes(dtype="float32") and not takes(dtype="float16") and not takes(h=256) and not takes(t=65537)
    assert not takes(t=31) and not takes(softcap=30.0) and not takes(allowed=jnp.ones((256, 256), bool))
    for capability in ("8.0", "12.0"):
        gpu(capability)
        assert takes(h=122) and takes(h=128, alibi=False) and not takes(h=128)
    gpu("10.3")
    assert takes()
    gpu("7.5")
    assert not takes()
    gpu(platform="rocm 60")
    assert not takes()


def calls(function, *args):
    """The fused kernels that a program for GPUs calls, and the largest number of elements of an array in it."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r"custom_call @__cudnn\$(\w+)\(.*? : \((.*?)\) ->", text)
    shapes = [list(map(int, shape.split("x")[:-1])) for shape in re.findall(r"tensor<((?:\d+x)+)", text)]
    return found, max(int(np.prod(shape)) for shape in shapes)


def test_training_on_a_gpu_calls_cudnn_without_a_bias(gpu):
    """Forward and backward, for rows under vmap: they become the kernel's batch; nothing has queries × keys numbers."""
    from mpt_eqx.model.alibi import alibi_slopes
    from mpt_eqx.ops.attend import attend
    from mpt_eqx.ops.layer_cache import KeysValues

    gpu()
    rows, n, key_heads, t, h = 3, 4, 2, 1024, 64
    args = drawn(n, key_heads, t, h, "bfloat16", rows=(rows,))

    def row(q, k, v):
        return attend(q, KeysValues(k, v), jnp.arange(q.shape[1]), scale=0.1, slopes=alibi_slopes(n, 8), window=100)

    def loss(q, k, v):
        return jnp.sum(jax.vmap(row)(q, k, v).astype(jnp.float32) ** 2)

    def one_loss(q, k, v):
        return jnp.sum(row(q, k, v).astype(jnp.float32) ** 2)

    q, k = f"tensor<{rows}x{t}x{n}x72xbf16>", f"tensor<{rows}x{t}x{key_heads}x72xbf16>"
    forward = ("fmhaSoftmax", f"{q}, {k}, {k}")
    backward = ("fmhaSoftmaxBackward", f"{q}, {k}, {k}, tensor<{rows}x{n}x{t}xf32>, {q}, {q}")
    largest = rows * n * t * 72
    assert calls(jax.vmap(row), *args) == ([forward], largest)
    assert calls(jax.vmap(row, in_axes=1), *(jnp.swapaxes(x, 0, 1) for x in args)) == ([forward], largest)
    assert calls(jax.grad(loss, argnums=(0, 1, 2)), *args) == ([forward, backward], largest)
    # The kernel does not train an odd number of positions.
    assert calls(jax.grad(loss, argnums=(0, 1, 2)), *(x[:, :, 1:] for x in args))[0] == [forward, backward]
    assert calls(jax.vmap(jax.grad(one_loss, argnums=(0, 1, 2))), *args) == ([forward, backward], largest)


def test_a_model_trains_by_cudnn_on_a_gpu(gpu):
    """Stacked and rematerialised; not in float32, nor with a mask of padding."""
    import equinox as eqx

    from mpt_eqx import MPT, AttnConfig, MPTConfig, stack
    from mpt_eqx.surgery import remat
    from mpt_eqx.train import next_token_loss

    gpu()
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 64, "max_seq_len": 64}
    config = MPTConfig(**sizes, no_bias=True, attn_config=AttnConfig(alibi=True, attn_uses_sequence_id=True))
    shapes = eqx.filter_eval_shape(lambda: remat(stack(MPT(config, key=jax.random.key(0))), "dots"))
    tokens = jax.ShapeDtypeStruct((3, 64), jnp.int32)

    def kernels(dtype, **rest):
        model = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), shapes)
        return [name for name, _ in calls(jax.grad(lambda m, t: next_token_loss(m, t, **rest)), model, tokens)[0]]

    assert set(kernels("bfloat16")) == {"fmhaSoftmax", "fmhaSoftmaxBackward"}
    assert kernels("float32") == []
    assert kernels("bfloat16", mask=jnp.ones((3, 64), bool)) == []
