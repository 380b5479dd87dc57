"""Configurations of known models, as the content of a config.json: published checkpoints and llm-foundry's recipes.

Where both have a size (7b, 30b) the plain name is the published model and the recipe is called `…-recipe`. The recipes
(llm-foundry 0.22, scripts/train/yamls/pretrain) have learned positions and biases; the published models have neither.
"""

from typing import Any


def _published(**keys: Any) -> dict[str, Any]:
    """Returns what MosaicML's own checkpoints have in common, with `keys` replaced."""
    attn_config = {"alibi": True, **keys.pop("attn_config", {})}
    return {"vocab_size": 50432, "no_bias": True, **keys, "attn_config": attn_config}


def _gpt(d_model: int, n_heads: int, n_layers: int, **keys: Any) -> dict[str, Any]:
    """Returns a recipe's configuration: learned positions and biases."""
    return {"d_model": d_model, "n_heads": n_heads, "n_layers": n_layers, "vocab_size": 50368, **keys}


MPT_7B = {"d_model": 4096, "n_heads": 32, "n_layers": 32}
MPT_30B = {"d_model": 7168, "n_heads": 64, "n_layers": 48, "max_seq_len": 8192}
MPT_1B = {"d_model": 2048, "n_heads": 16, "n_layers": 24, "attn_config": {"qk_ln": True}}

PRESETS: dict[str, dict[str, Any]] = {
    "mpt-7b": _published(**MPT_7B),
    "mpt-7b-instruct": _published(**MPT_7B),
    "mpt-7b-chat": _published(**MPT_7B),
    "mpt-7b-storywriter": _published(**MPT_7B, max_seq_len=65536, attn_config={"alibi_bias_max": 16, "clip_qkv": 6}),
    "mpt-7b-8k": _published(**MPT_7B, max_seq_len=8192),
    "mpt-7b-8k-instruct": _published(**MPT_7B, max_seq_len=8192),
    "mpt-7b-8k-chat": _published(**MPT_7B, max_seq_len=8192),
    "mpt-30b": _published(**MPT_30B),
    "mpt-30b-instruct": _published(**MPT_30B),
    "mpt-30b-chat": _published(**MPT_30B),
    "mpt-1b-redpajama-200b": _published(**MPT_1B),
    "mpt-1b-redpajama-200b-dolly": _published(**MPT_1B),
    # Models that others published with this architecture, where every number of their config.json is known. Not so of
    # Krutrim-1, ipt-125m and ipt-350m, titulm-1b and precious3-gpt (vocab_size) and PhoGPT-7B5 (heads, layers,
    # vocab_size): a preset must not guess. Their own config.json is read like any other.
    "replit-code-v1-3b": _published(d_model=2560, n_heads=32, n_layers=32, vocab_size=32768),
    "replit-code-v1_5-3b": _published(
        d_model=3072,
        n_heads=24,
        n_layers=32,
        vocab_size=32768,
        max_seq_len=4096,
        attn_config={"attn_type": "grouped_query_attention", "kv_n_heads": 8},
    ),
    "phogpt-4b": _published(d_model=3072, n_heads=24, n_layers=32, vocab_size=20480, max_seq_len=8192, no_bias=False),
    "sea-lion-3b": _gpt(2560, 20, 32, vocab_size=256000),
    # That it has biases says the pull request of its authors (huggingface/text-generation-inference, 1469).
    "sea-lion-7b": _gpt(
        *(4096, 32, 32),
        vocab_size=256000,
        logit_scale="inv_sqrt_d_model",
        embedding_fraction=0.1,
        attn_config={"qk_ln": True},
    ),
    "mpt-125m-c4": _gpt(768, 12, 12),
    # llm-foundry's recipes.
    "mpt-125m": _gpt(768, 12, 12),
    "mpt-350m": _gpt(1024, 16, 24),
    "mpt-760m": _gpt(1536, 12, 24),
    "mpt-1b": _gpt(2048, 16, 24),
    "mpt-3b": _gpt(2560, 20, 32),
    "mpt-7b-recipe": _gpt(4096, 32, 32),
    "mpt-13b": _gpt(5120, 40, 40),
    "mpt-30b-recipe": _gpt(7168, 56, 48),
    "mpt-70b": _gpt(8192, 64, 80),
    "mpt-small-cpu": _gpt(16, 4, 4, expansion_ratio=5, max_seq_len=128),
}
