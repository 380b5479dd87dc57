"""What several processes agree on before they compute together, where one would otherwise wait for ever for others."""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpt_eqx.errors import ShardingError, printable

T = TypeVar("T")


def agree(**what: Any) -> None:
    """Refuses to go on where processes differ: all call it at the same place, and all raise then.

    `shard`, `from_pretrained` and `generate` do it for configurations, rules, prompts and options; agree(step=step) is
    for what only you know.

    Args:
        **what: things that JSON can tell apart; of others their repr counts. A mapping is compared key by key.

    Raises:
        ShardingError: one of them is not the same in all processes.
    """
    if jax.process_count() == 1:
        return
    everyones = [json.loads(text) for text in _of_all(json.dumps(_flat(what)))]
    for name in sorted(set().union(*everyones)):
        values = [printable(found.get(name, "nothing")) for found in everyones]
        if other := next((i for i, found in enumerate(everyones) if found.get(name) != everyones[0].get(name)), 0):
            raise ShardingError(
                f"{name}: expected the same in all {len(values)} processes, found {values[0]} in process 0 and "
                f"{values[other]} in process {other}; start all with the same checkpoint, rules, data and arguments"
            )


def together(function: Callable[[], T]) -> T:
    """Returns function(), which needs no other process, or raises in every process what it raised in one.

    Raises:
        ShardingError: it failed in another process.
    """
    if jax.process_count() == 1:
        return function()
    error: Exception | None = None
    try:
        result = function()
    except Exception as caught:
        error = caught
    failures = _of_all("" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for process, failure in enumerate(failures):
        if failure:
            raise ShardingError(f"process {process} failed, and all stop with it: {printable(failure, limit=1000)}")
    return result


def _flat(what: Mapping[str, Any], before: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in what.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[before + str(name)] = json.dumps(value, default=repr)
    return flat


def _of_all(text: str) -> list[str]:
    """Returns the texts of all processes."""
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.asarray(len(own), np.int32)))
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(own)] = own
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]
