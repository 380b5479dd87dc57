"""What is given to a model, as arrays: it may come as lists, and be of the wrong shape."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

from mpt_eqx.errors import MPTError


def as_tokens(tokens: Any, vocab_size: int, call: str = "model") -> Int[Array, " T"]:
    """Returns the token ids of one sequence as an array.

    Args:
        tokens: an array of any kind, or a list.
        vocab_size: ids are smaller, which is checked where they can be seen, that is outside of jit.
        call: what is mapped over a batch.

    Raises:
        MPTError: they are not the ids of one sequence.
    """
    given = tokens if isinstance(tokens, jax.Array) else _as_numpy("tokens", tokens)
    if given.ndim != 1:
        many = f"use jax.vmap({call})(tokens) for a batch" if given.ndim else f"use {call}(tokens) without jax.vmap"
        raise MPTError(f"tokens: expected the ids of one sequence, found an array of shape {given.shape}; {many}")
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise MPTError(f"tokens: expected whole numbers, found {given.dtype}; use tokens.astype(int)")
    if not isinstance(given, jax.core.Tracer) and given.size:
        # By numpy, because under jit even a constant's minimum would be traced.
        low, high = int(np.asarray(given).min()), int(np.asarray(given).max())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise MPTError(f"tokens: expected ids from 0 to {vocab_size - 1} (vocab_size), found {bad}")
    return given if isinstance(given, jax.Array) else jnp.asarray(given, jnp.int32)


def as_row(name: str, values: Any, shape: tuple[Any, ...]) -> Array | None:
    """Returns mask or sequence_ids as an array; None stays None.

    Raises:
        MPTError: there is not one value for each token.
    """
    if values is None:
        return None
    array = values if isinstance(values, jax.Array) else _as_numpy(name, values)
    if array.shape != shape:
        raise MPTError(f"{name}: expected the shape of tokens, {shape}, found {array.shape}")
    return jnp.asarray(array)


def as_embeddings(embeddings: Any, tokens: Any, width: int, dtype: DTypeLike) -> Float[Array, "T D"]:
    """Returns the embeddings of one sequence as an array of the model's type.

    Raises:
        MPTError: there is not one vector of the model's width for each token.
    """
    array = embeddings if isinstance(embeddings, jax.Array) else jnp.asarray(_as_numpy("embeddings", embeddings))
    rows = "T" if tokens is None else np.shape(tokens)[0]
    if array.ndim != 2 or array.shape[1] != width or (tokens is not None and array.shape[0] != rows):
        raise MPTError(f"embeddings: expected shape ({rows}, {width}), found {array.shape}")
    return array.astype(dtype)


def _as_numpy(name: str, values: Any) -> np.ndarray:
    """Returns what numpy makes of values; an empty list has whole numbers."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # lists of several lengths; tensors of another library
        found = f"{type(values).__name__} ({str(error)[:100]})"
        raise MPTError(f"{name}: expected a list or an array of numbers, found {found}") from None
    if np.issubdtype(array.dtype, np.character):
        raise MPTError(f"{name}: expected numbers, found text; encode it with mpt_eqx.text.load_tokenizer")
    if np.issubdtype(array.dtype, np.object_):
        raise MPTError(f"{name}: expected numbers, found other objects")
    return array if array.size else array.astype(np.int32)


def as_batch(name: str, values: Any, shape: tuple[Any, ...] | None = None) -> Array:
    """Returns a batch of rows, of a shape if it is given, as an array.

    Raises:
        MPTError: it has another shape, or its rows have several lengths.
    """
    array = values if isinstance(values, jax.Array) else _as_numpy(name, values)
    if shape is not None and array.shape != shape:
        raise MPTError(f"{name}: expected the shape of tokens, {shape}, found {array.shape}")
    if array.ndim != 2:
        one = f"; use {name}[None] for one sequence" if array.ndim == 1 else ""
        raise MPTError(f"{name}: expected a batch of sequences, found an array of shape {array.shape}{one}")
    return jnp.asarray(array)
