"""Activations under the names that torch.nn.functional gives them, with values and gradients equal to its own.

Each is computed in float32 (float64 for float64) and rounded once to the type of x, except where the reference rounds
after each step.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mpt_eqx.config import ActFnConfig, MPTConfig
from mpt_eqx.config.parts import ACTIVATIONS
from mpt_eqx.ops.numerics import accum_dtype, scale


def _rounded_once(function: Callable[..., Array]) -> Callable[..., Array]:
    """Makes a function of x compute in `accum_dtype` and return the type of x, which alone is kept for the gradient."""

    @functools.wraps(function)
    def rounded(x: Float[Array, "*shape"], **arguments: float) -> Float[Array, "*shape"]:
        return jax.checkpoint(lambda x: function(x.astype(accum_dtype(x.dtype)), **arguments).astype(x.dtype))(x)

    return rounded


@_rounded_once
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x·Φ(x) with the exact Φ (erf)."""
    return jax.nn.gelu(x, approximate=False)


@_rounded_once
def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x·Φ(x) with the tanh approximation of Φ."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x·sigmoid(1.702·x), rounded after each step, as the reference does."""
    return x * sigmoid(scale(x, 1.702))


def relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns max(x, 0)."""
    return jax.nn.relu(x)


def relu6(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns min(max(x, 0), 6)."""
    return hardtanh(x, min_val=0.0, max_val=6.0)


def leaky_relu(x: Float[Array, "*shape"], *, negative_slope: float) -> Float[Array, "*shape"]:
    """Returns x where x > 0, else negative_slope·x."""
    return jnp.where(x > 0, x, scale(x, negative_slope))


@_rounded_once
def elu(x: Float[Array, "*shape"], *, alpha: float) -> Float[Array, "*shape"]:
    """Returns x where x > 0, else alpha·(exp(x) - 1)."""
    return jax.nn.elu(x, alpha)


@_rounded_once
def selu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the elu whose alpha and scale keep a mean of 0 and a variance of 1."""
    return jax.nn.selu(x)


@_rounded_once
def celu(x: Float[Array, "*shape"], *, alpha: float) -> Float[Array, "*shape"]:
    """Returns x where x > 0, else alpha·(exp(x/alpha) - 1)."""
    return jax.nn.celu(x, alpha)


@_rounded_once
def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x·sigmoid(x)."""
    return jax.nn.silu(x)


@_rounded_once
def mish(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x·tanh(log(1 + exp(x)))."""
    return jax.nn.mish(x)


@_rounded_once
def softplus(x: Float[Array, "*shape"], *, beta: float, threshold: float) -> Float[Array, "*shape"]:
    """Returns log(1 + exp(beta·x)) / beta, and x itself where beta·x > threshold."""
    return jnp.where(beta * x > threshold, x, jax.nn.softplus(beta * x) / beta)


def softsign(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x / (1 + |x|), rounded after each step, as the reference does."""
    return x / (jnp.abs(x) + 1)


@_rounded_once
def tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the hyperbolic tangent of x."""
    return jnp.tanh(x)


@_rounded_once
def sigmoid(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns 1 / (1 + exp(-x))."""
    return jax.nn.sigmoid(x)


@_rounded_once
def logsigmoid(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns log(sigmoid(x))."""
    return jax.nn.log_sigmoid(x)


def hardtanh(x: Float[Array, "*shape"], *, min_val: float, max_val: float) -> Float[Array, "*shape"]:
    """Returns min(max(x, min_val), max_val); unlike jnp.clip's, its gradient at the borders is 0."""
    return jnp.where(x <= min_val, min_val, jnp.where(x >= max_val, max_val, x)).astype(x.dtype)


@_rounded_once
def hardsigmoid(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns relu6(x + 3) / 6."""
    return relu6(x + 3) / 6


@_rounded_once
def hardswish(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x·relu6(x + 3) / 6."""
    return x * relu6(x + 3) / 6


FUNCTIONS: dict[str, Callable[..., Array]] = {
    function.__name__: function
    for function in (
        *(quick_gelu, relu, relu6, leaky_relu, elu, selu, celu, silu, mish, softplus, softsign, tanh, sigmoid),
        *(logsigmoid, hardtanh, hardsigmoid, hardswish),
    )
}


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation with its arguments; equal and of the same hash where both are, so that nothing compiles again.

    Attributes:
        function: one of this file.
        arguments: its arguments but x, as pairs of name and value.
    """

    function: Callable[..., Array]
    arguments: tuple[tuple[str, float], ...] = ()

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Returns the activation of each number in x."""
        return self.function(x, **dict(self.arguments))


def make_activation(config: MPTConfig) -> Activation:
    """Returns the activation of `config.ffn_config`."""
    act = config.ffn_config.ffn_act_fn
    if act is None:
        # Transformer Engine's and megablocks' own default is the approximation (TransformerEngine,
        # transformer_engine/common/util/math.h; megablocks, layers/arguments.py).
        approximate = config.ffn_config.ffn_type in ("te_ln_mlp", "mb_dmoe")
        act = ActFnConfig(approximate="tanh" if approximate else "none")
    if act.name == "gelu":
        return Activation(gelu_tanh if act.approximate == "tanh" else gelu)
    return Activation(FUNCTIONS[act.name], tuple((name, getattr(act, name)) for name in ACTIVATIONS[act.name]))
