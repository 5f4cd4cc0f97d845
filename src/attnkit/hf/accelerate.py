"""Layers of a model that run our mechanisms in place of their own arithmetic, when asked to and as long as wanted."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attnkit.hf import rotary
from attnkit.hf.attention import attention
from attnkit.hf.latent import carried_heads
from attnkit.hf.linears import linear, maps_tokens
from attnkit.hf.recurrent import DELTA, calls_delta_rule, lightning, with_names

_MARK = "_attnkit_accelerated"  # the attribute of a layer that names the other one we set


def accelerate(model: nn.Module) -> tuple[str, ...]:
    """Let the layers of ``model`` that we have more for than an attention function use it, until ``restore``.

    Latent attention (DeepSeek and others with ``expand_kv``) attends to the latents themselves where that costs less,
    as in decoding, and with ``attnkit.hf.Cache`` reads them where they lie. It makes the keys and values of all heads
    as before for a prompt, for training, for layers with sinks and while a graph is compiled. Gated delta rules
    (Qwen3-Next, Qwen3.5, OLMo-Hybrid, Kimi-Linear, Bailing-Hybrid) and MiniMax's lightning attention run
    ``delta_attention`` and ``retention_attention_step``, prompts and steps, with gradients. A ``torch.nn.Linear`` in
    bfloat16 or float16 on a CPU maps up to 8 tokens at once by a kernel that reads its weight where it lies. Attention
    with the rotary positions of Llama, under whatever name, computes them in one pass.

    Returns the names of those layers. Only they change: each gets attributes, which ``restore`` takes away. A model
    cannot be pickled before that.

    Raises
    ------
    ValueError: the model does not run our attention. NotImplementedError: nothing in it is known to us, or a layer has
    a form that is not; nothing is changed then.
    """
    check_runs_ours(model, "accelerate")
    found = {name: layer for name, layer in model.named_modules() if _attribute(layer)}
    if not found:
        raise NotImplementedError(
            f"accelerate got a {type(model).__name__}, which has no latent or linear attention that it knows, no "
            "rotary positions like Llama's and no torch.nn.Linear in bfloat16 or float16 on a CPU: it needs no more "
            "than attn_implementation='attnkit'"
        )
    for name, layer in found.items():
        if _MARK not in vars(layer) and (reason := _rejects(layer)):
            raise NotImplementedError(f"accelerate cannot change {name}: {reason}")
    for layer in found.values():
        attribute = _attribute(layer)
        assert attribute is not None
        vars(layer).update({_MARK: attribute, attribute: _made(layer)})
    return tuple(found)


def restore(model: nn.Module) -> None:
    """Undo ``accelerate``; a model that it has not changed stays as it is."""
    for layer in model.modules():
        if attribute := vars(layer).pop(_MARK, None):
            vars(layer).pop(attribute, None)


def _attribute(layer: nn.Module) -> str | None:
    """What has to be set on a layer to change it, if we have something for it."""
    if callable(getattr(type(layer), "expand_kv", None)):
        return "expand_kv"
    if _is_lightning(layer) or calls_delta_rule(layer) or _is_plain_linear(layer) or _turns(layer):
        return "forward"
    return None


def _made(layer: nn.Module) -> Any:
    if callable(getattr(type(layer), "expand_kv", None)):
        return functools.partial(_expand_kv, layer)
    if type(layer) is nn.Linear:
        return functools.partial(linear, layer)
    if _is_lightning(layer):
        return types.MethodType(lightning, layer)
    names = DELTA if calls_delta_rule(layer) else {rotary.NAME: rotary.rotated}
    return types.MethodType(with_names(type(layer).forward, names), layer)


def _is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer is a map that we have a kernel for, and nobody else (PEFT, offloading) has changed it."""
    return maps_tokens(layer) and _unchanged(layer)


def _turns(layer: nn.Module) -> bool:
    """The same of attention with rotary positions."""
    return rotary.turns_like_llama(layer) and _unchanged(layer)


def _unchanged(layer: nn.Module) -> bool:
    return "forward" not in vars(layer) or _MARK in vars(layer)


def _is_lightning(layer: nn.Module) -> bool:
    return type(layer).__name__ == "MiniMaxLightningAttention"


def runs(module: Any) -> str | None:
    """The name of its attention."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def ours(module: nn.Module) -> bool:
    """Whether that is ours, under whatever name."""
    return ALL_ATTENTION_FUNCTIONS.get(runs(module)) is attention


def check_runs_ours(model: nn.Module, where: str) -> None:
    """Raise ``ValueError`` unless ``model`` runs our attention."""
    if not ours(model):
        raise ValueError(
            f"{where} got a model that runs {runs(model)!r}: call attnkit.hf.register() and "
            "model.set_attn_implementation('attnkit') first"
        )


def _rejects(layer: Any) -> str | None:
    """Why a layer cannot be changed: the map from latents to heads is not a plain matrix, or others changed it."""
    attribute = _attribute(layer)
    if attribute in vars(layer):
        return f"its {attribute} has been replaced already by {vars(layer)[attribute]!r}"
    if attribute != "expand_kv":
        return None
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
    if wanted or torch.compiler.is_compiling() or latent.dtype != weight.dtype or not ours(layer):
        heads: tuple[Tensor, Tensor] = type(layer).expand_kv(layer, latent, rotary)
        return heads
    return carried_heads(layer, latent, rotary)
