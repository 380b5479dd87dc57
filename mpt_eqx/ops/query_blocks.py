"""Attention without a cache, some queries after the other, so that memory grows with the number of positions only."""

import bisect
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mpt_eqx.ops.sizes import at_most

BLOCK = 128
"""Queries whose scores are held at a time."""

PARTS = 4
"""Parts of the queries that have keys of their own number, because those after a part are hidden from all of it."""

Formula = Callable[[Array, Array, Array, Array, Array, Array | None], Float[Array, "N T H"]]
"""Of queries, keys, values, the positions of queries and of keys, and which keys may be seen."""


def in_query_blocks(
    formula: Formula,
    q: Float[Array, "N T H"],
    k: Float[Array, "K T H"],
    v: Float[Array, "K T H"],
    positions: Int[Array, " T"],
    allowed: Bool[Array, "T T"] | None,
    window: int | None,
) -> Float[Array, "N T H"]:
    """Returns `formula(q, k, v, positions, positions, allowed)`, computed for a block of queries after the other.

    No scores are kept for the gradient: those of a block are computed again. A query that sees nothing may get the mean
    of fewer values than the formula's. With few queries, or a symbolic number of them, the formula is called once.

    Args:
        formula: attention of queries to keys, given both, the values, the positions of both, and which may be seen.
        q: queries.
        k: keys.
        v: values.
        positions: where all of them stand; they increase.
        allowed: True where a query may see a key, causality apart; None for all.
        window: how many keys before its own a query sees; None for all.
    """
    length = q.shape[1]
    if not isinstance(length, int) or at_most(length, 2 * BLOCK):
        return formula(q, k, v, positions, positions, allowed)
    # Otherwise XLA would copy all of the three, which are transposed, for each block.
    q, k, v = jax.lax.optimization_barrier((q, k, v))
    size = -(-length // (PARTS * BLOCK)) * BLOCK
    edges = sorted({*range(0, length, size), length // BLOCK * BLOCK, length})
    sizes = [stop - start for start, stop in itertools.pairwise(edges)]
    # The gradient of a split is one concatenation, that of slices a sum of arrays that are padded with zeros.
    queries, keys, values = (jax.lax.split(x, sizes, axis=1) for x in (q, k, v))

    def part(number: int) -> Float[Array, "N P H"]:
        """Returns the result for one part of the queries, which is one block or whole blocks."""
        start, stop = edges[number : number + 2]
        first = 0 if window is None else max(start - window, 0)
        seen = slice(bisect.bisect_right(edges, first) - 1, number + 1)
        skip = first - edges[seen.start]
        k, v = (jnp.concatenate(parts[seen], axis=1)[:, skip:] for parts in (keys, values))

        def block(q: Array, here: Array, allowed: Array | None) -> Array:
            return formula(q, k, v, here, positions[first:stop], allowed)

        allowed_here = None if allowed is None else allowed[start:stop, first:stop]
        rows = (queries[number], positions[start:stop], allowed_here)
        if stop - start <= BLOCK:
            return jax.checkpoint(block)(*rows)
        axes = (1, 0, 0)
        split = tuple(
            None if x is None else jnp.moveaxis(x.reshape(*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :]), axis, 0)
            for x, axis in zip(rows, axes, strict=True)
        )
        found = jax.lax.map(lambda rows: jax.checkpoint(block, prevent_cse=False)(*rows), split)
        return jnp.moveaxis(found, 0, 1).reshape(rows[0].shape)

    return jnp.concatenate([part(number) for number in range(len(sizes))], axis=1)
