"""The linear maps of a decoding step, which read every weight for a few tokens: as fast as memory gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnkit import native

# Of float32, torch's own products of a few rows are as fast.
DTYPES = (torch.bfloat16, torch.float16)
# Rows up to which this takes less time than torch's product, which packs weights.
MOST_ROWS = 8


def maps_tokens(layer: nn.Module) -> bool:
    """Whether a layer is nothing but a product with a weight that is worth another way to read it."""
    if type(layer) is not nn.Linear or not native.STATUS.available:
        return False
    return layer.weight.dtype in DTYPES and layer.weight.is_cpu


def linear(layer: Any, x: Tensor) -> Tensor:
    """Stands in for ``nn.Linear.forward``: ``(..., d)`` to ``(..., n)``.

    Sums are float32 and rounded once, as torch's are. More than ``MOST_ROWS`` rows, gradients, graphs that are compiled
    and everything else that the kernel does not know go to torch.
    """
    weight, bias = layer.weight, layer.bias
    if torch.compiler.is_compiling() or not _can(x, weight, bias):
        return nn.functional.linear(x, weight, bias)
    n, d = weight.shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], n)
    addresses = x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr()
    sizes = x.numel() // d, n, d, d, weight.stride(0), n
    kind = native.DTYPES[x.dtype], torch.get_num_threads()
    native.run_alone("project", native.pack_projection(*addresses, *sizes, *kind))
    return y


def _can(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    d = weight.shape[1]
    if x.numel() > MOST_ROWS * d or x.dtype != weight.dtype or x.dtype not in DTYPES:
        return False
    if type(x) is not Tensor or x.shape[-1:] != (d,) or not (x.is_cpu and weight.is_cpu and weight.stride(1) == 1):
        return False
    if bias is not None and not (bias.dtype == x.dtype and bias.is_contiguous()):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return False
    return not torch.is_autocast_enabled("cpu")
