"""MPTConfig: the numbers that decide an MPT, under llm-foundry's own names.

This file holds the canonical form, what makes it valid and what follows from it by counting; its nested parts stand in
`config_parts`, how the dialects of config.json are brought into this form in `config_dialects`, and the configurations
of known models in `config_presets`.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpt_eqx.config.dialects import as_written, from_canonical, read_json_object, to_canonical, to_config_json
from mpt_eqx.config.parts import MOE_TYPES
from mpt_eqx.config.parts import ActFnConfig as ActFnConfig
from mpt_eqx.config.parts import AttnConfig as AttnConfig
from mpt_eqx.config.parts import BlockOverride as BlockOverride
from mpt_eqx.config.parts import FFNConfig as FFNConfig
from mpt_eqx.config.parts import InitConfig as InitConfig
from mpt_eqx.config.parts import RopeHFConfig as RopeHFConfig
from mpt_eqx.config.parts import TemperatureTuning as TemperatureTuning
from mpt_eqx.config.presets import PRESETS
from mpt_eqx.config.validation import check_bool, check_choice, check_int, check_number, check_part, check_probability
from mpt_eqx.errors import ConfigError

LAYERNORMS = ("low_precision_layernorm", "layernorm")
RMSNORMS = ("low_precision_rmsnorm", "rmsnorm", "triton_rmsnorm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What one block's attention is, after block_overrides.

    Attributes:
        sliding_window_size: tokens before itself that a query sees; None for all.
        attn_temperature_tuning: None for none.
        nope: neither rotation nor ALiBi.
        kv_from: the block whose keys and values this one reads, if not its own.
        kv_x_from: the block whose input this one computes its keys and values from, if not its own.
    """

    sliding_window_size: int | None
    attn_temperature_tuning: TemperatureTuning | None
    nope: bool
    kv_from: int | None
    kv_x_from: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPTConfig:
    """Everything that decides an MPT's modules and maths. Frozen and hashable.

    Names, meanings and defaults are those of llm-foundry's `MPTConfig` (0.22, llmfoundry/models/mpt/
    configuration_mpt.py), so that a config.json reads the same here and there.

    Args:
        d_model: width of the residual stream; a multiple of n_heads.
        n_heads: attention heads.
        n_layers: blocks.
        head_dim: width of a head if not d_model/n_heads; other values need fused_qkv False.
        expansion_ratio: FFN width over d_model, unless ffn_config says the width; their product must be whole.
        max_seq_len: tokens the model was made for; longer inputs are refused. Models without learned positions may
            be given more.
        vocab_size: rows of the embedding; may exceed the tokenizer's size.
        resid_pdrop: dropout in training on what attention and FFN add to the residual stream, a probability.
        emb_pdrop: dropout in training on the embedding, a probability.
        learned_pos_emb: positions as learned vectors; becomes False where alibi or rope is on.
        logit_scale: factor on the logits, or "inv_sqrt_d_model"; None for none.
        final_logit_softcapping: logits become c·tanh(logits/c), after logit_scale, c > 0; None for none.
        no_bias: True when no Linear and no norm has a bias.
        attention_bias: whether the projections to q, k and v have a bias; None means as no_bias says.
        embedding_fraction: share of the gradient that reaches the embedding from the input side, 0 < f ≤ 1.
        pad_token_id: token whose embedding starts at 0 and gets no gradient from the input side.
        norm_type: "low_precision_layernorm", "layernorm", "low_precision_rmsnorm", "rmsnorm" or "triton_rmsnorm";
            the first two are the same outside mixed precision, and so are the last three.
        norm_eps: added to the variance in every norm but q_ln and k_ln, > 0.
        tie_word_embeddings: the output matrix is the embedding; False gives the model an lm_head.
        block_overrides: what each block has otherwise, one entry for each, or None.
        attn_config, ffn_config, init_config: the nested parts.

    Raises:
        ConfigError: a value is out of range, contradicts another, or asks for what is not supported.
    """

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    head_dim: int | None = None
    expansion_ratio: float = 4
    max_seq_len: int = 2048
    vocab_size: int = 50368
    resid_pdrop: float = 0.0
    emb_pdrop: float = 0.0
    learned_pos_emb: bool = True
    logit_scale: float | str | None = None
    final_logit_softcapping: float | None = None
    no_bias: bool = False
    attention_bias: bool | None = None
    embedding_fraction: float = 1.0
    pad_token_id: int | None = None
    norm_type: str = "low_precision_layernorm"
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    block_overrides: tuple[BlockOverride, ...] | None = None
    attn_config: AttnConfig = dataclasses.field(default_factory=AttnConfig)
    ffn_config: FFNConfig = dataclasses.field(default_factory=FFNConfig)
    init_config: InitConfig = dataclasses.field(default_factory=InitConfig)

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "max_seq_len", "vocab_size"):
            check_int(name, getattr(self, name))
        # A bound of its own, because every block is an object in memory: a hostile file must not make us build 10⁹.
        check_int("n_layers", self.n_layers, high=1024)
        for name, part in (("attn_config", AttnConfig), ("ffn_config", FFNConfig), ("init_config", InitConfig)):
            check_part(name, getattr(self, name), part)
        check_probability("resid_pdrop", self.resid_pdrop)
        check_probability("emb_pdrop", self.emb_pdrop)
        for name in ("learned_pos_emb", "no_bias", "tie_word_embeddings"):
            check_bool(name, getattr(self, name))
        if self.attn_config.alibi or self.attn_config.rope:
            # As llm-foundry does, whatever a file says: mpt-7b's own says true and has no such tensor.
            object.__setattr__(self, "learned_pos_emb", False)
        if self.attention_bias is not None:
            check_bool("attention_bias", self.attention_bias)
        if self.logit_scale != "inv_sqrt_d_model":
            if isinstance(self.logit_scale, str):
                raise ConfigError(
                    f"logit_scale: expected a number, 'inv_sqrt_d_model' or null, found {self.logit_scale!r}"
                )
            check_number("logit_scale", self.logit_scale, low=-math.inf, optional=True)
        check_number("final_logit_softcapping", self.final_logit_softcapping, optional=True)
        check_number("embedding_fraction", self.embedding_fraction)
        if self.embedding_fraction > 1:
            raise ConfigError(f"embedding_fraction: expected a number with 0 < f ≤ 1, found {self.embedding_fraction}")
        check_int("pad_token_id", self.pad_token_id, low=0, high=self.vocab_size - 1, optional=True)
        check_number("norm_eps", self.norm_eps)
        check_choice("norm_type", self.norm_type, (*LAYERNORMS, *RMSNORMS))
        self._check_sizes()
        if self.block_overrides is not None:
            self._check_overrides(self.block_overrides)

    def _check_sizes(self) -> None:
        attn = self.attn_config
        if self.d_model % self.n_heads:
            raise ConfigError(f"d_model: expected a multiple of n_heads={self.n_heads}, found {self.d_model}")
        check_int("head_dim", self.head_dim, optional=True)
        if self.head_dim not in (None, self.d_model // self.n_heads):
            if attn.fused_qkv:
                raise ConfigError(
                    f"head_dim: expected d_model/n_heads={self.d_model // self.n_heads} or null with fused_qkv, "
                    f"found {self.head_dim}"
                )
            if attn.rope and attn.rope_impl == "dail":
                raise ConfigError(
                    f"head_dim: expected d_model/n_heads={self.d_model // self.n_heads} or null with rope_impl 'dail', "
                    f"found {self.head_dim}; rope_impl 'hf' takes others"
                )
        if attn.kv_n_heads is not None and (attn.kv_n_heads > self.n_heads or self.n_heads % attn.kv_n_heads):
            raise ConfigError(
                f"attn_config.kv_n_heads: expected a divisor of n_heads={self.n_heads}, found {attn.kv_n_heads}"
            )
        if attn.rope and self.head_size % 2:
            raise ConfigError(f"attn_config.rope: expected an even head_dim, found {self.head_size}")
        check_number("expansion_ratio", self.expansion_ratio)
        if self.ffn_config.ffn_hidden_size is None:
            width = self.d_model * self.expansion_ratio
            if not 1 <= width < 2**31 or width != int(width):
                raise ConfigError(
                    f"expansion_ratio: expected d_model·expansion_ratio to be a whole number, "
                    f"found {self.d_model}·{self.expansion_ratio}"
                )

    def _check_overrides(self, overrides: tuple[BlockOverride, ...]) -> None:
        if not isinstance(overrides, tuple) or len(overrides) != self.n_layers:
            found = len(overrides) if isinstance(overrides, tuple) else type(overrides).__name__
            raise ConfigError(f"block_overrides: expected one entry for each of {self.n_layers} blocks, found {found}")
        for i, override in enumerate(overrides):
            check_part(f"block_overrides[{i}]", override, BlockOverride)
            if override.nope and self.learned_pos_emb:
                raise ConfigError(f"block_overrides[{i}]: nope: expected false with learned positions, found true")
            for name in ("reuse_kv_layer_idx", "reuse_kv_x_layer_idx"):
                if (getattr(override, name) or 0) + i < 0:
                    raise ConfigError(
                        f"block_overrides[{i}]: {name}: expected at least {-i}, found {getattr(override, name)}: "
                        f"there is no block before the first"
                    )
            if override.reuse_kv_x_layer_idx is not None and self.attn_config.fused_qkv:
                raise ConfigError(
                    f"block_overrides[{i}]: reuse_kv_x_layer_idx: expected attn_config.fused_qkv false with it, "
                    f"found true"
                )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """How many heads of keys and values there are."""
        if self.attn_config.attn_type == "multihead_attention":
            return self.n_heads
        return self.attn_config.kv_n_heads or 1

    @property
    def ffn_hidden_size(self) -> int:
        """Width of the FFN's hidden layer."""
        return self.ffn_config.ffn_hidden_size or int(self.d_model * self.expansion_ratio)

    @property
    def has_attention_bias(self) -> bool:
        """Whether the projections to q, k and v have a bias."""
        return not self.no_bias if self.attention_bias is None else self.attention_bias

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """The attention of each block, with block_overrides applied and relative layer numbers resolved."""
        attn = self.attn_config
        layers: list[LayerConfig] = []
        for i, override in enumerate(self.block_overrides or (BlockOverride(),) * self.n_layers):
            window = override.sliding_window_size
            window = attn.sliding_window_size if window is None else window
            tuning = override.attn_temperature_tuning or attn.attn_temperature_tuning
            # A layer that itself reads from another leads on to that one.
            kv_from = None if (idx := override.reuse_kv_layer_idx) is None else i + idx
            if kv_from is not None and layers[kv_from].kv_from is not None:
                kv_from = layers[kv_from].kv_from
            kv_x_from = None if (idx := override.reuse_kv_x_layer_idx) is None else i + idx
            if kv_x_from is not None and layers[kv_x_from].kv_x_from is not None:
                kv_x_from = layers[kv_x_from].kv_x_from
            layers.append(
                LayerConfig(
                    sliding_window_size=None if window == -1 else window,
                    attn_temperature_tuning=tuning if tuning.attn_scale else None,
                    nope=override.nope,
                    kv_from=kv_from,
                    kv_x_from=kv_x_from,
                )
            )
        return tuple(layers)

    def num_parameters(self) -> int:
        """Returns how many numbers the model's tensors hold."""
        return self._count_parameters(self.ffn_config.moe_num_experts)

    def _count_parameters(self, experts: int) -> int:
        """Returns the number of parameters with `experts` experts in each mixture."""
        d, q, kv = self.d_model, self.n_heads * self.head_size, self.kv_heads * self.head_size
        bias, ffn = int(not self.no_bias), self.ffn_config
        norm = d * (1 + bias) if self.norm_type in LAYERNORMS else d
        if ffn.ffn_type in MOE_TYPES:
            matrices = 3 if ffn.mlp_type == "glu" else 2
            network = d * ffn.moe_num_experts + experts * matrices * d * self.ffn_hidden_size
            network += norm + (d * bias if ffn.ffn_type == "mb_dmoe" else 0)
        else:
            ups = 2 if ffn.ffn_type == "mptglu" else 1
            network = ups * self.ffn_hidden_size * (d + bias) + d * (self.ffn_hidden_size + bias)
            network += 2 * d if ffn.ffn_type == "te_ln_mlp" else norm
        total = self.vocab_size * d * (1 if self.tie_word_embeddings else 2) + norm
        total += self.max_seq_len * d if self.learned_pos_emb else 0
        for layer in self.layers:
            own = layer.kv_from is None
            total += norm + (q + (2 * kv if own else 0)) * (d + self.has_attention_bias) + d * (q + bias) + network
            if self.attn_config.qk_ln:
                total += (q + (kv if own else 0)) * (1 + bias)
            elif self.attn_config.qk_gn:
                total += self.head_size * (2 if own else 1) * (1 + bias)
        return total

    @classmethod
    def preset(cls, name: str) -> "MPTConfig":
        """Returns the configuration of a known model: a published checkpoint, or a size of llm-foundry's recipes.

        Args:
            name: such as "mpt-7b", "mpt-7b-storywriter" or "mpt-125m"; an unknown name lists all of them.

        Raises:
            ConfigError: there is no preset of that name.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, found {name!r}")
        return cls.from_dict(PRESETS[name])

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "MPTConfig":
        """Reads the content of a config.json, in llm-foundry's dialect, transformers' or the flat one of early 2023.

        Raises:
            ConfigError: a key is unknown and could change the maths, or its value is wrong or not supported. The
                message names the key as the file spells it.
        """
        try:
            return cls(**from_canonical(to_canonical(d)))
        except ConfigError as error:
            raise ConfigError(as_written(str(error), d)) from None

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


def count_flops(config: MPTConfig, seq_len: int) -> int:
    """Returns the floating-point operations of one training step on one sequence, by llm-foundry's formula.

    3·(2·N·T + 4·n_layers·d_model·T²): the backward pass costs twice the forward pass, attention is counted in full as
    if it were not causal, and N counts all parameters but an embedding that is not also the output matrix; of mb_dmoe
    only the experts that a token goes to.

    Args:
        config: the model.
        seq_len: T, tokens in the sequence, ≥ 1.

    Raises:
        ConfigError: the formula does not hold with block_overrides, or seq_len is not a whole number ≥ 1.

    Source: llm-foundry 0.22, llmfoundry/models/mpt/modeling_mpt.py, flops_per_batch; utils/mpt_param_count.py.
    """
    check_int("seq_len", seq_len)
    if config.block_overrides is not None:
        raise ConfigError("block_overrides: expected null; llm-foundry's count of operations does not hold with them")
    ffn = config.ffn_config
    n = config._count_parameters(ffn.moe_top_k if ffn.ffn_type == "mb_dmoe" else ffn.moe_num_experts)
    if not config.tie_word_embeddings:
        n -= config.vocab_size * config.d_model
    return 3 * (2 * n * seq_len + 4 * config.n_layers * config.d_model * seq_len**2)
