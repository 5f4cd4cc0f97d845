"""Each level through the fastest softmax attention there is, and the new tokens of each level over a state."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import causal
from attnkit.mechanisms.hierarchical.levels import coarser, maps, turned
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.positions import Rotary
from attnkit.state import PyramidState

SHORT = 64


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    down: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    v_weight: Tensor | None,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    rotary: Rotary | None,
) -> Tensor:
    out, n, found = q.dtype, q.shape[2], []
    # Results are the next level's input: what half precision would round away there comes back as other weights.
    work = torch.promote_types(out, torch.float32)
    q, k, v = q.to(work), k.to(work), v.to(work)
    for level, weights in enumerate([*maps(down, q_weight, k_weight, v_weight), None]):
        q, k = turned(q, k, (q_gain, k_gain), rotary, level)
        o: Tensor = softmax_attention(q, k, v, mask=causal(), backend=_backend(q, k))
        found.append(o.repeat_interleave(2**level, 2)[:, :, :n])
        if weights is not None:
            q, k, v = coarser(o[:, :, ::2], *weights)
    return torch.cat(found, -1).to(out)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: PyramidState,
    down: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    v_weight: Tensor | None,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    rotary: Rotary | None,
) -> Tensor:
    """The same for the ``m`` tokens after those of the state: a level gets those whose position it keeps."""
    start, found = state.length, []
    i = torch.arange(start, start + q.shape[2], device=q.device)
    for level, weights in enumerate([*maps(down, q_weight, k_weight, v_weight), None]):
        first = -(-start // 2**level)  # the first new token of this level, if there is one
        q, k = turned(q, k, (q_gain, k_gain), rotary, level, first)
        view = state.append(level, k, v)
        o: Tensor = softmax_attention(q, view.k, view.v, mask=causal())
        if level:
            # Tokens before this level's first new one stand on the result that it has held since.
            standing = torch.cat([state.results[:, :, level - 1 : level], o], 2)
            state.results[:, :, level - 1] = standing[:, :, -1]
            found.append(standing[:, :, i // 2**level - first + 1])
        else:
            found.append(o)
        if weights is not None:
            q, k, v = coarser(o[:, :, first % 2 :: 2], *weights)
    return torch.cat(found, -1)


def _backend(q: Tensor, k: Tensor) -> str | None:
    """In training, the definition for a level of a few tokens, which costs nothing there and rounds finely.

    A fused backward subtracts two sums that differ only in rounding for a row with one key, and nearly so for few.
    """
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return "reference" if trained and k.shape[2] <= SHORT else None
