"""MPTConfig: the numbers that decide an MPT, under llm-foundry's own names.

This file holds the canonical form and what makes it valid; how the dialects of config.json are brought into that
form stands in `config_dialects`.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpt_eqx.config_dialects import read_json_object, to_canonical, to_config_json
from mpt_eqx.errors import ConfigError

NORM_TYPES = ("low_precision_layernorm", "layernorm")
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
class AttnConfig:
    """Attention: `attn_config` of config.json.

    Args:
        alibi: positions as a linear bias on the attention scores. Must be True: other schemes are not supported yet.
        alibi_bias_max: exponent of the steepest-to-flattest range of ALiBi slopes, > 0; 8 in most models.
        clip_qkv: q, k and v are clamped to [-clip_qkv, clip_qkv]; > 0, or None for no clamping.
        softmax_scale: factor on q·k, > 0; None means 1/√(d_model/n_heads).
    """

    alibi: bool = False
    alibi_bias_max: float = 8
    clip_qkv: float | None = None
    softmax_scale: float | None = None

    def __post_init__(self) -> None:
        _check_bool("attn_config.alibi", self.alibi)
        if not self.alibi:
            raise ConfigError(
                "attn_config.alibi: expected true, found false; learned, rotary and no positions are not supported yet"
            )
        _check_number("attn_config.alibi_bias_max", self.alibi_bias_max)
        _check_number("attn_config.clip_qkv", self.clip_qkv, optional=True)
        _check_number("attn_config.softmax_scale", self.softmax_scale, optional=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FFNConfig:
    """Feed-forward network: `ffn_config` of config.json.

    Args:
        ffn_type: "mptmlp", two linear maps with an exact GELU between them.
    """

    ffn_type: str = "mptmlp"

    def __post_init__(self) -> None:
        _check_choice("ffn_config.ffn_type", self.ffn_type, ("mptmlp",))


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
        emb_init_std: standard deviation of the embedding, instead of the scheme's.
        emb_init_uniform_lim: bounds (low, high) of a uniform embedding, or one bound for (-bound, bound).
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
        _check_choice("init_config.name", self.name, INIT_NAMES)
        _check_choice("init_config.fan_mode", self.fan_mode, ("fan_in", "fan_out"))
        _check_choice("init_config.init_nonlinearity", self.init_nonlinearity, ("relu", "leaky_relu", "linear"))
        _check_number("init_config.init_gain", self.init_gain, low=-math.inf)
        if not isinstance(self.init_div_is_residual, bool):
            _check_number("init_config.init_div_is_residual", self.init_div_is_residual)
        _check_number("init_config.init_std", self.init_std, low=-math.inf, optional=True)
        _check_number("init_config.emb_init_std", self.emb_init_std, low=-math.inf, optional=True)
        lim = self.emb_init_uniform_lim
        if isinstance(lim, tuple):
            if len(lim) != 2:
                raise ConfigError(
                    f"init_config.emb_init_uniform_lim: expected one bound or (low, high), found {list(lim)}"
                )
            for bound in lim:
                _check_number("init_config.emb_init_uniform_lim", bound, low=-math.inf)
        else:
            _check_number("init_config.emb_init_uniform_lim", lim, low=-math.inf, optional=True)
        if self.name == "baseline_" and self.init_std is None:
            raise ConfigError("init_config.init_std: expected a number with name 'baseline_', found null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPTConfig:
    """Everything that decides an MPT's modules and maths. Frozen and hashable.

    Names, meanings and defaults are those of llm-foundry's `MPTConfig` (commit 8c8dd48,
    llmfoundry/models/mpt/configuration_mpt.py), so that a config.json reads the same here and there.

    Args:
        d_model: width of the residual stream; a multiple of n_heads.
        n_heads: attention heads.
        n_layers: blocks.
        expansion_ratio: FFN width over d_model; the product must be a whole number.
        max_seq_len: tokens the model was made for; longer inputs are refused. ALiBi models may be given more.
        vocab_size: rows of the embedding; may exceed the tokenizer's size.
        no_bias: True when no Linear and no norm has a bias. Must be True: biases are not supported yet.
        norm_type: "low_precision_layernorm" or "layernorm"; outside mixed precision they are the same.
        norm_eps: added to the variance in every norm, > 0.
        tie_word_embeddings: the output matrix is the embedding; False gives the model an lm_head.
        attn_config, ffn_config, init_config: the nested parts.

    Raises:
        ConfigError: a value is out of range, contradicts another, or asks for what is not supported.
    """

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    expansion_ratio: float = 4
    max_seq_len: int = 2048
    vocab_size: int = 50368
    no_bias: bool = False
    norm_type: str = "low_precision_layernorm"
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    attn_config: AttnConfig = dataclasses.field(default_factory=AttnConfig)
    ffn_config: FFNConfig = dataclasses.field(default_factory=FFNConfig)
    init_config: InitConfig = dataclasses.field(default_factory=InitConfig)

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "max_seq_len", "vocab_size"):
            _check_int(name, getattr(self, name))
        # A bound of its own, because every block is an object in memory: a hostile file must not make us build 10⁹.
        _check_int("n_layers", self.n_layers, high=1024)
        if self.d_model % self.n_heads:
            raise ConfigError(f"d_model: expected a multiple of n_heads={self.n_heads}, found {self.d_model}")
        _check_number("expansion_ratio", self.expansion_ratio)
        if self.d_model * self.expansion_ratio != int(self.d_model * self.expansion_ratio):
            raise ConfigError(
                f"expansion_ratio: expected d_model·expansion_ratio to be a whole number, "
                f"found {self.d_model}·{self.expansion_ratio}"
            )
        _check_number("norm_eps", self.norm_eps)
        _check_choice("norm_type", self.norm_type, NORM_TYPES)
        _check_bool("tie_word_embeddings", self.tie_word_embeddings)
        _check_bool("no_bias", self.no_bias)
        if not self.no_bias:
            raise ConfigError("no_bias: expected true, found false; biases are not supported yet")
        for name, part in (("attn_config", AttnConfig), ("ffn_config", FFNConfig), ("init_config", InitConfig)):
            if not isinstance(getattr(self, name), part):
                raise ConfigError(
                    f"{name}: expected {part.__name__}, found {type(getattr(self, name)).__name__}; "
                    f"MPTConfig.from_dict takes plain dicts"
                )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def ffn_hidden_size(self) -> int:
        """Width of the FFN's hidden layer."""
        return int(self.d_model * self.expansion_ratio)

    def num_parameters(self) -> int:
        """Returns how many numbers the model's tensors hold."""
        d = self.d_model
        block = 4 * d * d + 2 * d * self.ffn_hidden_size + 2 * d
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.n_layers * block + d

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "MPTConfig":
        """Reads the content of a config.json, in llm-foundry's or in transformers' dialect.

        Raises:
            ConfigError: a key is unknown and could change the maths, or its value is wrong or not supported yet.
        """
        canonical = to_canonical(d)
        return cls(
            attn_config=AttnConfig(**canonical.pop("attn_config")),
            ffn_config=FFNConfig(**canonical.pop("ffn_config")),
            init_config=InitConfig(**canonical.pop("init_config")),
            **canonical,
        )

    @classmethod
    def from_json_file(cls, path: str | Path) -> "MPTConfig":
        """Reads a config.json.

        Raises:
            ConfigError: the file is missing, is not a JSON object, or `from_dict` refuses its content.
        """
        d = read_json_object(path)
        try:
            return cls.from_dict(d)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of a config.json that llm-foundry, transformers and `from_dict` read alike."""
        return to_config_json(dataclasses.asdict(self))


def _check_int(name: str, value: object, *, low: int = 1, high: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}: expected a whole number from {low} to {high}, found {value!r}")


def _check_number(name: str, value: object, *, low: float = 0.0, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < math.inf:
        above = "a finite number" if low == -math.inf else f"a finite number > {low:g}"
        raise ConfigError(f"{name}: expected {above}{' or null' if optional else ''}, found {value!r}")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected true or false, found {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: expected {' or '.join(map(repr, choices))}, found {value!r}; not supported")
