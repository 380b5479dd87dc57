"""cuDNN's fused attention played by a CPU: JAX partitions the same operations, and a formula stands for the kernels."""

from contextlib import contextmanager
from unittest import mock

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax._src.interpreters import mlir

from mpt_eqx.ops import flash_attention

MAKE_CONTEXT = mlir.make_ir_context

ASKED: list[tuple[tuple[int, ...], ...]] = []
"""The shapes of what each kernel was given when a program for the CPU was made, backward with its five residuals."""


def attention(q, k, v, scale, window):
    """Causal attention of B T N H, and the logarithm of what its weights are divided by."""
    wide = jnp.float32
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2).astype(wide) for x in (k, v))
    away = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q.astype(wide), k)
    scores = jnp.where((away >= 0) & (away < (window or q.shape[1])), scores, -jnp.inf)
    h = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
    return h.astype(q.dtype), jax.nn.logsumexp(scores, axis=-1)


def forward(q, k, v, *_, scale, sliding_window_length, is_training, **__):
    ASKED.append(tuple(x.shape for x in (q, k, v)))
    return attention(q, k, v, scale, sliding_window_length)[: 1 + is_training]


def backward(q, k, v, *rest, scale, sliding_window_length, **_):
    *_, logsumexp, h, slope = rest
    ASKED.append(tuple(x.shape for x in (q, k, v, logsumexp, h, slope)))
    found, back = jax.vjp(lambda *x: attention(*x, scale, sliding_window_length), q, k, v)
    # What a device was given of another's rows or heads makes NaN.
    same = jnp.all(jnp.abs(found[1] - logsumexp) < 0.1) & jnp.all(jnp.abs(found[0] - h) < 0.1)
    return [jnp.where(same, x, jnp.nan) for x in back((slope, jnp.zeros_like(logsumexp)))]


@contextmanager
def played():
    """In it, programs for CPUs call the kernels that those for GPUs would; what was traced before has none."""
    for primitive, kernel in (("fwd", forward), ("bwd", backward)):
        lowering = mlir.lower_fun(kernel, multiple_results=True)
        mlir.register_lowering(getattr(fused, f"_dot_product_attention_{primitive}_p"), lowering, platform="cpu")
    ASKED.clear()
    with (
        mock.patch.object(fused, "check_cudnn_version", lambda: 91000),
        mock.patch.object(fused, "check_compute_capability", lambda _: True),
        mock.patch.object(fused, "is_cuda_compute_capability_equal", lambda _: False),
        mock.patch.object(flash_attention, "max_cudnn_head", lambda: 256),
        # JAX lowers what it has partitioned while the program is compiled, so that the two cannot be in one context.
        mock.patch.object(mlir, "make_ir_context", MAKE_CONTEXT),
        mock.patch.object(jax.lax, "platform_dependent", lambda *args, cuda, **_: cuda(*args)),
    ):
        yield
