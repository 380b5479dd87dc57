"""The blocks of a model within a program of generation: compiled once where they are alike, else traced once."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mpt_eqx.errors import GenerationError
from mpt_eqx.model import MPT
from mpt_eqx.model.leaves import is_array, with_fields
from mpt_eqx.model.linear import Linear
from mpt_eqx.model.positions import Positions
from mpt_eqx.model.taps import Tap, stack_edits
from mpt_eqx.ops.layer_cache import LayerCache
from mpt_eqx.ops.matmul import LayerWeight, picks_layers
from mpt_eqx.ops.platform import on_one_cpu


class LoopedBlocks(eqx.Module):
    """L blocks that are alike, as a scan over their numbers, so that a program does not grow with L.

    Attributes:
        block: one block, whose arrays have a leading axis of layers, but for the weights of linear maps.
        weights: of each `Linear` in `block`, the weights of all layers, which stay the arrays that they are.
    """

    block: Any
    weights: tuple[tuple[Any, ...], ...]

    def __len__(self) -> int:
        """Returns the number of layers."""
        return len(self.weights[0])

    def __call__(
        self,
        x: Float[Array, "T D"],
        positions: Positions,
        cache: LayerCache,
        keys: Any,
        *,
        tap: Tap,
        constrain: Any,
        remat: str,
    ) -> tuple[tuple[()], Float[Array, "T D"], LayerCache]:
        """Returns the output of the last block, and the cache afterwards.

        Args:
            x: the residual stream.
            positions: where the tokens stand.
            cache: of all layers.
            keys: unused, like `constrain` and `remat`: there is no dropout, no mesh and no gradient.
            tap: what is edited; nothing is captured.
            constrain: unused.
            remat: unused.
        """
        edits = stack_edits([tap.of_block(number).edits for number in range(len(self))])
        arrays, rest = eqx.partition((self.block, edits), is_array)

        def one(
            carry: tuple[Float[Array, "T D"], LayerCache], this: tuple[Int[Array, ""], Any]
        ) -> tuple[tuple[Float[Array, "T D"], LayerCache], None]:
            (x, cache), (number, part) = carry, this
            block, edits = eqx.combine(part, rest)
            weights = iter(self.weights)
            block = jax.tree.map(
                lambda leaf: with_fields(leaf, weight=LayerWeight(next(weights), number)) if _is_linear(leaf) else leaf,
                block,
                is_leaf=_is_linear,
            )
            own = Tap(edits, frozenset(), tap.query, {})
            x, read = block(x, positions, dataclasses.replace(cache, number=number), tap=own)
            return (x, dataclasses.replace(read, number=None)), None

        (x, cache), _ = jax.lax.scan(one, (x, cache), (jnp.arange(len(self)), arrays))
        return (), x, cache


class TracedOnce(eqx.Module):
    """A block as a program of its own, which JAX keeps for the next block of the same shapes and settings."""

    block: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the block returns."""
        return _run(self.block, args, kwargs)


@eqx.filter_jit
def _run(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return block(*args, **kwargs)


def with_blocks_once(model: MPT, layers: Any) -> MPT:
    """Returns the model for use within a program: its blocks in a loop if the cache has all `layers` in one.

    A model that has been through this is returned as it is.

    Raises:
        GenerationError: the blocks are not alike, so that the cache is that of another model.
    """
    if callable(model.blocks) or isinstance(model.blocks[0], TracedOnce):
        return model
    if not isinstance(layers, LayerCache):
        return eqx.tree_at(lambda m: m.blocks, model, tuple(map(TracedOnce, model.blocks)))
    if not _are_alike(model):
        raise GenerationError(
            "prefix: expected one of this model, whose blocks differ, found that of a model whose blocks are alike; "
            "make it with prefill(model, tokens)"
        )
    return eqx.tree_at(lambda m: m.blocks, model, _looped(model.blocks))


def has_layer_loop(model: MPT) -> bool:
    """Whether the blocks are alike, and the kernel computes the products of one without a copy of its weights."""
    if not on_one_cpu(*[x for x in jax.tree.leaves(model) if isinstance(x, jax.Array)]) or not _are_alike(model):
        return False
    leaves = jax.tree.leaves(model.blocks[0], is_leaf=_is_linear)
    weights = [leaf.weight for leaf in leaves if _is_linear(leaf)]
    others = [leaf for leaf in leaves if not _is_linear(leaf)]
    return all(picks_layers(weight, model.dtype) for weight in weights) and not any(
        is_array(leaf) and leaf.ndim > 1 for leaf in others
    )


def _are_alike(model: MPT) -> bool:
    """Whether the blocks differ in numbers only, and none reads the keys or the input of another."""
    if any(layer.kv_from is not None or layer.kv_x_from is not None for layer in model.config.layers):
        return False
    kinds = [(jax.tree.structure(block), [*map(_kind, jax.tree.leaves(block))]) for block in model.blocks]
    return all(kind == kinds[0] for kind in kinds)


def _looped(blocks: Sequence[Any]) -> LoopedBlocks:
    def joined(*leaves: Any) -> Any:
        if not _is_linear(leaves[0]):
            return jnp.stack(leaves) if is_array(leaves[0]) else leaves[0]
        weights.append(tuple(leaf.weight for leaf in leaves))
        bias = None if leaves[0].bias is None else jnp.stack([leaf.bias for leaf in leaves])
        return with_fields(leaves[0], weight=None, bias=bias)

    weights: list[tuple[Any, ...]] = []
    block = jax.tree.map(joined, *blocks, is_leaf=_is_linear)
    return LoopedBlocks(block, tuple(weights))


def _is_linear(module: Any) -> bool:
    return isinstance(module, Linear)


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if is_array(leaf) else leaf
