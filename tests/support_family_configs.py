"""What sets the tiny instances of the promised families apart; read by ``support_families``. Data only."""

from typing import Any

BLOCKS = 3

COMMON: dict[str, Any] = {
    # widths
    "hidden_size": 64, "n_embd": 64, "hidden_dim": 64, "model_dim": 64, "d_model": 64,
    "intermediate_size": 128, "n_inner": 128, "mlp_hidden_size": 128, "ffn_hidden_size": 128,
    "ff_intermediate_size": 128, "moe_intermediate_size": 96, "shared_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64,
    "expert_ffn_hidden_size": 96, "dense_intermediate_size": 128, "intermediate_size_mlp": 160,
    "share_expert_dim": 64, "vocab_size": 320, "num_vocab": 320, "embedding_size": 320,
    # depth
    "num_hidden_layers": BLOCKS, "n_layer": BLOCKS, "n_layers": BLOCKS, "num_layers": BLOCKS,
    "num_transformer_layers": BLOCKS,
    # attention
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2,
    "n_kv_heads": 2, "num_kv_heads": 2, "head_dim": 32, "kv_channels": 16, "sliding_window": 8,
    "window_size": 8, "attention_window_size": 8, "sliding_window_size": 8, "rotary_dim": 16,
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "model_max_length": 256,
    "block_size": 256, "rope_theta": 10000.0, "rotary_emb_base": 10000, "rotary_pct": 0.5,
    "attention_bias": False, "mlp_bias": False, "use_bias": False, "use_qkv_bias": False,
    "use_qk_norm": True, "rope_scaling": None, "partial_rotary_factor": 0.5,
    # latent attention
    "q_lora_rank": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
    # experts
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_top_k": 2, "moe_k": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "num_shared_expert": 1, "first_k_dense_replace": 1,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.5,
    # state space and convolution
    "conv_kernel": 4, "conv_bias": False, "conv_L_cache": 3, "state_size": 16, "use_conv_bias": True,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "mamba_d_state": 16, "mamba_d_conv": 4,
    "mamba_expand": 2,
    # norms and scales
    "rms_norm_eps": 1e-5, "norm_eps": 1e-5, "layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5, "post_norm_eps": 1e-5, "logits_scaling": 2.0, "attention_multiplier": 0.2,
    "embedding_multiplier": 2.0, "residual_multiplier": 0.7,
}  # fmt: skip

SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_GEMMA4: dict[str, Any] = {
    "head_dim": 32, "global_head_dim": 64, "num_key_value_heads": 1, "num_hidden_layers": 4,
    "layer_types": [*SLIDING[:2], *SLIDING[:2]], "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 2, "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_theta": 10000.0},
    },
}  # fmt: skip
_QWEN35: dict[str, Any] = {
    "full_attention_interval": 2, "tie_word_embeddings": False,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2]},
}  # fmt: skip
YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
BOTH_ROPES = {"full_attention": ROPE, "sliding_attention": ROPE}
LONG_ROPE = {
    "type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "short_mscale": 1.2,
    "long_mscale": 1.2, "original_max_position_embeddings": 256,
}  # fmt: skip

NAMED: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"tie_word_embeddings": False},
    "phi3": {"tie_word_embeddings": False, "rope_theta": 10000},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {"tie_word_embeddings": False},
    "qwen3_5": {"text_config": {"model_type": "qwen3_5_text", "num_experts": 0, **_QWEN35}},
    "qwen3_5_moe": {"text_config": {"module": "qwen3_5", "model_type": "qwen3_5_moe_text", **_QWEN35}},
    "qwen3_next": {"full_attention_interval": 2, "num_hidden_layers": 4, "mlp_only_layers": [0]},
    "gemma3": {"vocab_size": 320, "text_config": {"module": "gemma3_text", "sliding_window_pattern": 2}},
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma3n": {
        "text_config": {
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 320,
            "rope_local_base_freq": 10000.0, "final_logit_softcapping": 30.0,
            "layer_types": [*SLIDING[:2], *SLIDING[:2]],
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
            "hidden_size_per_layer_input": 64, "altup_num_inputs": 2, "altup_coef_clip": 120.0,
            "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 32,
        }
    },
    "gemma4": {"vocab_size": 320, "text_config": {"module": "gemma4_text", **_GEMMA4}},
    "gemma4_moe": {
        "model_type": "gemma4", "vocab_size": 320,
        "text_config": {
            "module": "gemma4_text", **_GEMMA4, "enable_moe_block": True, "top_k_experts": 2,
            "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
        },
    },
    "gemma4_unified": {
        "vocab_size": 320, "text_config": {"module": "gemma4_text", **_GEMMA4, "attention_k_eq_v": True},
    },
    "gemma4_text": _GEMMA4,
    "nemotron_h": {
        "num_hidden_layers": 4, "hybrid_override_pattern": ["M", "*", "E", "-"], "mamba_num_heads": 4,
        "mamba_head_dim": 32, "mamba_proj_bias": False, "ssm_state_size": 16, "n_groups": 2,
        "time_step_limit": [0.001, 10.0],
    },
    "minicpm": {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 4.0},
    "minicpm3": {
        "dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 4.0,
        "rope_scaling": {**LONG_ROPE, "short_factor": [1.0] * 16, "long_factor": [1.0] * 16},
    },
    "deepseek_v3": {
        "rope_scaling": YARN, "n_group": 2,
    },
    "gpt_oss": {"layer_types": SLIDING},
    "lfm2": {
        "block_dim": 64, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False, "block_ff_dim": 128,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "mamba2": {
        "head_dim": 32, "num_heads": 4, "n_groups": 2, "tie_word_embeddings": True,
        "time_step_limit": [0.001, 10.0], "time_step_rank": "auto",
    },
    "jamba": {
        "num_hidden_layers": 4, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1,
        "expert_layer_period": 2, "mamba_dt_rank": 32,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 4, "mamba_d_head": 32,
        "mamba_proj_bias": False, "mamba_n_groups": 1, "mamba_conv_bias": True,
    },
    "falcon_h1": {
        "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_chunk_size": 16,
        "lm_head_multiplier": 1.0,
    },
}  # fmt: skip
