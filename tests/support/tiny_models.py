"""Tiny random models of the families that people serve, of transformers' own classes, as model folders."""

import torch
import transformers

from support.engine_rig import EOS, byte_tokenizer

COMMON = {
    "vocab_size": 257,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "initializer_range": 0.3,  # decided logits: greedy choices do not hang on rounding
}
WINDOW = 24
"""Tokens of a sliding window: shorter than a chunk, and no multiple of a block or a slice."""
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SLIDING_FIRST = ["sliding_attention", "full_attention"] * 2

FAMILIES = {
    "llama": ("Llama", {}),
    "mistral-window": ("Mistral", {"sliding_window": WINDOW}),
    "llama-bias": ("Llama", {"attention_bias": True}),
    "qwen3-qk-norm": ("Qwen3", {}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "mixtral-moe": ("Mixtral", {**_MOE, "sliding_window": None}),
    "gemma2-window": (
        "Gemma2",
        {"sliding_window": WINDOW, "layer_types": _SLIDING_FIRST, "query_pre_attn_scalar": 8},
    ),
    "gemma3-window": (
        "Gemma3",
        {"sliding_window": WINDOW, "layer_types": _SLIDING_FIRST, "query_pre_attn_scalar": 8},
    ),
    "gpt-oss-sinks": (
        "GptOss",
        {**_MOE, "sliding_window": WINDOW, "layer_types": _SLIDING_FIRST,
         "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                             "original_max_position_embeddings": 128, "truncate": False}},
    ),
    "phi-partial-rotary": ("Phi", {"partial_rotary_factor": 0.5}),
    "stablelm-partial-rotary": ("StableLm", {"partial_rotary_factor": 0.25}),
    "smollm3-nope": ("SmolLM3", {"no_rope_layers": [1, 1, 1, 0]}),
    "deepseek-v3-mla": (
        "DeepseekV3",
        {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
         "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
         "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 32, "num_key_value_heads": 6,
         "first_k_dense_replace": 1},
    ),
    "qwen3-next-linear": (
        "Qwen3Next",
        {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "num_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
         "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]},
    ),
    "qwen3-5-linear": (
        "Qwen3_5",
        {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
         "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]},
    ),
    "dynamic-ntk": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "longrope": (
        "Phi3",
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0,
                             "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                             "original_max_position_embeddings": 128}},
    ),
    "mamba2": ("Mamba2", {"num_heads": 6, "head_dim": 16, "state_size": 8, "n_groups": 1}),
    "jamba-hybrid": (
        "Jamba",
        {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
         "mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "gpt2-absolute": ("GPT2", {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 512}),
    "llama4-chunked": (
        "Llama4",
        {"attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 64,
         "no_rope_layers": [1, 1, 1, 0]},
    ),
    "deepseek-v32-indexer": (
        "DeepseekV32",
        {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
         "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
         "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 32, "num_key_value_heads": 6,
         "first_k_dense_replace": 1, "index_topk": 16, "index_n_heads": 2, "index_head_dim": 16},
    ),
    "gemma3n-shared-kv": (
        "Gemma3n",
        {"sliding_window": WINDOW, "layer_types": _SLIDING_FIRST, "num_kv_shared_layers": 2,
         "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 257, "laurel_rank": 4,
         "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2, "intermediate_size": [96] * 4},
    ),
}  # fmt: skip
"""Name -> prefix of the classes, settings over `COMMON`."""


def write_family(folder, name):
    """A model folder of a family; the same weights each time."""
    prefix, settings = FAMILIES[name]
    config_class = getattr(transformers, f"{prefix}Config", None)
    for suffix in ("TextConfig", "Config"):
        config_class = getattr(transformers, prefix + suffix, None)
        if config_class is not None:
            break
    head = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, prefix + head)(config_class(**COMMON | settings))
    with torch.no_grad():  # norms and sinks of fresh models are all alike: a bug in them must show
        for _, weight in sorted(model.named_parameters()):
            if weight.ndim == 1:
                weight += 0.2 * torch.randn(weight.shape)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
