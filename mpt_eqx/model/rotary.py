"""Rotary positions: pairs of numbers in q and k are turned by an angle that grows with the position."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from mpt_eqx.config import MPTConfig, RopeHFConfig
from mpt_eqx.model.positions import Positions


def rotate(x: Float[Array, "N T H"], angles: Float32[Array, "T H/2"]) -> Float[Array, "N T H"]:
    """Returns x with the pair (i, i + H/2) of each head turned by angle i of its position.

    Cosine, sine, products and sum are each rounded to the type of x, as in the reference.

    Args:
        x: queries or keys of T positions.
        angles: in radians.

    Source: arXiv:2104.09864; transformers 4.51.3, models/llama/modeling_llama.py, apply_rotary_pos_emb.
    """
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Rotary(eqx.Module):
    """Rotation by position · frequency.

    Attributes:
        frequencies: of each pair, in radians per token.
        counts_padding: whether padding tokens count as positions.
    """

    frequencies: tuple[float, ...] = eqx.field(static=True)
    counts_padding: bool = eqx.field(static=True)

    def __call__(self, x: Float[Array, "N T H"], positions: Positions) -> Float[Array, "N T H"]:
        """Returns x rotated by the positions of its T rows."""
        pos = positions.query if self.counts_padding else positions.token
        return rotate(x, pos.astype(jnp.float32)[:, None] * jnp.asarray(self.frequencies, jnp.float32))


class DynamicRotary(eqx.Module):
    """Rotation with a base that grows once a position is past the trained length ("dynamic NTK").

    A token at position p is rotated as the reference rotates it when it is the last one so far. The full forward pass
    and decoding token by token therefore agree, which they do not in the reference.

    Attributes:
        size: width of a head.
        theta: the base up to `length`.
        factor: how fast the base grows.
        length: the trained length in tokens.

    Source: transformers 4.51.3, modeling_rope_utils.py, _compute_dynamic_ntk_parameters.
    """

    size: int = eqx.field(static=True)
    theta: float = eqx.field(static=True)
    factor: float = eqx.field(static=True)
    length: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "N T H"], positions: Positions) -> Float[Array, "N T H"]:
        """Returns x rotated by the positions of its T rows."""
        pos = positions.token.astype(jnp.float32)[:, None]
        so_far = jnp.maximum(pos + 1, float(self.length))
        base = self.theta * (self.factor * so_far / self.length - (self.factor - 1)) ** (self.size / (self.size - 2))
        return rotate(x, pos * base ** jnp.asarray(-_exponents(self.size), jnp.float32))


def make_rotary(config: MPTConfig) -> Rotary | DynamicRotary | None:
    """Returns the rotation of `config.attn_config`, or None without rope."""
    attn, scaling = config.attn_config, config.attn_config.rope_hf_config
    if not attn.rope:
        return None
    frequencies = attn.rope_theta ** -_exponents(config.head_size)
    if attn.rope_impl == "dail":
        return Rotary(tuple(frequencies.tolist()), counts_padding=True)
    if scaling.type == "dynamic" and config.head_size > 2:
        length = scaling.original_max_position_embeddings or config.max_seq_len
        return DynamicRotary(config.head_size, attn.rope_theta, scaling.factor, length)
    if scaling.type == "linear":
        frequencies = frequencies / scaling.factor
    if scaling.type == "llama3":
        frequencies = _llama3(frequencies, scaling)
    return Rotary(tuple(frequencies.tolist()), counts_padding=False)


def _llama3(frequencies: np.ndarray, scaling: RopeHFConfig) -> np.ndarray:
    """Returns the frequencies with the low ones divided by factor, and those between blended.

    Source: transformers 4.51.3, modeling_rope_utils.py, _compute_llama3_parameters.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    length = scaling.original_max_position_embeddings
    assert low is not None and high is not None and length is not None  # RopeHFConfig refuses it
    turns = length * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _exponents(size: int) -> np.ndarray:
    return np.arange(0, size, 2) / size
