"""What each tensor of an MPT is called in a checkpoint: today, in the files of early 2023, and behind wrappers."""

import re
from collections.abc import Mapping
from typing import Any

import jax

from mpt_eqx.config import MPTConfig

EMBEDDING = "transformer.wte.weight"
# transformers' state dicts name the head also where it is tied to the embedding.
HEAD = "lm_head.weight"

# The two arrays of a quantised weight stand under its name.
VALUES, SCALE = ".values", ".scale"

# What wrappers put into names: FSDP and activation checkpointing anywhere, trainers and PEFT at the front.
WRAPPERS = r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\."
PREFIXES = r"^(base_model\.model\.|model\.|module\.)+"
# Transformer Engine's network with a norm of its own: our name → its name.
TRANSFORMER_ENGINE = (
    (".norm_2.", ".ffn.layer_norm_"),
    (".ffn.up_proj.", ".ffn.fc1_"),
    (".ffn.down_proj.", ".ffn.fc2_"),
)
# Other names for the same tensor: pattern → today's name.
ALIASES = (
    (r"\.ln_([12])\.", r".norm_\1."),
    (r"\.ln_f\.", ".norm_f."),
    (r"\.mlp\.mlp_(up|down)\.", r".ffn.\1_proj."),
    (r"\.norm_attn_norm\.", "."),
    *((re.escape(theirs), ours) for ours, theirs in TRANSFORMER_ENGINE),
)
# No weights: a buffer that follows from the configuration, and what Transformer Engine keeps for itself.
IGNORED = r"^transformer\.rotary_embedding\.inv_freq$|.*\._extra_state$"


def canonical_name(name: str) -> str | None:
    """Returns today's llm-foundry name of a stored tensor, or None for one that holds no weights."""
    name = re.sub(PREFIXES, "", re.sub(WRAPPERS, "", name))
    for pattern, today in ALIASES:
        name = re.sub(pattern, today, name)
    return None if re.match(IGNORED, name) else name


def stored_name(name: str, config: MPTConfig) -> str:
    """Returns the name under which llm-foundry stores the tensor of a canonical name."""
    if config.ffn_config.ffn_type == "te_ln_mlp":
        for ours, theirs in TRANSFORMER_ENGINE:
            name = name.replace(ours, theirs)
    return name


def is_quantised(name: str) -> bool:
    """Tells whether a name is that of an array of a quantised weight, whose type never changes."""
    return name.endswith((f"weight{VALUES}", f"weight{SCALE}"))


def named_leaves(model: Any) -> dict[str, Any]:
    """Returns the weights of an MPT, arrays or their shapes, in the tree's order under their canonical names."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model) if hasattr(leaf, "shape")}


def with_leaves(model: Any, arrays: Mapping[str, Any]) -> Any:
    """Returns the model with its weights replaced by those of the same canonical names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: arrays[_name(path)] if hasattr(leaf, "shape") else leaf, model
    )


def _name(path: tuple[Any, ...]) -> str:
    """Returns the canonical name of a leaf: its path, because fields are called as tensors are."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name if name == HEAD or name.startswith(f"{HEAD}.") else f"transformer.{name}"
