"""The native kernels, forward only: prefill packs keys once for all queries, decode reads each key once."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit import native
from attnkit.masks import UNBOUNDED, Mask, explicit
from attnkit.spec import Call

# 576 is a latent of 512 beside a rotary key of 64, as DeepSeek has them.
MOST_SIZE = 576
# Up to this many queries are served by the decode kernel, which packs nothing. Measured with 8 KV heads of 128 numbers
# and 1,000 to 32,000 keys.
MOST_DECODE_QUERIES = 8

_TENSORS = ("q", "k", "v", "bias", "alibi", "sink")


def rejects(call: Call) -> tuple[str, ...]:
    q, v = call["q"], call["v"]
    reasons = []
    if not native.STATUS.available:
        reasons.append(native.STATUS.reason)
    if q.device.type != "cpu":
        reasons.append(f"device is {q.device.type}, the native kernel needs cpu")
    if q.dtype not in native.DTYPES:
        reasons.append(f"dtype is {q.dtype}, the native kernel takes float32, bfloat16 and float16")
    for name, size in (("key", q.shape[3]), ("value", v.shape[3])):
        if not 1 <= size <= MOST_SIZE:
            reasons.append(f"{name} size is {size}, the native kernel takes 1 to {MOST_SIZE}")
    if call["dropout"]:
        reasons.append(f"dropout is {call['dropout']}, the native kernel has none")
    if torch.is_grad_enabled():
        wanted = [name for name in _TENSORS if call[name] is not None and call[name].requires_grad]
        if wanted:
            reasons.append(f"gradients are wanted for {', '.join(wanted)}, the native kernel is forward only")
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
    seed: int | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    interval = (UNBOUNDED, UNBOUNDED) if mask is None else mask.interval()
    if torch.compiler.is_compiling():
        # A mask object cannot cross into an operator: it goes over as a tensor, and is made a block list inside.
        dense = None if mask is None or interval is not None else mask.dense(q.shape[2], k.shape[2], q.device)
        left, right = interval or (UNBOUNDED, UNBOUNDED)
        o, lse = _operator(q, k, v, dense, left, right, scale, bias, alibi, softcap or 0.0, sink)
        return (o, lse) if return_lse else o
    o, maybe_lse = _run(
        q, k, v, mask if interval is None else None, interval, scale, bias, alibi, softcap, sink, return_lse
    )
    return o if maybe_lse is None else (o, maybe_lse)


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
) -> tuple[Tensor, Tensor]:
    mask = None if dense is None else explicit(dense)
    o, lse = _run(q, k, v, mask, (left, right), scale, bias, alibi, softcap or None, sink, True)
    assert lse is not None
    return o, lse


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
) -> tuple[Tensor, Tensor]:
    rows = q.shape[:3]
    return q.new_empty(*rows, v.shape[3]), q.new_empty(rows, dtype=torch.float32)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    interval: tuple[int, int] | None,
    scale: float,
    bias: Tensor | None,
    alibi: Tensor | None,
    softcap: float | None,
    sink: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """One native call. ``mask`` is lowered to a block list; the interval bounds visibility beside it."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    b, h, m, d = q.shape
    g, n, e = v.shape[1:]
    o = q.new_empty(b, h, m, e)
    lse = q.new_empty(b, h, m, dtype=torch.float32) if return_lse else None
    left, right = interval or (UNBOUNDED, UNBOUNDED)
    blocks = None if mask is None else mask.block_list(m, n, native.BLOCK_QUERIES, native.BLOCK_KEYS)
    bias, alibi, sink = _float32(bias), _float32(alibi), _float32(sink)
    native.run(
        "softmax_forward",
        native.pack_softmax(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            o.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if alibi is None else alibi.data_ptr(),
            0 if sink is None else sink.data_ptr(),
            *(
                (0, 0, 0, 0)
                if blocks is None
                else (
                    blocks.offsets.data_ptr(),
                    blocks.columns.data_ptr(),
                    blocks.pattern.data_ptr(),
                    blocks.patterns.data_ptr(),
                )
            ),
            *(b, h, g, m, n, d, e),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *o.stride()[:3],
            *((0, 0, 0, 0) if bias is None else bias.stride()),
            *(left, right),
            *((1, 1) if blocks is None else (blocks.batches, blocks.heads)),
            torch.get_num_threads(),
            native.DTYPES[q.dtype],
            native.DECODE if m <= MOST_DECODE_QUERIES else native.PREFILL,
            scale,
            softcap or 0.0,
        ),
    )
    return o, lse


def _rows(x: Tensor) -> Tensor:
    """Rows without gaps between their numbers, which is all the kernels ask of a layout."""
    return x if x.stride(3) == 1 else x.contiguous()


def _float32(x: Tensor | None) -> Tensor | None:
    if x is None or (x.dtype == torch.float32 and (x.dim() == 4 or x.is_contiguous())):
        return x
    if x.dim() != 4:
        return x.float().contiguous()
    # Convert what is stored, not what it was broadcast to.
    kept = x[tuple(slice(None, 1) if step == 0 else slice(None) for step in x.stride())]
    return kept.float().expand(x.shape)
