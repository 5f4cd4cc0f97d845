"""The chunkwise form: a triangular system and a few matrix products a block, one state handed from block to block.

What a token adds to the state, ``u_t = beta_t (v_t - k_t^T S)``, depends on what the tokens before it in its block
added: a unit lower triangular system, solved at once for the block. The backward is written out. It keeps the state at
the start of each run of blocks, computes one run again at a time and walks back through it: see ``page.md``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnkit.blocks import spans
from attnkit.costs import DELTA_BLOCK as BLOCK
from attnkit.mechanisms.delta.lawful import spoiled_from
from attnkit.mechanisms.delta.walk import Run, Tokens

# Blocks whose tables are in memory at once. On one core 2 to 16 take the same time; half of 8 is half the memory.
RUN = 4


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
    (b, h, _, d), e = q.shape, v.shape[3]
    work = torch.promote_types(q.dtype, torch.float32)
    spoiled = spoiled_from(k, v, beta, log_decay)
    first = q.new_zeros(b, h, d, e, dtype=work) if state is None else state.to(work)
    o, last = _Chunked.apply(q, k, v, beta, log_decay, first, spoiled, read_scale)  # type: ignore[no-untyped-call]
    return (o, last) if return_state else o


class _Chunked(torch.autograd.Function):
    """All runs of blocks, first to last, and their backward, last to first."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        state: Tensor,
        spoiled: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        tokens, o, states = Tokens(q, k, v, beta, log_decay, spoiled, scale), q.new_empty(v.shape), []
        for start, end in _runs(q):
            states.append(state)
            rows, state = Run.of(tokens, start, end).walk(state)[:2]
            o[:, :, start:end] = rows.masked_fill(spoiled[:, :, start:end, None], torch.nan)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, beta, log_decay, spoiled, *states)
        return o, state.masked_fill(spoiled.any(-1)[..., None, None], torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, log_decay, spoiled, *states = ctx.saved_tensors
        tokens = Tokens(q, k, v, beta, log_decay, spoiled, ctx.scale)
        found = [None if x is None else torch.empty_like(x) for x in (q, k, v, beta, log_decay)]
        with torch.autocast(q.device.type, enabled=False):
            for (start, end), state in reversed(list(zip(_runs(q), states, strict=True))):
                *parts, d_state = Run.of(tokens, start, end).walk_back(state, d_o[:, :, start:end], d_state)
                for whole, part in zip(found, parts, strict=True):
                    if whole is not None:
                        whole[:, :, start:end] = part
        return *found, d_state, None, None


def _runs(q: Tensor) -> list[tuple[int, int]]:
    return spans(q.shape[2], RUN * BLOCK) if q.shape[2] else []
