"""Sums over the past that fade: ``S_t = diag(a_t) S_{t-1} + k_t v_t^T``, read by ``o_t = scale * q_t S_t``.

Three forms of one equation. ``recurrent`` goes token by token and is what decodes. ``parallel`` is one masked product
of all pairs. ``chunked`` is what trains: products within a chunk and one state from chunk to chunk. Its time is linear
in the length, and its written backward keeps one state a chunk and computes the rest again.

All three take the same tensors and give the same pair of results:

q: (b, h, m, d), the last ``m`` of the ``n`` positions. k: (b, g, n, d). v: (b, g, n, e). ``g`` divides ``h``.
log_decay: natural logarithms of ``a``, finite and at most 0: (g,) one constant a head, (b, g, n) one a token,
    (b, g, n, d) one a channel of the key; None never fades.
state: (b, g, d, e), what the tokens before have added up to; None is zeros.
keep: (b, n) bool, False for padding, which neither adds to the state nor lets it fade.
scale: multiplies the result.

They return ``o`` (b, h, m, e) in q's dtype and the state after the last token. Sums are float32, or float64 for that,
and gradients flow through everything, both states included. Exponents are never positive, so nothing overflows however
fast a sum fades.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from attnkit.blocks import spans
from attnkit.costs import CHUNK as CHUNK
from attnkit.costs import TILE

Form = Callable[..., tuple[Tensor, Tensor]]


def exactly(device: torch.device) -> torch.autocast:
    """Without autocast, which would round each product with a sum over all tokens to half precision."""
    return torch.autocast(device.type, enabled=False)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Token by token, as the equation is written."""
    work, grouped, keys, decay, state = _prepared(q, k, v, log_decay, state, keep)
    asked, keys, values, factors = grouped.to(work) * scale, keys.to(work), v.to(work), decay.to(work).exp()
    past, rows = k.shape[2] - q.shape[2], []
    for t in range(k.shape[2]):
        state = factors[:, :, t, :, None] * state + keys[:, :, t, :, None] * values[:, :, t, None]
        if t >= past:
            rows.append(asked[:, :, :, t - past] @ state)
    o = torch.stack(rows, 3) if rows else asked.new_zeros(*asked.shape[:4], v.shape[3])
    return o.flatten(1, 2).to(q.dtype), state


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """All pairs at once: n x n numbers a head, and with a decay a channel, as many again for each channel."""
    work, grouped, keys, decay, state = _prepared(q, k, v, log_decay, state, keep)
    asked, keys, values = grouped.to(work) * scale, keys.to(work), v.to(work)
    total = decay.double().cumsum(2)
    m, n = q.shape[2], k.shape[2]
    mine = total[:, :, n - m :]
    sees = torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)[..., None]
    fade = (mine[:, :, :, None] - total[:, :, None]).masked_fill(~sees, -torch.inf).to(work).exp()
    if decay.shape[3] == 1:
        weights = (asked @ keys[:, :, None].mT).tril(n - m) * fade[:, :, None, ..., 0]
    else:
        weights = torch.einsum("bgrmd,bgnd,bgmnd->bgrmn", asked, keys, fade)
    o = weights @ values[:, :, None] + (asked * mine.to(work).exp()[:, :, None]) @ state[:, :, None]
    if n:
        last = total[:, :, -1:]
        state = last.to(work).exp().mT * state + (keys * (last - total).to(work).exp()).mT @ values
    return o.flatten(1, 2).to(q.dtype), state


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk. Its gradients have none themselves: asking for second derivatives raises."""
    _, grouped, keys, decay, state = _prepared(q, k, v, log_decay, state, keep)
    m, n = q.shape[2], k.shape[2]
    if n == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]), state
    if m < n:  # rows of zeros stand for the queries that nobody asked
        grouped = torch.nn.functional.pad(grouped, (0, 0, n - m, 0))
    given = (grouped, keys, v, decay, state)
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        o, after = _Chunked.apply(*given, scale)  # type: ignore[no-untyped-call]
    else:
        o, after, _ = _forward(*given, scale, keep_states=False)
    return o[:, :, :, n - m :].flatten(1, 2), after


def advance(q: Tensor, *rest: Tensor | None, **settings: Any) -> tuple[Tensor, Tensor]:
    """The form that suits a step of ``m`` tokens: ``recurrent`` for one, ``chunked`` for several."""
    form: Form = recurrent if q.shape[2] == 1 else chunked
    return form(q, *rest, **settings)


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, keep: Tensor | None
) -> tuple[torch.dtype, Tensor, Tensor, Tensor, Tensor]:
    """The dtype to work in, queries by KV head (b, g, r, m, d), keys, decays (b, g, n, 1 or d), and the state."""
    (b, g, n, d), e = k.shape, v.shape[3]
    work = torch.promote_types(q.dtype, torch.float32)
    if log_decay is None:
        decay = torch.zeros((), dtype=work, device=k.device).expand(b, g, n, 1)
    elif log_decay.dim() == 1:
        decay = log_decay[:, None, None].expand(b, g, n, 1)
    else:
        decay = log_decay if log_decay.dim() == 4 else log_decay[..., None]
    if keep is not None:
        hidden = ~keep[:, None, :, None]
        k, decay = k.masked_fill(hidden, 0.0), decay.masked_fill(hidden, 0.0)
    state = torch.zeros(b, g, d, e, dtype=work, device=k.device) if state is None else state.to(work)
    return work, q.unflatten(1, (g, -1)), k, decay, state


@dataclass(frozen=True)
class _Tile:
    """Tokens ``start`` to ``end`` of a chunk, and what is left of other tokens at each of them.

    ``fade`` (b, g, s, s, 1 or d) is of earlier tokens of the tile, 0 for those that are not earlier. Of what was there
    before the tile, ``kept`` (b, g, s, d) is left; of the chunk's tokens before it, ``left`` (b, g, start, d) at its
    start. A tile that is the whole chunk has no such tokens.
    """

    start: int
    end: int
    fade: Tensor
    kept: Tensor | None
    left: Tensor | None

    @classmethod
    def of(cls, total: Tensor, start: int, end: int, work: torch.dtype) -> _Tile:
        mine = total[:, :, start:end]
        later = torch.ones(end - start, end - start, dtype=torch.bool, device=total.device).tril(-1)[..., None]
        fade = (mine[:, :, :, None] - mine[:, :, None]).masked_fill(~later, -torch.inf).to(work).exp()
        if not start:
            return cls(start, end, fade, None, None)
        base = total[:, :, start - 1 : start]
        return cls(start, end, fade, (mine - base).to(work).exp(), (base - total[:, :, :start]).to(work).exp())


@dataclass(frozen=True)
class _Chunk:
    """One chunk's queries (b, g, r, s, d), scaled, its keys and values, and what its decays leave of what.

    Of the state before the chunk ``from_start`` (b, g, s, 1 or d) is left at each token and ``through`` (b, g, 1 or d,
    1) at the end, and of each token ``to_end`` (b, g, s, 1 or d).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    from_start: Tensor
    to_end: Tensor
    through: Tensor
    tiles: list[_Tile]

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float, work: torch.dtype, span: tuple[int, int]
    ) -> _Chunk:
        rows, s = slice(*span), span[1] - span[0]
        # Of large sums the differences are needed, and those of tokens after a closed gate are small: hence float64.
        total = decay[:, :, rows].double().cumsum(2)
        last = total[:, :, -1:]
        tiles = [_Tile.of(total, *part, work) for part in spans(s, TILE if total.shape[3] > 1 else s)]
        q, k, v = q[:, :, :, rows].to(work) * scale, k[:, :, rows].to(work), v[:, :, rows].to(work)
        return cls(q, k, v, total.to(work).exp(), (last - total).to(work).exp(), last.to(work).exp().mT, tiles)

    def weights(self) -> Tensor:
        """Products of queries and faded earlier keys (b, g, r, s, s), without a token's own key."""
        rows = []
        for tile in self.tiles:
            q, k = self.q[:, :, :, tile.start : tile.end], self.k[:, :, tile.start : tile.end]
            if tile.fade.shape[4] == 1:
                found = (q @ k[:, :, None].mT).tril(-1) * tile.fade[:, :, None, ..., 0]
            else:
                found = ((k[:, :, None] * tile.fade)[:, :, None] @ q[..., None])[..., 0]
            if tile.kept is not None and tile.left is not None:
                far = (q * tile.kept[:, :, None]) @ (self.k[:, :, : tile.start] * tile.left)[:, :, None].mT
                found = torch.cat([far, found], -1)
            rows.append(torch.nn.functional.pad(found, (0, self.k.shape[2] - tile.end)))
        return torch.cat(rows, 3)

    def slopes(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of queries (b, g, r, s, d) and keys (b, g, s, d) for that of ``weights()``."""
        dq, dk = torch.zeros_like(self.q), torch.zeros_like(self.k)
        for tile in self.tiles:
            rows, before = slice(tile.start, tile.end), slice(tile.start)
            q, k, near = self.q[:, :, :, rows], self.k[:, :, rows], slope[:, :, :, rows, rows]
            if tile.fade.shape[4] == 1:
                near = near * tile.fade[:, :, None, ..., 0]
                dq[:, :, :, rows] += near @ k[:, :, None]
                dk[:, :, rows] += (near.mT @ q).sum(2)
            else:
                dq[:, :, :, rows] += (near[..., None, :] @ (k[:, :, None] * tile.fade)[:, :, None])[..., 0, :]
                dk[:, :, rows] += ((near[..., None] * q[..., None, :]).sum(2) * tile.fade).sum(2)
            if tile.kept is not None and tile.left is not None:
                kept, far = tile.kept[:, :, None], slope[:, :, :, rows, before]
                dq[:, :, :, rows] += (far @ (self.k[:, :, before] * tile.left)[:, :, None]) * kept
                dk[:, :, before] += (far.mT @ (q * kept)).sum(2) * tile.left
        return dq, dk


def _forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, scale: float, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Results (b, g, r, n, e), the state at the end, and those at the start of every chunk, if they are to be kept."""
    blocks = spans(k.shape[2], CHUNK)
    o = q.new_empty(*q.shape[:4], v.shape[3])
    states = state.new_empty(len(blocks) if keep_states else 0, *state.shape)
    for i, span in enumerate(blocks):
        if keep_states:
            states[i] = state
        c = _Chunk.of(q, k, v, decay, scale, state.dtype, span)
        own = (c.q * c.k[:, :, None]).sum(-1, keepdim=True) * c.v[:, :, None]
        inside = c.weights() @ c.v[:, :, None] + own
        o[:, :, :, slice(*span)] = (c.q * c.from_start[:, :, None]) @ state[:, :, None] + inside
        state = c.through * state + (c.k * c.to_end).mT @ c.v
    return o, state, states


class _Chunked(Function):
    """``_forward`` with its gradients, chunk by chunk from the end, from the states that it kept."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        o, after, states = _forward(q, k, v, decay, state, scale, keep_states=True)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, decay, states)
        return o, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, states = ctx.saved_tensors
        do, ds = slopes
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        faded = torch.empty_like(decay) if ctx.needs_input_grad[3] else None
        blocks = spans(k.shape[2], CHUNK)
        for i in range(len(blocks) - 1, -1, -1):
            rows, state = slice(*blocks[i]), states[i]
            c = _Chunk.of(q, k, v, decay, ctx.scale, state.dtype, blocks[i])
            d_o = do[:, :, :, rows].to(state.dtype)
            d_weights = d_o @ c.v[:, :, None].mT
            own = d_weights.diagonal(dim1=-2, dim2=-1)[..., None]
            near_q, near_k = c.slopes(d_weights)
            far_q = (d_o @ state[:, :, None].mT) * c.from_start[:, :, None]
            far_k = (c.v @ ds.mT) * c.to_end
            dq[:, :, :, rows] = (near_q + far_q + own * c.k[:, :, None]) * ctx.scale
            dk[:, :, rows] = near_k + far_k + (own * c.q).sum(2)
            mine = (c.q * c.k[:, :, None]).sum(-1, keepdim=True) * d_o
            dv[:, :, rows] = (c.weights().mT @ d_o + mine).sum(2) + (c.k * c.to_end) @ ds
            if faded is not None:
                # A decay counts for every pair that it stands between, by the pair's product with its gradient.
                here = (c.q * (near_q + far_q)).sum(2) - c.k * near_k
                kept = (c.through * state * ds).sum(-1)[:, :, None]
                gone = c.k * far_k
                slope = here.flip(2).cumsum(2).flip(2) + kept + gone.cumsum(2) - gone
                faded[:, :, rows] = slope.sum(3, keepdim=True) if decay.shape[3] == 1 else slope
            ds = c.through * ds + ((c.q * c.from_start[:, :, None]).mT @ d_o).sum(2)
        return dq, dk, dv, faded, ds, None
