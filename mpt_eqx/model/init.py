"""Initialisation of new weights, as llm-foundry does it.

Source: llm-foundry 8c8dd48, llmfoundry/models/utils/param_init_fns.py, and torch.nn.init, whose fans and gains it uses.
All weights are float32.
"""

import math

import jax
from jaxtyping import Array, Float32, PRNGKeyArray

from mpt_eqx.config import InitConfig, MPTConfig

Matrix = Float32[Array, "out in"]


def init_matrix(config: MPTConfig, shape: tuple[int, int], *, key: PRNGKeyArray) -> Matrix:
    """Returns a new matrix [out, in] drawn by the scheme `config.init_config.name`."""
    if config.init_config.name == "default_":
        # torch.nn.Linear draws from U(±1/√fan_in).
        return _uniform(key, shape, 1 / math.sqrt(shape[1]))
    return _draw(config, shape, key)


def init_residual_matrix(config: MPTConfig, shape: tuple[int, int], *, key: PRNGKeyArray) -> Matrix:
    """Returns a new matrix that writes to the residual stream: as `init_matrix`, divided for the model's depth."""
    return init_matrix(config, shape, key=key) / _residual_divisor(config)


def init_embedding(config: MPTConfig, shape: tuple[int, int], *, key: PRNGKeyArray) -> Matrix:
    """Returns a new embedding [V, D]: `emb_init_std` or `emb_init_uniform_lim` if given, else the matrix scheme."""
    init = config.init_config
    if init.name == "default_":
        return jax.random.normal(key, shape)
    if init.emb_init_std is not None:
        return init.emb_init_std * jax.random.normal(key, shape)
    if (lim := init.emb_init_uniform_lim) is not None:
        low, high = lim if isinstance(lim, tuple) else (-lim, lim)
        return jax.random.uniform(key, shape, minval=low, maxval=high)
    return _draw(config, shape, key)


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
    return std * jax.random.normal(key, shape)


def _uniform(key: PRNGKeyArray, shape: tuple[int, int], bound: float) -> Matrix:
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


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
