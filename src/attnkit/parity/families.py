"""Tiny random models of every family of decoders in Transformers, for ``attnkit parity`` and for our tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_BASE = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "num_experts_per_tok": 2,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
_LINEAR["linear_value_head_dim"] = 16
# The indexer adds up what is positive of each head: with few heads many keys score 0, and which are chosen
# is left to chance.
_INDEXER = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 8}
_WINDOW = {"sliding_window": 8}
_THREE_LINEAR = {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}

# What differs from the base in each family's configuration.
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bailing_hybrid": {**_EXPERTS, **_LATENT, **_LINEAR, **_THREE_LINEAR},
    "bamba": {"attn_layer_indices": [1, 3], **_MAMBA},
    "bitnet": {},
    "bloom": {"n_head": 4, "n_layer": 4},
    "cohere2": _WINDOW,
    "deepseek_v2": {**_EXPERTS, **_LATENT},
    "deepseek_v3": {**_EXPERTS, **_LATENT},
    "deepseek_v32": {**_EXPERTS, **_LATENT, **_INDEXER},
    "deepseek_v4": {
        **{**_EXPERTS, **_LATENT, **_INDEXER, **_WINDOW},
        **{"head_dim": 32, "partial_rotary_factor": 0.25, "o_groups": 2, "o_lora_rank": 16, "num_key_value_heads": 1},
    },
    "diffllama": {},
    "doge": {},
    "dots1": _EXPERTS,
    "exaone4": _WINDOW,
    "falcon": {"head_dim": None},
    "falcon_h1": {"mamba_d_ssm": 128, **_MAMBA},
    "gemma2": {**_WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_WINDOW, "query_pre_attn_scalar": 16},
    "gemma4_text": {
        **_WINDOW,
        "vocab_size_per_layer_input": 99,
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 32,
    },
    "glm4_moe_lite": {**_EXPERTS, **_LATENT},
    "glm_moe_dsa": {**_EXPERTS, **_LATENT, **_INDEXER},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
    "gpt_oss": {**_EXPERTS, **_WINDOW},
    "granite": {},
    "helium": {},
    "hy_v4": {**_EXPERTS, **_LATENT, **_INDEXER},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"num_experts": 4, "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4},
    },
    "kimi_linear": {**_EXPERTS, **_LATENT, **_THREE_LINEAR, "linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2": {},
    "llama": {},
    "llama4_text": {**_EXPERTS, "attention_chunk_size": 7},
    "longcat_flash": {**_EXPERTS, **_LATENT},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "mimo_v2_flash": {**_EXPERTS, **_WINDOW},
    "minicpm3": _LATENT,
    "minimax": {**_EXPERTS, "block_size": 16},
    "minimax_m2": _EXPERTS,
    "ministral": {},
    "ministral3": {},
    "mistral": _WINDOW,
    "mixtral": _EXPERTS,
    "modernbert-decoder": {},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 128},
    "nanochat": {},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16},
    "olmo2": {},
    "olmo3": _WINDOW,
    "olmo_hybrid": _LINEAR,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": _WINDOW,
    "qwen2": {},
    "qwen3": {},
    "qwen3_5_text": {**_EXPERTS, **_LINEAR},
    "qwen3_moe": _EXPERTS,
    "qwen3_next": {**_EXPERTS, **_LINEAR},
    "recurrent_gemma": {},
    "rwkv": {"attention_hidden_size": 64},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": _WINDOW,
    "youtu": _LATENT,
}


def build(
    name: str, implementation: str = "eager", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """A model of one family in evaluation mode; the same weights for every implementation and dtype."""
    options = {k: v for k, v in {**_BASE, **FAMILIES[name], **changes}.items() if v is not None}
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[name](**options)
    config._experts_implementation = "eager"  # the grouped product has no float64
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for layer in model.modules():  # sinks start at nothing, which nobody would miss
        if isinstance(sinks := getattr(layer, "sinks", None), torch.nn.Parameter):
            torch.nn.init.normal_(sinks, 1.0)
    return model.eval().to(dtype)
