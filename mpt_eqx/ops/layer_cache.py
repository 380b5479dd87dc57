"""Keys and values of one layer, and how a cache of them is stored."""

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt16

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
