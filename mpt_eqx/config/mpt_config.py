"""MPTConfig: the numbers that decide an MPT, under llm-foundry's own names.

This file holds the dataclass, its validation, and what follows from it by counting. Its nested parts are in `parts`,
reading config.json is in `dialects`, writing it in `write_json`, and known models are in `presets`.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpt_eqx.config.dialects import build_parts, to_canonical
from mpt_eqx.config.json_file import read_json_object
from mpt_eqx.config.parts import MOE_TYPES
from mpt_eqx.config.parts import ActFnConfig as ActFnConfig
from mpt_eqx.config.parts import AttnConfig as AttnConfig
from mpt_eqx.config.parts import BlockOverride as BlockOverride
from mpt_eqx.config.parts import FFNConfig as FFNConfig
from mpt_eqx.config.parts import InitConfig as InitConfig
from mpt_eqx.config.parts import RopeHFConfig as RopeHFConfig
from mpt_eqx.config.parts import TemperatureTuning as TemperatureTuning
from mpt_eqx.config.presets import PRESETS
from mpt_eqx.config.quantization import Quantization
from mpt_eqx.config.validation import (
    ANY_NUMBER,
    BOOLEAN,
    NULL,
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
from mpt_eqx.config.write_json import to_config_json
from mpt_eqx.errors import ConfigError

LAYERNORMS = ("low_precision_layernorm", "layernorm")
RMSNORMS = ("low_precision_rmsnorm", "rmsnorm", "triton_rmsnorm")
LOGIT_SCALE = Check(
    "a number, 'inv_sqrt_d_model'", lambda value: value == "inv_sqrt_d_model" or ANY_NUMBER.valid(value)
)
ENDS = Check(
    "a whole number ≥ 0, a tuple of them",
    lambda value: all(map(whole(low=0).valid, value if isinstance(value, tuple) else (value,))),
)
OVERRIDES = Check("a tuple of BlockOverride", lambda value: isinstance(value, tuple))


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
        bos_token_id: token that begins a text; like the next two it has no effect on the model and is kept for those
            who generate with it.
        eos_token_id: token that ends a text, or several of them.
        text_pad_token_id: token of padding where pad_token_id is None, as in transformers' own port of MPT. In
            config.json it is pad_token_id beside a key of this library's own.
        norm_type: "low_precision_layernorm", "layernorm", "low_precision_rmsnorm", "rmsnorm" or "triton_rmsnorm";
            the first two are the same outside mixed precision, and so are the last three.
        norm_eps: added to the variance in every norm but q_ln and k_ln, > 0.
        tie_word_embeddings: the output matrix is the embedding; False gives the model an lm_head.
        block_overrides: what each block has otherwise, one entry for each, or None.
        attn_config: the attention.
        ffn_config: the feed-forward network.
        init_config: the initialisation of new weights.

    Raises:
        ConfigError: a value is out of range, contradicts another, or asks for what is not supported.
    """

    d_model: int = field(2048, whole())
    n_heads: int = field(16, whole())
    # Every block is an object in memory: a hostile file must not make us build 10⁹.
    n_layers: int = field(24, whole(high=1024))
    head_dim: int | None = field(None, whole())
    expansion_ratio: float = field(4, number())
    max_seq_len: int = field(2048, whole())
    vocab_size: int = field(50368, whole())
    resid_pdrop: float = field(0.0, PROBABILITY)
    emb_pdrop: float = field(0.0, PROBABILITY)
    learned_pos_emb: bool = field(True, BOOLEAN)
    logit_scale: float | str | None = field(None, LOGIT_SCALE)
    final_logit_softcapping: float | None = field(None, number())
    no_bias: bool = field(False, BOOLEAN)
    attention_bias: bool | None = field(None, BOOLEAN)
    embedding_fraction: float = field(1.0, between(math.ulp(0), 1, "a number with 0 < f ≤ 1"))
    pad_token_id: int | None = field(None, whole(low=0))
    bos_token_id: int | None = field(None, whole(low=0))
    eos_token_id: int | tuple[int, ...] | None = field(None, ENDS)
    text_pad_token_id: int | None = field(None, whole(low=0))
    norm_type: str = field("low_precision_layernorm", choice(*LAYERNORMS, *RMSNORMS))
    norm_eps: float = field(1e-5, number())
    tie_word_embeddings: bool = field(True, BOOLEAN)
    block_overrides: tuple[BlockOverride, ...] | None = field(None, OVERRIDES)
    attn_config: AttnConfig = field(AttnConfig(), part(AttnConfig))
    ffn_config: FFNConfig = field(FFNConfig(), part(FFNConfig))
    init_config: InitConfig = field(InitConfig(), part(InitConfig))

    def __post_init__(self) -> None:
        check_fields(self)
        if self.attn_config.alibi or self.attn_config.rope:
            # As llm-foundry does, whatever a file says: mpt-7b's own says true and has no such tensor.
            object.__setattr__(self, "learned_pos_emb", False)
        check("pad_token_id", self.pad_token_id, either(whole(0, self.vocab_size - 1), NULL))
        if None not in (self.pad_token_id, self.text_pad_token_id):
            raise ConfigError(
                "text_pad_token_id", f"expected null with pad_token_id={self.pad_token_id}, found a token"
            )
        self._check_sizes()
        if self.block_overrides is not None:
            self._check_overrides(self.block_overrides)

    def _check_sizes(self) -> None:
        attn = self.attn_config
        if self.d_model % self.n_heads:
            raise ConfigError("d_model", f"expected a multiple of n_heads={self.n_heads}, found {self.d_model}")
        if self.head_dim not in (None, self.d_model // self.n_heads):
            expected = f"expected d_model/n_heads={self.d_model // self.n_heads} or null"
            if attn.fused_qkv:
                raise ConfigError("head_dim", f"{expected} with fused_qkv, found {self.head_dim}")
            if attn.rope and attn.rope_impl == "dail":
                raise ConfigError(
                    "head_dim", f"{expected} with rope_impl 'dail', found {self.head_dim}; rope_impl 'hf' takes others"
                )
        if attn.kv_n_heads is not None and self.n_heads % attn.kv_n_heads:
            raise ConfigError(
                "attn_config.kv_n_heads", f"expected a divisor of n_heads={self.n_heads}, found {attn.kv_n_heads}"
            )
        if attn.rope and self.head_size % 2:
            raise ConfigError("attn_config.rope", f"expected an even head_dim, found {self.head_size}")
        if self.ffn_config.ffn_hidden_size is None:
            width = self.d_model * self.expansion_ratio
            if not 1 <= width < 2**31 or width != int(width):
                raise ConfigError(
                    "expansion_ratio",
                    f"expected d_model·expansion_ratio to be a whole number, "
                    f"found {self.d_model}·{self.expansion_ratio}",
                )

    def _check_overrides(self, overrides: tuple[BlockOverride, ...]) -> None:
        if len(overrides) != self.n_layers:
            raise ConfigError(
                "block_overrides", f"expected one entry for each of {self.n_layers} blocks, found {len(overrides)}"
            )
        for i, override in enumerate(overrides):
            path = f"block_overrides[{i}]"
            check(path, override, part(BlockOverride))
            if override.nope and self.learned_pos_emb:
                raise ConfigError(path, "nope: expected false with learned positions, found true")
            for name in ("reuse_kv_layer_idx", "reuse_kv_x_layer_idx"):
                if ((back := getattr(override, name)) or 0) + i < 0:
                    raise ConfigError(
                        path, f"{name}: expected at least {-i}, found {back}: there is no block before the first"
                    )
            if override.reuse_kv_x_layer_idx is not None and self.attn_config.fused_qkv:
                raise ConfigError(
                    path, "reuse_kv_x_layer_idx: expected attn_config.fused_qkv false with it, found true"
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
            raise ConfigError("preset", f"expected one of {', '.join(PRESETS)}, found {name!r}")
        return cls.from_dict(PRESETS[name])

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "MPTConfig":
        """Reads the content of a config.json, in llm-foundry's dialect, transformers' or the flat one of early 2023.

        Raises:
            ConfigError: a key is unknown and could change the maths, or its value is wrong or not supported. The
                message names the key as the file spells it.
        """
        return read_config(d)[0]

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
            raise ConfigError(str(path), *error.args) from None

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of a config.json that llm-foundry, transformers and `from_dict` read alike."""
        return to_config_json(dataclasses.asdict(self))


def read_config(d: Mapping[str, Any]) -> tuple[MPTConfig, Quantization | None]:
    """Returns what the content of a config.json says: the model, and how its weights are quantised, None if not.

    Raises:
        ConfigError: as by `MPTConfig.from_dict`.
    """
    canonical = to_canonical(d)
    try:
        return MPTConfig(**build_parts(canonical)), canonical.quantization
    except ConfigError as error:
        path, *problem = error.args
        raise ConfigError(canonical.spelling.get(path, path), *problem) from None


def count_flops(config: MPTConfig, seq_len: int) -> int:
    """Returns the floating-point operations of one training step (forward and backward) on one sequence.

    The forward pass alone, as in inference, is a third of it. The formula is llm-foundry's:
    3·(2·N·T + 4·n_layers·d_model·T²): the backward pass costs twice the forward pass, attention is counted in full as
    if it were not causal, and N counts all parameters but the embedding of a model with an untied lm_head; of mb_dmoe
    only the experts that a token goes to.

    Args:
        config: the model.
        seq_len: T, tokens in the sequence, ≥ 1.

    Raises:
        ConfigError: the formula does not hold with block_overrides, or seq_len is not a whole number ≥ 1.

    Source: llm-foundry 0.22, llmfoundry/models/mpt/modeling_mpt.py, flops_per_batch; utils/mpt_param_count.py.
    """
    check("seq_len", seq_len, whole())
    if config.block_overrides is not None:
        raise ConfigError("block_overrides", "expected null; llm-foundry's count of operations does not hold with them")
    ffn = config.ffn_config
    n = config._count_parameters(ffn.moe_top_k if ffn.ffn_type == "mb_dmoe" else ffn.moe_num_experts)
    if not config.tie_word_embeddings:
        n -= config.vocab_size * config.d_model
    return 3 * (2 * n * seq_len + 4 * config.n_layers * config.d_model * seq_len**2)
