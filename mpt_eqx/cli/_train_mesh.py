"""The mesh and the processes of `mpt-eqx train`."""

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mpt_eqx.errors import MPTError

if TYPE_CHECKING:
    from mpt_eqx import MPT, MPTConfig
    from mpt_eqx.sharding import ShardingRules

ROWS = ("dp", "fsdp")
"""The axes that share the rows of a batch."""


def connect(options: SimpleNamespace) -> None:
    """Meets the other processes, if there are any; before JAX does anything else.

    Raises:
        MPTError: they were not found.
    """
    if options.coordinator is None:
        return
    import jax

    where = None if options.coordinator == "auto" else options.coordinator
    try:
        jax.distributed.initialize(where, options.processes, options.process)
    except (RuntimeError, ValueError) as error:
        raise MPTError(f"--coordinator: expected a process 0 at {options.coordinator}, found none ({error})") from None


def make_mesh(axes: dict[str, int]) -> tuple[Any, "ShardingRules"]:
    """Returns a mesh, and the rules that its axes stand for: with the same axes, those of the presets.

    Raises:
        ShardingError: there are fewer devices.
    """
    from mpt_eqx import sharding

    base = sharding.TENSOR_PARALLEL if "tp" in axes else sharding.DATA_PARALLEL
    rules = dataclasses.replace(
        base, batch=tuple(axis for axis in ROWS if axis in axes) or None, embed="fsdp" if "fsdp" in axes else None,
        seq="sp" if "sp" in axes else None,
    )  # fmt: skip
    return sharding.make_mesh(**axes), rules


def new_on_mesh(config: "MPTConfig", key: Any, mesh: Any, rules: "ShardingRules") -> "MPT":
    """Returns a model with new weights, of which no device ever holds more than its part."""
    import equinox as eqx

    from mpt_eqx import MPT, sharding

    made: MPT = eqx.filter_jit(lambda key: sharding.shard(MPT(config, key=key), mesh, rules))(key)
    return made
