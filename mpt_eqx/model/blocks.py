"""One layer: attention, then the feed-forward network, each normed before and added after."""

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mpt_eqx.config import MPTConfig
from mpt_eqx.model.attention import Attention
from mpt_eqx.model.cache import LayerCache
from mpt_eqx.model.ffn import MLP
from mpt_eqx.model.norms import LayerNorm


class Block(eqx.Module):
    """x + attn(norm_1(x)), then x + ffn(norm_2(x))."""

    norm_1: LayerNorm
    attn: Attention
    norm_2: LayerNorm
    ffn: MLP

    def __init__(self, config: MPTConfig, *, key: PRNGKeyArray):
        attn_key, ffn_key = jax.random.split(key)
        self.norm_1 = LayerNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config, key=attn_key)
        self.norm_2 = LayerNorm(config.d_model, config.norm_eps)
        self.ffn = MLP(config, key=ffn_key)

    def __call__(
        self,
        x: Float[Array, "T D"],
        query_pos: Int[Array, " T"],
        key_pos: Int[Array, " S"],
        mask: Bool[Array, "T S"],
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "T D"], LayerCache | None]:
        """Returns the residual stream after this layer, and its cache; arguments as in `Attention`."""
        h, cache = self.attn(self.norm_1(x), query_pos, key_pos, mask, cache)
        x = x + h
        x = x + self.ffn(self.norm_2(x))
        return x, cache
