"""Packed documents in one native call, forward and backward: each has the bits of a call of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import native
from attnkit.native.softmax import MOST_DECODE_QUERIES, as_float32, packed, packed_gradients, rows


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    left: int,
    right: int,
    scale: float,
    alibi: Tensor | None,
    softcap: float | None,
    sink: Tensor | None,
) -> Tensor:
    """``(h, t, e)``; a query at position ``p`` of its document sees keys from ``p - left`` to ``p + right``."""
    alibi, sink = as_float32(alibi), as_float32(sink)
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sink))
    given = (q, k, v, q_offsets, k_offsets, left, right, scale, alibi, softcap or 0.0, sink)
    if trains or torch.compiler.is_compiling():
        o: Tensor = _operator(*given, trains)[0]
        return o
    return _run(*given, None, None)


@torch.library.custom_op("attnkit::softmax_varlen", mutates_args=(), device_types="cpu")
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    left: int,
    right: int,
    scale: float,
    alibi: Tensor | None,
    softcap: float,
    sink: Tensor | None,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result; for the backward pass the log-sum-exp, document by document, and what float32 drops of it."""
    lse, rest = _kept(q, trains)
    given = (q, k, v, q_offsets, k_offsets, left, right, scale, alibi, softcap, sink)
    o = _run(*given, lse if trains else None, rest if trains else None)
    return o, lse, rest


@_operator.register_fake
def _shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    left: int,
    right: int,
    scale: float,
    alibi: Tensor | None,
    softcap: float,
    sink: Tensor | None,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[2]), *_kept(q, trains)


@torch.library.custom_op("attnkit::softmax_varlen_backward", mutates_args=(), device_types="cpu")
def _backward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    alibi: Tensor | None,
    sink: Tensor | None,
    o: Tensor,
    lse: Tensor,
    rest: Tensor,
    d_o: Tensor,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of q, k, v and sink; an empty tensor for each that is not wanted."""
    edges = _edges(q_offsets), _edges(k_offsets)
    found = [x.new_empty(x.shape if want else 0) for x, want in zip((q, k, v), wanted, strict=False)]
    # A sum over documents comes last, in their order.
    d_sinks = sink.new_empty(len(edges[0]) - 1, len(sink)) if sink is not None and wanted[3] else None
    q, k, v, o, d_o = (rows(x[None]) for x in (q, k, v, o, d_o))
    call = packed(q, k, v, o, lse, rest, None, left, right, scale, None, alibi, softcap, sink, native.PREFILL)
    d_q, d_k, d_v = (x[None] if want else None for x, want in zip(found, wanted, strict=False))
    gradients = packed_gradients(d_o, None, d_q, d_k, d_v, d_sink=d_sinks)
    native.run("documents_backward", call, gradients, _documents(*edges))
    return [*found, q.new_empty(0) if d_sinks is None else d_sinks.sum(0)]


@_backward_operator.register_fake
def _backward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    alibi: Tensor | None,
    sink: Tensor | None,
    o: Tensor,
    lse: Tensor,
    rest: Tensor,
    d_o: Tensor,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    wanted: list[bool],
) -> list[Tensor]:
    pairs = zip((q, k, v, sink), wanted, strict=True)
    return [x.new_empty(x.shape) if x is not None and want else q.new_empty(0) for x, want in pairs]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *given, ctx.left, ctx.right, ctx.scale, alibi, ctx.softcap, sink, _ = inputs
    ctx.save_for_backward(*given, alibi, sink, *output)


def _backward(ctx: Any, d_o: Tensor, _lse: Tensor, _rest: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    wanted = [*needs[:3], needs[10]]
    found = torch.ops.attnkit.softmax_varlen_backward(
        *ctx.saved_tensors, d_o, ctx.left, ctx.right, ctx.scale, ctx.softcap, wanted
    )
    d_q, d_k, d_v, d_sink = (x if want else None for x, want in zip(found, wanted, strict=True))
    return d_q, d_k, d_v, None, None, None, None, None, None, None, d_sink, None


_operator.register_autograd(_backward, setup_context=_keep)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    left: int,
    right: int,
    scale: float,
    alibi: Tensor | None,
    softcap: float,
    sink: Tensor | None,
    lse: Tensor | None,
    rest: Tensor | None,
) -> Tensor:
    checked("q_offsets", q_offsets, q), checked("k_offsets", k_offsets, k)
    edges = _edges(q_offsets), _edges(k_offsets)
    o = q.new_empty(*q.shape[:2], v.shape[2])
    q, k, v = (rows(x[None]) for x in (q, k, v))
    call = packed(q, k, v, o[None], lse, rest, None, left, right, scale, None, alibi, softcap, sink, native.PREFILL)
    # As in a call of its own: the backward pass makes scores again in prefill's order.
    native.run("documents_forward", call, _documents(*edges, MOST_DECODE_QUERIES if rest is None else -1))
    return o


def checked(name: str, offsets: Tensor, packed: Tensor) -> list[int]:
    """Where each document starts in ``packed`` ``(heads, length, size)``, then the end."""
    where = "softmax_attention_varlen"
    if offsets.is_floating_point() or offsets.is_meta:
        raise TypeError(f"{where}: {name} is {offsets.dtype} on {offsets.device}, expected integers that can be read")
    edges: list[int] = offsets.tolist()
    rising = all(a <= b for a, b in zip(edges, edges[1:], strict=False))
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != packed.shape[1] or not rising:
        raise ValueError(f"{where}: {name} is {edges}, expected rising from 0 to {packed.shape[1]}, the packed length")
    return edges


def _kept(q: Tensor, trains: bool) -> tuple[Tensor, Tensor]:
    shape = (q.shape[1] * q.shape[0] if trains else 0,)
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def _edges(offsets: Tensor) -> Tensor:
    return offsets.to("cpu", torch.int64).contiguous()


def _documents(q_edges: Tensor, k_edges: Tensor, decode_queries: int = -1) -> bytes:
    return native.pack_documents(q_edges.data_ptr(), k_edges.data_ptr(), len(q_edges) - 1, decode_queries)
