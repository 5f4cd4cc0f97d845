"""The delta rule one token at a time, as the papers write it."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.mechanisms.delta.lawful import spoiled_from


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    read_scale: float,
    return_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    (b, h, n, d), g, e = q.shape, k.shape[1], v.shape[3]
    work = torch.promote_types(q.dtype, torch.float32)
    spoiled = spoiled_from(k, v, beta, log_decay)
    held = q.new_zeros(b, h, d, e, dtype=work) if state is None else state.to(work)
    # An unlawful token and all after it write nothing, so that what it would overflow to stays out of gradients.
    beta = torch.where(spoiled, 0.0, beta.to(work))[..., None]
    k = torch.where(spoiled[..., None], 0.0, k.to(work).repeat_interleave(h // g, 1))
    v = torch.where(spoiled[..., None], 0.0, v.to(work))
    kept = None
    if log_decay is not None:
        wide = log_decay.to(work) if log_decay.dim() == 4 else log_decay.to(work)[..., None]
        kept = torch.exp(torch.where(spoiled[..., None], 0.0, wide))
    rows = []
    for t in range(n):
        if kept is not None:
            held = held * kept[:, :, t, :, None]
        recalled = (k[:, :, t, None] @ held)[:, :, 0]
        held = held + k[:, :, t, :, None] * (beta[:, :, t] * (v[:, :, t] - recalled))[:, :, None]
        rows.append(read_scale * (q[:, :, t, None].to(work) @ held)[:, :, 0])
    o = torch.stack(rows, 2) if rows else v
    o = torch.where(spoiled[..., None], torch.nan, o).to(q.dtype)
    if not return_state:
        return o
    return o, torch.where(spoiled.any(-1)[..., None, None], torch.nan, held)
