"""resize_vocab: a model with more tokens, or fewer."""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import MPTError
from mpt_eqx.model import MPT
from mpt_eqx.model.leaves import with_fields
from mpt_eqx.ops.quantized import QuantizedWeight, dequantize
from mpt_eqx.ops.switches import model_function
from mpt_eqx.sharding import shard
from mpt_eqx.surgery.quantization import quantize_weight

SPREAD = math.sqrt(1e-5)
"""Deviation of new rows, in deviations of the old ones: small, so that new tokens change no probability much."""


@model_function
def resize_vocab(model: MPT, n: int, *, key: PRNGKeyArray | None = None) -> MPT:
    """Returns the model with n tokens: with rows added to the embedding and an untied lm_head, or cut off.

    Rows that stay are the same to the bit, also quantised ones. New rows are the mean of the old ones, so that
    a new token is at first as probable as an average one, or with a key are drawn about it: from the normal
    distribution of the old rows' mean and 1e-5 of their covariance (John Hewitt, "Initializing New Word Embeddings for
    Pretrained Language Models", 2021, whose recipe transformers follows, too).

    Also for a model whose embedding has another number of rows than its config says: the result's config agrees.

    Args:
        model: the model, in any type; on a mesh the result is sharded alike.
        n: the number of tokens, `config.vocab_size` of the result, ≥ 1.
        key: randomness of new rows; None for the mean itself.

    Raises:
        MPTError: n is no such number, a token of the configuration (end, beginning, padding) would be cut off, or the
            embedding is no matrix of floating-point numbers or a quantised one.
        ShardingError: the mesh does not divide the new number of rows.
    """
    check_count(n)
    config = _config(model.config, int(n))
    modules = [model.wte] if model.lm_head is None else [model.wte, model.lm_head]
    weights = [getattr(module, "weight", module) for module in modules]
    keys = [None] * len(weights) if key is None else list(jax.random.split(key, len(weights)))
    names = ("wte.weight", "lm_head.weight")
    resized = [_resized(*args, int(n)) for args in zip(names, weights, keys, strict=False)]
    changed = with_fields(model, config=config)

    def where(m: MPT) -> list[Any]:
        return [m.wte.weight] if m.lm_head is None else [m.wte.weight, m.lm_head.weight]

    changed = eqx.tree_at(where, changed, resized, is_leaf=lambda node: isinstance(node, QuantizedWeight))
    if model.layout is None or not isinstance(model.layout.mesh, Mesh):
        return changed
    return shard(changed, model.layout.mesh, model.layout.rules)


def check_count(n: Any) -> None:
    """Raises an MPTError unless n is a number of tokens."""
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 1 <= n < 2**31:
        raise MPTError(f"n: expected a whole number from 1 to 2147483647, found {n!r}")


def _config(config: MPTConfig, n: int) -> MPTConfig:
    ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    kept = {"pad_token_id": (config.pad_token_id,), "bos_token_id": (config.bos_token_id,), "eos_token_id": ends}
    for name, ids in kept.items():
        for token in ids:
            if token is not None and n <= token < config.vocab_size:
                raise MPTError(
                    f"n: expected more than {token}, which is config.{name}, found {n}; load the model with "
                    f"config_overrides={{{name!r}: None}} to do without it"
                )
    return dataclasses.replace(config, vocab_size=n)


def _resized(name: str, weight: Any, key: PRNGKeyArray | None, n: int) -> Array | QuantizedWeight:
    """Returns a matrix with n rows."""
    if isinstance(weight, QuantizedWeight):
        rows = len(weight.values)
        if n <= rows:
            return jax.tree.map(lambda array: array[:n], weight)
        new = _new_rows(dequantize(weight.values, weight.scale), n - rows, key)
        scheme = "int4" if weight.values.dtype == jnp.uint8 else "int8"
        added = quantize_weight(name, new, scheme)
        return QuantizedWeight(
            jnp.concatenate([weight.values, added.values]), jnp.concatenate([weight.scale, added.scale]), weight.dtype
        )
    if getattr(weight, "ndim", None) != 2 or not jnp.issubdtype(weight.dtype, jnp.floating):
        raise MPTError(
            f"{name}: expected a matrix of floating-point numbers, found {type(weight).__name__}; resize the model "
            f"before it is wrapped"
        )
    if n <= len(weight):
        return jnp.asarray(weight[:n])
    new = _new_rows(jnp.asarray(weight), n - len(weight), key)
    return jnp.concatenate([jnp.asarray(weight), new.astype(weight.dtype)])


def _new_rows(old: Float[Array, "V D"], count: int, key: PRNGKeyArray | None) -> Float[Array, "N D"]:
    """Returns new rows in float32."""
    mean = jnp.mean(old, axis=0, dtype=jnp.float32)
    if key is None:
        return jnp.broadcast_to(mean, (count, len(mean)))
    # Sums of the old rows' deviations with random weights have their covariance, without a decomposition of it.
    weights = jax.random.normal(key, (count, len(old)), jnp.float32)
    return mean + (SPREAD / math.sqrt(len(old))) * (weights @ (old.astype(jnp.float32) - mean))
