"""Calls cut into blocks of queries, so that no tensor of all queries times all keys is ever in memory.

Training keeps none either: where there is more than one block, the backward computes each again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnkit.masks import Mask


def spans(count: int, size: int) -> list[tuple[int, int]]:
    """Start and end of each block of ``size`` out of ``count`` rows; one empty block when there are none."""
    if count <= size:  # said first, for the graph of a compiled call whose lengths are unknown
        return [(0, count)]
    return [(i * size, min(count, (i + 1) * size)) for i in range(-(-count // size))]


def joined(rows: Callable[..., Any], blocks: Iterable[tuple[Any, ...]]) -> Any:
    """``rows(*block)`` of each block, tensors ``(b, h, rows, ...)`` or tuples of them, joined along the rows.

    Where a block holds slices, let ``blocks`` be a generator that cuts them as they are asked for. The backward goes
    through what was made last first: slices that were all cut before the first block are all kept until its end,
    a whole set of keys a block.
    """
    waiting = iter(blocks)
    ahead = list(islice(waiting, 2))
    if len(ahead) == 1:
        return rows(*ahead[0])
    again = torch.is_grad_enabled()
    found = [
        checkpoint(rows, *block, use_reentrant=False, preserve_rng_state=False) if again else rows(*block)
        for block in chain(ahead, waiting)
    ]
    if isinstance(found[0], tuple):
        return tuple(torch.cat(parts, 2) for parts in zip(*found, strict=True))
    return torch.cat(found, 2)


def seen(
    mask: Mask | None, start: int, end: int, m: int, n: int, device: torch.device
) -> tuple[int, int, Tensor | None]:
    """What queries ``start`` to ``end`` of a call of ``m`` queries and ``n`` keys may see: ``(low, high, keep)``.

    No key outside ``low`` to ``high`` is visible to any of them; the range is empty only when there are no keys.
    ``keep``, bool ``(batches, heads, end - start, high - low)``, says who sees which of these; None when all see all.
    """
    if mask is None:
        return 0, n, None
    first, past = n - m + start, n - m + end
    low, high = mask.reached((first, past), n)
    interval = mask.interval()
    if interval is not None and past - 1 - interval[0] <= low and first + interval[1] >= high - 1:
        return low, high, None
    return low, high, mask.part((first, past), (low, high), device)


def largest(scores: Tensor, count: int) -> Tensor:
    """Places of the ``count`` largest of each row, ascending; of equals the first ones."""
    if scores.shape[-1] <= count:
        return torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    values, place = scores.topk(count + 1)
    # torch.topk takes any of several equals, which matters when some of them are in and some are not.
    tied = (values[..., -1] == values[..., -2]) & (values[..., -2] > -torch.inf)
    if torch.compiler.is_compiling() or bool(tied.any()):
        place = scores.argsort(dim=-1, descending=True, stable=True)
    return place[..., :count].sort(-1).values
