"""torch's own ``scaled_dot_product_attention``: the fast road wherever torch runs, gradients included."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from attnkit.masks import UNBOUNDED, Mask
from attnkit.positions import distance
from attnkit.spec import Call


def rejects(call: Call) -> tuple[str, ...]:
    reasons = []
    if call["softcap"] is not None:
        reasons.append(f"softcap is {call['softcap']}, torch SDPA has none")
    if call["dropout"]:
        reasons.append(f"dropout is {call['dropout']}, torch SDPA cannot replay a seed")
    if call["return_lse"]:
        reasons.append("return_lse is True, torch SDPA returns no log-sum-exp")
    if call["k"].shape[2] == 0:
        reasons.append("there are 0 keys, torch SDPA needs at least 1")
    return tuple(reasons)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float,
    bias: Tensor | None,
    alibi: Tensor | None,
    softcap: float | None,
    sink: Tensor | None,
    dropout: float,
    seed: int | None,
    return_lse: bool,
) -> Tensor:
    m, n = q.shape[2], k.shape[2]
    # While dynamic sizes are traced a comparison of two is no bool, and SDPA takes nothing else; a branch makes one.
    grouped = True if q.shape[1] != k.shape[1] else False
    plain = bias is None and alibi is None and sink is None
    if plain and mask is None:
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    # torch's is_causal counts from the top left: the same thing only when there are as many queries as keys.
    if plain and mask is not None and mask.interval() == (UNBOUNDED, 0) and m == n:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    keep = mask.dense(m, n, q.device) if mask is not None else None
    if plain:
        return scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale, enable_gqa=grouped)
    work = torch.promote_types(q.dtype, torch.float32)
    added = torch.zeros(1, 1, m, n, dtype=work, device=q.device) if bias is None else bias.to(work)
    if alibi is not None:
        added = added - alibi.to(work)[:, None, None] * distance(m, n, q.device)
    if keep is not None:
        added = added.masked_fill(~keep, -torch.inf)
    if sink is not None:
        # The sink is one more key with a zero value, seen by all, whose logit is the sink's.
        column = sink.to(work)[:, None, None].expand(added.shape[0], -1, m, 1)
        added = torch.cat([added.expand(-1, q.shape[1], -1, -1), column], -1)
        k, v = pad(k, (0, 0, 0, 1)), pad(v, (0, 0, 0, 1))
    if q.device.type != "cpu":  # only the CPU kernel takes a float32 mask beside half-precision queries
        added = added.to(q.dtype)
    return scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale, enable_gqa=grouped)
