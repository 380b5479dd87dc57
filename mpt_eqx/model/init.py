"""Initialisation of new weights, as llm-foundry does it.

Source: llm-foundry 0.22, llmfoundry/models/utils/param_init_fns.py, and torch.nn.init, whose fans and gains it uses.
All weights are float32.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PRNGKeyArray

from mpt_eqx.config import InitConfig, MPTConfig
from mpt_eqx.model.linear import Linear

Matrix = Float32[Array, "out in"]


def init_linear(
    config: MPTConfig, shape: tuple[int, int], bias: bool, *, residual: bool = False, key: PRNGKeyArray
) -> Linear:
    """Returns a new linear map [out, in] drawn by the scheme `config.init_config.name`, with bias 0 if with one.

    Args:
        config: the scheme, and the sizes it needs.
        shape: out, in.
        bias: whether there is one.
        residual: whether it writes to the residual stream, so that its weights are divided for the model's depth.
        key: randomness.
    """
    weight_key, bias_key = jax.random.split(key)
    weight = _matrix(config, shape, weight_key)
    if residual:
        weight = weight / _residual_divisor(config)
    return Linear(weight, _bias(config, shape, bias_key) if bias else None)


def init_heads(config: MPTConfig, heads: int, bias: bool, *, key: PRNGKeyArray) -> Linear:
    """Returns a new linear map from the residual stream to `heads` heads, each drawn as a matrix of its own."""
    weight_key, bias_key = jax.random.split(key)
    shape = (config.head_size, config.d_model)
    weight = jax.vmap(lambda k: _matrix(config, shape, k))(jax.random.split(weight_key, heads))
    rows = heads * config.head_size
    return Linear(
        weight.reshape(rows, config.d_model), _bias(config, (rows, config.d_model), bias_key) if bias else None
    )


def init_experts(config: MPTConfig, *, residual: bool = False, key: PRNGKeyArray) -> Matrix:
    """Returns new weights of all experts of a mixture, [E·F, D].

    llm-foundry draws torch_dmoe's as one matrix, without a division for depth, and megablocks' expert by expert, where
    those that are used untransposed (`residual`) have their fans exchanged and are divided.
    """
    shape = (config.ffn_hidden_size, config.d_model)
    experts = config.ffn_config.moe_num_experts
    if config.ffn_config.ffn_type == "torch_dmoe":
        if config.init_config.name == "default_":
            # The module has no way to reset itself: what its constructor draws remains.
            return jax.random.uniform(key, (experts * shape[0], shape[1]), jnp.float32)
        return _draw(config, (experts * shape[0], shape[1]), key)
    keys = jax.random.split(key, experts)
    if residual:
        weight = jax.vmap(lambda k: _matrix(config, shape[::-1], k).T)(keys) / _residual_divisor(config)
    else:
        weight = jax.vmap(lambda k: _matrix(config, shape, k))(keys)
    return weight.reshape(-1, config.d_model)


def init_embedding(config: MPTConfig, shape: tuple[int, int], *, key: PRNGKeyArray) -> Matrix:
    """Returns a new embedding [V, D]: `emb_init_std` or `emb_init_uniform_lim` if given, else the matrix scheme."""
    init = config.init_config
    if init.name == "default_":
        return jax.random.normal(key, shape, jnp.float32)
    if init.emb_init_std is not None:
        return init.emb_init_std * jax.random.normal(key, shape, jnp.float32)
    if (lim := init.emb_init_uniform_lim) is not None:
        low, high = lim if isinstance(lim, tuple) else (-lim, lim)
        return jax.random.uniform(key, shape, jnp.float32, minval=low, maxval=high)
    return _draw(config, shape, key)


def _matrix(config: MPTConfig, shape: tuple[int, int], key: PRNGKeyArray) -> Matrix:
    if config.init_config.name == "default_":
        # torch.nn.Linear draws from U(±1/√fan_in).
        return _uniform(key, shape, 1 / math.sqrt(shape[1]))
    return _draw(config, shape, key)


def _bias(config: MPTConfig, shape: tuple[int, int], key: PRNGKeyArray) -> Float32[Array, " out"]:
    if config.init_config.name == "default_":
        # torch.nn.Linear draws its bias like its weight.
        return jax.random.uniform(
            key, shape[:1], jnp.float32, minval=-1 / math.sqrt(shape[1]), maxval=1 / math.sqrt(shape[1])
        )
    return jnp.zeros(shape[0], jnp.float32)


def _draw(config: MPTConfig, shape: tuple[int, int], key: PRNGKeyArray) -> Matrix:
    init = config.init_config
    fan_out, fan_in = shape
    if init.name.startswith("kaiming"):
        std = _gain(init) / math.sqrt(fan_in if init.fan_mode == "fan_in" else fan_out)
    elif init.name.startswith("xavier"):
        std = init.init_gain * math.sqrt(2 / (fan_in + fan_out))
    elif init.name == "baseline_":
        assert init.init_std is not None  # InitConfig refuses it
        std = init.init_std
    else:  # small_init_ and neox_init_, arXiv:1910.05895
        std = math.sqrt(2 / (5 * config.d_model))
    if init.name.endswith("uniform_"):
        return _uniform(key, shape, math.sqrt(3) * std)
    return std * jax.random.normal(key, shape, jnp.float32)


def _uniform(key: PRNGKeyArray, shape: tuple[int, int], bound: float) -> Matrix:
    return jax.random.uniform(key, shape, jnp.float32, minval=-bound, maxval=bound)


def _gain(init: InitConfig) -> float:
    """Returns torch.nn.init.calculate_gain for the nonlinearity."""
    if init.init_nonlinearity == "linear":
        return 1.0
    slope = init.init_gain if init.init_nonlinearity == "leaky_relu" else 0.0
    return math.sqrt(2 / (1 + slope**2))


def _residual_divisor(config: MPTConfig) -> float:
    divisor = config.init_config.init_div_is_residual
    if config.init_config.name == "neox_init_":
        return config.n_layers / math.sqrt(10)
    if config.init_config.name == "default_" or divisor is False:
        return 1.0
    return math.sqrt(2 * config.n_layers) if divisor is True else divisor
