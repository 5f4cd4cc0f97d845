"""What backends read: a dense bool tensor, a list of tiles with bit patterns, or a picture for people."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from attnkit.masks.algebra import Mask, Tiles

_KEPT_ELEMENTS = 1 << 22  # dense masks above 4 MB are made afresh: keeping 32 of them would be a leak in disguise
_TILES_AT_ONCE = 512  # pairs asked about at once: 512 x 48 x 64 int64 indices are 12 MB


@dataclass(frozen=True)
class BlockList:
    """The non-empty tiles of a mask, in the form the native kernels read.

    ``offsets`` int64 ``(batches * heads * query_blocks + 1,)``: where each block row starts in ``columns``.
    ``columns`` int32: ascending indices of the non-empty key blocks. ``pattern`` int32: -1 for a full block, else a
    row of ``patterns`` int64 ``(p, block_q)``, whose word ``i`` has bit ``j`` set when query row ``i`` sees key ``j``
    of the block. In the ragged last blocks, bits of rows or keys that do not exist are 0.
    """

    offsets: Tensor
    columns: Tensor
    pattern: Tensor
    patterns: Tensor
    batches: int
    heads: int
    block_q: int
    block_k: int


def dense(mask: Mask, m: int, n: int, device: torch.device | str | None) -> Tensor:
    """Bool ``(batches, heads, m, n)``."""
    if torch.compiler.is_compiling() or mask.batches * mask.heads * m * n > _KEPT_ELEMENTS:
        return part(mask, (n - m, n), (0, n), device)
    return _kept_dense(mask, m, n, torch.device(device or "cpu"))


def part(mask: Mask, queries: tuple[int, int], keys: tuple[int, int], device: torch.device | str | None) -> Tensor:
    """Bool ``(batches, heads, queries, keys)`` for positions from the first to before the second of each pair."""
    b = torch.arange(mask.batches, device=device)[:, None, None, None]
    h = torch.arange(mask.heads, device=device)[:, None, None]
    q, k = torch.arange(*queries, device=device)[:, None], torch.arange(*keys, device=device)
    return mask.visible(b, h, q, k).expand(mask.batches, mask.heads, queries[1] - queries[0], keys[1] - keys[0])


@lru_cache(maxsize=32)
def _kept_dense(mask: Mask, m: int, n: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
        return part(mask, (n - m, n), (0, n), device).contiguous()


def grid(m: int, n: int, block_q: int, block_k: int) -> Tiles:
    """The tiles of an m x n call; the last of each row and column is cut at the edge."""
    from attnkit.masks.algebra import Tiles

    q0, k0 = torch.arange(n - m, n, block_q)[:, None], torch.arange(0, n, block_k)[None]
    return Tiles(q0, (q0 + block_q - 1).clamp(max=n - 1), k0, (k0 + block_k - 1).clamp(max=n - 1))


@lru_cache(maxsize=64)
def block_list(mask: Mask, m: int, n: int, block_q: int, block_k: int) -> BlockList:
    """Lower ``mask``; at most 64 keys fit the word of a pattern row."""
    if not 1 <= block_k <= 64:
        raise ValueError(f"block_list: block_k is {block_k}, expected 1 to 64, the bits of one pattern word")
    from attnkit.masks.program import build

    with torch.inference_mode(False):
        built = build(mask, m, n, block_q, block_k)
        if built is not None:
            return BlockList(*built, mask.batches, mask.heads, block_q, block_k)
        some, every = mask.tiles(grid(m, n, block_q, block_k))
        shape = (mask.batches, mask.heads, *some.shape[-2:])
        some, every = some.expand(shape), every.expand(shape)
        state = some.int() + (some & every).int()  # 0 empty, 1 to look at, 2 full
        doubtful = (state == 1).nonzero()
        words, seen, complete = _bits(mask, doubtful, m, n, block_q, block_k)
        state[tuple(doubtful.T)] = (seen.int() + complete.int()).to(state.dtype)
        patterns, index = _unique(words[seen & ~complete], block_q)
        pattern = torch.full(shape, -1, dtype=torch.int32)
        pattern[tuple(doubtful[seen & ~complete].T)] = index.to(torch.int32)
        used = state > 0
        offsets = torch.nn.functional.pad(used.flatten(0, 2).sum(-1).cumsum(0), (1, 0))
        return BlockList(
            offsets=offsets,
            columns=used.nonzero()[:, -1].to(torch.int32),
            pattern=pattern[used],
            patterns=patterns,
            batches=mask.batches,
            heads=mask.heads,
            block_q=block_q,
            block_k=block_k,
        )


def _bits(mask: Mask, tiles: Tensor, m: int, n: int, block_q: int, block_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pattern words ``(tiles, block_q)`` of the given tiles, and whether each shows something and everything."""
    made, seen, complete = [], [], []
    for part in torch.split(tiles, _TILES_AT_ONCE):
        b, h, i, j = (x[:, None, None] for x in part.T)
        row, key = i * block_q + torch.arange(block_q)[:, None], j * block_k + torch.arange(block_k)
        exists = packed((row < m) & (key < n))
        # Rows and keys past the edge are asked about the last real position, then struck out.
        query = row.clamp(max=m - 1) + (n - m)
        answer = words(mask, b, h, query, key[..., :1])
        word = packed(mask.visible(b, h, query, key.clamp(max=n - 1))) if answer is None else answer[..., 0]
        made.append(word & exists)
        seen.append((made[-1] != 0).any(-1))
        complete.append((made[-1] == exists).all(-1))
    if not made:
        empty = torch.zeros(0, dtype=torch.bool)
        return torch.zeros(0, block_q, dtype=torch.int64), empty, empty
    return torch.cat(made), torch.cat(seen), torch.cat(complete)


def words(mask: Mask, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
    """``mask.words``, unless a class that inherits it has a rule of its own."""
    owner = next(cls for cls in type(mask).__mro__ if "visible" in vars(cls))
    return mask.words(b, h, q, k) if "words" in vars(owner) else None


def packed(bits: Tensor) -> Tensor:
    """Bool ``(..., at most 64)`` to int64 words, bit j for column j."""
    wide = torch.nn.functional.pad(bits, (0, 64 - bits.shape[-1]))
    packed = np.packbits(wide.numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(packed).view("<i8")[..., 0].copy())


def _unique(words: Tensor, block_q: int) -> tuple[Tensor, Tensor]:
    if not len(words):
        return torch.zeros(0, block_q, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    patterns, index = torch.unique(words, dim=0, return_inverse=True)
    return patterns.contiguous(), index


def visible_pairs(mask: Mask, m: int, n: int) -> int:
    """Visible pairs over the mask's own batches and heads, counted from its tiles."""
    listed = block_list(mask, m, n, 64, 64)
    rows = torch.arange(len(listed.offsets) - 1).repeat_interleave(listed.offsets.diff()) % max(1, -(-m // 64))
    area = (m - rows * 64).clamp(max=64) * (n - listed.columns.long() * 64).clamp(max=64)
    bits = (listed.patterns[..., None] >> torch.arange(64)) & 1
    counts = torch.cat([bits.flatten(1).sum(-1), torch.zeros(1, dtype=torch.int64)])
    return int(torch.where(listed.pattern < 0, area, counts[listed.pattern.long()]).sum())


def draw(mask: Mask, m: int, n: int, cells: int) -> str:
    """Queries down, keys across, batch 0 and head 0: ``■`` all visible, ``▪`` some, ``·`` none."""
    step = -(-max(m, n) // cells)
    if step <= 64:
        listed = block_list(mask, m, n, step, step)
        counts = listed.offsets.diff()
        picture = torch.zeros(len(counts), -(-n // step), dtype=torch.int32)
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        picture[rows, listed.columns.long()] = torch.where(listed.pattern < 0, 2, 1).to(torch.int32)
    else:
        some, every = mask.tiles(grid(m, n, step, step))
        picture = (some.int() + (some & every).int())[0, 0]
    scale = f"{m} queries x {n} keys" + (f", a cell is {step} x {step}" if step > 1 else "")
    rows_drawn = (" ".join("·▪■"[int(cell)] for cell in row) for row in picture[: -(-m // step)])
    return "\n".join([f"{mask!r}: {scale}", *rows_drawn])
