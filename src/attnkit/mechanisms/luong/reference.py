"""Luong attention as the paper writes it: all scores, the window as a mask, the Gaussian after the softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.mechanisms.softmax import softmax_attention


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    vector: Tensor | None,
    place_weight: Tensor | None,
    place_vector: Tensor | None,
    score: str,
    local: str | None,
    radius: int,
    start: int,
    lengths: Tensor | None,
) -> Tensor:
    work = torch.promote_types(q.dtype, torch.float32)
    (b, h, m, _), n = q.shape, k.shape[2]
    s = torch.arange(n, device=q.device)
    inside = s < (n if lengths is None else lengths[:, None])  # (b, n)
    inside = inside.expand(b, n)
    keys, values = (
        x.to(work).masked_fill(~inside[:, None, :, None], 0).repeat_interleave(h // k.shape[1], 1) for x in (k, v)
    )
    asks = q.to(work)
    if score == "dot":
        scores = torch.einsum("bhmd,bhnd->bhmn", asks, keys)
    elif score == "general":
        assert weight is not None
        scores = torch.einsum("bhmd,hdc,bhnc->bhmn", asks, weight.to(work), keys)
    elif score == "concat":
        assert weight is not None and vector is not None
        pairs = torch.cat(
            [asks[:, :, :, None].expand(-1, -1, -1, n, -1), keys[:, :, None].expand(-1, -1, m, -1, -1)], -1
        )
        hidden = torch.tanh(torch.einsum("bhmnj,hxj->bhmnx", pairs, weight.to(work)))
        scores = torch.einsum("bhmnx,hx->bhmn", hidden, vector.to(work))
    else:
        assert weight is not None
        scores = torch.einsum("bhmd,hnd->bhmn", asks, weight[:, :n].to(work))
    keep = inside[:, None, None].expand(b, h, m, n)
    place = None
    if local == "m":
        place = torch.arange(start, start + m, device=q.device, dtype=work).expand(b, h, m)
    elif local == "p":
        assert place_weight is not None and place_vector is not None and lengths is not None
        hidden = torch.tanh(torch.einsum("bhmd,hyd->bhmy", asks, place_weight.to(work)))
        share = torch.sigmoid(torch.einsum("bhmy,hy->bhm", hidden, place_vector.to(work)))
        place = lengths[:, None, None] * share
    if place is not None:
        keep = keep & ((s - place.detach()[..., None]).abs() <= radius)
    nothing, eye = asks.new_zeros(b, h, m, 1), torch.eye(n, dtype=work, device=q.device).expand(b, 1, n, n)
    weights = softmax_attention(
        nothing, nothing.new_zeros(b, 1, n, 1), eye, bias=scores.masked_fill(~keep, -torch.inf), backend="reference"
    )
    if local == "p":
        assert place is not None
        weights = weights * torch.exp(-2 * ((s - place[..., None]) / radius) ** 2)
    return torch.einsum("bhmn,bhne->bhme", weights, values).to(q.dtype)
