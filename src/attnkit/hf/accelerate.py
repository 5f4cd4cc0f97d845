"""Layers of a model that run our mechanisms in place of their own arithmetic, when asked to and as long as wanted."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attnkit.hf.attention import attention
from attnkit.hf.latent import carried_heads


def accelerate(model: nn.Module) -> tuple[str, ...]:
    """Let the layers of ``model`` that we have more for than an attention function use it, until ``restore``.

    Latent attention (DeepSeek and others with ``expand_kv``) attends to the latents themselves where that costs less,
    as in decoding, and with ``attnkit.hf.Cache`` reads them where they lie. It makes the keys and values of all heads
    as before for a prompt, for training, for layers with sinks and while a graph is compiled.

    Returns the names of those layers. Only they change: each gets an attribute, which ``restore`` takes away.

    Raises
    ------
    ValueError: the model does not run our attention. NotImplementedError: nothing in it is known to us, or a layer has
    a form that is not; nothing is changed then.
    """
    if not _ours(model):
        raise ValueError(
            f"accelerate got a model that runs {_implementation(model)!r}: call attnkit.hf.register() and "
            "model.set_attn_implementation('attnkit') first"
        )
    found = {name: layer for name, layer in model.named_modules() if callable(getattr(type(layer), "expand_kv", None))}
    if not found:
        raise NotImplementedError(
            f"accelerate got a {type(model).__name__}, which has no latent attention: it needs no more than "
            "attn_implementation='attnkit'"
        )
    for name, layer in found.items():
        if reason := _rejects(layer):
            raise NotImplementedError(f"accelerate cannot change {name}: {reason}")
    for layer in found.values():
        vars(layer)["expand_kv"] = functools.partial(_expand_kv, layer)
    return tuple(found)


def restore(model: nn.Module) -> None:
    """Undo ``accelerate``; a model that it has not changed stays as it is."""
    for layer in model.modules():
        held = vars(layer).get("expand_kv")
        if isinstance(held, functools.partial) and held.func is _expand_kv:
            del vars(layer)["expand_kv"]


def _implementation(module: Any) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _ours(module: nn.Module) -> bool:
    return ALL_ATTENTION_FUNCTIONS.get(_implementation(module)) is attention


def _rejects(layer: Any) -> str | None:
    """Why the map from latents to heads is not a plain matrix that the kernel can read."""
    linear: Any = layer.kv_b_proj
    if getattr(linear, "bias", None) is not None or type(linear) is not nn.Linear:
        return f"its kv_b_proj is {linear!r}, expected a torch.nn.Linear without bias"
    wanted = (layer.num_heads * (layer.qk_nope_head_dim + layer.v_head_dim), layer.kv_lora_rank)
    if tuple(linear.weight.shape) != wanted:
        return f"its kv_b_proj has a weight {tuple(linear.weight.shape)}, expected {wanted}"
    return None


def _expand_kv(layer: Any, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Stands in for the method of that name; what our attention function would not know goes to the method."""
    weight = layer.kv_b_proj.weight
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (latent, rotary, weight))
    if wanted or torch.compiler.is_compiling() or latent.dtype != weight.dtype or not _ours(layer):
        heads: tuple[Tensor, Tensor] = type(layer).expand_kv(layer, latent, rotary)
        return heads
    return carried_heads(layer, latent, rotary)
