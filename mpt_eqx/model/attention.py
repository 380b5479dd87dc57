"""Attention with ALiBi: the formula first, then the module that holds its weights."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from mpt_eqx.config import MPTConfig
from mpt_eqx.model.cache import LayerCache
from mpt_eqx.model.init import init_matrix, init_residual_matrix
from mpt_eqx.model.linear import Linear
from mpt_eqx.model.positions import alibi_bias, alibi_slopes


def attention(
    q: Float[Array, "N T H"],
    k: Float[Array, "N S H"],
    v: Float[Array, "N S H"],
    bias: Float32[Array, "N T S"],
    mask: Bool[Array, "T S"],
    scale: float,
) -> Float[Array, "N T H"]:
    """Returns softmax(scale · q kᵀ + bias, where masked) v for each of N heads.

    Scores are rounded to the type of q after the product and after the scale, then the float32 bias makes them
    float32, in which the softmax is taken; its weights are rounded to the type of v. This order is the references'.

    Args:
        q: queries of T positions.
        k: keys of S positions.
        v: values of S positions.
        bias: added to the scores.
        mask: True where a query may see a key. A query that may see none gets the mean of all values.
        scale: factor on q·k, usually 1/√H.

    Source: llm-foundry 8c8dd48, llmfoundry/models/layers/attention.py, scaled_multihead_dot_product_attention.
    """
    scores = jnp.einsum("NTH,NSH->NTS", q, k, preferred_element_type=jnp.float32).astype(q.dtype)
    scores = (scores.astype(jnp.float32) * scale).astype(q.dtype)
    scores = scores.astype(jnp.float32) + bias
    # The smallest number instead of −∞, so that a row without any visible key is not NaN.
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("NTS,NSH->NTH", weights, v, preferred_element_type=jnp.float32).astype(v.dtype)


class Attention(eqx.Module):
    """Multi-head self-attention: one fused projection to q, k and v, ALiBi, and a projection back.

    Rows of `Wqkv` are [q; k; v], each with its heads one after another.
    """

    Wqkv: Linear
    out_proj: Linear
    n_heads: int = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    clip_qkv: float | None = eqx.field(static=True)
    alibi_bias_max: float = eqx.field(static=True)

    def __init__(self, config: MPTConfig, *, key: PRNGKeyArray):
        d = config.d_model
        qkv_key, out_key = jax.random.split(key)
        # Every head's rows are a matrix of their own, so its shape decides the fans of the initialisation.
        head_keys = jax.random.split(qkv_key, 3 * config.n_heads)
        heads = jax.vmap(lambda k: init_matrix(config, (config.head_size, d), key=k))(head_keys)
        self.Wqkv = Linear(heads.reshape(3 * d, d))
        self.out_proj = Linear(init_residual_matrix(config, (d, d), key=out_key))
        self.n_heads = config.n_heads
        self.scale = config.attn_config.softmax_scale or config.head_size**-0.5
        self.clip_qkv = config.attn_config.clip_qkv
        self.alibi_bias_max = config.attn_config.alibi_bias_max

    def __call__(
        self,
        x: Float[Array, "T D"],
        query_pos: Int[Array, " T"],
        key_pos: Int[Array, " S"],
        mask: Bool[Array, "T S"],
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "T D"], LayerCache | None]:
        """Returns what T positions gather from S, and the cache with the keys and values of the T added.

        Args:
            x: the normed residual stream.
            query_pos: positions of the T rows of x, in tokens, 0-based; in the cache, also where they are written.
            key_pos: positions of the keys: those of the cache, or of x without a cache.
            mask: True where a query may see a key.
            cache: keys and values so far; None attends within x alone.
        """
        qkv = self.Wqkv(x)
        if self.clip_qkv is not None:
            qkv = jnp.clip(qkv, -self.clip_qkv, self.clip_qkv)
        q, k, v = jnp.moveaxis(qkv.reshape(x.shape[0], 3, self.n_heads, -1), 0, 2)
        if cache is not None:
            cache = cache.write(k, v, query_pos)
            k, v = cache.k, cache.v
        bias = alibi_bias(alibi_slopes(self.n_heads, self.alibi_bias_max), query_pos, key_pos)
        h = attention(q, k, v, bias, mask, self.scale)
        return self.out_proj(jnp.swapaxes(h, 0, 1).reshape(x.shape)), cache
