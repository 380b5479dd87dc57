"""The presets of rules, and the table of the logical axes of each weight."""

import dataclasses
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from mpt_eqx.config import MPTConfig
from mpt_eqx.config.sharding_rules import ShardingRules
from mpt_eqx.errors import ShardingError

# Numbers of these need not be multiples of powers of two: six heads on four devices are replicated.
COUNTED = ("vocab", "heads", "kv_heads", "experts")

DATA_PARALLEL = ShardingRules(batch="dp", allow_replicated=COUNTED)
"""Weights are replicated, the batch is sharded. Mesh axis: dp."""

FSDP = ShardingRules(batch="fsdp", embed="fsdp", allow_replicated=COUNTED)
"""Weights and the batch are sharded; each weight is gathered when it is used. Mesh axis: fsdp."""

TENSOR_PARALLEL = ShardingRules(vocab="tp", heads="tp", kv_heads="tp", mlp="tp", experts="tp", allow_replicated=COUNTED)
"""Heads, hidden units of the feed-forward networks, experts and vocabulary are sharded. Mesh axis: tp."""

FSDP_TP = dataclasses.replace(TENSOR_PARALLEL, batch="fsdp", embed="fsdp")
"""FSDP and TENSOR_PARALLEL together. Mesh axes: fsdp and tp."""

SEQUENCE_PARALLEL = ShardingRules(batch="dp", seq="sp", allow_replicated=COUNTED)
"""Weights are replicated, the batch and the positions of each sequence are sharded. Mesh axes: dp and sp."""

# The logical axes of each weight: the pattern of its path → the names.
WEIGHT_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(wte|lm_head)\.weight", ("vocab", "embed")),
    (r"wpe\.weight", (None, "embed")),
    (r"blocks\.\d+\.norm_[12]\.(weight|bias)|norm_f\.(weight|bias)", (None,)),
    (r"blocks\.\d+\.attn\.(Wqkv|Wq)\.weight", ("heads", "embed")),
    (r"blocks\.\d+\.attn\.(Wqkv|Wq)\.bias", ("heads",)),
    (r"blocks\.\d+\.attn\.W[kv]\.weight", ("kv_heads", "embed")),
    (r"blocks\.\d+\.attn\.W[kv]\.bias", ("kv_heads",)),
    (r"blocks\.\d+\.attn\.q_ln\.(weight|bias)", ("heads",)),
    (r"blocks\.\d+\.attn\.k_ln\.(weight|bias)", ("kv_heads",)),
    (r"blocks\.\d+\.attn\.out_proj\.weight", ("embed", "heads")),
    (r"blocks\.\d+\.ffn\.(up|gate)_proj\.weight", ("mlp", "embed")),
    (r"blocks\.\d+\.ffn\.(up|gate)_proj\.bias", ("mlp",)),
    (r"blocks\.\d+\.ffn\.down_proj\.weight", ("embed", "mlp")),
    (r"blocks\.\d+\.(attn\.out_proj|ffn\.down_proj)\.bias", (None,)),
    (r"blocks\.\d+\.ffn\.router\.layer\.weight", (None, "embed")),
    (r"blocks\.\d+\.ffn\.experts\.mlp\.(w1|v1|w2)", ("experts", "embed")),
    (r"blocks\.\d+\.ffn\.experts\.bias", (None,)),
)

STACKED = "blocks.block."
"""How names of weights of stacked blocks begin; they have an axis of layers in front, which is replicated."""


def weight_axes(name: str, leaf: Any, config: MPTConfig) -> tuple[str | None, ...]:
    """Returns the logical axes of a weight, for example ("heads", "embed").

    Args:
        name: its name, from `leaf_name`.
        leaf: the array or its shape.
        config: of the model.

    Raises:
        ShardingError: WEIGHT_AXES has no such weight, or one of another rank.
    """
    if name.startswith(STACKED):
        one = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return (None, *weight_axes(name.replace(STACKED, "blocks.0.", 1), one, config))
    base, _, part = name.partition(".weight.")
    found = [axes for pattern, axes in WEIGHT_AXES if re.fullmatch(pattern, f"{base}.weight" if part else name)]
    if len(found) != 1 or len(found[0]) != len(leaf.shape):
        raise ShardingError(
            f"{name}: expected one of an MPT's weights, which one rule matches, found shape {tuple(leaf.shape)} and "
            f"{len(found)} rules; shard the MPT before other arrays are added to it, or wrap a Linear or an Embedding "
            f"of the shape that the configuration says"
        )
    if config.attn_config.qk_gn and re.search(r"\.[qk]_ln\.", name):
        return ("head_dim",)
    if part == "scale" and leaf.shape[1] == 1:
        return (found[0][0], None)
    return found[0]


def check_axes(rules: ShardingRules, mesh: Mesh | AbstractMesh) -> None:
    """Raises a ShardingError if a rule names an axis that the mesh does not have."""
    for field in dataclasses.fields(rules):
        for axis in () if field.name == "allow_replicated" else rules.axes(field.name):
            if axis not in mesh.shape:
                raise ShardingError(
                    f"rules.{field.name}: expected an axis of the mesh, {' or '.join(mesh.shape)}, found {axis!r}; "
                    f"name the mesh's axes so, or change the rule with dataclasses.replace(rules, {field.name}=…)"
                )
