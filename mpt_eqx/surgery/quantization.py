"""quantize: a model with weights in 8 or 4 bits."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, BFloat16, DTypeLike, Float, Float32, Int8, UInt8
from tqdm import tqdm

from mpt_eqx.config import MPTConfig
from mpt_eqx.config.quantization import Quantization, check_quantization
from mpt_eqx.errors import MPTError
from mpt_eqx.model import MPT
from mpt_eqx.model.leaves import leaf_name
from mpt_eqx.model.linear import Embedding, Linear
from mpt_eqx.model.moe import Router
from mpt_eqx.ops.quantized import GROUP, QuantizedWeight
from mpt_eqx.ops.switches import model_function
from mpt_eqx.sharding import shard
from mpt_eqx.sharding.wrappers import find_bases, place_of

NUMBERS = 2**20
"""Numbers quantised at a time, in whole rows, so that a large weight needs little additional memory."""

DIVISORS = (-8.0, -7.0, -7.25, -7.5, -7.75, -8.25, -8.5, -8.75, -9.0)
"""Candidates for the scale of a group in 4 bits: its number of largest magnitude divided by each of these.

The one with the least squared error is taken, the first of equals. −8 maps that number to −8, the end of the range that
reaches further. A larger divisor clips it and rounds the others less; a smaller one leaves room for a number of the
other sign that is almost as large.
"""


@model_function
def quantize(model: MPT, scheme: str, *, embeddings: bool = False) -> MPT:
    """Returns the model with its matrices in 8 or 4 bits. It runs, is saved and loaded like any other.

    The matrices of attention, of MLP and GLU networks and an untied lm_head are quantised. The embedding (also where it
    is the lm_head), learned positions, norms, biases, and the routers and experts of mixtures are not.

    int8 has one scale per row, the largest magnitude / 127. int4 has one scale per 32 columns of a row, chosen among
    nine candidates by squared error. Weights are quantised one at a time, in memory for the result and a few rows.
    Gradients are those of the floating-point arrays: of weights that are not quantised, and of scales. In a wrapper,
    such as a LoRA's, the weight that it wraps is quantised, and its own arrays are not.

    Args:
        model: a model in any floating-point type, in which it still computes. On a mesh the result is sharded alike.
        scheme: "int8" or "int4".
        embeddings: whether to quantise the embedding as well.

    Raises:
        ConfigError: the scheme is unknown.
        MPTError: the model is quantised already, the columns of a weight are no multiple of 32 (int4), or a weight has
            NaN or infinity.
    """
    quantization = Quantization(scheme, embeddings)
    check_quantization(quantization)
    if (found := quantization_of(model)) is not None:
        raise MPTError(
            f"model: expected weights that are not quantised, found {found.scheme}; quantise the model it was made from"
        )
    # This also checks every shape before the work begins.
    total = sum(weight.size for weight in _quantizable(model, quantization))
    hidden = True if sys.stderr is None or sys.stderr.closed else None  # None: unless stderr is a terminal
    with tqdm(total=total, desc="quantising", unit="", unit_scale=True, delay=2, disable=hidden, leave=False) as bar:

        def make(name: str, weight: Float[Array | np.ndarray, "*L out in"]) -> QuantizedWeight:
            made = quantize_weight(name, weight, scheme)
            bar.update(weight.size)
            return made

        made = with_quantized(model, quantization, make)
    if model.layout is None or not isinstance(model.layout.mesh, Mesh):
        return made
    return shard(made, model.layout.mesh, model.layout.rules)


def quantization_of(model: MPT) -> Quantization | None:
    """Returns how a model is quantised, or None if it is not.

    Raises:
        MPTError: the weights that are quantised are not those that one call of `quantize` quantises.
    """
    nodes = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda node: isinstance(node, QuantizedWeight))
    found = {leaf_name(path): node for path, node in nodes if isinstance(node, QuantizedWeight)}
    if not found:
        return None
    schemes = {"int4" if weight.values.dtype == jnp.uint8 else "int8" for weight in found.values()}
    quantization = Quantization(min(schemes), any(name.startswith("wte.") for name in found))
    wanted = _quantizable(model, quantization)
    if len(schemes) > 1 or len(wanted) != len(found) or not all(isinstance(w, QuantizedWeight) for w in wanted):
        raise MPTError(
            f"model: expected all of its matrices quantised alike, or none, found {len(found)} in "
            f"{' and '.join(sorted(schemes))}; make it with mpt_eqx.quantize"
        )
    return quantization


def with_quantized(model: Any, quantization: Quantization, make: Callable[[str, Any], Any]) -> Any:
    """Returns a model, or a part of one, with make(name, weight) in place of each weight to quantise.

    Of a wrapper in a model this is the weight that it wraps; linear maps of its own stay.

    Raises:
        MPTError: int4 is asked for, and the columns of a weight are no multiple of 32.
    """
    bases = find_bases(model) if isinstance(model, MPT) else {}

    def change(path: tuple[Any, ...], node: Any) -> Any:
        name = leaf_name(path)
        place = place_of(name) or name
        wanted = quantization.embeddings if place == "wte" else isinstance(node, Linear)
        if not wanted or not isinstance(node, Linear | Embedding) or bases.get(place, name) != name:
            return node
        name, weight = f"{name}.weight", node.weight
        if quantization.scheme == "int4" and not isinstance(weight, QuantizedWeight) and weight.shape[-1] % GROUP:
            raise MPTError(
                f"{name}: expected a multiple of {GROUP} columns for int4, found {weight.shape[-2]} by "
                f"{weight.shape[-1]}; int8 takes any"
            )
        return eqx.tree_at(lambda node: node.weight, node, make(name, weight))

    # A Router is a leaf here, so that the Linear inside is not found.
    return jax.tree_util.tree_map_with_path(
        change, model, is_leaf=lambda node: isinstance(node, Linear | Embedding | Router)
    )


def with_zeros(model: Any, quantization: Quantization | None, dtype: np.dtype) -> Any:
    """Returns a model, or a part of one, with zeros in place of the weights to quantise, for their shapes and types.

    Args:
        model: a model that is not quantised.
        quantization: which weights to quantise, and how; None for none.
        dtype: the type that quantised weights have outside, in `QuantizedWeight.dtype`.

    Raises:
        MPTError: as `with_quantized`.
    """
    if quantization is None:
        return model
    packed = quantization.scheme == "int4"

    def zeros(name: str, weight: Float[Array, "out in"]) -> QuantizedWeight:
        out, columns = weight.shape
        if packed:
            values, scale = jnp.zeros((out, columns // 2), jnp.uint8), jnp.zeros((out, columns // GROUP), jnp.bfloat16)
        else:
            values, scale = jnp.zeros((out, columns), jnp.int8), jnp.zeros((out, 1), jnp.float32)
        return QuantizedWeight(values, scale, dtype)

    return with_quantized(model, quantization, zeros)


@functools.lru_cache(maxsize=256)  # tracing a model takes longer than loading a small one
def skeleton(config: MPTConfig, quantization: Quantization | None = None, dtype: DTypeLike = np.float32) -> MPT:
    """Returns a ShapeDtypeStruct for each array of the model that a checkpoint of this configuration is loaded into.

    Args:
        config: sizes and options.
        quantization: which weights are quantised, and how; None for none.
        dtype: the type that quantised weights have outside. All others are float32 here.

    Raises:
        MPTError: a weight cannot be quantised so.
    """

    def make() -> MPT:
        made: MPT = with_zeros(MPT(config, key=jax.random.key(0)), quantization, np.dtype(dtype))
        return made

    shapes: MPT = eqx.filter_eval_shape(make)
    return shapes


def _quantizable(model: MPT, quantization: Quantization) -> list[Any]:
    """Returns the weights that a quantisation is of, before or after it."""
    found: list[Any] = []

    def find(name: str, weight: Any) -> Any:
        found.append(weight)
        return weight

    with_quantized(model, quantization, find)
    return found


def quantize_weight(name: str, weight: Float[Array | np.ndarray, "*L out in"], scheme: str) -> QuantizedWeight:
    """Returns a weight in 8 or 4 bits, quantised a few rows at a time.

    Args:
        name: the weight's name, for the error.
        weight: W, in any floating-point type; of stacked blocks all layers.
        scheme: "int8" or "int4".

    Raises:
        MPTError: (outside jit, where values are known) it has NaN or infinity.
    """
    if weight.ndim == 3:
        layers = [quantize_weight(f"{name}[{i}]", layer, scheme) for i, layer in enumerate(weight)]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    quantize_rows = to_int8 if scheme == "int8" else to_int4
    rows = max(NUMBERS // weight.shape[1], 1)
    parts = []
    for at in range(0, len(weight), rows):
        part = jnp.asarray(weight[at : at + rows])
        if not isinstance(part, jax.core.Tracer) and not jnp.isfinite(part).all():
            raise MPTError(f"{name}: expected finite numbers, found NaN or infinity; the weights are damaged")
        # Waits, because otherwise the memory of several parts would be in use at once.
        parts.append(jax.block_until_ready(quantize_rows(part)))
    values, scale = (jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return QuantizedWeight(values, scale, np.dtype(weight.dtype))


@jax.jit
def to_int8(weight: Float[Array, "out in"]) -> tuple[Int8[Array, "out in"], Float32[Array, "out 1"]]:
    """Returns `values` and `scale` of a `QuantizedWeight` in 8 bits. The scale of a row of zeros is 0."""
    w = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(w), axis=1, keepdims=True) / 127
    return _rounded(w, scale, low=-127, high=127).astype(jnp.int8), scale


@jax.jit
def to_int4(weight: Float[Array, "out in"]) -> tuple[UInt8[Array, "out half"], BFloat16[Array, "out groups"]]:
    """Returns `values` and `scale` of a `QuantizedWeight` in 4 bits.

    The scale of a group of zeros is 0; others have either sign.
    """
    w = weight.astype(jnp.float32).reshape(len(weight), -1, GROUP)
    high, low = jnp.max(w, axis=-1, keepdims=True), jnp.min(w, axis=-1, keepdims=True)
    largest = jnp.where(high > -low, high, low)
    # Rounded to bfloat16 before dividing by it. XLA may drop a cast there and back, but not reduce_precision.
    scales = jnp.stack([jax.lax.reduce_precision(largest / divisor, 8, 7) for divisor in DIVISORS])

    def better(best: tuple[Array, Array], scale: Array) -> tuple[tuple[Array, Array], None]:
        # Relative to the largest number, because its square might overflow or underflow in float32.
        errors = (w - scale * _rounded(w, scale, low=-8, high=7)) / jnp.where(largest == 0, 1, largest)
        error = jnp.sum(errors**2, axis=-1, keepdims=True)
        return (jnp.minimum(error, best[0]), jnp.where(error < best[0], scale, best[1])), None

    start = (jnp.full_like(largest, jnp.inf), jnp.full_like(largest, jnp.nan))
    (_, scale), _ = jax.lax.scan(better, start, scales)
    numbers = (_rounded(w, scale, low=-8, high=7) + 8).astype(jnp.uint8).reshape(len(weight), -1, 2, GROUP // 2)
    packed = numbers[:, :, 0] | (numbers[:, :, 1] << 4)
    return packed.reshape(len(weight), -1), scale[..., 0].astype(jnp.bfloat16)


def _rounded(w: Float32[Array, "..."], scale: Float32[Array, "..."], low: int, high: int) -> Float32[Array, "..."]:
    """Returns w / scale rounded to an integer and clipped to low ≤ n ≤ high; 0 where the scale is 0."""
    return jnp.clip(jnp.round(w / jnp.where(scale == 0, 1, scale)), low, high)
