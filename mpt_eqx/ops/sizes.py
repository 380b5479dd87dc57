"""Sizes of arrays, which in `jax.export` may be symbols."""

from typing import Any

import jax.errors


def at_most(size: Any, limit: Any) -> bool:
    """Whether a size is known to be at most a limit; of a symbol it may not be known."""
    try:
        return bool(size <= limit)
    except jax.errors.InconclusiveDimensionOperation:
        return False
