"""The presets of rules, and the table of which logical axes each weight has."""

import dataclasses

from mpt_eqx.config.sharding_rules import ShardingRules

# What is counted and not measured: a vocabulary of 97 or six heads on four devices stay whole.
COUNTED = ("vocab", "heads", "kv_heads", "experts")

DATA_PARALLEL = ShardingRules(batch="dp", allow_replicated=COUNTED)
"""Every device has all weights and a part of the batch. Mesh axis: dp."""

FSDP = ShardingRules(batch="fsdp", embed="fsdp", allow_replicated=COUNTED)
"""Every device has a part of each weight and of the batch; weights are gathered when they are used. Mesh axis: fsdp."""

TENSOR_PARALLEL = ShardingRules(vocab="tp", heads="tp", kv_heads="tp", mlp="tp", experts="tp", allow_replicated=COUNTED)
"""Every device has some of the heads, of the hidden numbers, experts and of the vocabulary. Mesh axis: tp."""

FSDP_TP = dataclasses.replace(TENSOR_PARALLEL, batch="fsdp", embed="fsdp")
"""Both. Mesh axes: fsdp and tp."""

SEQUENCE_PARALLEL = ShardingRules(batch="dp", seq="sp", allow_replicated=COUNTED)
"""Every device has all weights and a part of the positions of each sequence, for long prompts. Mesh axes: dp and sp."""

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
