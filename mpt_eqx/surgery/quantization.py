"""Quantising a model: weights in 8 or 4 bits in the place of those in its own type, as a transform of its tree."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, BFloat16, Float, Float32, Int8, UInt8
from tqdm import tqdm

from mpt_eqx.config.quantization import Quantization, check_quantization
from mpt_eqx.errors import MPTError
from mpt_eqx.model import MPT
from mpt_eqx.model.linear import Embedding, Linear
from mpt_eqx.model.moe import Router
from mpt_eqx.ops.quantized import GROUP, QuantizedWeight
from mpt_eqx.sharding import shard

NUMBERS = 2**20
"""How many numbers are quantised at once, as whole rows, so that a large weight needs little memory on the way."""

DIVISORS = (-8.0, -7.0, -7.25, -7.5, -7.75, -8.25, -8.5, -8.75, -9.0)
"""What the largest number of a group is divided by for its scale in 4 bits; the first of the best ones is taken.

By −8 the largest number becomes −8, the end of the range that is one longer. A larger divisor cuts it off and rounds
the others less, a smaller one leaves room for one of the other sign that is almost as large.
"""


def quantize(model: MPT, scheme: str, *, embeddings: bool = False) -> MPT:
    """Returns the model with its matrices in 8 or 4 bits; it runs, is saved and loaded like any other.

    Quantised is every matrix of attention and of MLP and GLU networks, and the output matrix if it is not the
    embedding. The embedding (also where it is the output matrix), learned positions, norms, biases, and the routers
    and experts of mixtures stay as they are.

    Int8 has a scale for each row, the row's largest magnitude / 127. Int4 has one for each 32 columns of a row, of
    nine candidates the one with the least squared error. Weights are quantised one after the other, so this needs
    memory for the result and a few rows. Gradients are those of what is floating: of what stays, and of the scales.

    Args:
        model: a model in any floating type, which stays the type of computations.
        scheme: "int8" or "int4".
        embeddings: whether the embedding is quantised, too.

    Raises:
        ConfigError: there is no such scheme.
        MPTError: the model is quantised already, a weight has columns that int4 cannot divide into groups, or a weight
            holds NaN or infinity.
    """
    quantization = Quantization(scheme, embeddings)
    check_quantization(quantization)
    if (found := quantization_of(model)) is not None:
        raise MPTError(
            f"model: expected weights that are not quantised, found {found.scheme}; quantise the model it was made from"
        )
    # Every shape is looked at before the work begins.
    total = sum(weight.size for weight in _weights(model, quantization))
    with tqdm(total=total, desc="quantising", unit="", unit_scale=True, delay=2, disable=None, leave=False) as bar:

        def make(name: str, weight: Float[Array | np.ndarray, "out in"]) -> QuantizedWeight:
            made = quantized(name, weight, scheme)
            bar.update(weight.size)
            return made

        whole = with_quantized(model, quantization, make)
    layout = model.layout
    if layout is None or not isinstance(layout.mesh, Mesh):
        return whole
    return shard(whole, layout.mesh, layout.rules)


def quantization_of(model: MPT) -> Quantization | None:
    """Returns how a model is quantised, None if it is not.

    Raises:
        MPTError: some of its weights are, and not those that `quantize` would have quantised together.
    """
    nodes = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, QuantizedWeight))
    found = [node for node in nodes if isinstance(node, QuantizedWeight)]
    if not found:
        return None
    schemes = {"int4" if weight.values.dtype == jnp.uint8 else "int8" for weight in found}
    quantization = Quantization(min(schemes), isinstance(model.wte.weight, QuantizedWeight))
    wanted = _weights(model, quantization)
    if len(schemes) > 1 or len(wanted) != len(found) or not all(isinstance(w, QuantizedWeight) for w in wanted):
        raise MPTError(
            f"model: expected all of its matrices quantised alike, or none, found {len(found)} in "
            f"{' and '.join(sorted(schemes))}; make it with mpt_eqx.quantize"
        )
    return quantization


def with_quantized(model: Any, quantization: Quantization, make: Callable[[str, Any], Any]) -> Any:
    """Returns a model, or a part of one, with make(name, weight) in the place of each weight that is quantised.

    Raises:
        MPTError: a weight has columns that cannot be divided into groups.
    """

    def change(path: tuple[Any, ...], node: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(node, Linear) and not (quantization.embeddings and name == "wte"):
            return node
        name, weight = f"{name}.weight", node.weight
        if quantization.scheme == "int4" and not isinstance(weight, QuantizedWeight) and weight.shape[1] % GROUP:
            raise MPTError(
                f"{name}: expected a multiple of {GROUP} columns for int4, found {weight.shape[0]} by "
                f"{weight.shape[1]}; int8 takes any"
            )
        return eqx.tree_at(lambda node: node.weight, node, make(name, weight))

    # A router is a leaf here, so that the linear map in it is not one.
    return jax.tree_util.tree_map_with_path(
        change, model, is_leaf=lambda node: isinstance(node, Linear | Embedding | Router)
    )


def with_zeros(model: Any, quantization: Quantization | None, dtype: np.dtype) -> Any:
    """Returns a model, or a part of one, with zeros for the weights that are quantised: for their shapes and types.

    Args:
        model: whose weights are not quantised.
        quantization: which of them are to be, and how; None for none.
        dtype: the type that they have as a whole.

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


def _weights(model: MPT, quantization: Quantization) -> list[Any]:
    """Returns the weights that are, or would be, quantised."""
    found: list[Any] = []

    def find(name: str, weight: Any) -> Any:
        found.append(weight)
        return weight

    with_quantized(model, quantization, find)
    return found


def quantized(name: str, weight: Float[Array | np.ndarray, "out in"], scheme: str) -> QuantizedWeight:
    """Returns a weight in 8 or 4 bits, made a few rows at a time.

    Args:
        name: what the weight is called in an error.
        weight: W, in any floating type.
        scheme: "int8" or "int4".

    Raises:
        MPTError: (outside jit, where it can be seen) it holds NaN or infinity.
    """
    quantize_rows = to_int8 if scheme == "int8" else to_int4
    rows = max(NUMBERS // weight.shape[1], 1)
    parts = []
    for at in range(0, len(weight), rows):
        part = jnp.asarray(weight[at : at + rows])
        if not isinstance(part, jax.core.Tracer) and not jnp.isfinite(part).all():
            raise MPTError(f"{name}: expected finite numbers, found NaN or infinity; the weights are damaged")
        # Otherwise the next part would need its memory beside this one's.
        parts.append(jax.block_until_ready(quantize_rows(part)))
    values, scale = (jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return QuantizedWeight(values, scale, np.dtype(weight.dtype))


@jax.jit
def to_int8(weight: Float[Array, "out in"]) -> tuple[Int8[Array, "out in"], Float32[Array, "out 1"]]:
    """Returns values and scale of `QuantizedWeight` in 8 bits; a row of zeros has the scale 0."""
    w = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(w), axis=1, keepdims=True) / 127
    return _rounded(w, scale, low=-127, high=127).astype(jnp.int8), scale


@jax.jit
def to_int4(weight: Float[Array, "out in"]) -> tuple[UInt8[Array, "out half"], BFloat16[Array, "out groups"]]:
    """Returns values and scale of `QuantizedWeight` in 4 bits; a group of zeros has the scale 0, others any sign."""
    w = weight.astype(jnp.float32).reshape(len(weight), -1, GROUP)
    high, low = jnp.max(w, axis=-1, keepdims=True), jnp.min(w, axis=-1, keepdims=True)
    largest = jnp.where(high > -low, high, low)
    # Rounded to bfloat16 before anything is divided by it, by a function that no compiler leaves out.
    scales = jnp.stack([jax.lax.reduce_precision(largest / divisor, 8, 7) for divisor in DIVISORS])

    def better(best: tuple[Array, Array], scale: Array) -> tuple[tuple[Array, Array], None]:
        # By the largest number, because a square of it might be too large or too small for float32.
        errors = (w - scale * _rounded(w, scale, low=-8, high=7)) / jnp.where(largest == 0, 1, largest)
        error = jnp.sum(errors**2, axis=-1, keepdims=True)
        return (jnp.minimum(error, best[0]), jnp.where(error < best[0], scale, best[1])), None

    start = (jnp.full_like(largest, jnp.inf), jnp.full_like(largest, jnp.nan))
    (_, scale), _ = jax.lax.scan(better, start, scales)
    numbers = (_rounded(w, scale, low=-8, high=7) + 8).astype(jnp.uint8).reshape(len(weight), -1, 2, GROUP // 2)
    packed = numbers[:, :, 0] | (numbers[:, :, 1] << 4)
    return packed.reshape(len(weight), -1), scale[..., 0].astype(jnp.bfloat16)


def _rounded(w: Float32[Array, "..."], scale: Float32[Array, "..."], low: int, high: int) -> Float32[Array, "..."]:
    """Returns the whole numbers from `low` to `high` that are nearest to w / scale, 0 where the scale is."""
    return jnp.clip(jnp.round(w / jnp.where(scale == 0, 1, scale)), low, high)
