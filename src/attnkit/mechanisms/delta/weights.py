"""Weights of published layers under the names that our layer has for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnkit.mechanisms.delta.layer import DeltaConfig


def qwen3_next_weights(weights: Mapping[str, Tensor], config: DeltaConfig) -> dict[str, Tensor]:
    """A state dict for ``DeltaAttention(config)`` from that of a Qwen3-Next ``linear_attn`` layer.

    Its fused projections hold, for one key head after the other, its query, its key, and the values and gates (or the
    strengths and decays) of the value heads it serves. ``config`` wants ``decay="head"`` and ``gate="silu"``.
    """
    if config.decay != "head" or config.gate != "silu" or config.rank:
        raise ValueError(f"qwen3_next_weights: got {config}, expected decay 'head', gate 'silu' and rank 0")
    served = config.heads // config.groups
    fused = weights["in_proj_qkvz.weight"].unflatten(0, (config.groups, -1))
    sizes = [config.keys, config.keys, served * config.values, served * config.values]
    q, k, v, gate = (part.flatten(0, 1) for part in fused.split(sizes, 1))
    beta, decay = (
        part.flatten(0, 1) for part in weights["in_proj_ba.weight"].unflatten(0, (config.groups, 2, -1)).unbind(1)
    )
    return {
        "q.weight": q,
        "k.weight": k,
        "v.weight": v,
        "gate.weight": gate,
        "beta.weight": beta,
        "decay.weight": decay,
        "conv.weight": weights["conv1d.weight"],
        "log_rate": weights["A_log"],
        "decay_bias": weights["dt_bias"],
        "norm.weight": weights["norm.weight"],
        "o.weight": weights["out_proj.weight"],
    }


def kimi_linear_weights(weights: Mapping[str, Tensor], config: DeltaConfig) -> dict[str, Tensor]:
    """A state dict for ``DeltaAttention(config)`` from that of a Kimi Linear delta layer, joint or split convolutions.

    ``config`` wants ``decay="channel"``, ``gate="sigmoid"``, ``rank`` the head size, and ``eps=1e-5``.
    """
    if config.decay != "channel" or config.gate != "sigmoid" or not config.rank:
        raise ValueError(f"kimi_linear_weights: got {config}, expected decay 'channel', gate 'sigmoid' and a rank")
    inside = {name.removeprefix("forget_gate."): x for name, x in weights.items()}
    conv = inside.get("conv1d.weight")
    if conv is None:
        conv = torch.cat([inside[f"{name}_conv1d.weight"] for name in "qkv"])
    named = {
        "q.weight": "q_proj",
        "k.weight": "k_proj",
        "v.weight": "v_proj",
        "beta.weight": "b_proj",
        "decay.0.weight": "f_a_proj",
        "decay.1.weight": "f_b_proj",
        "gate.0.weight": "g_a_proj",
        "gate.1.weight": "g_b_proj",
        "norm.weight": "o_norm",
        "o.weight": "o_proj",
    }
    found = {ours: inside[f"{theirs}.weight"] for ours, theirs in named.items()}
    return {
        **found,
        "conv.weight": conv,
        "log_rate": inside["A_log"].flatten(),
        "decay_bias": inside["dt_bias"].flatten(),
    }
