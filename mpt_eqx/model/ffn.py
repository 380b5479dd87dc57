"""Feed-forward networks of one expert: MLP and GLU."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from mpt_eqx.config import MPTConfig
from mpt_eqx.model.activations import Activation, make_activation
from mpt_eqx.model.init import init_linear
from mpt_eqx.model.linear import Linear
from mpt_eqx.model.taps import UNTAPPED, Tap


class MLP(eqx.Module):
    """down_proj(act(up_proj(x)))."""

    up_proj: Linear
    down_proj: Linear
    act: Activation = eqx.field(static=True)

    def __init__(self, config: MPTConfig, *, key: PRNGKeyArray):
        up_key, down_key = jax.random.split(key)
        d, f, bias = config.d_model, config.ffn_hidden_size, not config.no_bias
        self.up_proj = init_linear(config, (f, d), bias, key=up_key)
        self.down_proj = init_linear(config, (d, f), bias, residual=True, key=down_key)
        self.act = make_activation(config)

    @jax.named_scope("ffn")
    def __call__(
        self, x: Float[Array, "T D"], *, key: PRNGKeyArray | None = None, tap: Tap = UNTAPPED
    ) -> Float[Array, "T D"]:
        """Returns the network's output, position by position; the key is for networks that have a use for it."""
        h = self.act(tap("mlp.hook_pre", self.up_proj(x)))
        return self.down_proj(tap("mlp.hook_post", h))


class GLU(eqx.Module):
    """down_proj(act(gate_proj(x)) · up_proj(x)).

    Source: llm-foundry 0.22, llmfoundry/models/layers/ffn.py, MPTGLU.
    """

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    act: Activation = eqx.field(static=True)

    def __init__(self, config: MPTConfig, *, key: PRNGKeyArray):
        gate_key, up_key, down_key = jax.random.split(key, 3)
        d, f, bias = config.d_model, config.ffn_hidden_size, not config.no_bias
        self.gate_proj = init_linear(config, (f, d), bias, key=gate_key)
        self.up_proj = init_linear(config, (f, d), bias, key=up_key)
        self.down_proj = init_linear(config, (d, f), bias, residual=True, key=down_key)
        self.act = make_activation(config)

    @jax.named_scope("ffn")
    def __call__(
        self, x: Float[Array, "T D"], *, key: PRNGKeyArray | None = None, tap: Tap = UNTAPPED
    ) -> Float[Array, "T D"]:
        """Returns the network's output, position by position; the key is for networks that have a use for it."""
        h = self.act(tap("mlp.hook_pre", self.gate_proj(x))) * self.up_proj(x)
        return self.down_proj(tap("mlp.hook_post", h))
