"""What each tensor of an MPT is called in a checkpoint: one table, read by loading and by saving."""

from typing import Any

import jax

# Leaf of the model → tensor of the checkpoint; {i} is the number of the block.
NAMES = {
    "wte.weight": "transformer.wte.weight",
    "blocks.{i}.norm_1.weight": "transformer.blocks.{i}.norm_1.weight",
    "blocks.{i}.attn.Wqkv.weight": "transformer.blocks.{i}.attn.Wqkv.weight",
    "blocks.{i}.attn.out_proj.weight": "transformer.blocks.{i}.attn.out_proj.weight",
    "blocks.{i}.norm_2.weight": "transformer.blocks.{i}.norm_2.weight",
    "blocks.{i}.ffn.up_proj.weight": "transformer.blocks.{i}.ffn.up_proj.weight",
    "blocks.{i}.ffn.down_proj.weight": "transformer.blocks.{i}.ffn.down_proj.weight",
    "norm_f.weight": "transformer.norm_f.weight",
    "lm_head.weight": "lm_head.weight",
}

EMBEDDING = NAMES["wte.weight"]
# transformers' state dicts name the head also where it is tied to the embedding.
HEAD = NAMES["lm_head.weight"]


def named_leaves(model: Any) -> dict[str, Any]:
    """Returns the leaves of an MPT, arrays or their shapes, in the tree's order under their checkpoint names."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        number = parts[1] if parts[0] == "blocks" else ""
        pattern = ".".join([parts[0], "{i}", *parts[2:]] if number else parts)
        named[NAMES[pattern].format(i=number)] = leaf
    return named
