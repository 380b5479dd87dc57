"""Wrappers around linear maps and embeddings, as libraries for adapters make them, each with its own names."""

import equinox as eqx
import jax


class Lora(eqx.Module):
    """Around a linear map or, with the weight that a tied output matrix reads, an embedding."""

    base: eqx.Module
    a: jax.Array
    b: jax.Array

    def __call__(self, x, dtype=None):
        if jax.numpy.issubdtype(x.dtype, jax.numpy.integer):
            return self.base(x) + self.b[x] @ self.a
        return self.base(x, dtype) + (x @ self.a.T) @ self.b.T

    @property
    def weight(self):
        return self.base.weight


class LoraWithAxes(Lora):
    """Its own arrays are sharded, too."""

    logical_axes = {"a": (None, "embed"), "b": ("mlp", None)}  # noqa: RUF012


class Outer(eqx.Module):
    """Around a wrapper; its own linear map comes first, but has another shape."""

    gate: eqx.Module
    inner: eqx.Module

    def __call__(self, x, dtype=None):
        return self.inner(x, dtype) * jax.nn.sigmoid(self.gate(x)).mean(-1, keepdims=True)


def make_lora(module, kind=Lora):
    out, columns = module.weight.shape
    a, b = jax.random.split(jax.random.key(1))
    return kind(module, 0.1 * jax.random.normal(a, (2, columns)), 0.1 * jax.random.normal(b, (out, 2)))


def make_nested(module):
    from mpt_eqx.model.linear import Linear

    return Outer(Linear(jax.random.normal(jax.random.key(2), (3, module.weight.shape[1]))), make_lora(module))
