"""The KV cache: keys and values of the tokens seen so far, as plain arrays."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from mpt_eqx.config import MPTConfig


class LayerCache(eqx.Module):
    """Keys and values of one layer, for S positions; heads come first, as the products of a decode step read them."""

    k: Float[Array, "K S H"]
    v: Float[Array, "K S H"]

    def write(self, k: Float[Array, "K T H"], v: Float[Array, "K T H"], positions: Int[Array, " T"]) -> "LayerCache":
        """Returns the cache with T rows written at `positions`; those beyond the capacity are dropped."""
        return LayerCache(
            k=self.k.at[:, positions].set(k, mode="drop"),
            v=self.v.at[:, positions].set(v, mode="drop"),
        )


class KVCache(eqx.Module):
    """Keys and values of every layer, and how many tokens they stand for.

    Rows from `length` on hold anything: causality hides them from every query until they are written. A layer that
    reads another's keys and values has None.
    """

    layers: tuple[LayerCache | None, ...]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, config: MPTConfig, capacity: int, dtype: DTypeLike) -> "KVCache":
        """Returns a cache for `capacity` tokens that holds none."""
        rows = jnp.zeros((config.kv_heads, capacity, config.head_size), dtype)
        return cls(
            layers=tuple(LayerCache(rows, rows) if layer.kv_from is None else None for layer in config.layers),
            length=jnp.zeros((), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """How many tokens fit."""
        first = self.layers[0]
        assert first is not None  # there is no layer before it to read from
        return first.k.shape[-2]
