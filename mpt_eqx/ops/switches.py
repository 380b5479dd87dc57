"""JAX's switches that look for mistakes in a user's own code, and would find what this library means."""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import jax

T = TypeVar("T")


@contextlib.contextmanager
def library_switches() -> Iterator[None]:
    """Allows transfers from the host and arrays of other ranks, as JAX does by itself; as a decorator, in a function.

    The values are JAX's defaults, so that nothing is traced or compiled anew where a user has changed nothing.
    """
    with jax.numpy_rank_promotion("allow"), jax.transfer_guard("allow"):
        yield


def each_with_library_switches(items: Iterator[T]) -> Iterator[T]:
    """Yields the items of an iterator, which runs with these switches; who takes them runs with their own."""
    while True:
        with library_switches():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
