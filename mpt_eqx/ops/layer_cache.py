"""Keys and values of one layer, and how a cache of them is stored."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int, UInt16

from mpt_eqx.errors import MPTError

BLOCK = 256
"""Keys that a cached query reads at a time; the capacity of a cache is a multiple of it."""


class KeysValues(eqx.Module):
    """Keys and values of one layer, for S positions; heads come first, as the products read them."""

    k: Float[Array, "K S H"]
    v: Float[Array, "K S H"]


class LayerCache(eqx.Module):
    """Keys and values of one layer with room for S positions, stored.

    Generation stores bfloat16 and float16 as their bits: XLA's CPU backend cannot write into an array of theirs in
    place and would turn the whole cache into float32 and back for every token. Bits have no derivatives.

    With a `number`, the arrays hold all L layers, and this is the one of that number, from 0: a loop over layers reads
    and writes each in place.
    """

    k: Float[Array, "*L K S H"] | UInt16[Array, "*L K S H"]
    v: Float[Array, "*L K S H"] | UInt16[Array, "*L K S H"]
    dtype: np.dtype = eqx.field(static=True)
    number: Int[Array, ""] | None = None

    def write(self, new: KeysValues, positions: Int[Array, " T"]) -> "LayerCache":
        """Returns the cache with T rows written at `positions`; those beyond the capacity are dropped.

        Raises:
            MPTError: the rows are of another type than the cache, or derivatives of a cache of bits are asked for.
        """
        if new.k.dtype != self.dtype:
            raise MPTError(
                f"cache: expected one of {new.k.dtype}, in which the model computes, found {self.dtype}; "
                f"make it with KVCache.empty(model.config, capacity, '{new.k.dtype}')"
            )

        def written(old: Array, rows: Float[Array, "K T H"]) -> Array:
            rows = rows if rows.dtype == old.dtype else _bits(rows)
            if self.number is None:
                return old.at[:, positions].set(rows, mode="drop")
            return old.at[self.number, :, positions].set(jnp.swapaxes(rows, 0, 1), mode="drop")

        return LayerCache(written(self.k, new.k), written(self.v, new.v), self.dtype, self.number)

    def rows(self, first: Int[Array, ""] | int, count: int) -> KeysValues:
        """Returns `count` rows from `first` on."""

        def part(stored: Array) -> Float[Array, "K S H"]:
            if self.number is None:
                rows = jax.lax.dynamic_slice_in_dim(stored, first, count, axis=1)
            else:
                _, heads, _, size = stored.shape
                rows = jax.lax.dynamic_slice(stored, (self.number, 0, first, 0), (1, heads, count, size))[0]
            return rows if rows.dtype == self.dtype else jax.lax.bitcast_convert_type(rows, self.dtype)

        return KeysValues(k=part(self.k), v=part(self.v))


@jax.custom_jvp
def _bits(rows: Float[Array, "K T H"]) -> UInt16[Array, "K T H"]:
    return jax.lax.bitcast_convert_type(rows, jnp.uint16)


def _no_derivative(primals: tuple[Any], tangents: tuple[Any]) -> Any:
    if not isinstance(tangents[0], SymbolicZero):
        raise MPTError(
            "cache: expected one of KVCache.empty(model.config, capacity, dtype), through which derivatives go, found "
            "one of generation, which holds 16-bit numbers as integers"
        )
    bits = _bits(*primals)
    return bits, SymbolicZero(jax.typeof(bits).to_tangent_aval())


_bits.defjvp(_no_derivative, symbolic_zeros=True)
