"""JAX's switches that look for mistakes in a user's own code, and would find what this library means.

Explicit axes are one of them. A user may have them, by `jax.set_mesh` or in the types of arrays; what this library
computes is written for Auto axes. So its functions cast at their border, which moves no array.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")
P = ParamSpec("P")


@contextlib.contextmanager
def library_switches() -> Iterator[None]:
    """Allows transfers from the host and arrays of other ranks, as JAX does by itself; as a decorator, in a function.

    The values are JAX's defaults, so that nothing is traced or compiled anew where a user has changed nothing.
    """
    with jax.numpy_rank_promotion("allow"), jax.transfer_guard("allow"):
        yield


def library_function(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function of arrays, the model first, run with these switches and Auto axes, traced or not.

    Its results have Explicit axes where `jax.set_mesh` sets some, or where another argument than the model has them.
    They are then replicated, but for axes that `jax.vmap` adds. Elsewhere they have Auto axes.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with library_switches():
            context = jax.sharding.get_abstract_mesh()
            mesh = context if _is_explicit(context) else _explicit_mesh(*args, **kwargs)
            if mesh is None:
                return function(*args, **kwargs)
            given, (args, kwargs) = _explicit_mesh(*args[1:], **kwargs), _with_auto_axes((args, kwargs))
            with jax.sharding.use_abstract_mesh(with_auto_axes(mesh.abstract_mesh)):
                found = function(*args, **kwargs)
            if _is_explicit(context):
                return _replicated(found, context)
            # jax.grad cannot start from a scalar with Explicit axes where no mesh is set.
            return jax.tree.map(lambda x: x if given is None or not np.ndim(x) else _replicated(x, given), found)

    return run


def host_function(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function of models and values of the host run as `host_context` says, given arrays with Auto axes."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with host_context():
            if _explicit_mesh(*args, **kwargs) is not None:
                args, kwargs = _with_auto_axes((args, kwargs))
            return function(*args, **kwargs)

    return run


def model_function(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a `host_function` return the arrays of a model with the types of axes that the given one has."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        mesh, found = _explicit_mesh(*args, **kwargs), host_function(function)(*args, **kwargs)
        if not isinstance(mesh, Mesh):
            return found
        auto = with_auto_axes(mesh)

        def one(x: Any) -> Any:
            if not isinstance(x, jax.Array) or _mesh(x) != auto:
                return x
            sharding: Any = x.sharding
            return jax.device_put(x, sharding.update(mesh=mesh))

        explicit: T = jax.tree.map(one, found)
        return explicit

    return run


@contextlib.contextmanager
def host_context() -> Iterator[None]:
    """Applies these switches, and unsets a mesh with Explicit axes: arrays themselves say where they lie."""
    with library_switches(), contextlib.ExitStack() as stack:
        context = jax.sharding.get_abstract_mesh()
        if _is_explicit(context):
            try:
                stack.enter_context(jax.set_mesh(None))
            except ValueError:  # traced, where no mesh can be unset
                stack.enter_context(jax.sharding.use_abstract_mesh(with_auto_axes(context)))
        yield


def each_in_host_context(items: Iterator[T]) -> Iterator[T]:
    """Yields the items of an iterator, which runs in `host_context`; who takes them runs in their own."""
    while True:
        with host_context():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def with_auto_axes(mesh: Any) -> Any:
    """Returns the mesh with Auto axes in place of Explicit ones; XLA propagates shardings along these."""
    if not _is_explicit(mesh):
        return mesh
    types = [AxisType.Auto if kind == AxisType.Explicit else kind for kind in mesh.axis_types]
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names, axis_types=tuple(types))
    return mesh.update_axis_types(dict(zip(mesh.axis_names, types, strict=True)))


def _is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    return AxisType.Explicit in mesh.axis_types


def _explicit_mesh(*args: Any, **kwargs: Any) -> Mesh | AbstractMesh | None:
    """Returns the mesh of the first array among arguments that has Explicit axes."""
    # A model has no iterators, and to ask each of its nodes takes longer than all else.
    leaves = (
        jax.tree.leaves(arg, is_leaf=None if isinstance(arg, eqx.Module) else _is_iterator)
        for arg in (*args, *kwargs.values())
    )
    arrays = (x for x in itertools.chain.from_iterable(leaves) if isinstance(x, jax.Array))
    return next((_mesh(x) for x in arrays if _is_explicit(jax.typeof(x).sharding.mesh)), None)


def _mesh(x: jax.Array) -> Mesh | AbstractMesh:
    """Returns an array's mesh, with its devices where they are known."""
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
    mesh: Mesh | AbstractMesh = (sharding if isinstance(sharding, NamedSharding) else jax.typeof(x).sharding).mesh
    return mesh


def _with_auto_axes(tree: Any) -> Any:
    """Returns the tree with Auto axes in its arrays' types; none of a concrete array's memory is copied."""
    context = jax.sharding.get_abstract_mesh()

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        mesh = _mesh(x)
        if mesh.empty and _is_explicit(context) and isinstance(x, jax.core.Tracer):
            x, mesh = _replicated(x, context), context  # so that its cotangent has the axes of the context
        if not _is_explicit(mesh):
            return x
        if isinstance(mesh, Mesh):
            return jax.device_put(x, x.sharding.update(mesh=with_auto_axes(mesh)))
        return _resharded(x, with_auto_axes(mesh))

    return jax.tree.map(one, tree, is_leaf=_is_iterator)


def _is_iterator(node: Any) -> bool:
    """Tells whether a node of arguments can be read only once; JAX warns of those."""
    return isinstance(node, Iterator)


def _replicated(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns the tree with its arrays replicated over a mesh with Explicit axes."""
    return jax.tree.map(lambda x: _resharded(x, mesh) if isinstance(x, jax.Array) else x, tree)


def _resharded(x: jax.Array, mesh: Mesh | AbstractMesh) -> jax.Array:
    """Returns an array with the axes of a mesh: replicated over Explicit ones, left to XLA along Auto ones."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*(None,) * x.ndim)))
