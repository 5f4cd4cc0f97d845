"""The native kernels: compressed blocks and the choice in one, then the chosen blocks and the window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit import masks, native
from attnkit.masks.algebra import Tiles
from attnkit.mechanisms.moba import selected_attention
from attnkit.mechanisms.nsa.blocks import Blocks
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.native.softmax import MOST_SIZE, scale_refused
from attnkit.spec import Call

# So few queries are served by the chunk backend, which packs nothing and fetches what a query chose.
FEWEST_QUERIES = 2
MOST_TOKENS = (1 << 31) - 1


@dataclass(frozen=True, repr=False)
class Ended(masks.Mask):
    """Compressed blocks that end no later than a query, which stands ``ahead`` of its place among them."""

    tokens: int
    stride: int
    ahead: int

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k * self.stride + self.tokens - 1 <= q + self.ahead

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        some, every = (self.visible(q, q, q, k) for q, k in ((t.q1, t.k0), (t.q0, t.k1)))
        return some[None, None], every[None, None]


def rejects(call: Call) -> tuple[str, ...]:
    q, v = call["q"], call["v"]
    reasons = []
    if not native.STATUS.available:
        reasons.append(native.STATUS.reason)
    if torch.compiler.is_compiling():
        reasons.append("the call is being compiled, the native kernel runs eagerly only")
    if q.device.type != "cpu":
        reasons.append(f"device is {q.device.type}, the native kernel needs cpu")
    if q.dtype not in native.DTYPES:
        reasons.append(f"dtype is {q.dtype}, the native kernel takes float32, bfloat16 and float16")
    if q.shape[2] < FEWEST_QUERIES:
        reasons.append(f"there are {q.shape[2]} queries, the native kernel takes {FEWEST_QUERIES} or more")
    for name, size in (("key", q.shape[3]), ("value", v.shape[3])):
        if not 1 <= size <= MOST_SIZE:
            reasons.append(f"{name} size is {size}, the native kernel takes 1 to {MOST_SIZE}")
    for name in ("length", "block"):
        if (size := getattr(call["blocks"], name)) > MOST_TOKENS:
            reasons.append(f"{name} is {size}, the native kernel takes at most {MOST_TOKENS}")
    if not call["scale"] > 0:
        reasons.append(f"scale is {call['scale']}, the native kernel takes one above 0")
    if not call["causal"]:
        reasons.append("causal is False, the native kernel is causal")
    reasons += scale_refused(call["scale"])
    return tuple(reasons)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    gates: Tensor,
    blocks: Blocks,
    window: int,
    causal: bool,
    scale: float,
) -> Tensor:
    n, c = k.shape[2], compressed_k.shape[2]
    coarse, chosen = _coarse(q.detach(), compressed_k.detach(), compressed_v.detach(), n, blocks, scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, compressed_k, compressed_v)):
        # The kernel that chooses keeps nothing for gradients, which softmax attention has.
        ended = Ended(blocks.length, blocks.stride, n - c)
        coarse = softmax_attention(q, compressed_k, compressed_v, mask=ended, scale=scale).float()
    if blocks.selected >= -(-n // blocks.block):
        fine = softmax_attention(q, k, v, mask=masks.causal(), scale=scale)
    else:
        fine = selected_attention(q, k, v, chosen, block=blocks.block, scale=scale)
    near = softmax_attention(q, window_k, window_v, mask=masks.window(window), scale=scale)
    gate = gates.float()[..., None, :]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (coarse, fine, near, gate)):
        o: Tensor = coarse * gate[..., 0] + gate[..., 1] * fine.float() + gate[..., 2] * near.float()
    else:
        o = coarse.mul_(gate[..., 0]).addcmul_(gate[..., 1], fine.float()).addcmul_(gate[..., 2], near.float())
    return o.to(q.dtype)


def _coarse(q: Tensor, k: Tensor, v: Tensor, n: int, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """The first branch, float32 ``(b, h, m, e)``, and blocks beside the own one, int64 ``(b, g, m, s)``."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    (b, h, m, d), (g, c, e) = q.shape, v.shape[1:]
    o = torch.empty(b, h, m, e)
    most = min(blocks.selected, -(-n // blocks.block)) - 1  # there are no more to choose from
    chosen = torch.empty(b, g, m, max(0, most), dtype=torch.int32)
    native.run(
        "coarse_forward",
        native.pack_coarse(
            *(x.data_ptr() for x in (q, k, v, o, chosen)),
            *(b, h, g, m, n, c, d, e, chosen.shape[3]),
            *(step for x in (q, k, v) for step in x.stride()[:3]),
            *(blocks.length, blocks.stride, blocks.block, torch.get_num_threads()),
            *(native.DTYPES[q.dtype], True, scale),
        ),
    )
    return o, chosen.long()
