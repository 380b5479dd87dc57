"""One layer: attention, then the feed-forward network, each normed before and added after."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from mpt_eqx.config import MOE_TYPES, LayerConfig, MPTConfig
from mpt_eqx.model.attention import Attention
from mpt_eqx.model.ffn import GLU, MLP
from mpt_eqx.model.moe import MoE
from mpt_eqx.model.norms import LayerNorm, RMSNorm, make_norm
from mpt_eqx.model.positions import Positions
from mpt_eqx.model.taps import UNTAPPED, Tap
from mpt_eqx.ops.layer_cache import KeysValues, LayerCache
from mpt_eqx.ops.numerics import apply_dropout


class Block(eqx.Module):
    """x + attn(norm_1(x)), then x + ffn(norm_2(x))."""

    norm_1: LayerNorm | RMSNorm
    attn: Attention
    norm_2: LayerNorm | RMSNorm
    ffn: MLP | GLU | MoE
    resid_dropout: eqx.nn.Dropout | None

    def __init__(self, config: MPTConfig, layer: LayerConfig, *, key: PRNGKeyArray):
        attn_key, ffn_key = jax.random.split(key)
        ffn_type = config.ffn_config.ffn_type
        self.norm_1 = make_norm(config)
        self.attn = Attention(config, layer, key=attn_key)
        # Transformer Engine's network has its own norm, which knows neither norm_type nor no_bias.
        te = ffn_type == "te_ln_mlp"
        self.norm_2 = LayerNorm(config.d_model, 1e-5, bias=True) if te else make_norm(config)
        network = MoE if ffn_type in MOE_TYPES else GLU if ffn_type == "mptglu" else MLP
        self.ffn = network(config, key=ffn_key)
        self.resid_dropout = eqx.nn.Dropout(config.resid_pdrop) if config.resid_pdrop else None

    @jax.named_scope("block")
    def __call__(
        self,
        x: Float[Array, "T D"],
        positions: Positions,
        kv: KeysValues | LayerCache | None = None,
        x_kv: Float[Array, "T D"] | None = None,
        *,
        key: PRNGKeyArray | None = None,
        tap: Tap = UNTAPPED,
    ) -> tuple[Float[Array, "T D"], KeysValues | LayerCache]:
        """Returns the residual stream after this layer, and the keys and values that it read.

        Args:
            x: the residual stream.
            positions: where the tokens stand.
            kv: as in `Attention`.
            x_kv: the input of the block that keys and values are computed from, if not this one.
            key: randomness of dropout and of the router's jitter; None for none.
            tap: what is captured and edited.
        """
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        x = tap("hook_resid_pre", x)
        h = tap("ln1.hook_normalized", self.norm_1(x))
        h, kv = self.attn(h, positions, kv, None if x_kv is None else self.norm_1(x_kv), key=keys[0], tap=tap)
        x = x + apply_dropout(tap("hook_attn_out", h), self.resid_dropout, keys[1])
        x = tap("hook_resid_mid", x)
        h = self.ffn(tap("ln2.hook_normalized", self.norm_2(x)), key=keys[2], tap=tap)
        x = x + apply_dropout(tap("hook_mlp_out", h), self.resid_dropout, keys[3])
        return tap("hook_resid_post", x), kv
