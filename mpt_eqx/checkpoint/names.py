"""Names of tensors: of a leaf of the model, in checkpoints of today and of early 2023, and behind wrappers."""

import re
from collections.abc import Mapping
from typing import Any

import jax

from mpt_eqx.config import MPTConfig
from mpt_eqx.model.leaves import is_array, leaf_name

EMBEDDING = "transformer.wte.weight"
# transformers' state dicts name the head also where it is tied to the embedding.
HEAD = "lm_head.weight"

# The two arrays of a quantised weight stand under its name.
VALUES, SCALE = ".values", ".scale"

# What wrappers put into names: anywhere (FSDP, activation checkpointing, compiling, DDP, PEFT around one linear map),
# and, whatever they are called, in front of the model. Two models in one file end up with the same names, and are
# refused for that.
WRAPPERS = r"(?<![^.])(_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_orig_mod|module|base_layer)\."
PREFIXES = r"^(?:[A-Za-z_]\w*\.)*?(?=(?:transformer\.)?(?:wte|wpe|blocks|norm_f|ln_f|rotary_embedding)\.|lm_head\.)"
# A bare backbone (`AutoModel.save_pretrained`) has no name in front.
BACKBONE = r"^(?=(?:wte|wpe|blocks|norm_f|ln_f|rotary_embedding)\.)"
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
# Not weights: a buffer that follows from the configuration, and Transformer Engine's own state.
IGNORED = r"^transformer\.rotary_embedding\.inv_freq$|.*\._extra_state$"


def canonical_name(name: str) -> str | None:
    """Returns the name that today's llm-foundry has for a stored tensor, None for one that is not a weight."""
    name = re.sub(BACKBONE, "transformer.", re.sub(PREFIXES, "", re.sub(WRAPPERS, "", name)))
    for pattern, today in ALIASES:
        name = re.sub(pattern, today, name)
    return None if re.match(IGNORED, name) else name


def stored_name(name: str, config: MPTConfig) -> str:
    """Returns the name under which llm-foundry stores the tensor of a canonical name."""
    if config.ffn_config.ffn_type == "te_ln_mlp":
        for ours, theirs in TRANSFORMER_ENGINE:
            name = name.replace(ours, theirs)
    return name


def is_quantized(name: str) -> bool:
    """Returns whether a name is that of one of the two arrays of a quantised weight."""
    return name.endswith((f"weight{VALUES}", f"weight{SCALE}"))


def named_leaves(model: Any) -> dict[str, Any]:
    """Returns the weights of an MPT, arrays or their shapes, by canonical name, in the order of the tree."""
    return {canonical_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model) if is_array(leaf)}


def with_leaves(model: Any, arrays: Mapping[str, Any]) -> Any:
    """Returns the model with its weights replaced by those of the same canonical names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: arrays[canonical_path(path)] if is_array(leaf) else leaf, model
    )


def canonical_path(path: tuple[Any, ...]) -> str:
    """Returns the canonical name of a leaf from its path in the tree, as modules' fields are named after tensors."""
    name = leaf_name(path)
    return name if name == HEAD or name.startswith(f"{HEAD}.") else f"transformer.{name}"
