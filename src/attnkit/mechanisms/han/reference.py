"""HAN pooling as the paper writes it, with a table that says which word is in which sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.mechanisms.softmax import softmax_attention


def forward(x: Tensor, weight: Tensor, offset: Tensor, vector: Tensor, ids: Tensor, sentences: int) -> Tensor:
    work = torch.promote_types(x.dtype, torch.float32)
    (b, n, _), s = x.shape, torch.arange(sentences, device=x.device)
    member = ids[:, None] == s[:, None]  # (b, s, n)
    words = x.to(work).masked_fill(~member.any(1)[..., None], 0)
    u = torch.tanh(torch.einsum("bnx,dx->bnd", words, weight.to(work)) + offset.to(work))
    scores = torch.einsum("bnd,d->bn", u, vector.to(work))
    # Softmax attention with known logits: its queries and keys are 0, the scores are its bias.
    nothing = words.new_zeros(b, 1, sentences, 1), words.new_zeros(b, 1, n, 1)
    logits = torch.where(member, scores[:, None], -torch.inf)[:, None]
    o: Tensor = softmax_attention(*nothing, words[:, None], bias=logits, scale=1.0, backend="reference")
    return o[:, 0].to(x.dtype)
