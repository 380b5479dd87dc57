"""The nested parts of an MPTConfig, each under llm-foundry's own names, with what makes it valid by itself.

Defaults are those of llm-foundry 0.22, llmfoundry/models/utils/config_defaults.py.
"""

import dataclasses
import sys

from mpt_eqx.config.validation import (
    ANY_NUMBER,
    BOOLEAN,
    PROBABILITY,
    Check,
    between,
    check,
    check_fields,
    choice,
    either,
    field,
    number,
    part,
    whole,
)
from mpt_eqx.errors import ConfigError

ATTN_TYPES = ("multihead_attention", "multiquery_attention", "grouped_query_attention")
ROPE_TYPES = ("no_scaling", "linear", "dynamic", "llama3")
MOE_TYPES = ("torch_dmoe", "mb_dmoe")
FFN_TYPES = ("mptmlp", "mptglu", "te_ln_mlp", *MOE_TYPES)
MOE_FIELDS = ("moe_num_experts", "moe_top_k", "mlp_type", "moe_jitter_eps", "moe_normalize_expert_weights")
MB_FIELDS = ("moe_loss_weight",)
# Each activation with its arguments, as in torch.nn.functional; quick_gelu is llm-foundry's own.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "gelu": ("approximate",),
    "quick_gelu": (),
    "relu": (),
    "relu6": (),
    "leaky_relu": ("negative_slope",),
    "elu": ("alpha",),
    "selu": (),
    "celu": ("alpha",),
    "silu": (),
    "mish": (),
    "softplus": ("beta", "threshold"),
    "softsign": (),
    "tanh": (),
    "sigmoid": (),
    "logsigmoid": (),
    "hardtanh": ("min_val", "max_val"),
    "hardsigmoid": (),
    "hardswish": (),
}
INIT_NAMES = (
    "kaiming_normal_",
    "kaiming_uniform_",
    "baseline_",
    "small_init_",
    "neox_init_",
    "xavier_normal_",
    "xavier_uniform_",
    "default_",
)
NOT_ZERO = Check("a finite number but 0", lambda value: ANY_NUMBER.valid(value) and value != 0)
BOUNDS = Check(
    "one bound or (low, high)",
    lambda value: all(map(ANY_NUMBER.valid, value if isinstance(value, tuple) and len(value) == 2 else [value])),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeHFConfig:
    """How rotary positions are stretched: `attn_config.rope_hf_config` of config.json, for rope_impl "hf".

    Keys that the type has no use for may be there, as in the reference.

    Args:
        type: "no_scaling", "linear" (positions divided by factor), "dynamic" (a larger base past the trained length)
            or "llama3" (low frequencies divided by factor).
        factor: how much longer than trained the input may be, > 0.
        low_freq_factor: llama3: wavelengths above original_max_position_embeddings / this are divided fully.
        high_freq_factor: llama3: wavelengths below original_max_position_embeddings / this are left alone; must
            differ from low_freq_factor.
        original_max_position_embeddings: trained length in tokens; needed by llama3. For dynamic, None means the
            model's max_seq_len, which is what llm-foundry always takes; a number lets a model run past its trained
            length. A config.json has that number under `trained_max_seq_len`, a key of this library's own, because
            under this name the reference would not look at it.
    """

    type: str = field("no_scaling", choice(*ROPE_TYPES))
    factor: float = field(1.0, number())
    low_freq_factor: float | None = field(None, number())
    high_freq_factor: float | None = field(None, number())
    original_max_position_embeddings: int | None = field(None, whole())

    def __post_init__(self) -> None:
        path = "attn_config.rope_hf_config"
        check_fields(self, f"{path}.")
        if self.type == "llama3":
            check(f"{path}.low_freq_factor", self.low_freq_factor, number())
            check(f"{path}.high_freq_factor", self.high_freq_factor, number())
            check(f"{path}.original_max_position_embeddings", self.original_max_position_embeddings, whole())
            if self.low_freq_factor == self.high_freq_factor:
                raise ConfigError(
                    f"{path}.high_freq_factor",
                    f"expected another value than low_freq_factor, found {self.high_freq_factor}",
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemperatureTuning:
    """Sharper attention for later queries: `attn_config.attn_temperature_tuning` of config.json.

    Queries at position p (0-based) are multiplied by 1 + attn_scale · log(⌊(p + 1) / floor_scale⌋ + 1).

    Args:
        floor_scale: tokens over which the factor stays the same, > 0.
        attn_scale: strength; 0 switches it off.
    """

    floor_scale: float = field(8192, number())
    attn_scale: float = field(0.0, ANY_NUMBER)

    def __post_init__(self) -> None:
        check_fields(self, "attn_config.attn_temperature_tuning.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttnConfig:
    """Attention: `attn_config` of config.json.

    Args:
        attn_type: "multihead_attention", "multiquery_attention" (one head of keys and values) or
            "grouped_query_attention" (kv_n_heads of them).
        kv_n_heads: heads of keys and values for grouped_query_attention; divides n_heads. None otherwise.
        attn_pdrop: dropout on the attention weights in training, a probability.
        fused_qkv: one matrix Wqkv, or with False Wq, Wk and Wv.
        clip_qkv: q, k and v are clamped to [-clip_qkv, clip_qkv]; > 0, or None for no clamping.
        qk_ln: LayerNorm over the whole q and the whole k of a token, all heads together.
        qk_gn: LayerNorm over each head of q and k, the weights shared by the heads. Excludes qk_ln.
        softmax_scale: factor on q·k, > 0; None means 1/√(d_model/n_heads).
        attn_logit_softcapping: scores become c·tanh(scores/c) before the bias, c > 0; None for none.
        sliding_window_size: a query sees itself and this many tokens before it; -1 for all.
        attn_uses_sequence_id: sequence_ids given to the model keep packed sequences from seeing each other.
        attn_temperature_tuning: sharper attention for later queries.
        alibi: positions as a linear bias on the attention scores.
        alibi_bias_max: exponent of the flattest ALiBi slope, > 0; 8 in most models.
        rope: positions as a rotation of q and k.
        rope_theta: base of the rotation's frequencies, > 0.
        rope_impl: "dail" counts positions with padding, "hf" without, and can be stretched by rope_hf_config.
        rope_hf_config: how rotary positions are stretched.
    """

    attn_type: str = field("multihead_attention", choice(*ATTN_TYPES))
    kv_n_heads: int | None = field(None, whole())
    attn_pdrop: float = field(0.0, PROBABILITY)
    fused_qkv: bool = field(True, BOOLEAN)
    clip_qkv: float | None = field(None, number())
    qk_ln: bool = field(False, BOOLEAN)
    qk_gn: bool = field(False, BOOLEAN)
    softmax_scale: float | None = field(None, number())
    attn_logit_softcapping: float | None = field(None, number())
    sliding_window_size: int = field(-1, whole(low=-1))
    attn_uses_sequence_id: bool = field(False, BOOLEAN)
    attn_temperature_tuning: TemperatureTuning = field(TemperatureTuning(), part(TemperatureTuning))
    alibi: bool = field(False, BOOLEAN)
    alibi_bias_max: float = field(8, number())
    rope: bool = field(False, BOOLEAN)
    rope_theta: float = field(10000, number())
    rope_impl: str = field("dail", choice("dail", "hf"))
    rope_hf_config: RopeHFConfig = field(RopeHFConfig(), part(RopeHFConfig))

    def __post_init__(self) -> None:
        check_fields(self, "attn_config.")
        if self.attn_type == "grouped_query_attention":
            check("attn_config.kv_n_heads", self.kv_n_heads, whole())
        elif self.kv_n_heads is not None:
            raise ConfigError("attn_config.kv_n_heads", f"expected null with {self.attn_type}, found {self.kv_n_heads}")
        if self.qk_ln and self.qk_gn:
            raise ConfigError("attn_config.qk_gn", "expected false with qk_ln, found true")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActFnConfig:
    """The activation of the feed-forward network: `ffn_config.ffn_act_fn` of config.json.

    Args:
        name: "gelu", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "mish", "softplus", "softsign",
            "tanh", "sigmoid", "logsigmoid", "hardtanh", "hardsigmoid" or "hardswish", each as in torch.nn.functional,
            or "quick_gelu", x·sigmoid(1.702·x).
        approximate: gelu: "none" for the exact function, "tanh" for its approximation.
        negative_slope: leaky_relu: slope below 0.
        alpha: elu, celu: the limit at -∞ is -alpha. Not 0 for celu.
        min_val: hardtanh: smallest value, at most max_val.
        max_val: hardtanh: largest value.
        beta: softplus: log(1 + exp(beta·x)) / beta. Not 0.
        threshold: softplus: x itself where beta·x is above this.
    """

    name: str = field("gelu", choice(*ACTIVATIONS))
    approximate: str = field("none", choice("none", "tanh"))
    negative_slope: float = field(0.01, ANY_NUMBER)
    alpha: float = field(1.0, ANY_NUMBER)
    min_val: float = field(-1.0, ANY_NUMBER)
    max_val: float = field(1.0, ANY_NUMBER)
    beta: float = field(1.0, NOT_ZERO)
    threshold: float = field(20.0, ANY_NUMBER)

    def __post_init__(self) -> None:
        path = "ffn_config.ffn_act_fn"
        check_fields(self, f"{path}.")
        for name in {argument for arguments in ACTIVATIONS.values() for argument in arguments}:
            if name not in ACTIVATIONS[self.name] and getattr(self, name) != getattr(type(self), name):
                raise ConfigError(f"{path}.{name}", f"expected no such key with {self.name!r}")
        if self.name == "celu":
            check(f"{path}.alpha", self.alpha, NOT_ZERO)
        if self.min_val > self.max_val:
            raise ConfigError(f"{path}.min_val", f"expected at most max_val={self.max_val}, found {self.min_val}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FFNConfig:
    """Feed-forward network: `ffn_config` of config.json.

    Args:
        ffn_type: "mptmlp", down(act(up(x))); "mptglu", down(act(gate(x))·up(x)); "te_ln_mlp", an mptmlp of
            Transformer Engine, with its own LayerNorm and names; "torch_dmoe" or "mb_dmoe", a mixture of experts.
        ffn_hidden_size: width of the hidden layer; None means d_model·expansion_ratio.
        ffn_act_fn: the activation; None means the exact gelu, for te_ln_mlp and mb_dmoe the tanh one.
        moe_num_experts: experts of a mixture.
        moe_top_k: experts that each token goes to.
        mlp_type: what an expert of a mixture is: "mlp" or "glu".
        moe_jitter_eps: in training the router sees x times a uniform number from 1 - this to 1 + this; None for x.
        moe_normalize_expert_weights: p of the norm that a token's expert weights are divided by; None for none.
        moe_loss_weight: factor of the loss that balances the experts of mb_dmoe in training, ≥ 0.
    """

    ffn_type: str = field("mptmlp", choice(*FFN_TYPES))
    ffn_hidden_size: int | None = field(None, whole())
    ffn_act_fn: ActFnConfig | None = field(None, part(ActFnConfig))
    moe_num_experts: int = field(1, whole(high=4096))
    moe_top_k: int = field(1, whole())
    mlp_type: str = field("mlp", choice("mlp", "glu"))
    moe_jitter_eps: float | None = field(None, number())
    moe_normalize_expert_weights: float | None = field(None, number())
    moe_loss_weight: float = field(0.1, between(0, sys.float_info.max, "a finite number ≥ 0"))

    def __post_init__(self) -> None:
        check_fields(self, "ffn_config.")
        check("ffn_config.moe_top_k", self.moe_top_k, whole(high=self.moe_num_experts))
        if self.ffn_type == "te_ln_mlp" and self.ffn_act_fn is not None:
            raise ConfigError("ffn_config.ffn_act_fn", "expected null with te_ln_mlp, which has its own activation")
        absent = () if self.ffn_type in MOE_TYPES else MOE_FIELDS
        for name in absent if self.ffn_type == "mb_dmoe" else (*absent, *MB_FIELDS):
            if getattr(self, name) != getattr(type(self), name):
                raise ConfigError(f"ffn_config.{name}", f"expected no such key with {self.ffn_type!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Initialisation of new weights: `init_config` of config.json. It has no effect on a loaded model.

    Args:
        name: scheme for matrices; see `mpt_eqx.model.init`.
        fan_mode: "fan_in" or "fan_out", the fan of the kaiming schemes.
        init_nonlinearity: gain of the kaiming schemes: "relu", "leaky_relu" or "linear".
        init_gain: negative slope of leaky_relu for the kaiming schemes, factor for the xavier schemes.
        init_div_is_residual: divisor of out_proj and down_proj: True for √(2·n_layers), False for 1, or a number > 0.
        init_std: standard deviation of "baseline_".
        emb_init_std: standard deviation of the embeddings, instead of the scheme's.
        emb_init_uniform_lim: bounds (low, high) of uniform embeddings, or one bound for (-bound, bound).
    """

    name: str = field("kaiming_normal_", choice(*INIT_NAMES))
    fan_mode: str = field("fan_in", choice("fan_in", "fan_out"))
    init_nonlinearity: str = field("relu", choice("relu", "leaky_relu", "linear"))
    init_gain: float = field(0.0, ANY_NUMBER)
    init_div_is_residual: bool | float = field(True, either(number(), BOOLEAN))
    init_std: float | None = field(None, ANY_NUMBER)
    emb_init_std: float | None = field(None, between(0, sys.float_info.max, "a number ≥ 0"))
    emb_init_uniform_lim: float | tuple[float, float] | None = field(None, BOUNDS)

    def __post_init__(self) -> None:
        check_fields(self, "init_config.")
        lim = self.emb_init_uniform_lim
        if isinstance(lim, tuple) and lim[0] > lim[1]:
            raise ConfigError("init_config.emb_init_uniform_lim", f"expected low ≤ high, found {list(lim)}")
        if self.name == "baseline_" and self.init_std is None:
            raise ConfigError("init_config.init_std", "expected a number with name 'baseline_', found null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOverride:
    """What one block has otherwise than attn_config says; None and False leave it as there.

    Args:
        sliding_window_size: as in AttnConfig.
        attn_temperature_tuning: as in AttnConfig.
        nope: neither rotation nor ALiBi in this block.
        reuse_kv_layer_idx: < 0: this block has no keys and values of its own and reads those of the block that many
            places before it (or of the block that one in turn reads).
        reuse_kv_x_layer_idx: < 0: this block computes its keys and values from the input of the block that many places
            before it. Needs fused_qkv False.
    """

    sliding_window_size: int | None = field(None, whole(low=-1))
    attn_temperature_tuning: TemperatureTuning | None = field(None, part(TemperatureTuning))
    nope: bool = field(False, BOOLEAN)
    reuse_kv_layer_idx: int | None = field(None, whole(-1023, -1))
    reuse_kv_x_layer_idx: int | None = field(None, whole(-1023, -1))

    def __post_init__(self) -> None:
        path = "block_overrides: attn_config"
        check_fields(self, f"{path}.")
        if self.reuse_kv_layer_idx is not None and self.reuse_kv_x_layer_idx is not None:
            raise ConfigError(f"{path}.reuse_kv_x_layer_idx", "expected null with reuse_kv_layer_idx, found a number")
