"""What of a block is kept for its gradient, and what is computed again."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from mpt_eqx.model.positions import Positions
from mpt_eqx.model.taps import Tap
from mpt_eqx.ops.layer_cache import KeysValues, LayerCache
from mpt_eqx.ops.numerics import ROUNDED

save = jax.checkpoint_policies

INPUT = "block input"
"""The name by which a policy knows what a block reads."""

OFFLOAD = save.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=[INPUT], offload_src="device", offload_dst="pinned_host"
)
"""Keeps what a block reads, in the host's memory; where the device's memory is the host's, that moves nothing."""

POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": save.nothing_saveable,
    "dots": save.save_from_both_policies(save.dots_with_no_batch_dims_saveable, save.save_only_these_names(ROUNDED)),
    "offload": OFFLOAD,
}
"""Which results within a block are kept; None for what XLA chooses."""

IN_SCAN = save.save_from_both_policies(save.dots_saveable, save.save_only_these_names(ROUNDED))
"""In place of None within a scan, all of whose results would be kept otherwise. Products are not computed again."""


def run_block(
    block: Callable[..., Any],
    x: Float[Array, "T D"],
    positions: Positions,
    kv: KeysValues | LayerCache | None,
    x_kv: Float[Array, "T D"] | None,
    *,
    key: PRNGKeyArray | None,
    tap: Tap,
    remat: str,
    in_scan: bool = False,
) -> tuple[Float[Array, "T D"], KeysValues | LayerCache, dict[str, Array]]:
    """Returns what a block returns, and what its tap captures.

    Args:
        block: a Block, or what stands in its place.
        x: as in `Block`, like the arguments up to `tap`.
        positions: as above.
        kv: as above.
        x_kv: as above.
        key: as above.
        tap: as above.
        remat: which of POLICIES says what is kept for the gradient.
        in_scan: whether it runs in a scan, out of which XLA moves nothing.
    """
    block = block if key is None else _with_keys(block, key)
    policy = POLICIES[remat] or (IN_SCAN if in_scan else None)

    def run(x: Float[Array, "T D"]) -> tuple[Float[Array, "T D"], KeysValues | LayerCache, dict[str, Array]]:
        x = checkpoint_name(x, INPUT) if policy is OFFLOAD else x
        after, read = block(x, positions, kv, x_kv, key=key, tap=tap)
        return after, read, tap.found

    return run(x) if policy is None else jax.checkpoint(run, policy=policy, prevent_cse=not in_scan)(x)


def _with_keys(block: Any, key: PRNGKeyArray) -> Any:
    """Returns a block in which each module that has a method `with_key`, as an adapter has, was given a key of its own.

    The keys differ from those that the block makes of this one: it splits it, and into fewer than these numbers.
    """
    numbers = itertools.count(2**16)
    return jax.tree.map(
        lambda node: node.with_key(jax.random.fold_in(key, next(numbers))) if _takes_key(node) else node,
        block,
        is_leaf=_takes_key,
    )


def _takes_key(node: Any) -> bool:
    return hasattr(node, "with_key")
