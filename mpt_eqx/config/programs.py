"""What other programs compute of a configuration: each key that one ignores or takes otherwise, and what follows.

`RULES` is the table. A file that is written for a program says what that program computes (`computed_by`), so that
whoever else reads it computes the same.

Sources: transformers 5.24, models/mpt; llama.cpp's src/models/mpt.cpp as in llama-cpp-python 0.3.36; llm-foundry 0.22.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from mpt_eqx.config.mpt_config import RMSNORMS, MPTConfig
from mpt_eqx.config.parts import (
    ACTIVATIONS,
    MOE_FIELDS,
    ActFnConfig,
    AttnConfig,
    BlockOverride,
    FFNConfig,
    InitConfig,
)
from mpt_eqx.config.validation import shown
from mpt_eqx.config.write_json import to_config_json
from mpt_eqx.errors import ConfigError

PROGRAMS = ("transformers", "llama.cpp", "llm-foundry")

# The keys of transformers' MptConfig and MptAttentionConfig; the others stay at their defaults.
TRANSFORMERS = (
    *("model_type", "d_model", "n_heads", "n_layers", "expansion_ratio", "max_seq_len", "vocab_size", "resid_pdrop"),
    *("layer_norm_epsilon", "emb_pdrop", "learned_pos_emb", "no_bias", "embedding_fraction", "norm_type", "use_cache"),
    *("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)
TRANSFORMERS_ATTENTION = (
    *("attn_type", "attn_pdrop", "clip_qkv", "softmax_scale", "qk_ln", "attn_uses_sequence_id", "alibi"),
    "alibi_bias_max",
)


class Rule(NamedTuple):
    """What a program makes of a key.

    Attributes:
        key: the key, by its path in config.json.
        applies: whether the program computes something else than the configuration asks for.
        consequence: what it computes.
    """

    key: str
    applies: Callable[[MPTConfig], bool]
    consequence: str


class Difference(NamedTuple):
    """A key that a program ignores or takes otherwise; it prints as one line.

    Attributes:
        key: the key, by its path in config.json.
        value: its value.
        consequence: what the program does instead.
    """

    key: str
    value: Any
    consequence: str

    def __str__(self) -> str:
        return f"{self.key}={shown(self.value)}: {self.consequence}"


def computed_by(program: str, config: MPTConfig) -> MPTConfig:
    """Returns the configuration that a program computes when it is given this one.

    Raises:
        ConfigError: there is no such program.
    """
    check_program(program)
    attn, changes = config.attn_config, dict(TAKEN[program])
    if program != "llm-foundry":
        if config.norm_type in RMSNORMS:
            changes["norm_type"] = "layernorm"
        if config.text_pad_token_id is None:
            changes["text_pad_token_id"] = config.pad_token_id
    if program == "transformers":
        changes["resid_pdrop"] = changes["attn_config.attn_pdrop"] = _dropout_in_transformers(config)
    elif program == "llama.cpp":
        changes["attn_config.alibi_bias_max"] = attn.alibi_bias_max if attn.alibi else 8
    elif attn.rope_hf_config.type == "dynamic":
        rope = dataclasses.replace(attn.rope_hf_config, original_max_position_embeddings=None)
        changes["attn_config.rope_hf_config"] = rope
    parts: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        part, _, key = path.rpartition(".")
        parts.setdefault(part, {})[key] = value
    nested = {part: dataclasses.replace(getattr(config, part), **values) for part, values in parts.items() if part}
    return dataclasses.replace(config, **parts.get("", {}), **nested)


def differences(program: str, config: MPTConfig) -> list[Difference]:
    """Returns what a program ignores or computes otherwise of a configuration; empty where it computes the same.

    Of llama.cpp, which does not train, keys that count in training only are left out.

    Raises:
        ConfigError: there is no such program.
    """
    check_program(program)
    return [
        Difference(rule.key, _value(config, rule.key), rule.consequence)
        for rule in RULES[program]
        if rule.applies(config)
    ]


def config_json_for(program: str, config: MPTConfig) -> dict[str, Any]:
    """Returns the content of a config.json in a program's own dialect.

    Args:
        program: "transformers" or "llm-foundry".
        config: what the program computes, as `computed_by` returns it.
    """
    d = to_config_json(dataclasses.asdict(config))
    if program == "llm-foundry":
        return {key: value for key, value in d.items() if key != "layer_norm_epsilon"}
    attn = {key: d["attn_config"][key] for key in TRANSFORMERS_ATTENTION}
    return {
        **{key: d[key] for key in TRANSFORMERS if key in d},
        "architectures": ["MptForCausalLM"],
        "attn_config": {**attn, "attn_impl": "torch", "prefix_lm": False},
    }


def check_program(program: str) -> None:
    """Raises a ConfigError where there is no such program."""
    if program not in PROGRAMS:
        raise ConfigError("program", f"expected {', '.join(map(repr, PROGRAMS))}, found {shown(program)}")


def _value(config: MPTConfig, key: str) -> Any:
    """Returns the value of a key as a line shows it."""
    if key == "block_overrides":
        return f"{sum(map(_is_changed, config.block_overrides or ()))} of {config.n_layers} blocks"
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    if isinstance(value, ActFnConfig):
        return {name: getattr(value, name) for name in ("name", *ACTIVATIONS[value.name])}
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _is_changed(block: BlockOverride) -> bool:
    return block != BlockOverride()


def _reuses(config: MPTConfig) -> bool:
    return any(layer.kv_from is not None for layer in config.layers)


def _tunes(config: MPTConfig) -> bool:
    return any(layer.attn_temperature_tuning is not None for layer in config.layers)


def _is_trained_for_another_length(config: MPTConfig) -> bool:
    attn = config.attn_config
    rope = attn.rope_hf_config
    trained = rope.original_max_position_embeddings
    return attn.rope and rope.type == "dynamic" and trained not in (None, config.max_seq_len)


def _dropout_in_transformers(config: MPTConfig) -> float:
    """Returns attn_pdrop as transformers takes it, whose type for it is int."""
    return 1.0 if config.attn_config.attn_pdrop == 1 else 0.0


def _activation(config: MPTConfig) -> ActFnConfig:
    ffn = config.ffn_config
    tanh = ffn.ffn_type in ("te_ln_mlp", "mb_dmoe")
    return ffn.ffn_act_fn or ActFnConfig(approximate="tanh" if tanh else "none")


def _scale(config: MPTConfig) -> float:
    return float((config.d_model / config.n_heads) ** -0.5)


# What neither transformers nor llama.cpp knows.
COMMON = (
    Rule("head_dim", lambda c: c.head_size != c.d_model // c.n_heads, "a head is as wide as d_model/n_heads"),
    Rule("attn_config.rope", lambda c: c.attn_config.rope, "positions are not rotated"),
    Rule("attn_config.qk_gn", lambda c: c.attn_config.qk_gn, "queries and keys are not normalised"),
    Rule(
        "attn_config.attn_logit_softcapping",
        lambda c: c.attn_config.attn_logit_softcapping is not None,
        "attention scores are not capped",
    ),
    Rule(
        "attn_config.sliding_window_size",
        lambda c: c.attn_config.sliding_window_size != -1,
        "a token sees all before it",
    ),
    Rule(
        "attn_config.attn_temperature_tuning",
        lambda c: c.attn_config.attn_temperature_tuning.attn_scale != 0,
        "attention of later tokens is not sharpened",
    ),
    Rule(
        "block_overrides",
        lambda c: any(map(_is_changed, c.block_overrides or ())),
        "all blocks are as attn_config says",
    ),
    Rule("logit_scale", lambda c: c.logit_scale not in (None, 1), "logits are not scaled"),
    Rule("final_logit_softcapping", lambda c: c.final_logit_softcapping is not None, "logits are not capped"),
    Rule("norm_type", lambda c: c.norm_type in RMSNORMS, "norms subtract the mean, too"),
    Rule("ffn_config.ffn_type", lambda c: c.ffn_config.ffn_type != "mptmlp", "the network is down(act(up(x)))"),
)

RULES: dict[str, tuple[Rule, ...]] = {
    "transformers": (
        *COMMON,
        Rule("attn_config.attn_type", lambda c: c.kv_heads != c.n_heads, "each head has keys and values of its own"),
        Rule("attn_config.alibi", lambda c: not c.attn_config.alibi, "ALiBi is added to the scores"),
        Rule(
            "attn_config.alibi_bias_max",
            lambda c: c.attn_config.alibi and c.attn_config.alibi_bias_max != 8,
            "slopes are those of 8",
        ),
        Rule("learned_pos_emb", lambda c: c.learned_pos_emb, "learned positions are left out"),
        Rule("attn_config.qk_ln", lambda c: c.attn_config.qk_ln, "queries and keys are not normalised"),
        Rule("no_bias", lambda c: not c.no_bias, "biases are left out"),
        Rule("attention_bias", lambda c: c.no_bias and c.has_attention_bias, "biases are left out"),
        Rule(
            "ffn_config.ffn_hidden_size",
            lambda c: c.ffn_config.ffn_hidden_size not in (None, 4 * c.d_model),
            "the network is four times as wide as d_model",
        ),
        Rule(
            "expansion_ratio",
            lambda c: c.ffn_config.ffn_hidden_size is None and c.expansion_ratio != 4,
            "the network is four times as wide as d_model",
        ),
        Rule("ffn_config.ffn_act_fn", lambda c: _activation(c) != ActFnConfig(), "the activation is the exact GELU"),
        Rule(
            "attn_config.attn_uses_sequence_id",
            lambda c: c.attn_config.attn_uses_sequence_id,
            "packed sequences see each other",
        ),
        Rule(
            "attn_config.attn_pdrop",
            lambda c: c.attn_config.attn_pdrop not in (0, 1),
            "only 0 and 1 are read, and 0 is written: no dropout in training",
        ),
        Rule(
            "resid_pdrop",
            lambda c: c.resid_pdrop != _dropout_in_transformers(c),
            "attn_pdrop is taken for it in training",
        ),
        Rule("emb_pdrop", lambda c: c.emb_pdrop != 0, "no dropout on the embedding in training"),
        Rule(
            "embedding_fraction",
            lambda c: c.embedding_fraction != 1,
            "the embedding gets the whole gradient in training",
        ),
        Rule("pad_token_id", lambda c: c.pad_token_id is not None, "the row of padding is trained, too"),
    ),
    "llama.cpp": (
        *COMMON,
        Rule(
            "attn_config.softmax_scale",
            lambda c: c.attn_config.softmax_scale not in (None, _scale(c)),
            "scores are divided by √(d_model/n_heads)",
        ),
        # Versions of 2024 compute it, so it is written.
        Rule("attn_config.qk_ln", lambda c: c.attn_config.qk_ln, "versions of 2026 end in a failed assertion"),
        Rule("ffn_config.ffn_act_fn", lambda c: _activation(c).name != "gelu", "the activation is GELU"),
    ),
    "llm-foundry": (
        Rule(
            "attn_config.rope_hf_config",
            _is_trained_for_another_length,
            "max_seq_len is taken for the trained length of dynamic rotary positions",
        ),
        Rule(
            "attn_config.attn_temperature_tuning",
            lambda c: c.block_overrides is None and _tunes(c),
            "with a KV cache, a new token is computed as if at position 0",
        ),
        Rule(
            "block_overrides",
            lambda c: c.block_overrides is not None and (_tunes(c) or _reuses(c)),
            "with a KV cache, blocks with attn_temperature_tuning or reuse_kv_layer_idx are wrong or fail",
        ),
    ),
}
"""What each program ignores or takes otherwise. Of llama.cpp, which does not train, without what training needs."""

_DEFAULTS = {
    **{f"ffn_config.{name}": getattr(FFNConfig, name) for name in ("ffn_type", "ffn_act_fn", *MOE_FIELDS)},
    **{
        f"attn_config.{name}": getattr(AttnConfig, name)
        for name in (
            *("fused_qkv", "qk_gn", "attn_logit_softcapping", "sliding_window_size", "attn_uses_sequence_id"),
            *("attn_temperature_tuning", "rope", "rope_theta", "rope_impl", "rope_hf_config"),
        )
    },
    **{name: getattr(MPTConfig, name) for name in ("head_dim", "logit_scale", "final_logit_softcapping")},
    **{name: getattr(MPTConfig, name) for name in ("emb_pdrop", "embedding_fraction", "pad_token_id")},
    "block_overrides": None,
    "init_config": InitConfig(),
}

TAKEN: dict[str, dict[str, Any]] = {
    "transformers": {
        **_DEFAULTS,
        **{"attn_config.attn_type": "multihead_attention", "attn_config.kv_n_heads": None, "attn_config.qk_ln": False},
        **{"attn_config.alibi": True, "attn_config.alibi_bias_max": 8, "learned_pos_emb": False},
        **{"no_bias": True, "attention_bias": None, "expansion_ratio": 4, "ffn_config.ffn_hidden_size": None},
    },
    "llama.cpp": {
        **_DEFAULTS,
        **{"attn_config.softmax_scale": None, "attn_config.attn_pdrop": 0.0, "resid_pdrop": 0.0},
    },
    "llm-foundry": {"text_pad_token_id": None},
}
"""The values, by path, that a program computes with whatever the configuration says."""
