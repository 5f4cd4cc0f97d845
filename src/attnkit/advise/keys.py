"""Keys of a config.json that change neither bytes nor operations, and why; whatever else nobody reads is reported."""

from __future__ import annotations

_WHY: dict[str, str] = {
    "names and versions": """_name_or_path architectures transformers_version model_type auto_map tokenizer_class
        name_or_path language task_specific_params finetuning_task _attn_implementation attn_implementation
        _attn_implementation_internal _attn_implementation_autoset unsloth_fixed""",
    "tokens with a meaning": """bos_token_id eos_token_id pad_token_id cls_token_id sep_token_id decoder_start_token_id
        forced_bos_token_id forced_eos_token_id image_token_id image_token_index boi_token_id eoi_token_id
        vision_start_token_id vision_end_token_id video_token_id audio_token_id mask_token_id unk_token_id
        boi_token_index eoi_token_index initial_context_length prefix_token_id suppress_tokens begin_suppress_tokens""",
    "labels of classifiers": """id2label label2id problem_type num_labels classifier_activation classifier_bias
        classifier_dropout classifier_pooling summary_activation summary_first_dropout summary_proj_to_labels
        summary_type summary_use_proj scale_attn_by_inverse_layer_idx sparse_pred_ignore_index sparse_prediction""",
    "what is returned": """output_attentions output_hidden_states output_router_logits return_dict use_cache
        num_logits_to_keep chunk_size_feed_forward
        is_encoder_decoder cache_implementation output_past torchscript use_bfloat16
        pruned_heads keys_to_ignore_at_inference""",
    "training": """initializer_range initializer_factor init_std init_device attention_dropout attn_pdrop embd_pdrop
        resid_pdrop hidden_dropout dropout activation_dropout emb_pdrop embedding_dropout residual_dropout mlp_dropout
        dropout_rate layerdrop encoder_layerdrop decoder_layerdrop router_aux_loss_coef router_jitter_noise
        router_z_loss_coef aux_loss_alpha seq_aux z_loss_coefficient mtp_loss_scaling_factor ep_size pretraining_tp
        rescale_prenorm_residual initializer_cutoff_factor embedding_initializer_range lambda_std_dev
        final_w_init_variance_scale w_init_variance_scale num_ln_in_parallel_attn moe_layer_freq
        linear_a_log_max linear_a_log_min linear_dt_init_floor linear_dt_max linear_dt_min learnable_sink_init
        time_step_floor time_step_max time_step_min moe_router_load_balancing_type attn_dropout ffn_dropout
        use_pretrained_backbone gradient_checkpointing scale_init residual_in_fp32 rescale_every""",
    "positions": """rope_theta rope_scaling rope_parameters rope_type rope_local_base_freq partial_rotary_factor
        rotary_pct rotary_emb_base rotary_dim rope_interleave rope_ratio original_max_position_embeddings
        no_rope_layers no_rope_layer_interval compress_rope_theta alibi use_rope mrope_section
        global_rope_theta local_rope_theta rope_interleaved mla_use_nope position_embedding_type
        relative_attention_num_buckets relative_attention_max_distance rope_percent swa_rope_theta""",
    "factors and choices that move no bytes": """rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon
        hidden_act hidden_activation activation activation_function mlp_hidden_act mamba_hidden_act
        query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping logits_soft_cap logit_scale
        embedding_multiplier attention_multiplier residual_multiplier logits_scaling attention_in_multiplier
        attention_out_multiplier key_multiplier lm_head_multiplier mlp_multipliers ssm_in_multiplier ssm_multipliers
        ssm_out_multiplier scale_emb scale_depth dim_model_base attn_scale attn_temperature_tuning floor_scale
        attention_value_scale swiglu_limit swiglu_alpha layernorm_full_attention_alpha layernorm_full_attention_beta
        layernorm_linear_attention_alpha layernorm_linear_attention_beta layernorm_mlp_alpha layernorm_mlp_beta
        postnorm full_attn_alpha_factor full_attn_beta_factor linear_attn_alpha_factor linear_attn_beta_factor
        mlp_alpha_factor mlp_beta_factor do_layer_norm_before _remove_final_layer_norm
        apply_residual_connection_post_layernorm slow_but_exact use_parallel_residual parallel_attn
        reorder_and_upcast_attn scale_attn_weights norm_type scoring_func topk_method topk_group shared_moe_mode n_group
        num_expert_group norm_topk_prob moe_renormalize routed_scaling_factor use_grouped_topk
        moe_router_activation_func moe_shared_expert_overlap use_mamba_kernels use_mambapy
        use_associative_scan use_bidirectional_attention time_step_limit mamba_chunk_size chunk_size block_size
        mamba_norm_before_gate kda_safe_gate kda_lower_bound hc_eps hc_sinkhorn_iters linear_allow_neg_eigval
        clip_qkv mamba_ssm_cache_dtype layer_norm_elementwise_affine is_decoder attention_probs_dropout_prob
        hc_magnitude layer_group_size dense_act_fn is_gated_act scale_embedding zero_expert_type""",
}

IGNORABLE: dict[str, str] = {key: why for why, keys in _WHY.items() for key in keys.split()}
