"""Where a computation runs: the one place that asks."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array

from mpt_eqx.ops import cpu
from mpt_eqx.ops.switches import library_switches

T = TypeVar("T")

LEAST_UNWRITTEN = 2**20
"""Bytes of an array from which on it is worth to give back what is not written."""

MAX_DECODE_ROWS = 8
"""Positions of one sequence up to which a call counts as a step of decoding; prompts and training have more."""

Functions = tuple[Callable[..., Array], ...]


def by_platform(
    result: jax.ShapeDtypeStruct,
    *operands: Any,
    default: Callable[..., Array],
    cpu: Callable[..., Array],
    kernel: Callable[..., Array] | None = None,
    gpu: Callable[..., Array] | None = None,
    gpu_kernel: Callable[..., Array] | None = None,
) -> Array:
    """Returns what one of the functions gives: `cpu` in a program for CPUs, `gpu`, if given, for GPUs, else `default`.

    With `kernel`, that takes the place of `cpu`, and `gpu_kernel` that of `gpu`, but in programs that `jax.export`
    makes: they are to run in processes, and on machines, that have no kernel. Only the function that a program needs is
    traced, when it is lowered, so that none may use traced values apart from its operands; what is returned has a vmap,
    and no derivative.

    Args:
        result: shape and type of what each function returns.
        operands: what they take.
        default: the formula.
        cpu: the same for CPUs, in XLA.
        kernel: the same by the CPU kernel.
        gpu: the same for GPUs, in XLA.
        gpu_kernel: the same by a kernel for NVIDIA's GPUs.
    """
    leaves, structure = jax.tree_util.tree_flatten(operands)
    functions = (default, cpu, kernel or cpu, gpu or default, gpu_kernel or gpu or default)
    # The precision is that of the code around the call, which lowering is not inside of.
    return _by_platform.bind(
        *leaves, functions=functions, structure=structure, axes=(), result=result,
        precision=jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
    )  # fmt: skip


_by_platform = Primitive("by_platform")


def _run(*leaves: Any, functions: Functions, **how: Any) -> Array:
    default, _, kernel, gpu, gpu_kernel = (_of_leaves(function, **how) for function in functions)
    return jax.lax.platform_dependent(*leaves, cpu=kernel, cuda=gpu_kernel, rocm=gpu, default=default)


def _result(*_: Any, result: jax.ShapeDtypeStruct, **__: Any) -> jax.core.ShapedArray:
    return jax.core.ShapedArray(result.shape, result.dtype)


def _batch(leaves: Any, batched: Any, *, axes: tuple[Any, ...], result: jax.ShapeDtypeStruct, **rest: Any) -> Any:
    size = next(leaf.shape[axis] for leaf, axis in zip(leaves, batched, strict=True) if axis is not None)
    result = jax.ShapeDtypeStruct((size, *result.shape), result.dtype)
    return _by_platform.bind(*leaves, axes=(*axes, tuple(batched)), result=result, **rest), 0


def _lower(context: Any, *leaves: Any, functions: Functions, **how: Any) -> Any:
    default, cpu, kernel, gpu, gpu_kernel = (_of_leaves(function, **how) for function in functions)
    exported = context.module_context.lowering_parameters.for_export
    on_cpu, on_cuda = (cpu, gpu) if exported else (kernel, gpu_kernel)
    platforms = set(context.platforms or context.module_context.platforms)
    if len(platforms) == 1:
        function = {"cpu": on_cpu, "cuda": on_cuda, "rocm": gpu}.get(platforms.pop(), default)
    else:
        function = functools.partial(jax.lax.platform_dependent, cpu=on_cpu, cuda=on_cuda, rocm=gpu, default=default)
    return mlir.lower_fun(function, multiple_results=False)(context, *leaves)


def _of_leaves(
    function: Callable[..., Array], structure: Any, axes: tuple[Any, ...], precision: str | None, **_: Any
) -> Callable[..., Array]:
    """Returns the function of the operands' leaves, under each vmap, with the switches of where it was called."""

    @library_switches()
    def of_leaves(*leaves: Array) -> Array:
        with jax.default_matmul_precision(precision):
            return function(*jax.tree.unflatten(structure, leaves))

    for batched in axes:
        of_leaves = jax.vmap(of_leaves, in_axes=batched)
    return of_leaves


_by_platform.def_impl(_run)
_by_platform.def_abstract_eval(_result)
batching.primitive_batchers[_by_platform] = _batch
mlir.register_lowering(_by_platform, _lower)


def on_mesh(*arrays: Array) -> bool:
    """Whether a mesh is set, or any of the arrays lies on one."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)]
    return not all(mesh.empty for mesh in meshes)


def varying_as(tree: T, *operands: Any) -> T:
    """Returns arrays that vary, within `jax.shard_map`, over the axes that the operands do.

    What a loop begins with must vary as what it makes of it does; elsewhere nothing changes.
    """
    axes = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands)))

    def one(x: Array) -> Array:
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(one, tree)


def prefills_by_row(x: Array) -> bool:
    """Whether the rows of a batch that holds x are prefilled one at a time: on one CPU, with the kernel.

    There a row's result does not depend on the rest of the batch, to the bit: each row runs the same program. It costs
    nothing, because the products of a chunk of one prompt keep a CPU busy.
    """
    return cpu.available() and on_one_cpu(x)


def over_rows(function: Callable[..., Any], *rows: Any) -> Any:
    """Returns `jax.vmap(function)(*rows)`; of one row without an axis for it.

    XLA's CPU backend, as of jaxlib 0.10.2, takes 60 times as long for sums of products with an axis of one before
    them, which the gradients of norms and softmaxes are; that of jaxlib 0.12 does not.
    """
    if any(x.shape[0] != 1 for x in jax.tree.leaves(rows)):
        return jax.vmap(function)(*rows)
    return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], rows)))


def on_one_cpu(*arrays: Array) -> bool:
    """Whether arrays lie on a CPU, and on no mesh."""
    devices = {device for x in arrays for device in x.devices()}
    return not on_mesh(*arrays) and len(devices) == 1 and {device.platform for device in devices} == {"cpu"}


def is_default(platform: str) -> bool:
    """Whether "cpu" or "gpu" is where JAX puts arrays unless told otherwise."""
    return jax.default_backend() == platform


def nvidia_capability() -> tuple[int, ...]:
    """Returns the compute capability of NVIDIA's GPU that is the default backend, such as (9, 0); (0, 0) for none."""
    if not is_default("gpu"):
        return (0, 0)
    gpu = jax.local_devices(backend="gpu")[0]
    return tuple(map(int, gpu.compute_capability.split("."))) if "cuda" in gpu.client.platform_version else (0, 0)


def max_cudnn_head() -> int:
    """Returns the largest head size of cuDNN's fused attention, backward too, on the default backend; 0 for none.

    Source: jax 0.11.2, jax/_src/cudnn/fused_attention_stablehlo.py, check_is_flash_attention, check_compute_capability.
    """
    capability = nvidia_capability()
    # Consumers' chips of Blackwell, 12.0, have the shared memory of Ampere's.
    return 0 if capability < (8, 0) else 256 if (9, 0) <= capability < (12, 0) else 128


def unwritten(zeros: Array) -> Array:
    """Returns an array of zeros on one CPU, whose memory is given back until something else is written to it.

    XLA has written the zeros; pages that the system takes back are zeros again when they are next touched.
    """
    if sys.platform.startswith("linux") and zeros.nbytes >= LEAST_UNWRITTEN:
        start = jax.block_until_ready(zeros).unsafe_buffer_pointer()
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only
        size = (start + zeros.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        # numpy asks for huge pages, and memory that it had may be that of the array.
        for advice in (mmap.MADV_NOHUGEPAGE, mmap.MADV_DONTNEED):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), advice)
    return zeros


def trim_memory() -> None:
    """Gives memory that was freed back to the system, where arrays lie in it; glibc keeps what compiling has freed."""
    if sys.platform.startswith("linux") and is_default("cpu"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # musl has none, and keeps less
            trim(ctypes.c_size_t(0))
