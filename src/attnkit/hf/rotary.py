"""Rotary positions of Transformers in one pass, where a model defines them as Llama does."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama import modeling_llama as llama

from attnkit import native
from attnkit.hf.recurrent import innermost
from attnkit.native import memory

NAME = "apply_rotary_pos_emb"


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Stands in for the function of that ``NAME``: queries ``(b, h, m, d)`` and keys ``(b, g, m, d)`` turned.

    ``cos`` and ``sin`` are ``(b | 1, m, d)``. Numbers are computed in float32 and rounded once. Gradients, graphs that
    are compiled and everything else that the kernel does not know go to Transformers.
    """
    if torch.compiler.is_compiling() or unsqueeze_dim != 1 or not _can(q, k, cos, sin):
        turned: tuple[Tensor, Tensor] = llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        return turned
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def turns_like_llama(layer: Any) -> bool:
    """Whether a layer's own ``forward`` calls that function, and it is the one that Llama has, or a copy of it."""
    if not native.STATUS.available:
        return False
    forward = innermost(type(layer).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and NAME in code.co_names and _same(forward.__globals__.get(NAME))


def _same(theirs: Any) -> bool:
    function, known = innermost(theirs), innermost(llama.apply_rotary_pos_emb)
    if not (inspect.isfunction(function) and _says(function) == _says(known)):
        return False
    half = innermost(function.__globals__.get("rotate_half"))
    return inspect.isfunction(half) and _says(half) == _says(llama.rotate_half)


def _says(function: Any) -> tuple[Any, ...]:
    """What a function does, whatever its documentation says."""
    code = function.__code__
    constants = tuple(c for c in code.co_consts if not isinstance(c, str))
    return code.co_code, code.co_names, code.co_varnames, constants, function.__defaults__


def _can(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    b, _, m, d = q.shape
    for x in (q, k, cos, sin):
        if type(x) is not Tensor or x.dtype is not q.dtype or not x.is_cpu or x.stride(-1) != 1:
            return False
    if q.dtype not in native.DTYPES or d % 2 or k.shape[0] != b or k.shape[2:] != (m, d):
        return False
    if not (cos.shape[1:] == sin.shape[1:] == (m, d) and cos.shape[0] in (1, b) and sin.shape[0] in (1, b)):
        return False
    return not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = memory.rows_like(x, x.shape[3])
    native.run_alone(
        "rotate",
        native.pack_rotation(
            *(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr()),
            *x.shape,
            *x.stride()[:3],
            *_steps(cos),
            *_steps(sin),
            *y.stride()[:3],
            *(native.DTYPES[x.dtype], torch.get_num_threads()),
        ),
    )
    return y


def _steps(table: Tensor) -> tuple[int, int]:
    return 0 if table.shape[0] == 1 else table.stride(0), table.stride(1)
