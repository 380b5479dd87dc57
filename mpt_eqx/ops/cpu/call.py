"""The compiled kernel as JAX functions."""

import ctypes
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, Int32, Shaped, UInt8

from mpt_eqx.ops.cpu.build import LIBRARY

TARGETS = ("mpt_eqx_matmul", "mpt_eqx_attention")
SWITCH = "MPT_EQX_KERNEL"
BUILD = "python -m mpt_eqx.ops.cpu.build"
DTYPES = {np.dtype(np.float32): 0, np.dtype(jnp.bfloat16): 1, np.dtype(np.float16): 2}  # as in kernel.h


def available() -> bool:
    """Tells whether there is a compiled kernel, through which decode steps go on the CPU."""
    return missing() is None


@functools.cache
def missing() -> str | None:
    """Returns why there is no kernel, or None if there is one. The environment is asked once, and the file loaded."""
    if os.environ.get(SWITCH) == "0":
        return f"it is switched off by {SWITCH}=0"
    if not LIBRARY.exists():
        return f"it was not compiled when mpt_eqx was installed; do so with {BUILD}"
    try:
        library = ctypes.cdll.LoadLibrary(str(LIBRARY))
        # Where no CPU has been started yet, JAX would find out when it starts one, and fail to.
        made, known = ctypes.c_int.in_dll(library, "mpt_eqx_ffi_minor").value, _ffi_minor()
        if made > known:
            raise RuntimeError(
                f"expected one compiled with this JAX or an older one, found interface 0.{made} > 0.{known}"
            )
        library.mpt_eqx_has_tiles  # noqa: B018  # what an older version of this package has compiled lacks it
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    except Exception as error:  # another machine's file, or another JAX's interface: all works without it
        return f"{LIBRARY} cannot be used ({error}); make it anew with {BUILD}"
    return None


def _ffi_minor() -> int:
    """Returns the minor version of the interface that the installed JAX has."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    return int(re.findall(r"#define XLA_FFI_API_MINOR (\d+)", header.read_text())[0])


@functools.cache
def has_bfloat16_dot() -> bool:
    """Tells whether the processor multiplies bfloat16 itself, as XLA does, and the kernel where it `has_tiles`."""
    file = Path("/proc/cpuinfo")
    flags = set(file.read_text().split()) if file.exists() else set[str]()
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


@functools.cache
def has_tiles() -> bool:
    """Tells whether the kernel multiplies many vectors of bfloat16 by Intel's tiles (AMX)."""
    return available() and bool(ctypes.cdll.LoadLibrary(str(LIBRARY)).mpt_eqx_has_tiles())


def matmul(
    weights: Sequence[Float[Array, "out in"] | Int8[Array, "out in"] | UInt8[Array, "out half"]],
    scales: Sequence[Float[Array, "out groups"]],
    x: Float[Array, "B in"],
    number: Int32[Array, ""] | None = None,
    *,
    many: bool,
) -> Float32[Array, "B out"]:
    """Returns W x for each of B vectors, on the CPU, summed in float32. Every sum has the same order for any B.

    Args:
        weights: of each layer, W in float32, bfloat16 or float16; or the `values` of a `QuantizedWeight`.
        scales: the `scale` of each of those; of floating weights none.
        x: the vectors.
        number: of the layer whose weight is read; None for the first.
        many: whether the weight is widened once for all vectors, rather than with each few of them; sums then have
            another order. x may be of 16 bits if so, else it is float32.
    """
    call = jax.ffi.ffi_call("mpt_eqx_matmul", jax.ShapeDtypeStruct((x.shape[0], weights[0].shape[0]), jnp.float32))
    layer = jnp.int32(0) if number is None else number
    return call(layer, x, *weights, *scales, layers=np.int64(len(weights)), many=many)


def attention(
    q: Float32[Array, "B K G T H"],
    k: Shaped[Array, "B *L K S H"],
    v: Shaped[Array, "B *L K S H"],
    slopes: Float32[Array, "K G"],
    layer: Int32[Array, " B"],
    position: Int32[Array, "B T"],
    *,
    dtype: np.dtype,
    scale: float,
    window: int | None,
) -> Float32[Array, "B K G T H"]:
    """Returns the attention of T queries in each head to the keys of a cache, on the CPU; no other keys are read.

    Every sum has the same order for any T and any B.

    Args:
        q: queries of B rows, for each of K heads of keys the G heads that read it.
        k: keys of one layer, or of L, as a `LayerCache` stores them.
        v: values, likewise.
        slopes: of ALiBi; zeros for none.
        layer: which of the layers each row reads; another number than those, from 0, gives NaN.
        position: of each row's queries; each sees the keys up to its own.
        dtype: the type of keys and values, float32, bfloat16 or float16.
        scale: as in `mpt_eqx.ops.attention`.
        window: how many keys before its own a query sees; None for all.
    """
    call = jax.ffi.ffi_call("mpt_eqx_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32))
    return call(
        q, k, v, slopes, layer, position, kind=np.int32(DTYPES[dtype]), scale=np.float32(scale),
        window=np.int64(-1 if window is None else window),
    )  # fmt: skip
