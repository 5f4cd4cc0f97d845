"""A softmax attention call as the library reads it: what several mechanisms' kernels are given."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from attnkit import native
from attnkit.noise import drop_below

# 576 is a latent of 512 beside a rotary key of 64, as DeepSeek has them.
MOST_SIZE = 576
# Weights are powers of two, taken against a row's largest exponent, which is rounded by itself: beyond 2^30 by more
# than an exponent holds, so that the row may end as NaN. This leaves 2^14 for q.k.
MOST_SCALE = float(1 << 16)


def scale_refused(scale: float) -> tuple[str, ...]:
    """Why kernels that take weights of logits cannot run a call of this scale; NaN is refused too."""
    if abs(scale) <= MOST_SCALE:
        return ()
    return (f"scale is {scale}, the native kernel takes -{MOST_SCALE:.0f} to {MOST_SCALE:.0f}",)


# Up to this many queries are served by the decode kernel, which packs nothing. Measured with 8 KV heads of 128 numbers
# and 1,000 to 32,000 keys.
MOST_DECODE_QUERIES = 8


class Blocks(Protocol):
    """What is read of a mask's list of blocks, an ``attnkit.masks.BlockList``."""

    @property
    def offsets(self) -> Tensor: ...

    @property
    def columns(self) -> Tensor: ...

    @property
    def pattern(self) -> Tensor: ...

    @property
    def patterns(self) -> Tensor: ...

    @property
    def batches(self) -> int: ...

    @property
    def heads(self) -> int: ...


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor | None,
    rest: Tensor | None,
    blocks: Blocks | None,
    left: int,
    right: int,
    scale: float,
    bias: Tensor | None,
    alibi: Tensor | None,
    softcap: float | None,
    sink: Tensor | None,
    kernel: int,
    dropout: float = 0.0,
    seed: int = 0,
    total: Tensor | None = None,
) -> bytes:
    """The call as the library reads it; what it points to has to outlive it. ``total``: float64, rows without gaps."""
    (b, h, m, d), (g, n, e) = q.shape, v.shape[1:]
    return native.pack_softmax(
        *(0 if x is None else x.data_ptr() for x in (q, k, v, o, lse, rest, bias, alibi, sink, total)),
        *(
            (0, 0, 0, 0)
            if blocks is None
            else (x.data_ptr() for x in (blocks.offsets, blocks.columns, blocks.pattern, blocks.patterns))
        ),
        *(b, h, g, m, n, d, e),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *o.stride()[:3],
        *steps(bias),
        *((0, 0) if total is None else total.stride()[:2]),
        *(left, right),
        *((1, 1) if blocks is None else (blocks.batches, blocks.heads)),
        torch.get_num_threads(),
        seed,
        native.DTYPES[q.dtype],
        kernel,
        drop_below(dropout),
        scale,
        softcap or 0.0,
        1 / (1 - dropout),
    )


def packed_gradients(
    d_o: Tensor,
    d_lse: Tensor | None,
    d_q: Tensor | None,
    d_k: Tensor | None,
    d_v: Tensor | None,
    d_bias: Tensor | None = None,
    d_sink: Tensor | None = None,
    d_alibi: Tensor | None = None,
    d_total: Tensor | None = None,
) -> bytes:
    """What the backward pass reads and writes beside the call; None is not wanted, and results are contiguous."""
    return native.pack_softmax_gradients(
        *(0 if x is None else x.data_ptr() for x in (d_o, d_lse, d_q, d_k, d_v, d_bias, d_sink, d_alibi, d_total)),
        *d_o.stride()[:3],
        *steps(d_bias),
        *(0 if x is None else x.shape[2] * x.shape[3] for x in (d_q, d_k, d_v)),
    )


def refused(q: Tensor, v: Tensor) -> list[str]:
    """Why no kernel of this family takes a call, whatever else is in it."""
    reasons = []
    if not native.STATUS.available:
        reasons.append(native.STATUS.reason)
    # Many times faster than the name of the device where caches are cold, as they are between the layers of a model.
    if not q.is_cpu:
        reasons.append(f"device is {q.device.type}, the native kernel needs cpu")
    if q.dtype not in native.DTYPES:
        reasons.append(f"dtype is {q.dtype}, the native kernel takes float32, bfloat16 and float16")
    for name, size in (("key", q.shape[3]), ("value", v.shape[3])):
        if not 1 <= size <= MOST_SIZE:
            reasons.append(f"{name} size is {size}, the native kernel takes 1 to {MOST_SIZE}")
    return reasons


def rows(x: Tensor) -> Tensor:
    """Rows without gaps between their numbers, which is all the kernels ask of a layout."""
    return x if x.stride()[3] == 1 else x.contiguous()


def as_float32(x: Tensor | None) -> Tensor | None:
    """What the kernels read of biases, slopes and sinks; a bias keeps a size of 1 where it is broadcast."""
    if x is None:
        return None
    if x.dim() == 4:
        x = x[tuple(slice(None, 1) if step == 0 else slice(None) for step in x.stride())]
    return x.float() if x.dim() == 4 else x.float().contiguous()


def steps(bias: Tensor | None) -> tuple[int, ...]:
    """Strides of a bias or its gradient as the kernels take them: a size of 1 is shared by all it is broadcast to."""
    if bias is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True))
