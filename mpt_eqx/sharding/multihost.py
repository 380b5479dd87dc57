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
        values = [found.get(name, "nothing") for found in everyones]
        if other := next((i for i, value in enumerate(values) if value != values[0]), 0):
            here, there = _from_the_difference(values[0], values[other])
            raise ShardingError(
                f"{name}: expected the same in all {len(values)} processes, found {here} in process 0 and {there} in "
                f"process {other}; start all with the same checkpoint, rules, data and arguments"
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


def _from_the_difference(*texts: str) -> list[str]:
    """Returns texts as they may be shown, from a little before where they differ."""
    alike = next((at for at, (a, *others) in enumerate(zip(*texts, strict=False)) if {a} != set(others)), 0)
    start = max(alike - 40, 0)
    return [("…" if start else "") + printable(text[start:]) for text in texts]


def _plain(value: Any) -> Any:
    """Returns something that JSON can tell apart for what it does not know."""
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return value.tolist() if isinstance(value, jax.Array | np.ndarray | np.generic) else repr(value)


def _flat(what: Mapping[str, Any], before: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in what.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[before + str(name)] = json.dumps(value, default=_plain)
    return flat


def _of_all(text: str) -> list[str]:
    """Returns the texts of all processes."""
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.asarray(len(own), np.int32)))
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(own)] = own
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]
