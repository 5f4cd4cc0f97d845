"""Heads that take shares of each other: of logits before softmax, of weights after it."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import causal
from attnkit.mechanisms.softmax import softmax_attention


def mixed(x: Tensor, shares: Tensor | None) -> Tensor:
    """Each head's mixture ``(b, h, ...)`` of the heads of its group: ``shares`` (h, c) of ``x`` (b, h, ...)."""
    if shares is None:
        return x
    h, c = shares.shape
    grouped = x.unflatten(1, (h // c, c)).flatten(3)
    return torch.einsum("gic,bgcz->bgiz", shares.to(x.dtype).view(-1, c, c), grouped).reshape(x.shape)


def weighted(logits: Tensor, v: Tensor, shares: Tensor | None, backend: str | None) -> Tensor:
    """Values ``(b, h, m, e)`` under the causal softmax of logits (b, h, m, n), its weights mixed within groups.

    Mixing weights is mixing results, if each head of a group weighs the values of all: so softmax attention gets known
    logits as its bias, a product of queries and keys that is 0, and a group's values side by side.
    """
    (b, h, m, n), (g, e) = logits.shape, (v.shape[1], v.shape[3])
    c = 1 if shares is None else shares.shape[1]
    if c > 1:
        values = v.repeat_interleave(h // g, 1).unflatten(1, (h // c, c)).transpose(2, 3).flatten(3)
        v = values.repeat_interleave(c, 1)
    none = v.new_zeros(b, h, m, 1), v.new_zeros(b, v.shape[1], n, 1)
    o: Tensor = softmax_attention(*none, v, mask=causal(), scale=1.0, bias=logits, backend=backend)
    if shares is None:
        return o
    # Entry (j, i) of a group: the weights of head j on the values of head i, of which head i takes the share (i, j).
    each = o.view(b, h // c, c, m, c, e).to(logits.dtype)
    taken = torch.einsum("gij,bgjmie->bgime", shares.to(logits.dtype).view(-1, c, c), each)
    return taken.reshape(b, h, m, e).to(v.dtype)
