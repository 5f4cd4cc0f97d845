"""Memory for results and for decoding states: where it is large, the operating system is asked for huge pages.

The C library gives memory of 32 MiB or more back when a tensor goes, and often less than that: each result is then made
of new pages, and a page is found by an interrupt on its first byte. To write 32 MiB so took 18 ms of a core, 5 ms in
huge pages, and 2 ms in pages that were there (a Zen 4 core, Linux in a virtual machine). A state is read from end to
end for every token, and finding out where each page of 4 KiB lies takes longer than reading its quantised numbers.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_int, c_size_t, c_void_p

import torch
from torch import Tensor

# Four huge pages: fewer save less than a tenth of a millisecond.
LARGE = 8 << 20
PAGE = 4096
_HUGE = 14  # MADV_HUGEPAGE


def _advice() -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    advise: ctypes._NamedFuncPointer = ctypes.CDLL(None).madvise
    advise.argtypes, advise.restype = (c_void_p, c_size_t, c_int), c_int
    return advise


_advise = _advice()


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty(shape)``, on huge pages where the system has some to give; that is advice and cannot fail."""
    return _advised(like.new_empty(shape, dtype=dtype or like.dtype))


def rows_like(x: Tensor, size: int) -> Tensor:
    """Room for a row of ``size`` numbers for each of ``x`` ``(b, h, m, d)``, with its heads and tokens in its order.

    In a model heads lie within tokens: so do results then, and nothing has to be turned to go on.
    """
    (b, h, m, _), (_, across, along, _) = x.shape, x.stride()
    if across < along:
        return empty(x, b, m, h, size).transpose(1, 2)
    return empty(x, b, h, m, size)


def zeros(*shape: int, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """``torch.zeros(shape)``, on huge pages as ``empty``."""
    return _advised(torch.empty(shape, dtype=dtype, device=device)).zero_()


def _advised(made: Tensor) -> Tensor:
    size = made.numel() * made.element_size()
    if size >= LARGE and _advise is not None and made.device.type == "cpu":
        start = -(-made.data_ptr() // PAGE) * PAGE
        _advise(start, (made.data_ptr() + size - start) // PAGE * PAGE, _HUGE)
    return made
