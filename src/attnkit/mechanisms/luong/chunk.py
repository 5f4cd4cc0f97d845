"""Global scores as softmax attention over mapped queries or keys; local ones over the gathered windows only.

The map of ``general`` moves to the query, ``concat`` is additive attention, ``location`` has rows of its matrix for
keys: none builds all scores. A window's ``2 radius + 1`` keys are gathered for each query, so that its cost does not
grow with the source, and the Gaussian, which comes after the softmax, multiplies the gathered values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import explicit
from attnkit.mechanisms.additive import additive_attention
from attnkit.mechanisms.softmax import softmax_attention

ELEMENTS = 1 << 22
"""Numbers gathered at once, 16 MB of float32; as in additive attention."""


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
    (b, h, m, _), n, out = q.shape, k.shape[2], q.dtype
    if n == 0:
        return q.new_zeros(b, h, m, v.shape[3])
    work = torch.promote_types(q.dtype, torch.float32)
    inside = None if lengths is None else torch.arange(n, device=q.device) < lengths[:, None]
    if inside is not None:
        k, v = (x.masked_fill(~inside[:, None, :, None], 0) for x in (k, v))
    place = None
    if local == "m":
        place = torch.arange(start, start + m, device=q.device, dtype=work).expand(b, h, m)
    elif local == "p":
        assert place_weight is not None and place_vector is not None and lengths is not None
        hidden = torch.tanh(q.to(work) @ place_weight.to(work).mT)
        place = lengths[:, None, None] * torch.sigmoid((hidden @ place_vector.to(work)[:, :, None])[..., 0])
    # A product with a matrix rounds once more: in float32, so that half precision keeps its digits.
    if score != "dot":
        q, k, v = q.to(work), k.to(work), v.to(work)
    if score == "general":
        assert weight is not None
        q = q @ weight.to(work)
    elif score == "location":
        assert weight is not None
        k, v = weight[:, :n].to(work).expand(b, -1, -1, -1), v.repeat_interleave(h // v.shape[1], 1)
    elif score == "concat":
        assert weight is not None
        left, right = weight.to(work).split([q.shape[3], k.shape[3]], 2)
        q = q @ left.mT
        k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
        k = k @ right.mT
    if place is None:
        keep = None if inside is None else inside[:, None, None].expand(b, 1, m, n)
        return _attend(q, k, v, vector, keep).to(out)
    row = b * h * (2 * radius + 1) * max(k.shape[3], v.shape[3])
    if m * row <= ELEMENTS:
        return _windows(q, k, v, vector, place, local == "p", radius, lengths).to(out)
    size = max(1, ELEMENTS // row)
    parts = [
        _windows(part, k, v, vector, at, local == "p", radius, lengths)
        for part, at in zip(q.split(size, 2), place.split(size, 2), strict=True)
    ]
    return torch.cat(parts, 2).to(out)


def _attend(q: Tensor, k: Tensor, v: Tensor, vector: Tensor | None, keep: Tensor | None) -> Tensor:
    """Attention with mapped queries and keys, over the keys that ``keep`` ``(b, 1 | h, m, n)`` names."""
    if vector is not None:
        o: Tensor = additive_attention(q, k, v, vector.to(q.dtype), mask=None if keep is None else explicit(keep))
    else:
        bias = None if keep is None else torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, -torch.inf)
        o = softmax_attention(q, k, v, scale=1.0, bias=bias)
    return o


def _windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vector: Tensor | None,
    place: Tensor,
    gaussian: bool,
    radius: int,
    lengths: Tensor | None,
) -> Tensor:
    """Each query ``(b, h, m, .)`` over the keys within ``radius`` of its ``place`` ``(b, h, m)``, a call of its own."""
    (b, h, m, _), (g, n) = q.shape, k.shape[1:3]
    first = torch.ceil(place.detach() - radius).long()
    at = first[..., None] + torch.arange(2 * radius + 1, device=q.device)  # (b, h, m, w)
    end = n if lengths is None else lengths[:, None, None, None]
    keep = (at >= 0) & (at < end) & ((at - place.detach()[..., None]).abs() <= radius)
    rows = torch.arange(b, device=q.device)[:, None, None, None]
    heads = (torch.arange(h, device=q.device) // (h // g))[:, None, None]
    index = (rows, heads, at.clamp(0, n - 1))
    keys, values = k[index], v[index]
    if gaussian:
        near = torch.exp(-2 * ((at - place[..., None]) / radius) ** 2)
        values = values * near[..., None].to(values.dtype)

    def apart(x: Tensor) -> Tensor:
        """``(b, h, m, ...)`` as ``(b * m, h, ...)``."""
        return x.transpose(1, 2).flatten(0, 1)

    o = _attend(apart(q)[:, :, None], apart(keys), apart(values), vector, apart(keep)[:, :, None])
    return o.reshape(b, m, h, -1).transpose(1, 2)
