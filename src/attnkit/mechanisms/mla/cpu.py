"""The native kernel of the absorbed form: latents are read where they lie, once for all heads and both products."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit import native
from attnkit.masks import UNBOUNDED, Mask
from attnkit.spec import Call

_TENSORS = ("q", "latent", "kv_b")


def rejects(call: Call) -> tuple[str, ...]:
    q, mask = call["q"], call["mask"]
    reasons = []
    if not native.STATUS.available:
        reasons.append(native.STATUS.reason)
    if q.device.type != "cpu":
        reasons.append(f"device is {q.device.type}, the native kernel needs cpu")
    if q.dtype not in native.DTYPES:
        reasons.append(f"dtype is {q.dtype}, the native kernel takes float32, bfloat16 and float16")
    if mask is not None and mask.interval() is None:
        reasons.append(f"mask is {mask!r}, the native kernel takes causal, windows and none")
    if torch.is_grad_enabled() and (wanted := [name for name in _TENSORS if call[name].requires_grad]):
        reasons.append(f"gradients are wanted for {', '.join(wanted)}, the native kernel is forward only")
    return tuple(reasons)


def forward(q: Tensor, latent: Tensor, kv_b: Tensor, mask: Mask | None, scale: float) -> Tensor:
    left, right = (UNBOUNDED, UNBOUNDED) if mask is None else mask.interval() or (UNBOUNDED, UNBOUNDED)
    return (
        _operator(q, latent, kv_b, left, right, scale)
        if torch.compiler.is_compiling()
        else _run(q, latent, kv_b, left, right, scale)
    )


@torch.library.custom_op("attnkit::latent", mutates_args=(), device_types="cpu")
def _operator(q: Tensor, latent: Tensor, kv_b: Tensor, left: int, right: int, scale: float) -> Tensor:
    return _run(q, latent, kv_b, left, right, scale)


@_operator.register_fake
def _shapes(q: Tensor, latent: Tensor, kv_b: Tensor, left: int, right: int, scale: float) -> Tensor:
    h, rows, c = kv_b.shape
    return q.new_empty(*q.shape[:3], rows - (q.shape[3] - (latent.shape[3] - c)))


def attend_to(q: Tensor, latent: Tensor, kv_b: Tensor, places: Tensor, scale: float) -> Tensor:
    """Each query over the latents at its ``places`` ``(b, m, c)``, int32, -1 from the end of a shorter list on."""
    # The kernel has a list for each sequence: a query goes over as a sequence of its own, which shares its latents.
    b, h, m, d = q.shape
    o = q.new_empty(b, h, m, kv_b.shape[1] - d + latent.shape[3] - kv_b.shape[2])
    for x, y, at, out in zip(q, latent[:, None], places, o, strict=True):
        found = _run(x.transpose(0, 1)[:, :, None], y.expand(len(at), -1, -1, -1), kv_b, 0, 0, scale, at)
        out.copy_(found.squeeze(2).transpose(0, 1))
    return o


def _run(
    q: Tensor, latent: Tensor, kv_b: Tensor, left: int, right: int, scale: float, places: Tensor | None = None
) -> Tensor:
    q, latent, kv_b = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, latent, kv_b))
    b, h, m, d = q.shape
    g, stored, joined = latent.shape[1:]
    _, rows, c = kv_b.shape
    r = joined - c
    n = stored if places is None else places.shape[1]
    nope = d - r
    o = q.new_empty(b, h, m, rows - nope)
    native.run(
        "latent_forward",
        native.pack_latent(
            *(x.data_ptr() for x in (q, latent, kv_b, o)),
            places.data_ptr() if places is not None else 0,
            *(b, h, g, m, n, nope, r, c, rows - nope, stored),
            *q.stride()[:3],
            *latent.stride()[:3],
            *kv_b.stride()[:2],
            *o.stride()[:3],
            *(left, right),
            torch.get_num_threads(),
            native.DTYPES[q.dtype],
            scale,
        ),
    )
    return o
