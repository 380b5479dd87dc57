"""The KV cache: keys and values of the tokens seen so far, as plain arrays."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, UInt16

from mpt_eqx.config import MPTConfig

BLOCK = 256
"""Keys that a cached query reads at a time; the capacity of a cache is a multiple of it."""


class KeysValues(eqx.Module):
    """Keys and values of one layer, for S positions; heads come first, as the products read them."""

    k: Float[Array, "K S H"]
    v: Float[Array, "K S H"]


class LayerCache(eqx.Module):
    """Keys and values of one layer with room for S positions, stored.

    bfloat16 and float16 are stored as their bits: XLA's CPU backend cannot write into an array of theirs in place and
    would turn the whole cache into float32 and back for every token.
    """

    k: Float[Array, "K S H"] | UInt16[Array, "K S H"]
    v: Float[Array, "K S H"] | UInt16[Array, "K S H"]
    dtype: np.dtype = eqx.field(static=True)

    def write(self, new: KeysValues, positions: Int[Array, " T"]) -> "LayerCache":
        """Returns the cache with T rows written at `positions`; those beyond the capacity are dropped."""

        def written(old: Array, rows: Float[Array, "K T H"]) -> Array:
            return old.at[:, positions].set(jax.lax.bitcast_convert_type(rows, old.dtype), mode="drop")

        return LayerCache(k=written(self.k, new.k), v=written(self.v, new.v), dtype=self.dtype)

    def rows(self, first: Int[Array, ""] | int, count: int) -> KeysValues:
        """Returns `count` rows from `first` on."""

        def part(stored: Array) -> Float[Array, "K S H"]:
            rows = jax.lax.dynamic_slice_in_dim(stored, first, count, axis=1)
            return jax.lax.bitcast_convert_type(rows, self.dtype)

        return KeysValues(k=part(self.k), v=part(self.v))


class KVCache(eqx.Module):
    """Keys and values of every layer, and how many tokens they stand for.

    Rows from `length` on hold anything, even NaN: causality hides them from every query until they are written. A
    layer that reads another's keys and values has None.
    """

    layers: tuple[LayerCache | None, ...]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, config: MPTConfig, capacity: int, dtype: DTypeLike) -> "KVCache":
        """Returns a cache that holds no tokens and has room for `capacity`, rounded up to whole blocks."""
        shape = (config.kv_heads, -(-capacity // BLOCK) * BLOCK, config.head_size)
        dtype = np.dtype(dtype)
        # Made by numpy, so that no size of cache costs a compilation; each array is its own, so that it can be donated.
        stored = np.zeros(shape, np.uint16 if dtype.itemsize == 2 else dtype)
        return cls(
            layers=tuple(
                LayerCache(jnp.array(stored), jnp.array(stored), dtype) if layer.kv_from is None else None
                for layer in config.layers
            ),
            length=jnp.zeros((), jnp.int32),
        )

    def resized(self, capacity: int) -> "KVCache":
        """Returns the same tokens with room for `capacity`, rounded up to whole blocks and never less than now."""
        more = -(-capacity // BLOCK) * BLOCK - self.capacity

        def padded(stored: Array) -> Array:
            return jnp.pad(stored, [*[(0, 0)] * (stored.ndim - 2), (0, max(more, 0)), (0, 0)])

        return KVCache(layers=jax.tree.map(padded, self.layers), length=self.length)

    @property
    def capacity(self) -> int:
        """How many tokens fit."""
        first = self.layers[0]
        assert first is not None  # there is no layer before it to read from
        return first.k.shape[-2]
