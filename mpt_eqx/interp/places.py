"""The places of a model where activations can be captured and edited: TransformerLens's names, with shapes."""

import difflib
import fnmatch
from collections.abc import Sequence

from mpt_eqx.config import MOE_TYPES, MPTConfig
from mpt_eqx.errors import MPTError

Shape = tuple[int | str, ...]


def places(config: MPTConfig) -> dict[str, Shape]:
    """Returns the name of every place with the shape of its activation, in the order in which they are computed.

    "T" stands for the number of positions. Where blocks have a mixture of experts, `mlp.hook_pre` and `mlp.hook_post`
    have an axis of experts after it, and `mlp.hook_expert_weights` are the router's probabilities of all experts, of
    which the largest are chosen. Scores are those after scale, softcap, ALiBi and mask; queries, keys and values
    are those before norm and rotation, but in a block that reads another block's, the keys are as that block made them.
    """
    n, k, h, d, f = config.n_heads, config.kv_heads, config.head_size, config.d_model, config.ffn_hidden_size
    ffn = config.ffn_config
    mixed = ffn.ffn_type in MOE_TYPES
    hidden: Shape = ("T", ffn.moe_num_experts, f) if mixed else ("T", f)
    router: dict[str, Shape] = {"mlp.hook_expert_weights": ("T", ffn.moe_num_experts)} if mixed else {}
    block: dict[str, Shape] = {
        "hook_resid_pre": ("T", d),
        "ln1.hook_normalized": ("T", d),
        "attn.hook_q": ("T", n, h),
        "attn.hook_k": ("T", k, h),
        "attn.hook_v": ("T", k, h),
        "attn.hook_attn_scores": (n, "T", "T"),
        "attn.hook_pattern": (n, "T", "T"),
        "attn.hook_z": ("T", n, h),
        "hook_attn_out": ("T", d),
        "hook_resid_mid": ("T", d),
        "ln2.hook_normalized": ("T", d),
        **router,
        "mlp.hook_pre": hidden,
        "mlp.hook_post": hidden,
        "hook_mlp_out": ("T", d),
        "hook_resid_post": ("T", d),
    }
    return {
        "hook_embed": ("T", d),
        **{f"blocks.{i}.{name}": shape for i in range(config.n_layers) for name, shape in block.items()},
        "ln_final.hook_normalized": ("T", d),
    }


def matching(argument: str, patterns: str | Sequence[str], known: Sequence[str]) -> list[str]:
    """Returns the names of places that patterns such as "blocks.*.attn.hook_pattern" match, in their own order.

    Raises:
        MPTError: a pattern matches none.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    found: set[str] = set()
    for pattern in patterns:
        here = fnmatch.filter(known, pattern) if isinstance(pattern, str) else []
        if not here:
            near = difflib.get_close_matches(str(pattern), known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "mpt_eqx.interp.places(model.config) lists them"
            raise MPTError(f"{argument}: expected the name of a place, or a pattern of some, found {pattern!r}; {hint}")
        found.update(here)
    return [name for name in known if name in found]
