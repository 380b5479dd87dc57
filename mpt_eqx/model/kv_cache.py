"""The KV cache: keys and values of the tokens seen so far, as plain arrays."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Int

from mpt_eqx.config import MPTConfig
from mpt_eqx.ops.layer_cache import BLOCK, LayerCache


class KVCache(eqx.Module):
    """Keys and values of every layer, and how many tokens they stand for.

    Rows from `length` on hold anything, even NaN: causality hides them from every query until they are written. A
    layer that reads another's keys and values has None. Generation may have all layers in one, with an axis of them.
    """

    layers: tuple[LayerCache | None, ...] | LayerCache
    length: Int[Array, ""]

    @classmethod
    def empty(
        cls, config: MPTConfig, capacity: int, dtype: DTypeLike, *, as_bits: bool = False, joined: bool = False
    ) -> "KVCache":
        """Returns a cache that holds no tokens and has room for `capacity`, rounded up to whole blocks.

        Args:
            config: of the model.
            capacity: how many tokens have room.
            dtype: the type that the model computes in.
            as_bits: whether to store 16-bit numbers as integers, which are written faster, but have no derivatives.
            joined: whether all layers are one, for a program that runs them in a loop.
        """
        shape = (config.kv_heads, -(-capacity // BLOCK) * BLOCK, config.head_size)
        dtype = np.dtype(dtype)
        # Made by numpy, so that no size of cache costs a compilation; each array is its own, so that it can be donated.
        stored = np.zeros(shape, np.uint16 if as_bits and dtype.itemsize == 2 else dtype)

        def layer(*axes: int) -> LayerCache:
            one = np.broadcast_to(stored, (*axes, *shape))
            return LayerCache(jnp.array(one), jnp.array(one), dtype)

        length = jnp.zeros((), jnp.int32)
        if joined:
            return cls(layer(config.n_layers), length)
        return cls(tuple(layer() if one.kv_from is None else None for one in config.layers), length)

    def resized(self, capacity: int) -> "KVCache":
        """Returns the same tokens with room for `capacity`, rounded up to whole blocks and never less than now."""
        more = -(-capacity // BLOCK) * BLOCK - self.capacity

        def padded(stored: Array) -> Array:
            return jnp.pad(stored, [*[(0, 0)] * (stored.ndim - 2), (0, max(more, 0)), (0, 0)])

        return KVCache(layers=jax.tree.map(padded, self.layers), length=self.length)

    @property
    def capacity(self) -> int:
        """How many tokens fit."""
        first = self.layers if isinstance(self.layers, LayerCache) else self.layers[0]
        assert first is not None  # there is no layer before it to read from
        return first.k.shape[-2]
