"""PaTH attention as the paper writes it for a whole sequence: one triangular system, all products of all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import causal
from attnkit.mechanisms.path.householder import Run, lawful
from attnkit.mechanisms.softmax import softmax_attention


def forward(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, log_f: Tensor | None, scale: float) -> Tensor:
    (b, h, m, _), (g, n) = q.shape, k.shape[1:3]
    work = torch.promote_types(q.dtype, torch.float32)
    w, beta, spoiled = lawful(w, beta, work)
    run = Run.of(k.to(work), w, beta)
    # The reflections of one KV head serve its query heads: one axis more, over which the run is the same.
    shared = Run(run.k[:, :, None], run.w[:, :, None], run.t[:, :, None], run.x[:, :, None])
    products, _ = shared.local(q.to(work).reshape(b, g, h // g, m, -1), n - m)
    logits = (products * scale + spoiled[:, :, None, n - m :, None]).reshape(b, h, m, n)
    if log_f is not None:
        total = log_f.to(work).cumsum(-1)
        logits = logits + (total[:, :, n - m :, None] - total[:, :, None])
    # What remains is softmax attention over logits that are known: its own product of queries and keys is 0.
    none = q.new_zeros(b, h, m, 1), k.new_zeros(b, g, n, 1)
    o: Tensor = softmax_attention(*none, v, mask=causal(), scale=1.0, bias=logits, backend="reference")
    return o
