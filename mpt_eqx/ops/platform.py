"""Where a computation runs: the one place that asks."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

MAX_DECODE_ROWS = 8
"""Positions of one sequence up to which a call counts as a step of decoding; prompts and training have more."""


def by_platform(*operands: Any, default: Callable[..., Any], **platforms: Callable[..., Any]) -> Any:
    """Returns platforms[name](*operands) where the program is compiled for that platform, else default(*operands)."""
    return jax.lax.platform_dependent(*operands, default=default, **platforms)


def on_mesh(*arrays: Array) -> bool:
    """Whether a mesh is set, or any of the arrays lies on one."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)]
    return not all(mesh.empty for mesh in meshes)


def has_cudnn_attention() -> bool:
    """Whether the default backend is a GPU with cuDNN's fused attention.

    Source: jax 0.10.2, jax/_src/cudnn/fused_attention_stablehlo.py, check_compute_capability.
    """
    if jax.default_backend() != "gpu":
        return False
    gpu = jax.local_devices(backend="gpu")[0]
    return "cuda" in gpu.client.platform_version and float(gpu.compute_capability) >= 8.0
