"""Keys and values of every head, from the latents they share."""

from __future__ import annotations

import torch
from torch import Tensor


def parts(q: Tensor, latent: Tensor, kv_b: Tensor) -> tuple[int, int, int, int]:
    """Sizes of a head's key without rotary, of the rotary key, the value and the latent."""
    c = kv_b.shape[2]
    rotary = latent.shape[3] - c
    nope = q.shape[3] - rotary
    return nope, rotary, kv_b.shape[1] - nope, c


def mla_expand(latent: Tensor, kv_b: Tensor, *, nope: int) -> tuple[Tensor, Tensor]:
    """Keys ``(b, h, n, d)`` and values ``(b, h, n, e)`` of all heads, as ``softmax_attention`` takes them.

    Parameters
    ----------
    latent: (b, g, n, c + r) and kv_b: (h, nope + e, c), as in ``mla_attention``.
    nope: size of a head's key without its rotary part; keys are those ``nope`` channels and the ``r`` shared ones.
    """
    h, rows, c = kv_b.shape
    b, g, n, joined = latent.shape
    # Head i reads latent i // (h / g): consecutive heads share one.
    raised = torch.einsum("bgnc,grfc->bgrnf", latent[..., :c], kv_b.reshape(g, h // g, rows, c))
    raised = raised.reshape(b, h, n, rows).to(latent.dtype)  # autocast rounds products
    shared = latent[:, :, None, :, c:].expand(-1, -1, h // g, -1, -1).reshape(b, h, n, joined - c)
    return torch.cat([raised[..., :nope], shared], -1), raised[..., nope:]
