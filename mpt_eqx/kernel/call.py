"""The compiled kernel as a JAX function."""

import ctypes
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, UInt8

LIBRARY = Path(__file__).parent / "libmatvec.so"
TARGET = "mpt_eqx_matvec"
SWITCH = "MPT_EQX_KERNEL"
BUILD = "python -m mpt_eqx.kernel.build"


def available() -> bool:
    """Tells whether there is a compiled kernel, and products of few rows on the CPU go through it."""
    return missing() is None


@functools.cache
def missing() -> str | None:
    """Returns why there is no kernel, or None if there is one. The environment is asked once, and the file loaded."""
    if os.environ.get(SWITCH) == "0":
        return f"it is switched off by {SWITCH}=0"
    if not LIBRARY.exists():
        return f"it was not compiled when mpt_eqx was installed; do so with {BUILD}"
    try:
        function = getattr(ctypes.cdll.LoadLibrary(str(LIBRARY)), TARGET)
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(function), platform="cpu")
    except Exception as error:  # another machine's file, or another JAX's interface: all works without it
        return f"{LIBRARY} cannot be used ({error}); make it anew with {BUILD}"
    return None


def matvec(
    weight: Float[Array, "out in"] | Int8[Array, "out in"] | UInt8[Array, "out half"],
    scale: Float[Array, "out groups"] | None,
    x: Float32[Array, "B in"],
) -> Float32[Array, "B out"]:
    """Returns W x for each of B vectors, on the CPU. Every sum has the same order for any B.

    Args:
        weight: W in float32, bfloat16 or float16; or the `values` of a `QuantizedWeight`.
        scale: the `scale` of that.
        x: the vectors.
    """
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    none = jnp.zeros(0, jnp.float32)
    return jax.ffi.ffi_call(TARGET, result)(weight, none if scale is None else scale, x)
