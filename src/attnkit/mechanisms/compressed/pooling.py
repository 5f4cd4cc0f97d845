"""How tokens become entries, and how a query picks its entries: the two steps before the attention itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnkit import shapes
from attnkit.blocks import largest, spans

ELEMENTS = 1 << 20
"""The most scores of index heads in memory at a time, 4 MB of float32: with four times as many, one core of an AMD EPYC
takes twice as long for the scores of 8,192 tokens and 8 index heads, as they leave its cache."""


def compress(
    values: Tensor,
    gates: Tensor,
    bias: Tensor,
    *,
    overlap: bool = False,
    before: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Pool each whole window of ``rate`` tokens into one entry: a softmax over its tokens, for each channel by itself.

    Tokens left over at the end are left out. With ``overlap`` a token has two series of values and gates, ``a`` in the
    first half of its channels and ``b`` in the second: an entry pools series ``a`` of the window before and series
    ``b`` of its own, ``2 rate`` slots under one softmax.

    Parameters
    ----------
    values: (b, g, n, d), or (b, g, n, 2 d) with ``overlap``; any floating dtype.
    gates: same shape and dtype: logits of the softmax, which is taken in float32 at least.
    bias: (rate, d), or (rate, 2 d) with ``overlap``: added to the gates by the token's place in its window.
    before: series ``a`` of the window before the first, values and gates (b, g, rate, d); None when there is none.

    Returns
    -------
    entries: (b, g, n // rate, d) in the dtype of ``values``.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.
    """
    width = shapes.check("compress", values=(values, "b g n width"), gates=(gates, "b g n width"))["width"]
    shapes.check("compress", values=(values, "b g n width"), bias=(bias, "rate width"))
    shapes.check_same("compress", values=values, gates=gates)
    if overlap and width % 2 or before is not None and not overlap:
        raise ValueError(
            f"compress: got {width} channels, overlap {overlap} and {'a' if before else 'no'} window before, expected "
            f"an even number for two series, and a window before only where windows overlap"
        )
    rate = bias.shape[0]
    windows = values.shape[2] // rate
    work = torch.promote_types(values.dtype, torch.float32)
    pooled, logits = (x[:, :, : windows * rate].to(work).unflatten(2, (windows, rate)) for x in (values, gates))
    logits = logits + bias.to(work)
    if overlap:
        d = width // 2
        earlier = pooled.new_zeros(*pooled.shape[:2], rate, d)
        shut = torch.full_like(earlier, -torch.inf)  # where there is no window before, its slots have no weight
        if before is not None:
            earlier, shut = before[0].to(work), before[1].to(work) + bias[:, :d].to(work)
        pooled, logits = _two_series(pooled, earlier), _two_series(logits, shut)
    entries: Tensor = (pooled * logits.softmax(3)).sum(3).to(values.dtype)
    return entries


def _two_series(x: Tensor, before: Tensor) -> Tensor:
    """``(b, g, windows, 2 rate, d)``: series ``a`` of the window before and series ``b`` of the own."""
    windows, d = x.shape[2], before.shape[3]
    a = torch.cat([before[:, :, None], x[:, :, :-1, :, :d]], 2)[:, :, :windows]
    return torch.cat([a, x[..., d:]], 3)


@torch.no_grad()
def choose(q: Tensor, k: Tensor, weights: Tensor, *, rate: int, top: int, length: int | None = None) -> Tensor:
    """The ``top`` entries of each query, by the lightning indexer: ``score = sum_i weights_i relu(q_i k)``.

    Only entries whose whole window is there are ranked. Of equal scores the earlier entry wins, and equal scores are
    common: where no head's product is positive the score is 0. Choosing has no gradient.

    Parameters
    ----------
    q: (b, i, m, c), any floating dtype: queries of ``i`` index heads, of the last ``m`` tokens.
    k: (b, w, c), same dtype and device: one index key an entry, at least one for each whole window.
    weights: (b, i, m), any floating dtype: how much each head counts; may be negative.
    rate: tokens of a window.
    top: entries that a query picks.
    length: tokens there are so far, ``m`` when None.

    Returns
    -------
    chosen: (b, m, min(top, w)), int64 ascending, -1 at the end where fewer entries are closed.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.
    """
    where = "choose"
    sizes = shapes.check(where, q=(q, "b index_heads m c"), k=(k, "b entries c"), weights=(weights, "b index_heads m"))
    shapes.check_same(where, q=q, k=k)
    b, heads, m, count = sizes["b"], sizes["index_heads"], sizes["m"], sizes["entries"]
    length = m if length is None else length
    check_windows(where, rate, count, m, length)
    if top < 1:
        raise ValueError(f"{where}: top is {top}, expected at least 1: a query picks its best entry")
    work = torch.promote_types(q.dtype, torch.float32)
    k, weights, found = k.to(work), weights.to(work), []
    for start, end in spans(m, max(1, ELEMENTS // max(1, b * heads * count))):
        rows, first = end - start, length - m + start
        closed = (torch.arange(first, first + rows, device=q.device) + 1) // rate
        there = (first + rows) // rate
        products = q[:, :, start:end].to(work).flatten(1, 2) @ k[:, :there].mT
        scores = torch.einsum("biqw,biq->bqw", products.view(b, heads, rows, there).relu_(), weights[:, :, start:end])
        scores.masked_fill_(torch.arange(there, device=q.device) >= closed[:, None], -torch.inf)
        best = largest(scores, top)
        best = best.masked_fill(best >= closed[:, None], -1)
        found.append(pad(best, (0, min(top, count) - best.shape[-1]), value=-1))
    return torch.cat(found, 1)


def check_windows(where: str, rate: int, count: int, m: int, length: int) -> None:
    """Raise ``ValueError`` unless there is an entry for each whole window, and a position for each query."""
    if rate < 1:
        raise ValueError(f"{where}: rate is {rate}, expected at least 1 token a window")
    if length < m:
        raise ValueError(f"{where}: length is {length} but there are {m} queries, expected at least as many tokens")
    if count < length // rate:
        raise ValueError(
            f"{where}: got {count} entries for {length} tokens in windows of {rate}, expected at least "
            f"{length // rate}: one for each whole window"
        )
