"""What loading and converting show on stderr: a bar that counts bytes, and a summary at the end."""

import sys
from collections.abc import Mapping

import jax
from tqdm import tqdm

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def is_shown(progress: bool | None) -> bool:
    """Returns `progress`, and for None whether stderr is a terminal; in a program without a console there is none."""
    if progress is not None or sys.stderr is None or sys.stderr.closed:
        return bool(progress)
    return sys.stderr.isatty()


def byte_bar(description: str, total: int, is_shown: bool) -> tqdm:
    """Returns a progress bar over `total` bytes that disappears at its end."""
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, disable=not is_shown, leave=False)


def summary(parameters: int, arrays: Mapping[str, jax.Array], seconds: float) -> str:
    """Returns a line on what was loaded: parameters, bytes, types, seconds, and this process's peak memory."""
    types = " and ".join(sorted({array.dtype.name for array in arrays.values()}))
    size = sum(array.nbytes for array in arrays.values())
    peak = peak_memory()
    end = "" if peak is None else f", peak memory {_size(peak)}"
    return f"{parameters:,} parameters, {_size(size)} {types}, {seconds:.1f} s{end}"


def peak_memory() -> int | None:
    """Returns the most memory that this process has used in bytes, None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _size(count: int) -> str:
    unit, name = next((unit for unit in UNITS if count >= unit[0]), UNITS[-1])
    return f"{count / unit:.2f} {name}"
