"""Self-attention: projections to queries, keys and values, what is done to them, and the way back."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mpt_eqx.config import LayerConfig, MPTConfig, TemperatureTuning
from mpt_eqx.errors import MPTError
from mpt_eqx.model.alibi import ALiBi
from mpt_eqx.model.init import init_heads, init_linear
from mpt_eqx.model.linear import Linear
from mpt_eqx.model.norms import LayerNorm
from mpt_eqx.model.positions import Positions
from mpt_eqx.model.rotary import DynamicRotary, Rotary, make_rotary
from mpt_eqx.model.taps import UNTAPPED, Tap
from mpt_eqx.ops.attend import attend
from mpt_eqx.ops.layer_cache import KeysValues, LayerCache
from mpt_eqx.ops.layout import Layout
from mpt_eqx.ops.numerics import accum_dtype


class Temperature(eqx.Module):
    """q · (1 + attn_scale · log(⌊(position + 1) / floor_scale⌋ + 1)), computed in float32.

    Source: llm-foundry 0.22, llmfoundry/models/layers/attention.py, apply_temperature_tuning. There a cached step
    counts its position from 0 again; here it counts from the start of the input, as in the full forward pass of both.
    """

    floor_scale: float = eqx.field(static=True)
    attn_scale: float = eqx.field(static=True)

    def __init__(self, config: TemperatureTuning):
        self.floor_scale = config.floor_scale
        self.attn_scale = config.attn_scale

    def __call__(self, q: Float[Array, "N T H"], query_pos: Int[Array, " T"]) -> Float[Array, "N T H"]:
        """Returns the queries sharpened."""
        steps = jnp.floor((query_pos + 1).astype(jnp.float32) / self.floor_scale)
        factor = jnp.log(steps + 1) * self.attn_scale + 1
        return (q.astype(accum_dtype(q.dtype)) * factor[:, None].astype(accum_dtype(q.dtype))).astype(q.dtype)


class Attention(eqx.Module):
    """Self-attention of N query heads over K heads of keys and values; query head n reads key head ⌊n·K/N⌋.

    Which of the weights there are is decided by the configuration: `Wqkv`, whose rows are [q; k; v] with the heads of
    each one after another; or `Wq`, `Wk` and `Wv`; or `Wq` alone, where keys and values are another block's. What a
    model does not use is None.
    """

    Wqkv: Linear | None
    Wq: Linear | None
    Wk: Linear | None
    Wv: Linear | None
    q_ln: LayerNorm | None
    k_ln: LayerNorm | None
    out_proj: Linear
    alibi: ALiBi | None
    rotary: Rotary | DynamicRotary | None
    temperature: Temperature | None
    dropout: eqx.nn.Dropout | None
    layout: Layout | None
    n_heads: int = eqx.field(static=True)
    kv_heads: int = eqx.field(static=True)
    head_size: int = eqx.field(static=True)
    norm_per_head: bool = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    clip_qkv: float | None = eqx.field(static=True)
    softcap: float | None = eqx.field(static=True)
    sliding_window: int | None = eqx.field(static=True)

    def __init__(self, config: MPTConfig, layer: LayerConfig, *, key: PRNGKeyArray):
        attn, bias = config.attn_config, config.has_attention_bias
        n, k, h = config.n_heads, config.kv_heads, config.head_size
        q_key, k_key, v_key, out_key = jax.random.split(key, 4)
        own_kv = layer.kv_from is None
        fused = attn.fused_qkv and own_kv
        self.Wqkv = init_heads(config, n + 2 * k, bias, key=q_key) if fused else None
        self.Wq = None if fused else init_heads(config, n, bias, key=q_key)
        self.Wk = init_heads(config, k, bias, key=k_key) if own_kv and not fused else None
        self.Wv = init_heads(config, k, bias, key=v_key) if own_kv and not fused else None
        # llm-foundry hands neither norm_type nor norm_eps on to these two.
        normed, norm_bias = attn.qk_ln or attn.qk_gn, not config.no_bias
        self.q_ln = LayerNorm(h if attn.qk_gn else n * h, 1e-5, bias=norm_bias) if normed else None
        self.k_ln = LayerNorm(h if attn.qk_gn else k * h, 1e-5, bias=norm_bias) if normed and own_kv else None
        self.out_proj = init_linear(config, (config.d_model, n * h), not config.no_bias, residual=True, key=out_key)
        self.alibi = ALiBi(n, attn.alibi_bias_max) if attn.alibi and not layer.nope else None
        self.rotary = None if layer.nope else make_rotary(config)
        tuning = layer.attn_temperature_tuning
        self.temperature = None if tuning is None else Temperature(tuning)
        self.dropout = eqx.nn.Dropout(attn.attn_pdrop) if attn.attn_pdrop else None
        self.layout = None
        self.n_heads, self.kv_heads, self.head_size = n, k, h
        self.norm_per_head = attn.qk_gn
        # Also where head_dim is given, the default follows d_model.
        self.scale = attn.softmax_scale or (config.d_model / n) ** -0.5
        self.clip_qkv = attn.clip_qkv
        self.softcap = attn.attn_logit_softcapping
        self.sliding_window = layer.sliding_window_size

    @jax.named_scope("attn")
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
        """Returns what T positions gather, and the keys and values they gathered from.

        Args:
            x: the normed residual stream.
            positions: where the T rows of x stand, and what they may see.
            kv: the cache to which the keys and values of the T rows are added; None attends within x alone. In a block
                that reads another block's, those of that block, with the T rows added.
            x_kv: what keys and values are computed from, if not x.
            key: randomness of dropout; None for none.
            tap: what is captured and edited.
        """
        q, k, v = self._project(x, x if x_kv is None else x_kv)
        q = self._heads("attn.hook_q", q, self.n_heads, self.q_ln, tap)
        if self.temperature is not None:
            q = self.temperature(q, positions.query)
        if self.rotary is not None:
            q = self.rotary(q, positions)
        if k is not None and v is not None:
            k = self._heads("attn.hook_k", k, self.kv_heads, self.k_ln, tap)
            v = self._heads("attn.hook_v", v, self.kv_heads, None, tap)
            if self.rotary is not None:
                k = self.rotary(k, positions)
            own = KeysValues(k, v)
            kv = kv.write(own, positions.query) if isinstance(kv, LayerCache) else own
        assert kv is not None  # the model gives it to a block that has no keys of its own
        read = _tap_shared(kv, tap) if k is None and tap.asks("attn.hook_k", "attn.hook_v") else kv

        gather = functools.partial(
            attend,
            q,
            read,
            positions.query,
            scale=self.scale,
            slopes=None if self.alibi is None else self.alibi.slopes(),
            allowed=positions.allowed,
            window=self.sliding_window,
            softcap=self.softcap,
            dropout=self.dropout,
            key=key,
            layout=self.layout,
        )
        if not tap.asks("attn.hook_attn_scores", "attn.hook_pattern"):
            h = gather()
        elif isinstance(read, LayerCache):
            # Other positions, and other rows of a batch, keep what they have without edits.
            edited = tap.edited("attn.hook_attn_scores", "attn.hook_pattern")
            h = jnp.where(edited[:, None], gather(tap=tap), gather())
        else:
            h = gather(tap=tap)
        z = tap("attn.hook_z", jnp.swapaxes(h, 0, 1))
        return self.out_proj(z.reshape(x.shape[0], -1)), kv

    def _project(
        self, x: Float[Array, "T D"], x_kv: Float[Array, "T D"]
    ) -> tuple[Float[Array, "T NH"], Float[Array, "T KH"] | None, Float[Array, "T KH"] | None]:
        """Returns q, k and v with all heads in a row, clipped; k and v are None where they are another block's."""
        if self.Wqkv is not None:
            ends = (self.n_heads * self.head_size, (self.n_heads + self.kv_heads) * self.head_size)
            q, k, v = jnp.split(self._clip(self.Wqkv(x)), ends, axis=-1)
            return q, k, v
        assert self.Wq is not None
        q = self._clip(self.Wq(x))
        if self.Wk is None or self.Wv is None:
            return q, None, None
        return q, self._clip(self.Wk(x_kv)), self._clip(self.Wv(x_kv))

    def _clip(self, x: Float[Array, "T O"]) -> Float[Array, "T O"]:
        return x if self.clip_qkv is None else jnp.clip(x, -self.clip_qkv, self.clip_qkv)

    def _heads(
        self, place: str, x: Float[Array, "T NH"], n: int, norm: LayerNorm | None, tap: Tap
    ) -> Float[Array, "N T H"]:
        """Returns x normed and split into its n heads; `place` is its name before the norm."""
        if tap.asks(place):
            x = tap(place, x.reshape(x.shape[0], n, -1)).reshape(x.shape)
        if norm is not None and not self.norm_per_head:
            x = norm(x)
        x = jnp.swapaxes(x.reshape(x.shape[0], n, -1), 0, 1)
        return norm(x) if norm is not None and self.norm_per_head else x


def _tap_shared(kv: KeysValues | LayerCache, tap: Tap) -> KeysValues:
    """Returns another block's keys and values as this block alone reads them."""
    if isinstance(kv, LayerCache):
        raise MPTError(
            "edits: expected no hook_k and hook_v of a block that reads another block's cache; edit those of that block"
        )
    k, v = (jnp.swapaxes(x, 0, 1) for x in (kv.k, kv.v))
    k, v = tap("attn.hook_k", k), tap("attn.hook_v", v)
    return KeysValues(jnp.swapaxes(k, 0, 1), jnp.swapaxes(v, 0, 1))
