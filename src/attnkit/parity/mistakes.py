"""Which mistake that people really make would explain a wrong attention output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from attnkit.parity.recording import Judged, Settings, definition
from attnkit.testing.budgets import allowed

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Settings]


def mistake(judged: Judged, gold: Tensor, naive: Tensor) -> str | None:
    """The mistake with which the definition gives what the call returned, within its budget; None if none does."""
    call = judged.call
    rows = judged.visible.any(-1)  # a query that sees nothing has no right answer that all agree on
    keep = rows.expand(-1, call.q.shape[1], -1).transpose(1, 2)
    got, budget = call.o.double()[keep], allowed(gold[keep], naive[keep].double(), call.q.dtype)
    for name, inputs in _candidates(judged):
        if (definition(*inputs)[keep] - got).abs().max().item() <= budget:
            return name
    return _scale(judged, got, keep, budget)


def _right(judged: Judged) -> Inputs:
    call = judged.call
    return call.q.double(), call.k.double(), call.v.double(), judged.visible, call.settings


def _candidates(judged: Judged) -> Iterator[tuple[str, Inputs]]:
    q, k, v, visible, settings = _right(judged)
    h, g, m, n = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    if settings.sink is not None:
        yield "the sinks are dropped", (q, k, v, visible, replace(settings, sink=None))
    if settings.softcap is not None:
        yield "the soft-cap is dropped", (q, k, v, visible, replace(settings, softcap=None))
    if settings.bias is not None:
        yield "the position bias is dropped", (q, k, v, visible, replace(settings, bias=None))
    if settings.scale is not None:
        yield "the scale is dropped", (q, k, v, visible, replace(settings, scale=None))
    if 1 < g < h:
        tiled_k, tiled_v = (x.repeat(1, h // g, 1, 1) for x in (k, v))
        yield "KV heads are tiled where each has to be repeated", (q, tiled_k, tiled_v, visible, settings)
    distance = torch.arange(n - m, n)[:, None] - torch.arange(n)
    everything = torch.ones(m, n, dtype=torch.bool)
    causal = distance >= 0
    masks = {"the mask is missing": everything, "the mask is missing but for being causal": causal}
    if settings.window is not None:
        masks["padding is not masked"] = causal & (distance < settings.window)
        for name, step in (("wider", 1), ("narrower", -1)):
            seen = causal & (distance < settings.window + step)
            grown = visible | (seen & visible.any(-2, keepdim=True))
            masks[f"the window is one {name}"] = grown if step > 0 else visible & seen
    for name, seen in masks.items():
        yield name, (q, k, v, seen.expand(*visible.shape[:2], m, n), settings)


def _scale(judged: Judged, got: Tensor, keep: Tensor, budget: float) -> str | None:
    """The factor on the scale that explains the result best, if that explains it."""
    q, k, v, visible, settings = _right(judged)
    scale = judged.call.scale

    def error(factor: float) -> Tensor:
        return definition(q, k, v, visible, replace(settings, scale=scale * factor))[keep] - got

    factor, step = 1.0, 1e-4
    for _ in range(8):  # Gauss-Newton in one variable
        now = error(factor)
        slope = (error(factor + step) - now) / step
        steep = slope.square().sum().item()
        if not steep:
            return None
        factor -= (slope * now).sum().item() / steep
        if not 1e-3 < factor < 1e3:
            return None
    return f"the scale is {factor:.4g} times what it has to be" if error(factor).abs().max().item() <= budget else None
