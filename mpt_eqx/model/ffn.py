"""Feed-forward networks."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mpt_eqx.config import MPTConfig
from mpt_eqx.model.init import init_matrix, init_residual_matrix
from mpt_eqx.model.linear import Linear


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x·Φ(x) with the exact Φ (erf), in float32, rounded once to the type of x."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


class MLP(eqx.Module):
    """down_proj(gelu(up_proj(x)))."""

    up_proj: Linear
    down_proj: Linear

    def __init__(self, config: MPTConfig, *, key: PRNGKeyArray):
        up_key, down_key = jax.random.split(key)
        d, f = config.d_model, config.ffn_hidden_size
        self.up_proj = Linear(init_matrix(config, (f, d), key=up_key))
        self.down_proj = Linear(init_residual_matrix(config, (d, f), key=down_key))

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Returns the network's output, position by position."""
        return self.down_proj(gelu(self.up_proj(x)))
