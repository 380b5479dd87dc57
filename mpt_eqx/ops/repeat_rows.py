"""Copies of cached rows with more room, which takes memory only where it is used."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from mpt_eqx.ops import cpu
from mpt_eqx.ops.platform import by_platform, on_mesh


def repeat_rows(
    stored: Shaped[Array, "B *L K S H"], length: Int[Array, " B"], *, copies: int, capacity: int
) -> Shaped[Array, "R *L K capacity H"]:
    """Returns each row of a cache `copies` times in succession, with zeros behind its tokens.

    By the CPU kernel, pages of zeros take no memory until they are written.

    Args:
        stored: keys or values.
        length: how many tokens each row has; what stands behind them need not be kept.
        copies: as above.
        capacity: how many tokens have room, ≥ S.
    """

    def by_xla(stored: Array, length: Array) -> Array:
        # The copy is for the case that nothing changes: what is returned will be donated, what came in will not.
        rows = jnp.repeat(stored, copies, axis=0) if copies > 1 else jnp.copy(stored)
        return jnp.pad(rows, [*[(0, 0)] * (rows.ndim - 2), (0, capacity - rows.shape[-2]), (0, 0)])

    if not cpu.available() or on_mesh(stored, length):
        return by_xla(stored, length)
    result = jax.eval_shape(by_xla, stored, length)
    by_kernel = functools.partial(cpu.repeat_rows, result=result)
    return by_platform(result, stored, length, default=by_xla, cpu=by_xla, kernel=by_kernel)
