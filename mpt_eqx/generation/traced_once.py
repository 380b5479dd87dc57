"""Blocks within a program of generation: those that are alike are traced and lowered once, however many there are."""

from typing import Any

import equinox as eqx

from mpt_eqx.model import MPT
from mpt_eqx.model.block import Block


class TracedOnce(eqx.Module):
    """A block as a program of its own, which JAX keeps for the next block of the same shapes and settings."""

    block: Block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the block returns."""
        return _run(self.block, args, kwargs)


@eqx.filter_jit
def _run(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return block(*args, **kwargs)


def with_blocks_traced_once(model: MPT) -> MPT:
    """Returns the model for use within jit."""
    return eqx.tree_at(lambda m: m.blocks, model, tuple(map(TracedOnce, model.blocks)))
