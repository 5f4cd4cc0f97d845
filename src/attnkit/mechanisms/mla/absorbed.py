"""Queries take up the map to keys, so that all heads attend to the latents as they lie: the form of decoding.

``q_h . (U_h c_j) = (U_h^T q_h) . c_j``, so a latent and its rotary key are one key for all heads and the latent is one
value, which the map to values raises after the weighted sum. Nothing of a head is made for a key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.blocks import joined, seen, spans
from attnkit.dispatch import decide, run
from attnkit.masks import Mask
from attnkit.mechanisms.mla.keys import parts
from attnkit.mechanisms.softmax import SPEC as SOFTMAX
from attnkit.mechanisms.softmax import softmax_attention

LOGITS = 1 << 23
"""Logits that one block of queries may have, 32 MiB of them."""


def forward(q: Tensor, latent: Tensor, kv_b: Tensor, mask: Mask | None, scale: float) -> Tensor:
    nope, _, _, c = parts(q, latent, kv_b)
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    # Mapped queries stay in float32: rounding them would cost more than half precision's own budget.
    q, latent, kv_b = q.to(wide), latent.to(wide), kv_b.to(wide)
    raised = torch.einsum("bhmd,hdc->bhmc", q[..., :nope], kv_b[:, :nope])
    mixed = _attend(torch.cat([raised, q[..., nope:]], -1), latent, c, mask, scale)
    return torch.einsum("bhmc,hec->bhme", mixed, kv_b[:, nope:]).to(dtype)


def _attend(q: Tensor, latent: Tensor, c: int, mask: Mask | None, scale: float) -> Tensor:
    call = SOFTMAX.call(q, latent, latent[..., :c], mask=mask, scale=scale)
    if decide(SOFTMAX, call)[0].name == "cpu":  # its kernels read a latent once for all heads
        o: Tensor = run(SOFTMAX, call)
        return o
    (b, h, m, _), n = q.shape, latent.shape[2]
    rows = spans(m, max(1, LOGITS // max(1, b * h * n)))
    found: Tensor = joined(_block, [(q[:, :, i:j], latent, c, mask, i, m, scale) for i, j in rows])
    return found


def _block(q: Tensor, latent: Tensor, c: int, mask: Mask | None, start: int, of: int, scale: float) -> Tensor:
    """Queries from ``start`` on, out of ``of``; the heads of a latent stand below each other as its queries.

    As heads of their own, torch would repeat the latents for them.
    """
    b, h, m, size = q.shape
    low, high, keep = seen(mask, start, start + m, of, latent.shape[2], q.device)
    latent = latent[:, :, low:high]
    g, n = latent.shape[1:3]
    if keep is not None and keep.shape[1] == 1:
        keep = keep.expand(-1, h // g, -1, -1).reshape(-1, 1, h // g * m, n)
    elif keep is not None:
        keep = keep.reshape(-1, g, h // g * m, n)
    rows = q.reshape(b, g, h // g * m, size)
    o: Tensor = softmax_attention(rows, latent, latent[..., :c], mask=keep, scale=scale)
    return o.reshape(b, h, m, c)
