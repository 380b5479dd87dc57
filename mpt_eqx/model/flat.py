"""A pytree taken apart once, for programs that are called with it many times.

Taking a model apart takes the host a millisecond for thirty layers, and a call of a program does so several times: with
a GPU that is as long as some of the steps that the program runs.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from mpt_eqx.model.leaves import is_array


class Flat(eqx.Module):
    """The arrays of a pytree in one list, with what is needed to put it together again.

    Attributes:
        arrays: its arrays, and None for each leaf that is none.
        others: the leaves that are none, and None for each array.
        structure: how the leaves stand in it.
    """

    arrays: list[Any]
    others: tuple[Any, ...] = eqx.field(static=True)
    structure: Any = eqx.field(static=True)

    def whole(self) -> Any:
        """Returns the pytree."""
        leaves = [other if array is None else array for array, other in zip(self.arrays, self.others, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)


def flat(tree: Any) -> Flat:
    """Returns a pytree taken apart."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf if is_array(leaf) else None for leaf in leaves]
    return Flat(arrays, tuple(None if is_array(leaf) else leaf for leaf in leaves), structure)


def async_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function compiled as by `eqx.filter_jit(donate="all-except-first")`, whose calls do not wait.

    Those of `eqx.filter_jit` wait for their results, so that a device has nothing to do until it gets the next call.
    The first argument may be what `flat` makes of it. Arguments are given by place.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    @functools.wraps(function)
    def compiled(first: Flat, rest: Flat) -> Flat:
        return flat(function(first.whole(), *rest.whole()))

    def run(program: Callable[[Flat, Flat], Any], first: Any, rest: tuple[Any, ...]) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
            return program(first if isinstance(first, Flat) else flat(first), flat(rest))

    @functools.wraps(function)
    def call(first: Any, *rest: Any) -> Any:
        return run(compiled, first, rest).whole()

    call.lower = lambda first, *rest: run(compiled.lower, first, rest)  # type: ignore[attr-defined]
    return call
