"""The keys of config.json: every one that is known, and what becomes of it.

Every key falls in one of four groups: supported, ignored because it cannot change the maths, known but supported at
fixed values only, and unknown. The last two are refused by name, because a key that is dropped silently is a wrong
model.
"""

import dataclasses
from typing import Any

from mpt_eqx.config.parts import AttnConfig, FFNConfig, InitConfig
from mpt_eqx.config.quantization import KEY as QUANTIZATION

# Keys of the canonical form, per part of the config ("" is the top level).
SUPPORTED = {
    "": {
        *("d_model", "n_heads", "n_layers", "head_dim", "expansion_ratio", "max_seq_len", "vocab_size", "no_bias"),
        *("attention_bias", "norm_type", "norm_eps", "tie_word_embeddings", "learned_pos_emb", "logit_scale"),
        *("final_logit_softcapping", "embedding_fraction", "pad_token_id", "resid_pdrop", "emb_pdrop"),
        *("block_overrides", "bos_token_id", "eos_token_id"),
    },
    "attn_config": {field.name for field in dataclasses.fields(AttnConfig)},
    "ffn_config": {field.name for field in dataclasses.fields(FFNConfig)},
    "init_config": {field.name for field in dataclasses.fields(InitConfig)},
}

# Other spellings of a key, at the top level.
ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "layer_norm_epsilon": "norm_eps",
}

# Where the keys of the flat files of early 2023 belong; `dialects._nest` turns two of them into other values too.
LEGACY_FLAT = {
    "mlp_ratio": ("", "expansion_ratio"),
    "low_precision_layernorm": ("", "norm_type"),
    "multiquery_attention": ("attn_config", "attn_type"),
    "attn_qk_ln": ("attn_config", "qk_ln"),
    "attn_clip_qkv": ("attn_config", "clip_qkv"),
    "param_init_fn": ("init_config", "name"),
    **{
        key: ("attn_config", key)
        for key in (
            *("alibi", "alibi_bias_max", "attn_impl", "attn_pdrop", "softmax_scale", "prefix_lm"),
            "attn_uses_sequence_id",
        )
    },
    **{key: ("init_config", key) for key in SUPPORTED["init_config"] if key != "name"},
}
LEGACY_FLAT_MODEL_TYPES = ("mosaic_gpt", "replit_lm")

# In rope_hf_config: the length that dynamic rotary positions were trained for, where max_seq_len is another one. The
# key is this library's own. The reference's original_max_position_embeddings would not do, because for this type the
# reference takes max_seq_len whatever is there, and so must we for a file of its making.
TRAINED = "trained_max_seq_len"

# True beside a pad_token_id that is a matter of text only, as it is in transformers; the reference would not train it.
# The key is this library's own.
TEXT_PADDING = "pad_token_is_trained"

# The type of the model's weights where its tensors have several types, and each is to be loaded in its own.
# The key is this library's own, too.
STORED_TYPES = "dtypes_as_stored"

# Keys that would change the maths, and the values at which they do not. Supporting one means moving it to SUPPORTED.
FIXED_VALUE: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {
        # Of other models, as they stand in files that a program has filled in with what it knows.
        "per_layer_config": (None, {}),
        "rope_scaling": (None,),
        "rope_parameters": (None,),
        "sliding_window": (None,),
        "attention_dropout": (None, 0),
        "layer_types": (None,),
    },
    "attn_config": {
        "kv_dim": (None,),
        "head_dim": (None,),
        # llm-foundry, too, takes it for single blocks only.
        "nope": (False,),
        "prefix_lm": (False,),
        "reuse_kv_layer_idx": (None,),
        "reuse_kv_x_layer_idx": (None,),
        "seq_parallel_world_size": (None, 1),
        "norm_type": (),
        "norm_eps": (),
    },
    # It makes a token's expert depend on its place in the batch.
    "ffn_config": {"uniform_expert_assignment": (False,)},
    "init_config": {},
}

# Keys that choose a kernel, describe the file or belong to another program. fuse_norm_attn_norm only renames tensors,
# and both names are read; use_pad_tok_in_ffn changes only what is computed at padding, where outputs mean nothing;
# rope_dail_config is checked by `dialects._check_dail`, quantization_config by `read_quantization`; moe_zloss_weight is
# that of a loss which llm-foundry does not add.
IGNORED = {
    "": {
        *("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path"),
        *("attn_config", "ffn_config", "init_config", "fc_type", "init_device", "initializer_range", "loss_fn", "name"),
        *("tokenizer_name", "use_cache", "verbose", "fuse_norm_attn_norm", TEXT_PADDING, STORED_TYPES),
        *("activation_checkpointing_target", "use_pad_tok_in_ffn", QUANTIZATION),
    },
    "attn_config": {
        *("attn_impl", "verbose", "rope_dail_config", "fc_type", "model_type"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "tie_encoder_decoder"),
    },
    "ffn_config": {
        *("fc_type", "bias", "return_bias", "moe_world_size", "moe_zloss_weight", "device_mesh"),
        *("moe_capacity_factor", "moe_weight_parallelism", "moe_expert_model_parallelism", "lbl_process_group"),
        *("moe_lbl_in_fp32", "memory_optimized_mlp", "mlp_impl", "grouped_mlp", "fp16", "bf16", "num_layers"),
    },
    "init_config": {"verbose"},
}

# What transformers' PretrainedConfig writes or wrote, at the top level and again inside attn_config.
PRETRAINED_CONFIG = {
    *("_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "torch_dtype", "id2label", "label2id"),
    *("is_encoder_decoder", "is_decoder", "add_cross_attention", "output_attentions", "output_hidden_states"),
    *("problem_type", "return_dict", "return_dict_in_generate", "transformers_version", "use_return_dict"),
    *("finetuning_task", "task_specific_params", "torchscript", "pruned_heads", "cross_attention_hidden_size"),
    *("tie_encoder_decoder", "tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id", "use_bfloat16"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"),
    *("diversity_penalty", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "output_scores"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
    *("suppress_tokens", "begin_suppress_tokens", "tf_legacy_loss", "attn_implementation", "_attn_implementation"),
    *("_attn_implementation_autoset", "_commit_hash", "gradient_checkpointing", "num_labels", "name_or_path"),
    *("xla_device", "output_past", "is_composition", "_experts_implementation", "experts_implementation"),
    *("_attn_implementation_internal", "_experts_implementation_internal", "_auto_class", "_output_attentions"),
    *("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan"),
    *("sub_configs", "keys_to_ignore_at_inference", "base_config_key", "has_no_defaults_at_init"),
    *("adapters", "generation_config", "pad_token", "eos_token", "bos_token", "unk_token_id", "custom_pipelines"),
    *("transformers_weights", "return_unused_kwargs", "trust_remote_code", "revision", "language", "low_cpu_mem_usage"),
}

# What other programs note in a config.json: Unsloth, PEFT, AutoAWQ, AutoGPTQ, trainers, exporters and quantisers.
OTHER_PROGRAMS = {
    *("unsloth_version", "unsloth_fixed", "unsloth_optimized", "peft_config", "base_model_name_or_path", "base_model"),
    *("max_new_tokens", "awq_version", "use_exllama", "_from_model_config", "_from_pipeline", "pretraining_tp"),
    *("_flash_attn_2_enabled", "_fsdp_wrapped", "_pre_quantization_dtype", "is_quantized", "use_flash_attention_2"),
    *("flash_attention", "axolotl_version", "trl_version", "wandb_run_id", "hub_model_id", "license", "tags"),
    *("model_name", "model_max_length", "date", "author", "description"),
    *("export_model_type", "neuron", "onnx", "openvino_config", "ov_config", "mlx_version"),
}

# The activations whose function has the argument `inplace`, which changes nothing here.
INPLACE = {
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "mish", "hardtanh", "hardsigmoid", "hardswish"),
}
