"""Masks as objects: combine them with ``&``, ``|``, ``~``, print them, pass them to any backend.

``algebra`` holds what a mask is, ``patterns`` and ``held`` the kinds there are, ``lowering`` the forms backends read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnkit.masks.algebra import And, Mask, Not, Or
from attnkit.masks.blocks import bigbird_layout, random_blocks
from attnkit.masks.held import BlockSparse, Documents, Explicit, Moved, Padding
from attnkit.masks.lowering import BlockList
from attnkit.masks.patterns import (
    UNBOUNDED,
    Chunked,
    Dilated,
    Fixed,
    GlobalTokens,
    Interval,
    Predicate,
    Prefix,
    Strided,
)

__all__ = [
    "UNBOUNDED",
    "And",
    "BlockList",
    "Mask",
    "Moved",
    "Not",
    "Or",
    "bigbird",
    "bigbird_layout",
    "block_sparse",
    "causal",
    "checked",
    "chunked",
    "dilated_window",
    "documents",
    "explicit",
    "fixed",
    "full",
    "global_tokens",
    "joined",
    "padding",
    "predicate",
    "prefix",
    "random_blocks",
    "strided",
    "symmetric_window",
    "window",
]


def full() -> Mask:
    """Every query sees every key."""
    return Interval(UNBOUNDED, UNBOUNDED)


def causal() -> Mask:
    """A query sees itself and everything before it; fewer queries than keys are the last ones (bottom-right)."""
    return Interval(UNBOUNDED, 0)


def window(size: int) -> Mask:
    """Causal sliding window: the last ``size`` keys, the query's own included (FlashAttention's left offset + 1)."""
    return Interval(_positive("window", "size", size) - 1, 0)


def symmetric_window(radius: int) -> Mask:
    """Keys at most ``radius`` away on either side (an encoder's window of ``2 * radius + 1`` keys)."""
    radius = _positive("symmetric_window", "radius", radius, least=0)
    return Interval(radius, radius)


def dilated_window(size: int, dilation: int) -> Mask:
    """Causal: ``size`` keys spaced ``dilation`` apart, the query's own included (Longformer, arXiv 2004.05150)."""
    return Dilated(
        _positive("dilated_window", "size", size),
        _positive("dilated_window", "dilation", dilation),
    )


def strided(stride: int) -> Mask:
    """Sparse Transformer's strided pattern, both heads' sets: near keys and every ``stride``-th (arXiv 1904.10509)."""
    return Strided(_positive("strided", "stride", stride))


def fixed(stride: int, columns: int) -> Mask:
    """Sparse Transformer's fixed pattern: the own block and the last ``columns`` of each earlier one (1904.10509)."""
    stride, columns = _positive("fixed", "stride", stride), _positive("fixed", "columns", columns)
    if columns > stride:
        raise ValueError(f"fixed: columns is {columns} but stride is {stride}, expected columns <= stride")
    return Fixed(stride, columns)


def chunked(chunk: int) -> Mask:
    """Query and key lie in the same chunk of ``chunk`` positions (Llama 4: ``chunked(8192) & causal()``)."""
    return Chunked(_positive("chunked", "chunk", chunk))


def prefix(length: int) -> Mask:
    """Prefix language model: causal, and the first ``length`` keys are seen by all."""
    return Prefix(_positive("prefix", "length", length, least=0))


def global_tokens(positions: int | Sequence[int]) -> Mask:
    """Tokens that see all and are seen by all: the first so many, or those listed. Decoders add ``& causal()``."""
    listed = (
        range(_positive("global_tokens", "count", positions)) if isinstance(positions, int) else sorted(set(positions))
    )
    if not listed or min(listed) < 0:
        raise ValueError(f"global_tokens got positions {list(listed)}, expected at least one, none negative")
    runs: list[tuple[int, int]] = []
    for position in listed:
        grows = bool(runs) and position == runs[-1][1] + 1
        runs[-1:] = [(runs[-1][0], position)] if grows else [*runs[-1:], (position, position)]
    return GlobalTokens(tuple(runs))


def block_sparse(layout: Tensor, block: int) -> Mask:
    """Blocks of ``block`` positions see each other where ``layout`` ``([h,] blocks, blocks)`` bool is True."""
    layout = _bool("block_sparse", "layout", layout, (2, 3))
    if layout.shape[-1] != layout.shape[-2]:
        raise ValueError(
            f"block_sparse got a layout {tuple(layout.shape)}, expected as many query blocks as key blocks"
        )
    return BlockSparse(layout if layout.dim() == 3 else layout[None], _positive("block_sparse", "block", block))


def bigbird(length: int, block: int = 64, *, window: int = 3, random: int = 3, heads: int = 1, seed: int = 0) -> Mask:
    """BigBird's block pattern (ITC): first and last block global, ``window`` blocks around, ``random`` more a row.

    Random blocks differ by head and never repeat a window or global block (arXiv 2007.14062).
    """
    blocks = -(-_positive("bigbird", "length", length) // _positive("bigbird", "block", block))
    layout = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    layout |= bigbird_layout(random_blocks(blocks, window=window, random=random, heads=heads, seed=seed), window)
    return block_sparse(layout, block)


def documents(ids: Tensor) -> Mask:
    """Packed documents do not see each other: ``ids`` ``(b, n)`` or ``(n,)`` integers. Decoders add ``& causal()``."""
    if not isinstance(ids, Tensor) or ids.dim() not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"documents got {_what(ids)}, expected integer ids of shape (n,) or (b, n)")
    return Documents(ids if ids.dim() == 2 else ids[None])


def padding(keep: Tensor) -> Mask:
    """Hides padding keys: ``keep`` ``(b, n)`` bool, True for a real token (``nn.MultiheadAttention`` inverts it)."""
    keep = _bool("padding", "keep", keep, (1, 2))
    return Padding(keep if keep.dim() == 2 else keep[None])


def explicit(keep: Tensor) -> Mask:
    """A mask given as a bool tensor ``(m, n)``, ``(b, m, n)`` or ``(b, h, m, n)``; True may attend."""
    keep = _bool("explicit", "keep", keep, (2, 3, 4))
    return Explicit(keep[(None,) * 2] if keep.dim() == 2 else keep[:, None] if keep.dim() == 3 else keep)


def predicate(
    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], *, batches: int = 1, heads: int = 1
) -> Mask:
    """Any rule: ``function(b, h, q, k)`` of broadcasting index tensors returns bool; absolute positions.

    Say ``batches=`` or ``heads=`` when it depends on them. Keep one function object: lowerings are kept by identity.
    """
    return Predicate(function, batches, heads)


def joined(one: Mask | None, other: Mask | None) -> Mask | None:
    """What both let through; None is no mask, which lets everything."""
    return one & other if one is not None and other is not None else one or other


def checked(where: str, mask: Mask | Tensor | None, b: int, h: int, m: int, n: int) -> Mask | None:
    """The ``mask`` argument of a mechanism's function, a bool tensor made a mask, after checking that it fits."""
    if isinstance(mask, Tensor):
        mask = explicit(mask)
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(
            f"{where}: mask is a {type(mask).__name__}, expected a mask such as attnkit.causal(), or a bool tensor"
        )
    if mask is not None:
        mask.check(b, h, m, n)
    return mask


def _positive(where: str, name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: {name} is a {type(value).__name__} ({value!r}), expected an integer")
    if value < least:
        raise ValueError(f"{where}: {name} is {value}, expected at least {least}")
    return value


def _bool(where: str, name: str, tensor: Any, dims: tuple[int, ...]) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool or tensor.dim() not in dims:
        counts = " or ".join(map(str, dims))
        raise ValueError(
            f"{where}: {name} is {_what(tensor)}, expected a bool tensor of {counts} dimensions (True may attend)"
        )
    return tensor


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
