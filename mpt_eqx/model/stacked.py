"""Blocks that are alike as one block, whose arrays have a leading axis of layers, run by a scan."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from mpt_eqx.model.block import Block
from mpt_eqx.model.leaves import is_array
from mpt_eqx.model.positions import Positions
from mpt_eqx.model.remat import run_block
from mpt_eqx.model.taps import Tap, stack_edits
from mpt_eqx.ops.layer_cache import LayerCache
from mpt_eqx.ops.switches import model_function


class StackedBlocks(eqx.Module):
    """L blocks that are alike, as one: `blocks[i]` is the i-th of them, made of slices.

    Attributes:
        block: a Block, or what stands in its place; each of its arrays has a leading axis of L layers.
    """

    block: Any

    def __len__(self) -> int:
        """Returns the number of layers."""
        return int(next(leaf.shape[0] for leaf in jax.tree.leaves(self.block) if is_array(leaf)))

    def __getitem__(self, layer: int) -> Block:
        """Returns one of the blocks."""
        if not -len(self) <= layer < len(self):
            raise IndexError(layer)
        block: Block = jax.tree.map(lambda leaf: leaf[layer] if is_array(leaf) else leaf, self.block)
        return block

    def __iter__(self) -> Iterator[Block]:
        """Returns an iterator over the blocks."""
        return (self[layer] for layer in range(len(self)))

    def __call__(
        self,
        x: Float[Array, "T D"],
        positions: Positions,
        cache: Sequence[LayerCache | None],
        keys: Shaped[Array, "L ..."] | Sequence[None],
        *,
        tap: Tap,
        constrain: Callable[[Array], Array],
        remat: str,
    ) -> tuple[Float[Array, "L T D"], Float[Array, "T D"], list[LayerCache | None]]:
        """Returns the input of each block, the output of the last, and of a cache what it is afterwards.

        Args:
            x: the residual stream.
            positions: where the tokens stand.
            cache: of each block, or None for each.
            keys: randomness of each block, or None for each.
            tap: what is captured and edited.
            constrain: applied to the residual stream after each block.
            remat: as in `run_block`.
        """
        of_blocks = [tap.of_block(number) for number in range(len(self))]
        wanted = frozenset(place for of_block in of_blocks for place in of_block.wanted)
        edits = stack_edits([of_block.edits for of_block in of_blocks])
        cached = None if cache[0] is None else jax.tree.map(lambda *layers: jnp.stack(layers), *cache)
        arrays, rest = eqx.partition((self.block, edits), is_array)
        random = keys if isinstance(keys, jax.Array) else None

        def one(x: Float[Array, "T D"], this: tuple[Any, Any, Any]) -> tuple[Float[Array, "T D"], tuple[Any, ...]]:
            part, kv, key = this
            block, edits = eqx.combine(part, rest)
            of_block = Tap(edits, wanted, tap.query, {})
            after, read, found = run_block(
                block, x, positions, kv, None, key=key, tap=of_block, remat=remat, in_scan=True
            )
            return constrain(after), (x, None if kv is None else read, found)

        x, (inputs, written, found) = jax.lax.scan(one, x, (arrays, cached, random), length=len(self))
        for number, of_block in enumerate(of_blocks):
            tap.keep(number, {place: found[place][number] for place in of_block.wanted})
        return inputs, x, [jax.tree.map(lambda leaf, i=i: leaf[i], written) for i in range(len(self))]


def unstack(model: Any) -> Any:
    """Returns the model with single blocks, where they are stacked; the inverse of `stack`, outside jit and inside.

    Where the weights are large, unstack once and keep the result: each call copies them.
    """
    return _unstacked(model) if isinstance(model.blocks, StackedBlocks) else model


@model_function
def _unstacked(model: Any) -> Any:
    return eqx.tree_at(lambda m: m.blocks, model, tuple(model.blocks))
