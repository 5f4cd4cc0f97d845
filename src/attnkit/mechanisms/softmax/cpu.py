"""The native kernels: prefill packs keys once for all queries, decode reads each key once, and the backward pass makes
weights again from the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnkit import native
from attnkit.masks import UNBOUNDED, BlockList, Mask, explicit
from attnkit.native import memory
from attnkit.native.softmax import (
    MOST_DECODE_QUERIES,
    as_float32,
    packed,
    packed_gradients,
    refused,
    rows,
    scale_refused,
)
from attnkit.spec import Call


def rejects(call: Call) -> tuple[str, ...]:
    reasons = [*refused(call["q"], call["v"]), *scale_refused(call["scale"])]
    return tuple(reasons)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float,
    bias: Tensor | None,
    alibi: Tensor | None,
    softcap: float | None,
    sink: Tensor | None,
    dropout: float,
    seed: int | Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    interval = (UNBOUNDED, UNBOUNDED) if mask is None else mask.interval()
    left, right = interval or (UNBOUNDED, UNBOUNDED)
    bias, alibi, sink = as_float32(bias), as_float32(alibi), as_float32(sink)
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias, sink, alibi))
    if torch.compiler.is_compiling():
        # A mask object cannot cross into an operator: it goes over as a tensor, and is made a block list inside.
        dense = None if mask is None or interval is not None else mask.dense(q.shape[2], k.shape[2], q.device)
        # A seed that is drawn while the call is traced is a tensor, which each run draws again.
        number = seed if seed is None or isinstance(seed, Tensor) else torch.tensor(seed)
        o, lse, _ = _operator(
            q, k, v, dense, left, right, scale, bias, alibi, softcap or 0.0, sink, dropout, number, trains
        )
        return (o, lse) if return_lse else o
    listed = mask if interval is None else None
    if trains:
        apply: Any = _Attention.apply
        o, lse = apply(q, k, v, bias, sink, alibi, listed, left, right, scale, softcap, dropout, _number(seed))
        return (o, lse) if return_lse else o
    lse, o = _rows_of(q) if return_lse else None, memory.rows_like(q, v.shape[3])
    _run(q, k, v, listed, left, right, scale, bias, alibi, softcap, sink, dropout, _number(seed), lse, None, o)
    return o if lse is None else (o, lse)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sink: Tensor | None,
        alibi: Tensor | None,
        mask: Mask | None,
        left: int,
        right: int,
        scale: float,
        softcap: float | None,
        dropout: float,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        lse, rest = _rows_of(q), _rows_of(q)
        o = _run(q, k, v, mask, left, right, scale, bias, alibi, softcap, sink, dropout, seed, lse, rest)
        ctx.save_for_backward(q, k, v, o, lse, rest, bias, alibi, sink)
        ctx.mask, ctx.left, ctx.right, ctx.scale, ctx.softcap = mask, left, right, scale, softcap
        ctx.dropout, ctx.seed = dropout, seed
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, rest, bias, alibi, sink = ctx.saved_tensors
        gradients = _run_backward(
            q, k, v, o, lse, rest, d_o, d_lse, ctx.mask, ctx.left, ctx.right, ctx.scale, bias, alibi, ctx.softcap, sink,
            ctx.dropout, ctx.seed, ctx.needs_input_grad[:6],
        )  # fmt: skip
        return (*gradients, *(None,) * 7)


@torch.library.custom_op("attnkit::softmax", mutates_args=(), device_types="cpu")
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dense: Tensor | None,
    left: int,
    right: int,
    scale: float,
    bias: Tensor | None,
    alibi: Tensor | None,
    softcap: float,
    sink: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, its log-sum-exp, and what float32 drops of that, for the backward pass alone."""
    mask = None if dense is None else explicit(dense)
    lse, rest = _rows_of(q), _rows_of(q) if trains else None
    o = _run(q, k, v, mask, left, right, scale, bias, alibi, softcap or None, sink, dropout, _number(seed), lse, rest)
    return o, lse, lse.new_empty(0) if rest is None else rest


@_operator.register_fake
def _shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dense: Tensor | None,
    left: int,
    right: int,
    scale: float,
    bias: Tensor | None,
    alibi: Tensor | None,
    softcap: float,
    sink: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = _rows_of(q)
    return q.new_empty(*q.shape[:3], v.shape[3]), lse, torch.empty_like(lse) if trains else lse.new_empty(0)


@torch.library.custom_op("attnkit::softmax_backward", mutates_args=(), device_types="cpu")
def _backward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rest: Tensor,
    d_o: Tensor,
    d_lse: Tensor | None,
    dense: Tensor | None,
    left: int,
    right: int,
    scale: float,
    bias: Tensor | None,
    alibi: Tensor | None,
    softcap: float,
    sink: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of q, k, v, bias, sink and alibi; an empty tensor for each that is not wanted."""
    mask = None if dense is None else explicit(dense)
    gradients = _run_backward(
        q, k, v, o, lse, rest, d_o, d_lse, mask, left, right, scale, bias, alibi, softcap or None, sink,
        dropout, _number(seed), wanted,
    )  # fmt: skip
    return [q.new_empty(0) if x is None else x for x in gradients]


@_backward_operator.register_fake
def _backward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rest: Tensor,
    d_o: Tensor,
    d_lse: Tensor | None,
    dense: Tensor | None,
    left: int,
    right: int,
    scale: float,
    bias: Tensor | None,
    alibi: Tensor | None,
    softcap: float,
    sink: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    wanted: list[bool],
) -> list[Tensor]:
    pairs = zip((q, k, v, bias, sink, alibi), wanted, strict=True)
    return [x.new_empty(x.shape) if x is not None and want else q.new_empty(0) for x, want in pairs]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, dense, ctx.left, ctx.right, ctx.scale, bias, alibi, ctx.softcap, sink, ctx.dropout, seed, _ = inputs
    ctx.save_for_backward(q, k, v, *output, dense, bias, alibi, sink, seed)


def _backward(ctx: Any, d_o: Tensor, d_lse: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, rest, dense, bias, alibi, sink, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[2], needs[7], needs[10], needs[8]]
    found = torch.ops.attnkit.softmax_backward(
        q, k, v, o, lse, rest, d_o, d_lse, dense, ctx.left, ctx.right, ctx.scale, bias, alibi, ctx.softcap, sink,
        ctx.dropout, seed, wanted,
    )  # fmt: skip
    d_q, d_k, d_v, d_bias, d_sink, d_alibi = (x if want else None for x, want in zip(found, wanted, strict=True))
    return d_q, d_k, d_v, None, None, None, None, d_bias, d_alibi, None, d_sink, None, None, None


_operator.register_autograd(_backward, setup_context=_keep)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    left: int,
    right: int,
    scale: float,
    bias: Tensor | None,
    alibi: Tensor | None,
    softcap: float | None,
    sink: Tensor | None,
    dropout: float,
    seed: int,
    lse: Tensor | None,
    rest: Tensor | None,
    o: Tensor | None = None,
) -> Tensor:
    """One native call that fills ``o``, or makes it, and ``lse`` and ``rest``, what float32 drops of it, where given.

    ``mask`` is lowered to a block list; the interval bounds visibility beside it.
    """
    q, k, v = rows(q), rows(k), rows(v)
    if o is None:
        o = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype)
    # The backward pass makes scores again in prefill's order: where one weight is nearly 1, another order's rounding of
    # a large score would be an error of that weight.
    few = q.shape[2] <= MOST_DECODE_QUERIES and rest is None and not dropout
    kernel = native.DECODE if few else native.PREFILL
    blocks = block_list(mask, q, k)
    call = packed(q, k, v, o, lse, rest, blocks, left, right, scale, bias, alibi, softcap, sink, kernel, dropout, seed)
    native.run("softmax_forward", call)
    return o


def _number(seed: int | Tensor | None) -> int:
    return 0 if seed is None else int(seed)


def _rows_of(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def _run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rest: Tensor,
    d_o: Tensor | None,
    d_lse: Tensor | None,
    mask: Mask | None,
    left: int,
    right: int,
    scale: float,
    bias: Tensor | None,
    alibi: Tensor | None,
    softcap: float | None,
    sink: Tensor | None,
    dropout: float,
    seed: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, bias, sink and alibi in their shapes; None for each that is not wanted."""
    q, k, v, o = rows(q), rows(k), rows(v), rows(o)
    d_o = torch.zeros_like(o) if d_o is None else rows(d_o)
    d_lse = None if d_lse is None else d_lse.contiguous()
    blocks = block_list(mask, q, k)
    call = packed(
        q, k, v, o, lse, rest, blocks, left, right, scale, bias, alibi, softcap, sink, native.PREFILL, dropout, seed
    )
    d_q, d_k, d_v = (x.new_empty(x.shape) if want else None for x, want in zip((q, k, v), wanted, strict=False))
    d_bias = torch.zeros(bias.shape) if bias is not None and wanted[3] else None
    d_sink = torch.empty(sink.shape) if sink is not None and wanted[4] else None
    d_alibi = torch.empty(alibi.shape) if alibi is not None and wanted[5] else None
    native.run("softmax_backward", call, packed_gradients(d_o, d_lse, d_q, d_k, d_v, d_bias, d_sink, d_alibi))
    return d_q, d_k, d_v, d_bias, d_sink, d_alibi


def block_list(mask: Mask | None, q: Tensor, k: Tensor) -> BlockList | None:
    """The mask's list in the blocks of the kernels."""
    if mask is None:
        return None
    return mask.block_list(q.shape[2], k.shape[2], native.BLOCK_QUERIES, native.BLOCK_KEYS)
