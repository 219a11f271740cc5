"""The tiny instances of every other file in mlx-lm's model folder. Data only."""

from typing import Any

from support_family_configs import BOTH_ROPES, LONG_ROPE, ROPE, SLIDING, YARN

__all__ = ["NEEDS_METAL", "OTHERS"]

OTHERS: dict[str, dict[str, Any]] = {
    "Klear": {"num_key_value_heads": 4},
    "afm7": {"num_kv_reuse_layers": 1, "hidden_dim_scale_factor": 2.0},
    "afmoe": {"layer_types": SLIDING},
    "apertus": {"post_norm": True, "qk_norm": True, "tie_word_embeddings": False},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 1, "num_key_value_heads": 4},
    "bailing_moe": {},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 1, "num_key_value_heads": 4},
    "bailing_moe_v3": {
        "model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"], "layer_group_size": 2,
    },
    "bitnet": {},
    "cohere": {"use_qk_norm": True, "logit_scale": 1.0},
    "cohere2": {"sliding_window_pattern": 2, "head_dim": 16, "logit_scale": 1.0},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000},
    },
    "deepseek": {},
    "deepseek_v2": {"topk_method": "greedy", "rope_scaling": YARN},
    "deepseek_v32": {"index_head_dim": 64, "index_n_heads": 2, "index_topk": 8},
    "deepseek_v41": {},
    "dots1": {"scoring_func": "sigmoid"},
    "ernie4_5": {"tie_word_embeddings": True},
    "ernie4_5_moe": {"tie_word_embeddings": False, "moe_num_shared_experts": 1},
    "exaone": {"head_dim": 16},
    "exaone4": {
        "tie_word_embeddings": False, "sliding_window_pattern": "LLG",
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "exaone_moe": {"layer_types": SLIDING, "is_moe_layer": [False, True, True]},
    "gear": {"layer_types": SLIDING},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    "glm": {},
    "glm4": {},
    "glm4_moe": {"tie_word_embeddings": False},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {
        "index_head_dim": 64, "index_n_heads": 2, "index_topk": 8, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "moe_layer_freq": 1, "rope_parameters": ROPE,
    },
    "gpt2": {},
    "gpt_bigcode": {"tie_word_embeddings": False},
    "gpt_neox": {},
    "gptj": {},
    "granite": {},
    "granitemoe": {},
    "helium": {"tie_word_embeddings": False, "num_key_value_heads": 4, "head_dim": 16},
    "hunyuan": {
        "use_mixed_mlp_moe": True, "use_cla": True, "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    },
    "hunyuan_v1_dense": {
        "rope_scaling": {
            "alpha": 1000.0, "factor": 1.0, "type": "dynamic", "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 0.0, "original_max_position_embeddings": 8192,
        },
    },
    "internlm2": {},
    "internlm3": {},
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": 8},
    "kimi_k25": {"text_config": {"module": "deepseek_v3"}},
    "kimi_k3": {
        "text_config": {
            "linear_attn_config": {
                "num_heads": 4, "head_dim": 32, "kda_layers": [1, 3], "full_attn_layers": [2],
                "short_conv_kernel_size": 4,
            },
            "attn_res_block_size": 2, "activation_situ_beta": 4.0, "routed_expert_hidden_size": 32,
        }
    },
    "kimi_linear": {
        "linear_attn_config": {
            "num_heads": 4, "head_dim": 32, "kda_layers": [1, 3], "full_attn_layers": [2],
            "short_conv_kernel_size": 4,
        },
    },
    "kimi_vl": {"text_config": {}},
    "laguna": {
        "layer_types": SLIDING, "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_attention_heads_per_layer": [4, 4, 4],
        "rope_parameters": BOTH_ROPES,
    },
    "lfm2-vl": {
        "text_config": {
            "module": "lfm2", "block_dim": 64, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False, "block_ff_dim": 128,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    },
    "lfm2_moe": {
        "use_expert_bias": True, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"],
    },
    "lille-130m": {},
    "llama4": {
        "text_config": {
            "attention_chunk_size": 8, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1,
            "num_hidden_layers": 4,
        },
    },
    "llama4_text": {"tie_word_embeddings": False, "no_rope_layers": [0, 1, 1]},
    "longcat_flash": {
        "attention_method": "MLA", "zero_expert_type": "identity", "zero_expert_num": 2,
        "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": {
        "zero_expert_num": 2, "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 2, "emb_neighbor_num": 2, "emb_split_num": 2,
    },
    "mamba": {"time_step_rank": 32, "tie_word_embeddings": True},
    "mellum": {"layer_types": SLIDING, "rope_parameters": BOTH_ROPES, "tie_word_embeddings": False},
    "mimo": {},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0], "moe_layer_freq": [0, 1, 1], "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "swa_rope_theta": 10000.0, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
        "swa_head_dim": 32, "swa_v_head_dim": 32,
    },
    "minimax": {},
    "minimax_m3_vl": {
        "text_config": {
            "index_n_heads": 2, "index_head_dim": 32, "index_block_size": 4, "index_topk_blocks": 2,
            "sparse_attention_freq": [0, 1, 1],
        }
    },
    "ministral3": {
        "rope_parameters": {**ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}},
    "mistral3": {"text_config": {"module": "llama"}},
    "mistral4": {
        "rope_parameters": {
            **YARN, "rope_theta": 10000.0, "rope_type": "yarn", "llama_4_scaling_beta": 0.1,
        },
    },
    "mixtral": {},
    "muse_glimmer": {"layer_types": SLIDING},
    "muse_spark": {
        "text_config": {
            "rope_parameters": ROPE, "layer_rope_theta": [10000.0, 0, 10000.0], "layer_types": SLIDING,
            "final_logit_softcapping": 30.0, "output_multiplier": 1.0, "moe_hidden_size": 64,
            "num_shared_experts": 0,
        }
    },
    "nanbeige": {},
    "nanochat": {"num_key_value_heads": 4},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {
                "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
                "ffn": {"ffn_mult": 1.5, "no_op": False, "replace_with_linear": False},
            },
            {
                "attention": {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False},
                "ffn": {"ffn_mult": None, "no_op": False, "replace_with_linear": True},
            },
        ],
        "num_hidden_layers": 2,
    },
    "olmo2": {},
    "olmo3": {"layer_types": SLIDING},
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_allow_neg_eigval": True, "tie_word_embeddings": False,
    },
    "olmoe": {},
    "openelm": {
        "num_query_heads": [4, 4, 4], "num_kv_heads": [2, 2, 2], "ffn_multipliers": [1.0, 2.0, 1.5],
        "ffn_dim_divisor": 32,
    },
    "phi": {},
    "phi3small": {
        "dense_attention_every_n_layers": 2, "gegelu_limit": 20.0, "hidden_size": 128,
        "vocab_size": 100352,  # the model file writes to ids of that vocabulary
    },
    "phimoe": {"rope_scaling": LONG_ROPE},
    "phixtral": {},
    "pixtral": {"text_config": {"module": "llama"}},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 32, "mamba_num_heads": 4, "full_attention_idx": [1]},
    "plamo3": {"sliding_window_pattern": 2},
    "qwen": {},
    "qwen2_moe": {},
    "qwen2_vl": {"text_config": {"module": "qwen2"}},
    "qwen3_vl": {"text_config": {"module": "qwen3", "tie_word_embeddings": False}},
    "qwen3_vl_moe": {"text_config": {"module": "qwen3_moe", "tie_word_embeddings": False}},
    "recurrent_gemma": {
        "conv1d_width": 3, "logits_soft_cap": 30.0, "block_types": ["recurrent", "recurrent", "attention"],
        "num_key_value_heads": 1,
    },
    "rwkv7": {
        "a_low_rank_dim": 32, "v_low_rank_dim": 32, "gate_low_rank_dim": 32, "decay_low_rank_dim": 32,
    },
    "seed_oss": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "solar_open": {"tie_word_embeddings": False},
    "spark2_5": {"rope_parameters": BOTH_ROPES, "layer_types": SLIDING},
    "stablelm": {},
    "starcoder2": {},
    "step3p5": {
        "num_attention_groups": 2, "layer_types": SLIDING, "rope_theta": [10000.0] * 3,
        "partial_rotary_factors": [0.5, 1.0, 0.5], "moe_layers_enum": "1,2",
        "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2},
    },
    "talkie": {},
    "telechat3": {},
    "youtu_llm": {},
}  # fmt: skip

NEEDS_METAL = ("bitnet", "muse_spark")
"""mlx-lm's code for these runs on Metal only."""
