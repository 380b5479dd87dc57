"""Where a computation runs: the one place that asks."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array

from mpt_eqx.ops import cpu

MAX_DECODE_ROWS = 8
"""Positions of one sequence up to which a call counts as a step of decoding; prompts and training have more."""


def by_platform(*operands: Any, default: Callable[..., Any], **platforms: Callable[..., Any]) -> Any:
    """Returns platforms[name](*operands) where the program is compiled for that platform, else default(*operands)."""
    return jax.lax.platform_dependent(*operands, default=default, **platforms)


def by_kernel(kernel: Callable[..., Array], default: Callable[..., Array], *operands: Any) -> Array:
    """Returns kernel(*operands), or default(*operands) in a program that `jax.export` makes.

    Such a program is to run in processes, and on machines, that have no kernel.
    """
    leaves, structure = jax.tree_util.tree_flatten(operands)

    def of_leaves(function: Callable[..., Array]) -> Callable[..., Array]:
        return lambda *leaves: function(*jax.tree.unflatten(structure, leaves))

    return _by_kernel.bind(*leaves, kernel=of_leaves(kernel), default=of_leaves(default))


_by_kernel = Primitive("mpt_eqx_by_kernel")
_by_kernel.def_impl(lambda *leaves, kernel, default: kernel(*leaves))


def _result(*leaves: Any, kernel: Callable[..., Array], default: Callable[..., Array]) -> jax.core.ShapedArray:
    found = jax.eval_shape(default, *leaves)
    return jax.core.ShapedArray(found.shape, found.dtype)


def _lower(context: Any, *leaves: Any, kernel: Callable[..., Array], default: Callable[..., Array]) -> Any:
    exported = context.module_context.lowering_parameters.for_export
    return mlir.lower_fun(default if exported else kernel, multiple_results=False)(context, *leaves)


_by_kernel.def_abstract_eval(_result)
mlir.register_lowering(_by_kernel, _lower)


def on_mesh(*arrays: Array) -> bool:
    """Whether a mesh is set, or any of the arrays lies on one."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)]
    return not all(mesh.empty for mesh in meshes)


def prefills_by_row(x: Array) -> bool:
    """Whether the rows of a batch that holds x are prefilled one at a time: on one CPU, with the kernel.

    There a row's result does not depend on the rest of the batch, to the bit: each row runs the same program. It costs
    nothing, because the products of a chunk of one prompt keep a CPU busy.
    """
    return cpu.available() and not on_mesh(x) and {device.platform for device in x.devices()} == {"cpu"}


def has_cudnn_attention() -> bool:
    """Whether the default backend is a GPU with cuDNN's fused attention.

    Source: jax 0.10.2, jax/_src/cudnn/fused_attention_stablehlo.py, check_compute_capability.
    """
    if jax.default_backend() != "gpu":
        return False
    gpu = jax.local_devices(backend="gpu")[0]
    return "cuda" in gpu.client.platform_version and float(gpu.compute_capability) >= 8.0
