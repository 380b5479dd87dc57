"""Activations, under the names that torch.nn.functional gives them; each in float32, rounded once to the type of x."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mpt_eqx.config import ActFnConfig, MPTConfig
from mpt_eqx.ops.numerics import accum_dtype, scale

Activation = Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x·Φ(x) with the exact Φ (erf)."""
    return jax.nn.gelu(x.astype(accum_dtype(x.dtype)), approximate=False).astype(x.dtype)


def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x·Φ(x) with the tanh approximation of Φ."""
    return jax.nn.gelu(x.astype(accum_dtype(x.dtype)), approximate=True).astype(x.dtype)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x·sigmoid(1.702·x), rounded after each step, as the reference does."""
    return x * jax.nn.sigmoid(scale(x, 1.702).astype(accum_dtype(x.dtype))).astype(x.dtype)


def relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns max(x, 0)."""
    return jax.nn.relu(x)


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x·sigmoid(x)."""
    return jax.nn.silu(x.astype(accum_dtype(x.dtype))).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class LeakyReLU:
    """x where x ≥ 0, else negative_slope·x."""

    negative_slope: float

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Returns the activation of x."""
        return jnp.where(x >= 0, x, scale(x, self.negative_slope))


def make_activation(config: MPTConfig) -> Activation:
    """Returns the activation of `config.ffn_config`."""
    act = config.ffn_config.ffn_act_fn
    if act is None:
        # Transformer Engine's and megablocks' own default is the approximation (TransformerEngine,
        # transformer_engine/common/util/math.h; megablocks, layers/arguments.py).
        approximate = config.ffn_config.ffn_type in ("te_ln_mlp", "mb_dmoe")
        act = ActFnConfig(approximate="tanh" if approximate else "none")
    if act.name == "leaky_relu":
        return LeakyReLU(act.negative_slope)
    if act.name == "gelu" and act.approximate == "tanh":
        return gelu_tanh
    return {"gelu": gelu, "relu": relu, "silu": silu, "quick_gelu": quick_gelu}[act.name]
