"""Writing config.json: what llm-foundry, transformers and this library read alike."""

from collections.abc import Mapping
from typing import Any

from mpt_eqx.config.keys import TEXT_PADDING, TRAINED
from mpt_eqx.config.overrides import collapse_overrides
from mpt_eqx.config.parts import ACTIVATIONS, MB_FIELDS, MOE_FIELDS, MOE_TYPES


def to_config_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a config.json from the fields of an MPTConfig, its nested parts as dicts.

    transformers checks types strictly (a whole ratio must be an int, a clip a float), reads the epsilon under a name
    of its own, and recomputes the whole prefix for every token unless use_cache is true. llm-foundry passes unknown
    and unneeded keys of the nested parts on to classes that do not take them.
    """
    d = dict(fields)
    attn, ffn = dict(fields["attn_config"]), dict(fields["ffn_config"])
    d["expansion_ratio"] = _int_if_whole(fields["expansion_ratio"])
    attn["alibi_bias_max"] = _int_if_whole(attn["alibi_bias_max"])
    attn["attn_pdrop"] = _int_if_whole(attn["attn_pdrop"])
    for key in ("embedding_fraction", "norm_eps", "logit_scale", "final_logit_softcapping", "emb_pdrop", "resid_pdrop"):
        if isinstance(d[key], int):
            d[key] = float(d[key])
    attn["attn_temperature_tuning"] = _floats(attn["attn_temperature_tuning"])
    for key in ("clip_qkv", "softmax_scale"):
        if attn[key] is not None:
            attn[key] = float(attn[key])
    rope = _without_none(attn["rope_hf_config"])
    if rope["type"] == "dynamic" and "original_max_position_embeddings" in rope:
        rope[TRAINED] = rope.pop("original_max_position_embeddings")
    attn["rope_hf_config"] = rope
    if attn["kv_n_heads"] is None:
        del attn["kv_n_heads"]
    if ffn["ffn_act_fn"] is not None:
        act = ffn["ffn_act_fn"]
        ffn["ffn_act_fn"] = {key: act[key] for key in ("name", *ACTIVATIONS[act["name"]])}
    if ffn["ffn_type"] != "mb_dmoe":
        ffn = {key: value for key, value in ffn.items() if key not in MB_FIELDS}
    if ffn["ffn_type"] in MOE_TYPES:
        moe = {key: ffn[key] for key in MOE_FIELDS}
        extra = {"uniform_expert_assignment": False} if ffn["ffn_type"] == "torch_dmoe" else {"moe_world_size": 1}
        ffn = {**_without_none(ffn), **moe, **extra}
    else:
        ffn = _without_none({key: value for key, value in ffn.items() if key not in MOE_FIELDS})
    if (padding := d.pop("text_pad_token_id")) is not None:
        d |= {"pad_token_id": padding, TEXT_PADDING: True}
    for key in ("bos_token_id", "eos_token_id"):
        if d[key] is None:
            del d[key]
    init = dict(fields["init_config"])
    if isinstance(lim := init["emb_init_uniform_lim"], tuple):
        init["emb_init_uniform_lim"] = list(lim)
    impl = "torch"
    if d["block_overrides"] is not None:
        blocks = [
            {**block, "attn_temperature_tuning": _floats(block["attn_temperature_tuning"])}
            for block in d["block_overrides"]
        ]
        d["block_overrides"] = collapse_overrides(blocks)
        # llm-foundry can leave ALiBi out of single blocks with "flash" only. Where that would count positions
        # differently (`dialects._check_tuning`), "torch" makes it refuse the file instead of computing other numbers.
        tunings = [part["attn_temperature_tuning"] for part in (attn, *blocks)]
        counts = attn["attn_uses_sequence_id"] and any(tuning and tuning["attn_scale"] for tuning in tunings)
        if attn["alibi"] and any(block["nope"] for block in blocks) and not counts:
            impl = "flash"
    return {
        "architectures": ["MPTForCausalLM"],
        "model_type": "mpt",
        **d,
        "attn_config": {**attn, "attn_impl": impl},
        "ffn_config": ffn,
        "init_config": init,
        "layer_norm_epsilon": d["norm_eps"],
        "use_cache": True,
    }


def _without_none(d: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in d.items() if value is not None}


def _floats(d: Mapping[str, float] | None) -> dict[str, float] | None:
    """Returns the numbers as floats: llm-foundry wants an override to have the type of what it overrides."""
    return None if d is None else {key: float(value) for key, value in d.items()}


def _int_if_whole(value: float) -> float:
    return int(value) if value == int(value) else value
