"""Masks as the list of nodes that the native library makes block lists of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnkit import native
from attnkit.masks.algebra import And, Mask, Not, Or
from attnkit.masks.chosen import ChosenBlocks
from attnkit.masks.held import BlockSparse, Documents, Padding
from attnkit.masks.patterns import Chunked, Dilated, Fixed, GlobalTokens, Interval, Prefix, Strided
from attnkit.native import sparse

FIRST_ROOM = 1 << 14
"""Patterns that there is room for at first: few masks have more than a thousand, and room is memory."""


@dataclass
class Program:
    """Packed nodes, and the tensors that some of them point into."""

    nodes: list[bytes] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)

    def add(self, mask: Mask) -> int | None:
        """Append the nodes of ``mask``; the place of its last one, None when a part has no formula to hand over."""
        # By exact class: whoever inherits from a built-in mask may have changed its rule.
        match type(mask):
            case cls if cls in (And, Or):
                one, other = self.add(mask.one), self.add(mask.other)  # type: ignore[attr-defined]
                if one is None or other is None:
                    return None
                return self._node(sparse.AND if cls is And else sparse.OR, one, other)
            case cls if cls is Not:
                inner = self.add(mask.inner)  # type: ignore[attr-defined]
                return None if inner is None else self._node(sparse.NOT, inner)
            case cls if cls is ChosenBlocks and mask.batches > 1:
                return None  # the library's block layout has heads and no batches
            case cls if cls in LEAVES:
                kind, a, b, data = LEAVES[cls](mask)
                return self._node(kind, a, b, data, mask)
        return None

    def _node(self, kind: int, a: int, b: int = 0, data: Tensor | None = None, of: Mask | None = None) -> int:
        if data is not None:
            self.held.append(data)
        sizes = (of.batches, of.heads) if of is not None and data is not None else (1, 1)
        self.nodes.append(native.pack_mask_node(0 if data is None else data.data_ptr(), kind, a, b, *sizes))
        return len(self.nodes) - 1


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to("cpu", dtype).contiguous()


FARTHEST = 1 << 31
"""No two of the positions that the library takes are so far apart, and it takes no larger number."""


def _near(x: int) -> int:
    return max(-FARTHEST, min(x, FARTHEST))


# Kind, a, b and data of each.
LEAVES: dict[type[Mask], Any] = {
    Interval: lambda x: (sparse.INTERVAL, _near(x.left), _near(x.right), None),
    Dilated: lambda x: (sparse.DILATED, _near(x.window), _near(x.dilation), None),
    Strided: lambda x: (sparse.STRIDED, _near(x.stride), 0, None),
    Fixed: lambda x: (sparse.FIXED, _near(x.stride), max(0, x.columns - x.stride + _near(x.stride)), None),
    Chunked: lambda x: (sparse.CHUNKED, _near(x.chunk), 0, None),
    Prefix: lambda x: (sparse.PREFIX, _near(x.prompt), 0, None),
    GlobalTokens: lambda x: (sparse.GLOBAL, len(x.runs), 0, torch.tensor([tuple(map(_near, run)) for run in x.runs])),
    Documents: lambda x: (sparse.DOCUMENTS, x.tensor.shape[1], 0, _stored(x.tensor, torch.int64)),
    Padding: lambda x: (sparse.PADDING, x.tensor.shape[1], 0, _stored(x.tensor, torch.uint8)),
    BlockSparse: lambda x: (sparse.BLOCK_SPARSE, _near(x.block), x.tensor.shape[2], _stored(x.tensor, torch.uint8)),
    ChosenBlocks: lambda x: (sparse.BLOCK_SPARSE, _near(x.block), x.tensor.shape[3], _stored(x.tensor, torch.uint8)),
}


def build(mask: Mask, m: int, n: int, block_q: int, block_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """``offsets, columns, pattern, patterns`` of a ``BlockList``; None when the mask cannot be handed over."""
    program = Program()
    if not native.STATUS.available or program.add(mask) is None:
        return None
    nodes = b"".join(program.nodes)
    kept = np.frombuffer(nodes, dtype=np.uint8)
    found = torch.zeros(2, dtype=torch.int64)
    sizes = (len(program.nodes), mask.batches, mask.heads, m, n, block_q, block_k)
    native.run("block_bounds", native.pack_block_list(kept.ctypes.data, *(0,) * 5, found.data_ptr(), *sizes, 0, 0, 0))
    entries, partial = found.tolist()
    offsets = torch.empty(mask.batches * mask.heads * -(-m // block_q) + 1, dtype=torch.int64)
    columns, pattern = (torch.empty(entries, dtype=torch.int32) for _ in range(2))
    room = min(partial, FIRST_ROOM)
    while True:
        patterns = torch.empty(room, block_q, dtype=torch.int64)
        # numpy's zeros come from the system and are no memory until they are touched, unlike torch's.
        table = np.zeros(1 << (2 * room).bit_length(), dtype=np.int32)
        pointers = (x.data_ptr() for x in (offsets, columns, pattern, patterns))
        call = native.pack_block_list(
            kept.ctypes.data, *pointers, table.ctypes.data, found.data_ptr(), *sizes, entries, room, len(table)
        )
        native.run("block_list_fill", call)
        used, stored = found.tolist()
        if stored >= 0:
            return offsets, _cut(columns, used), _cut(pattern, used), _cut(patterns, stored)
        room = min(partial, 8 * room)


def _cut(x: Tensor, rows: int) -> Tensor:
    """The first rows, alone in memory when the rest would be much."""
    return x[:rows] if 8 * rows >= 7 * len(x) else x[:rows].clone()
