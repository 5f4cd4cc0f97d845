"""The native kernels of softmax attention, which add what gates leave to each logit where they make it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import native
from attnkit.masks import UNBOUNDED
from attnkit.native.softmax import MOST_DECODE_QUERIES, packed, packed_gradients, refused, rows, scale_refused
from attnkit.spec import Call


def rejects(call: Call) -> tuple[str, ...]:
    return (*refused(call["q"], call["v"]), *scale_refused(call["scale"]))


def forward(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, scale: float) -> Tensor:
    return attend(q, k, v, log_f.double().cumsum(-1), scale)


def attend(q: Tensor, k: Tensor, v: Tensor, total: Tensor, scale: float) -> Tensor:
    """Attention ``(b, h, m, e)`` for gates already summed: ``total`` ``(b, h, n)``."""
    total = total.double()
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, total))
    if trains or torch.compiler.is_compiling():
        o: Tensor = _operator(q, k, v, total, scale, trains)[0]
        return o
    return _run(q, k, v, total, scale, None, None)


@torch.library.custom_op("attnkit::forgetting", mutates_args=(), device_types="cpu")
def _operator(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor, scale: float, trains: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, its log-sum-exp, and what float32 drops of that; both empty where nothing trains."""
    lse, rest = (q.new_empty(q.shape[:3] if trains else (0,), dtype=torch.float32) for _ in range(2))
    o = _run(q, k, v, total, scale, lse if trains else None, rest if trains else None)
    return o, lse, rest


@_operator.register_fake
def _shapes(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor, scale: float, trains: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lse, rest = (q.new_empty(q.shape[:3] if trains else (0,), dtype=torch.float32) for _ in range(2))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse, rest


@torch.library.custom_op("attnkit::forgetting_backward", mutates_args=(), device_types="cpu")
def _backward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    total: Tensor,
    o: Tensor,
    lse: Tensor,
    rest: Tensor,
    d_o: Tensor,
    scale: float,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of q, k, v and total; an empty tensor for each that is not wanted."""
    q, k, v, o, d_o, total = rows(q), rows(k), rows(v), rows(o), rows(d_o), _sums(total)
    call = packed(q, k, v, o, lse, rest, None, UNBOUNDED, 0, scale, None, None, None, None, native.PREFILL, total=total)
    found = [x.new_empty(x.shape if want else 0) for x, want in zip((q, k, v, total), wanted, strict=True)]
    d_q, d_k, d_v, d_total = (x if want else None for x, want in zip(found, wanted, strict=True))
    native.run("softmax_backward", call, packed_gradients(d_o, None, d_q, d_k, d_v, d_total=d_total))
    return found


@_backward_operator.register_fake
def _backward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    total: Tensor,
    o: Tensor,
    lse: Tensor,
    rest: Tensor,
    d_o: Tensor,
    scale: float,
    wanted: list[bool],
) -> list[Tensor]:
    return [x.new_empty(x.shape if want else 0) for x, want in zip((q, k, v, total), wanted, strict=True)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *given, ctx.scale, _ = inputs
    ctx.save_for_backward(*given, *output)


def _backward(ctx: Any, d_o: Tensor, _lse: Tensor, _rest: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    found = torch.ops.attnkit.forgetting_backward(*ctx.saved_tensors, d_o, ctx.scale, wanted)
    return *(x if want else None for x, want in zip(found, wanted, strict=True)), None, None


_operator.register_autograd(_backward, setup_context=_keep)


def _run(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor, scale: float, lse: Tensor | None, rest: Tensor | None
) -> Tensor:
    q, k, v, total = rows(q), rows(k), rows(v), _sums(total)
    o = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype)
    # The backward pass makes logits again in prefill's order.
    kernel = native.DECODE if q.shape[2] <= MOST_DECODE_QUERIES and rest is None else native.PREFILL
    call = packed(q, k, v, o, lse, rest, None, UNBOUNDED, 0, scale, None, None, None, None, kernel, total=total)
    native.run("softmax_forward", call)
    return o


def _sums(total: Tensor) -> Tensor:
    return total if total.stride()[2] == 1 else total.contiguous()
