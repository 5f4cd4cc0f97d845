"""Interleaved head attention as the paper writes it, with tokens and pseudo tokens on axes of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import explicit
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.positions import Rotary


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_q: Tensor,
    mix_k: Tensor,
    mix_v: Tensor,
    collapse: Tensor,
    causal: str | None,
    window: int | None,
    rotary: Rotary | None,
    scale: float,
) -> Tensor:
    m, (h, n), p = q.shape[2], k.shape[1:3], mix_q.shape[2]
    tokens = torch.arange(n, device=q.device)
    queries = _pseudo(q, mix_q, rotary, tokens[n - m :])
    keys = _pseudo(k, mix_k, rotary, tokens)
    values = _pseudo(v, mix_v, None, tokens)

    # Token i with pseudo number a looks at token j with pseudo number b.
    i, j = tokens[n - m :, None, None, None], tokens[None, None, :, None]
    a, b = (torch.arange(p, device=q.device).view(shape) for shape in ((1, p, 1, 1), (1, 1, 1, p)))
    sees = torch.ones(m, p, n, p, dtype=torch.bool, device=q.device)
    if causal == "token":
        sees &= j <= i
    elif causal == "flat":
        sees &= (j < i) | ((j == i) & (b <= a))
    if window is not None:
        sees &= i - j < window

    mask = explicit(sees.reshape(m * p, n * p))
    o = softmax_attention(
        *(x.flatten(2, 3) for x in (queries, keys, values)), mask=mask, scale=scale, backend="reference"
    ).unflatten(2, (m, p))
    if collapse.shape[1] == p:
        joined = torch.einsum("hp,bhmpe->bhme", collapse.to(o.dtype), o)
    else:
        joined = torch.einsum("hjp,bjmpe->bhme", collapse.to(o.dtype).view(h, h, p), o)
    return joined.to(q.dtype)


def _pseudo(x: Tensor, mix: Tensor, rotary: Rotary | None, tokens: Tensor) -> Tensor:
    """``(b, h, n, p, d)``: number ``i`` of head ``h`` is a mixture of all heads, turned by its position ``t p + i``."""
    work = torch.promote_types(x.dtype, torch.float32)
    each = []
    for i in range(mix.shape[2]):
        one = torch.einsum("jh,bjnd->bhnd", mix[..., i].to(work), x.to(work))
        each.append(one if rotary is None else rotary.rotate(one, tokens * mix.shape[2] + i))
    return torch.stack(each, 3)
