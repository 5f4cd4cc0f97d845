"""Quantised caches written plainly from what they promise: what one of them changes is the budget of a real one.

Nothing here is shared with ``attnkit.state.codec``: a mistake there must not widen its own budget.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_TOKENS = _CHANNELS = 32  # that share a scale in int4: of keys, and of values


class RoundedLayer(DynamicLayer):
    """Theirs, which keeps all numbers as they came and hands on what a cache of ``codec`` would make of them."""

    def __init__(self, codec: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.codec = codec

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values ``(b, g, m, size)``; return all of them, rounded. int4 leaves a prompt as it came."""
        first = self.get_seq_length() == 0
        k, v = super().update(key_states, value_states, *args, **kwargs)
        if self.codec == "int4":
            return (k, v) if first else (_by_channel(k), _by_token(v))
        return _scaled(self.codec, k), _scaled(self.codec, v)


class RoundedWindowLayer(DynamicSlidingWindowLayer):
    """The same of a sliding window: the newest of what a layer that keeps all would hand on."""

    def __init__(self, codec: str, window: int) -> None:
        super().__init__(window)
        self.whole = RoundedLayer(codec)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values ``(b, g, m, size)``; return those that the new tokens may see, rounded."""
        seen = super().update(key_states, value_states, *args, **kwargs)[0].shape[2]
        k, v = self.whole.update(key_states, value_states)
        return k[:, :, k.shape[2] - seen :], v[:, :, v.shape[2] - seen :]


def rounded(config: Any, codec: str) -> DynamicCache:
    """Transformers' cache, whose layers of full attention and of sliding windows round as ``codec`` does."""
    made = DynamicCache(config=config)
    for i, layer in enumerate(made.layers):
        if type(layer) is DynamicLayer:
            made.layers[i] = RoundedLayer(codec)
        elif type(layer) is DynamicSlidingWindowLayer:
            made.layers[i] = RoundedWindowLayer(codec, layer.sliding_window)
    return made


def _scaled(codec: str, x: Tensor) -> Tensor:
    """A scale for each token and head: the largest magnitude is the largest code."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-30) / (127 if codec == "int8" else 448)
    ratio = x.float() / scale
    codes = ratio.round() if codec == "int8" else ratio.to(torch.float8_e4m3fn).float()
    return (codes * scale).to(x.dtype)


def _in_fifteenths(x: Tensor, dim: int) -> Tensor:
    """Each number as the nearest of sixteen, evenly spaced from the least along ``dim`` to the greatest."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-30)
    return low + step * ((x - low) / step).round()


def _by_channel(k: Tensor) -> Tensor:
    """Full groups of tokens; the newest keys as they come."""
    full = k.shape[2] // _TOKENS * _TOKENS
    groups = k[:, :, :full].float().unflatten(2, (-1, _TOKENS))
    return torch.cat([_in_fifteenths(groups, 3).flatten(2, 3).to(k.dtype), k[:, :, full:]], 2)


def _by_token(v: Tensor) -> Tensor:
    parts = [_in_fifteenths(part, -1) for part in v.float().split(_CHANNELS, -1)]
    return torch.cat(parts, -1).to(v.dtype)
