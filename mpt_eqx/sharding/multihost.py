"""Several processes on one mesh: checks that they compute the same, since otherwise one waits for ever."""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpt_eqx.errors import ShardingError, printable
from mpt_eqx.ops.switches import host_function

T = TypeVar("T")
P = ParamSpec("P")


def assert_same_across_processes(**what: Any) -> None:
    """Raises in every process unless all pass the same; all must call it, at the same place.

    `shard`, `from_pretrained` and `generate` do this for configurations, rules, prompts and options. Call it for what
    only your program knows: `assert_same_across_processes(step=step)`.

    Args:
        **what: values by name, compared as JSON, or by their repr where JSON has no such type. Mappings and dataclasses
            are compared field by field, arrays by value, functions by name.

    Raises:
        ShardingError: one of them is not the same in all processes.
    """
    if jax.process_count() == 1:
        return
    everyones = [json.loads(text) for text in texts_of_all(json.dumps(_flat(what)))]
    for name in sorted(set().union(*everyones)):
        values = [found.get(name, "nothing") for found in everyones]
        if other := next((i for i, value in enumerate(values) if value != values[0]), 0):
            here, there = _from_the_difference(values[0], values[other])
            raise ShardingError(
                f"{name}: expected the same in all {len(values)} processes, found {here} in process 0 and {there} in "
                f"process {other}; start all with the same checkpoint, rules, data and arguments"
            )


def check_same_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function of a model raise in all processes of its mesh unless all call it with the same arguments.

    The comparison comes before the function's own checks, which would end one process and leave the others waiting. It
    costs nothing where the mesh belongs to one process. Of a prefix the length is compared; `progress`, which may
    differ, and iterators, which can be read only once, are not.

    Args:
        function: its first parameter is called `model`. Of a generator function the arguments are compared at the call.

    Raises:
        ShardingError: (the decorated function) an argument differs; the message says which and in which process.
    """
    signature, run = inspect.signature(function), host_function(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = signature.bind(*args, **kwargs)
        layout = bound.arguments["model"].layout
        if layout is not None and layout.several_processes:
            bound.apply_defaults()
            given = {name: x for name, x in bound.arguments.items() if name not in ("model", "progress")}
            given |= given.pop("options", {})  # keyword arguments that a function collects
            if given.get("prefix") is not None:
                given["prefix"] = len(given["prefix"])
            assert_same_across_processes(**{n: x for n, x in given.items() if not isinstance(x, Iterator)})
        return run(*args, **kwargs)

    return checked


def run_or_raise_everywhere(function: Callable[[], T]) -> T:
    """Returns function(), or raises in every process if it raised in one; the function itself waits for no other.

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
    failures = texts_of_all("" if error is None else f"{type(error).__name__}: {error}")
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
    """Returns a value that JSON has for one that it has not; the same in every process."""
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return value.tolist()
    if inspect.isroutine(value):  # whose repr may hold an address
        return f"{value.__module__}.{value.__qualname__}"
    return _flat(_fields(value)) if dataclasses.is_dataclass(value) else repr(value)


def _flat(what: Mapping[str, Any], before: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in what.items():
        if dataclasses.is_dataclass(value):
            value = _fields(value)
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[before + str(name)] = json.dumps(value, default=_plain)
    return flat


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def texts_of_all(text: str) -> list[str]:
    """Returns the texts of all processes."""
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.asarray(len(own), np.int32)))
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(own)] = own
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]
