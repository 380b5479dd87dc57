"""Dropout, for training with a key."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class Dropout(eqx.Module):
    """Numbers become 0 with probability p, and the others x / (1 − p); `eqx.nn.inference_mode` switches it off.

    Attributes:
        p: a probability; 1 makes all 0, in value and gradient.
        inference: whether it is off.
    """

    p: float = eqx.field(static=True)
    inference: bool = False

    def __call__(self, x: Float[Array, "*shape"], *, key: PRNGKeyArray) -> Float[Array, "*shape"]:
        """Returns x after dropout."""
        if self.inference:
            return x
        if self.p == 1:
            return jnp.zeros_like(x)
        return jnp.where(jax.random.bernoulli(key, 1 - self.p, x.shape), x / (1 - self.p), 0)


def dropped(x: Float[Array, "*shape"], dropout: Dropout | None, key: PRNGKeyArray | None) -> Float[Array, "*shape"]:
    """Returns x after dropout, where there is one and a key is given."""
    return x if dropout is None or key is None else dropout(x, key=key)
