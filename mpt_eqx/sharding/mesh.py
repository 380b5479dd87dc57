"""Meshes: grids of devices with named axes."""

import math

import jax
from jax.sharding import Mesh

from mpt_eqx.errors import ShardingError
from mpt_eqx.sharding.multihost import assert_same_across_processes


def make_mesh(**axes: int) -> Mesh:
    """Returns a mesh over the first devices that JAX has, with axes of these sizes, such as `fsdp=2, tp=4`.

    Raises:
        ShardingError: it needs more devices than there are, or a size is not a positive integer.
    """
    for name, size in axes.items():
        if not isinstance(size, int) or size < 1:
            raise ShardingError(f"{name}: expected a number of devices, ≥ 1, found {size!r}")
    needed, there = math.prod(axes.values()), jax.device_count()
    if needed > there:
        raise ShardingError(
            f"mesh: expected at most {there} devices, which JAX has, found {needed} "
            f"({' × '.join(f'{name}={size}' for name, size in axes.items())}); make it smaller, or, to try it on a "
            f"CPU, set XLA_FLAGS=--xla_force_host_platform_device_count={needed} before JAX starts"
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=jax.devices()[:needed])


def assert_same_mesh(mesh: Mesh) -> None:
    """Raises a ShardingError if a mesh of several processes leaves one out, or is not the same in all of them."""
    if not mesh.is_multi_process:
        return
    here = {device.process_index for device in mesh.devices.flat}
    if missing := sorted(set(range(jax.process_count())) - here):
        raise ShardingError(
            f"mesh: expected devices of all {jax.process_count()} processes, or of one, found none of process "
            f"{missing[0]}; make it of all of jax.devices()"
        )
    assert_same_across_processes(mesh=dict(mesh.shape), devices=[device.id for device in mesh.devices.flat])
