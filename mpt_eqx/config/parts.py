"""The nested parts of an MPTConfig, each under llm-foundry's own names, with what makes it valid by itself.

Defaults are those of llm-foundry 0.22, llmfoundry/models/utils/config_defaults.py.
"""

import dataclasses
import math

from mpt_eqx.config.validation import check_bool, check_choice, check_int, check_number, check_part, check_probability
from mpt_eqx.errors import ConfigError

ATTN_TYPES = ("multihead_attention", "multiquery_attention", "grouped_query_attention")
ROPE_TYPES = ("no_scaling", "linear", "dynamic", "llama3")
MOE_TYPES = ("torch_dmoe", "mb_dmoe")
FFN_TYPES = ("mptmlp", "mptglu", "te_ln_mlp", *MOE_TYPES)
ACTIVATIONS = ("gelu", "relu", "silu", "quick_gelu", "leaky_relu")
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

    type: str = "no_scaling"
    factor: float = 1.0
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        name = "attn_config.rope_hf_config"
        check_choice(f"{name}.type", self.type, ROPE_TYPES)
        check_number(f"{name}.factor", self.factor)
        llama3 = self.type == "llama3"
        check_number(f"{name}.low_freq_factor", self.low_freq_factor, optional=not llama3)
        check_number(f"{name}.high_freq_factor", self.high_freq_factor, optional=not llama3)
        check_int(
            f"{name}.original_max_position_embeddings", self.original_max_position_embeddings, optional=not llama3
        )
        if llama3 and self.low_freq_factor == self.high_freq_factor:
            raise ConfigError(
                f"{name}.high_freq_factor: expected another value than low_freq_factor, found {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemperatureTuning:
    """Sharper attention for later queries: `attn_config.attn_temperature_tuning` of config.json.

    Queries at position p (0-based) are multiplied by 1 + attn_scale · log(⌊(p + 1) / floor_scale⌋ + 1).

    Args:
        floor_scale: tokens over which the factor stays the same, > 0.
        attn_scale: strength; 0 switches it off.
    """

    floor_scale: float = 8192
    attn_scale: float = 0.0

    def __post_init__(self) -> None:
        check_number("attn_config.attn_temperature_tuning.floor_scale", self.floor_scale)
        check_number("attn_config.attn_temperature_tuning.attn_scale", self.attn_scale, low=-math.inf)


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

    attn_type: str = "multihead_attention"
    kv_n_heads: int | None = None
    attn_pdrop: float = 0.0
    fused_qkv: bool = True
    clip_qkv: float | None = None
    qk_ln: bool = False
    qk_gn: bool = False
    softmax_scale: float | None = None
    attn_logit_softcapping: float | None = None
    sliding_window_size: int = -1
    attn_uses_sequence_id: bool = False
    attn_temperature_tuning: TemperatureTuning = TemperatureTuning()
    alibi: bool = False
    alibi_bias_max: float = 8
    rope: bool = False
    rope_theta: float = 10000
    rope_impl: str = "dail"
    rope_hf_config: RopeHFConfig = RopeHFConfig()

    def __post_init__(self) -> None:
        check_choice("attn_config.attn_type", self.attn_type, ATTN_TYPES)
        if self.attn_type == "grouped_query_attention":
            check_int("attn_config.kv_n_heads", self.kv_n_heads)
        elif self.kv_n_heads is not None:
            raise ConfigError(f"attn_config.kv_n_heads: expected null with {self.attn_type}, found {self.kv_n_heads!r}")
        check_probability("attn_config.attn_pdrop", self.attn_pdrop)
        for name in ("fused_qkv", "qk_ln", "qk_gn", "attn_uses_sequence_id", "alibi", "rope"):
            check_bool(f"attn_config.{name}", getattr(self, name))
        for name in ("clip_qkv", "softmax_scale", "attn_logit_softcapping"):
            check_number(f"attn_config.{name}", getattr(self, name), optional=True)
        check_number("attn_config.alibi_bias_max", self.alibi_bias_max)
        check_number("attn_config.rope_theta", self.rope_theta)
        check_choice("attn_config.rope_impl", self.rope_impl, ("dail", "hf"))
        check_part("attn_config.rope_hf_config", self.rope_hf_config, RopeHFConfig)
        check_part("attn_config.attn_temperature_tuning", self.attn_temperature_tuning, TemperatureTuning)
        check_int("attn_config.sliding_window_size", self.sliding_window_size, low=-1)
        if self.qk_ln and self.qk_gn:
            raise ConfigError("attn_config.qk_gn: expected false with qk_ln, found true")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActFnConfig:
    """The activation of the feed-forward network: `ffn_config.ffn_act_fn` of config.json.

    Args:
        name: "gelu", "relu", "silu", "quick_gelu" (x·sigmoid(1.702·x)) or "leaky_relu".
        approximate: "none" for the exact gelu, "tanh" for its approximation.
        negative_slope: slope of leaky_relu below 0.
    """

    name: str = "gelu"
    approximate: str = "none"
    negative_slope: float = 0.01

    def __post_init__(self) -> None:
        check_choice("ffn_config.ffn_act_fn.name", self.name, ACTIVATIONS)
        check_choice("ffn_config.ffn_act_fn.approximate", self.approximate, ("none", "tanh"))
        check_number("ffn_config.ffn_act_fn.negative_slope", self.negative_slope, low=-math.inf)
        for name, of in (("approximate", "gelu"), ("negative_slope", "leaky_relu")):
            if self.name != of and getattr(self, name) != getattr(type(self), name):
                raise ConfigError(f"ffn_config.ffn_act_fn.{name}: expected no such key with {self.name!r}")


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
    """

    ffn_type: str = "mptmlp"
    ffn_hidden_size: int | None = None
    ffn_act_fn: ActFnConfig | None = None
    moe_num_experts: int = 1
    moe_top_k: int = 1
    mlp_type: str = "mlp"
    moe_jitter_eps: float | None = None
    moe_normalize_expert_weights: float | None = None

    def __post_init__(self) -> None:
        check_choice("ffn_config.ffn_type", self.ffn_type, FFN_TYPES)
        check_int("ffn_config.ffn_hidden_size", self.ffn_hidden_size, optional=True)
        if self.ffn_act_fn is not None:
            check_part("ffn_config.ffn_act_fn", self.ffn_act_fn, ActFnConfig)
            if self.ffn_type == "te_ln_mlp":
                raise ConfigError("ffn_config.ffn_act_fn: expected null with te_ln_mlp, which has its own activation")
        check_int("ffn_config.moe_num_experts", self.moe_num_experts, high=4096)
        check_int("ffn_config.moe_top_k", self.moe_top_k, high=self.moe_num_experts)
        check_choice("ffn_config.mlp_type", self.mlp_type, ("mlp", "glu"))
        check_number("ffn_config.moe_jitter_eps", self.moe_jitter_eps, optional=True)
        check_number("ffn_config.moe_normalize_expert_weights", self.moe_normalize_expert_weights, optional=True)
        if self.ffn_type not in MOE_TYPES:
            for field in dataclasses.fields(self):
                if field.name in MOE_FIELDS and getattr(self, field.name) != field.default:
                    raise ConfigError(f"ffn_config.{field.name}: expected no such key with {self.ffn_type!r}")


MOE_FIELDS = ("moe_num_experts", "moe_top_k", "mlp_type", "moe_jitter_eps", "moe_normalize_expert_weights")


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

    name: str = "kaiming_normal_"
    fan_mode: str = "fan_in"
    init_nonlinearity: str = "relu"
    init_gain: float = 0.0
    init_div_is_residual: bool | float = True
    init_std: float | None = None
    emb_init_std: float | None = None
    emb_init_uniform_lim: float | tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_choice("init_config.name", self.name, INIT_NAMES)
        check_choice("init_config.fan_mode", self.fan_mode, ("fan_in", "fan_out"))
        check_choice("init_config.init_nonlinearity", self.init_nonlinearity, ("relu", "leaky_relu", "linear"))
        check_number("init_config.init_gain", self.init_gain, low=-math.inf)
        if not isinstance(self.init_div_is_residual, bool):
            check_number("init_config.init_div_is_residual", self.init_div_is_residual)
        check_number("init_config.init_std", self.init_std, low=-math.inf, optional=True)
        check_number("init_config.emb_init_std", self.emb_init_std, low=-math.inf, optional=True)
        if (self.emb_init_std or 0) < 0:
            raise ConfigError(f"init_config.emb_init_std: expected a number ≥ 0, found {self.emb_init_std}")
        lim = self.emb_init_uniform_lim
        if isinstance(lim, tuple):
            if len(lim) != 2:
                raise ConfigError(
                    f"init_config.emb_init_uniform_lim: expected one bound or (low, high), found {list(lim)}"
                )
            for bound in lim:
                check_number("init_config.emb_init_uniform_lim", bound, low=-math.inf)
            if lim[0] > lim[1]:
                raise ConfigError(f"init_config.emb_init_uniform_lim: expected low ≤ high, found {list(lim)}")
        else:
            check_number("init_config.emb_init_uniform_lim", lim, low=-math.inf, optional=True)
        if self.name == "baseline_" and self.init_std is None:
            raise ConfigError("init_config.init_std: expected a number with name 'baseline_', found null")


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

    sliding_window_size: int | None = None
    attn_temperature_tuning: TemperatureTuning | None = None
    nope: bool = False
    reuse_kv_layer_idx: int | None = None
    reuse_kv_x_layer_idx: int | None = None

    def __post_init__(self) -> None:
        name = "block_overrides: attn_config"
        check_int(f"{name}.sliding_window_size", self.sliding_window_size, low=-1, optional=True)
        check_bool(f"{name}.nope", self.nope)
        check_int(f"{name}.reuse_kv_layer_idx", self.reuse_kv_layer_idx, low=-1023, high=-1, optional=True)
        check_int(f"{name}.reuse_kv_x_layer_idx", self.reuse_kv_x_layer_idx, low=-1023, high=-1, optional=True)
        if self.attn_temperature_tuning is not None:
            check_part(f"{name}.attn_temperature_tuning", self.attn_temperature_tuning, TemperatureTuning)
        if self.reuse_kv_layer_idx is not None and self.reuse_kv_x_layer_idx is not None:
            raise ConfigError(f"{name}.reuse_kv_x_layer_idx: expected null with reuse_kv_layer_idx, found a number")
