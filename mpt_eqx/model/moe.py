"""A mixture of experts: a router sends each token to a few of E feed-forward networks, and none is dropped.

Source: llm-foundry 0.22, llmfoundry/models/layers/dmoe.py, which takes the layout from megablocks' dMoE.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mpt_eqx.config import MPTConfig
from mpt_eqx.model.activations import Activation, make_activation
from mpt_eqx.model.init import init_experts, init_linear
from mpt_eqx.model.linear import Linear
from mpt_eqx.model.taps import UNTAPPED, Tap
from mpt_eqx.ops.layout import Layout
from mpt_eqx.ops.matmul import expert_matmul
from mpt_eqx.ops.numerics import accum_dtype


class Jitter(eqx.Module):
    """x times uniform numbers from 1 − eps to 1 + eps, in training."""

    eps: float = eqx.field(static=True)
    inference: bool = False

    def __call__(self, x: Float[Array, "T D"], *, key: PRNGKeyArray) -> Float[Array, "T D"]:
        """Returns x jittered, or x itself under `eqx.nn.inference_mode`."""
        if self.inference:
            return x
        return x * jax.random.uniform(key, x.shape, x.dtype, minval=1 - self.eps, maxval=1 + self.eps)


class Router(eqx.Module):
    """Which k experts each token goes to, and how much each counts."""

    layer: Linear
    jitter: Jitter | None
    top_k: int = eqx.field(static=True)
    norm_order: float | None = eqx.field(static=True)

    def __init__(self, config: MPTConfig, *, key: PRNGKeyArray):
        ffn = config.ffn_config
        self.layer = init_linear(config, (ffn.moe_num_experts, config.d_model), False, key=key)
        self.jitter = None if ffn.moe_jitter_eps is None else Jitter(ffn.moe_jitter_eps)
        self.top_k = ffn.moe_top_k
        self.norm_order = ffn.moe_normalize_expert_weights

    def __call__(
        self, x: Float[Array, "T D"], *, key: PRNGKeyArray | None = None, tap: Tap = UNTAPPED
    ) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
        """Returns the weights and the numbers of each token's experts: the largest of a softmax over all experts."""
        if self.jitter is not None and key is not None:
            x = self.jitter(x, key=key)
        logits = self.layer(x)
        scores = jax.nn.softmax(logits.astype(accum_dtype(x.dtype)), axis=-1).astype(x.dtype)
        weights, experts = jax.lax.top_k(tap("mlp.hook_expert_weights", scores), self.top_k)
        if self.norm_order is not None:
            order = self.norm_order
            norm = jnp.sum(weights.astype(accum_dtype(x.dtype)) ** order, axis=-1, keepdims=True) ** (1 / order)
            weights = (weights.astype(norm.dtype) / norm.astype(x.dtype).astype(norm.dtype)).astype(x.dtype)
        return weights, experts


class ExpertMLP(eqx.Module):
    """The weights of E experts under one another: act(x w1ᵀ) w2 for each, or (act(x w1ᵀ) · x v1ᵀ) w2 with v1."""

    w1: Float[Array, "EF D"]
    v1: Float[Array, "EF D"] | None
    w2: Float[Array, "EF D"]
    layout: Layout | None  # where experts lie on different devices
    act: Activation = eqx.field(static=True)
    n_experts: int = eqx.field(static=True)

    def __init__(self, config: MPTConfig, *, key: PRNGKeyArray):
        w1_key, v1_key, w2_key = jax.random.split(key, 3)
        self.w1 = init_experts(config, key=w1_key)
        self.v1 = init_experts(config, key=v1_key) if config.ffn_config.mlp_type == "glu" else None
        self.w2 = init_experts(config, residual=True, key=w2_key)
        self.layout = None
        self.act = make_activation(config)
        self.n_experts = config.ffn_config.moe_num_experts

    def __call__(
        self, x: Float[Array, "T D"], weights: Float[Array, "T E"], tap: Tap = UNTAPPED
    ) -> Float[Array, "T D"]:
        """Returns the sum over the experts of weight · output.

        Args:
            x: the normed residual stream.
            weights: how much each expert counts for each token; 0 where it does not.
            tap: what is captured and edited.
        """

        def before(w: Float[Array, "F D"]) -> Float[Array, "T F"]:
            return expert_matmul(x, w.T)

        def after(h: Float[Array, "T F"], w2: Float[Array, "F D"], weight: Float[Array, " T"]) -> Float[Array, "T D"]:
            return expert_matmul(h, w2) * weight[:, None]

        def expert(this: tuple[Any, ...]) -> Float[Array, "T D"]:
            w1, v1, w2, weight = this
            h = self.act(before(w1))
            return after(h if v1 is None else h * before(v1), w2, weight)

        def per_expert(w: Float[Array, "EF D"] | None) -> Float[Array, "E F D"] | None:
            return None if w is None else w.reshape(self.n_experts, -1, w.shape[-1])

        stacked: tuple[Any, ...] = (per_expert(self.w1), per_expert(self.v1), per_expert(self.w2), weights.T)
        if tap.asks("mlp.hook_pre", "mlp.hook_post"):
            w1, v1, w2, _ = stacked
            h = self.act(tap("mlp.hook_pre", jax.vmap(before, out_axes=1)(w1)))
            h = tap("mlp.hook_post", h if v1 is None else h * jax.vmap(before, out_axes=1)(v1))
            return jnp.sum(jax.vmap(after, in_axes=(1, 0, 1))(h, w2, weights), axis=0)
        if self.layout is not None:
            # They work at the same time; in turns, each would be sent to all.
            return jnp.sum(jax.vmap(expert)(stacked), axis=0)
        # One expert after the other, as the reference adds them up, so that E·T·F numbers never stand side by side.
        return jax.lax.scan(lambda total, this: (total + expert(this), None), jnp.zeros_like(x), stacked)[0]


class Experts(eqx.Module):
    """The experts, and megablocks' bias on their sum, if there is one."""

    mlp: ExpertMLP
    bias: Float[Array, " D"] | None


class MoE(eqx.Module):
    """Σ weight · expert(x) over the experts that the router chooses."""

    router: Router
    experts: Experts

    def __init__(self, config: MPTConfig, *, key: PRNGKeyArray):
        router_key, experts_key = jax.random.split(key)
        self.router = Router(config, key=router_key)
        # torch_dmoe has no bias anywhere, whatever no_bias says; mb_dmoe has this one.
        biased = config.ffn_config.ffn_type == "mb_dmoe" and not config.no_bias
        bias = jnp.zeros(config.d_model, jnp.float32) if biased else None
        self.experts = Experts(mlp=ExpertMLP(config, key=experts_key), bias=bias)

    @jax.named_scope("ffn")
    def __call__(
        self, x: Float[Array, "T D"], *, key: PRNGKeyArray | None = None, tap: Tap = UNTAPPED
    ) -> Float[Array, "T D"]:
        """Returns the network's output, position by position; the key is for the router's jitter."""
        weights, experts = self.router(x, key=key, tap=tap)
        rows = jnp.arange(x.shape[0])[:, None]
        spread = jnp.zeros((x.shape[0], self.experts.mlp.n_experts), x.dtype).at[rows, experts].set(weights)
        y = self.experts.mlp(x, spread, tap)
        return y if self.experts.bias is None else y + self.experts.bias
