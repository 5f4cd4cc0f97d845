"""The native kernels, forward only: scores and choice in one pass, then attention to the latents that were chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit import native
from attnkit.blocks import joined, spans
from attnkit.mechanisms.dsa.ways import after_early, expanded, gathers, part
from attnkit.mechanisms.mla import mla_listed
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.native.softmax import MOST_SIZE
from attnkit.spec import Call

PLACES, BIASES = 1 << 18, 1 << 24
"""The most chosen places, and pairs of a bias, of a block of queries: 1 and 64 MB.

Every block maps its queries through all heads' weights: with 128 of them at ``top`` 2,048 these are read at no cost.
"""


_TENSORS = ("q", "latent", "kv_b", "index_q", "index_k", "index_w")


def rejects(call: Call) -> tuple[str, ...]:
    q, latent, kv_b, index_q, index_k = (call[name] for name in ("q", "latent", "kv_b", "index_q", "index_k"))
    (rows, c), d = kv_b.shape[1:], q.shape[3]
    reasons = []
    if not native.STATUS.available:
        reasons.append(native.STATUS.reason)
    if torch.compiler.is_compiling():
        reasons.append("the call is being compiled, the native kernel runs eagerly only")
    if q.device.type != "cpu":
        reasons.append(f"device is {q.device.type}, the native kernel needs cpu")
    for name, x in (("dtype", q), ("dtype of index_q", index_q)):
        if x.dtype not in native.DTYPES:
            reasons.append(f"{name} is {x.dtype}, the native kernel takes float32, bfloat16 and float16")
    if index_q.dtype != index_k.dtype:
        reasons.append(f"index_q is {index_q.dtype} and index_k {index_k.dtype}, the native kernel takes one dtype")
    for name, size in (("key", d), ("value", rows - d + latent.shape[3] - c)):
        if size > MOST_SIZE:
            reasons.append(f"{name} size is {size}, the native kernel takes 1 to {MOST_SIZE}")
    if index_q.shape[3] < 1:
        reasons.append("an index key has 0 channels, the native kernel takes at least 1")
    if torch.is_grad_enabled():
        wanted = [name for name in _TENSORS if call[name].requires_grad]
        if wanted:
            reasons.append(f"gradients are wanted for {', '.join(wanted)}, the native kernel is forward only")
    return tuple(reasons)


def forward(
    q: Tensor, latent: Tensor, kv_b: Tensor, index_q: Tensor, index_k: Tensor, index_w: Tensor, top: int, scale: float
) -> Tensor:
    way = _gathered if gathers(q, latent, kv_b, top) else _among_all
    return after_early(q, latent, kv_b, (index_q, index_k, index_w.float()), top, scale, way)


def _among_all(q: Tensor, latent: Tensor, kv_b: Tensor, index: tuple[Tensor, ...], top: int, scale: float) -> Tensor:
    """All keys, most of them hidden; in a sequence with a NaN, which -inf does not hide, only those that are chosen."""
    finite = latent.isfinite().flatten(1).all(1)
    if finite.all():
        return _hidden(q, latent, kv_b, index, top, scale)
    found = [
        (_hidden if whole else _gathered)(q[at], latent[at], kv_b, tuple(x[at] for x in index), top, scale)
        for at, whole in ((slice(i, i + 1), bool(whole)) for i, whole in enumerate(finite))
    ]
    return torch.cat(found)


def _gathered(q: Tensor, latent: Tensor, kv_b: Tensor, index: tuple[Tensor, ...], top: int, scale: float) -> Tensor:
    m, n = q.shape[2], latent.shape[2]

    def rows(start: int, end: int) -> Tensor:
        chosen = choose(*part(index, start, end), n - m + end, top)
        return mla_listed(q[:, :, start:end], latent, kv_b, chosen, scale=scale)

    o: Tensor = joined(rows, spans(m, max(1, PLACES // max(1, q.shape[0] * top))))
    return o


def _hidden(q: Tensor, latent: Tensor, kv_b: Tensor, index: tuple[Tensor, ...], top: int, scale: float) -> Tensor:
    m, n = q.shape[2], latent.shape[2]
    k, v = expanded(q, latent, kv_b)

    def rows(start: int, end: int) -> Tensor:
        seen = n - m + end
        chosen = choose(*part(index, start, end), seen, top)
        # Places left over name the last column, which is cut off.
        bias = q.new_full((*chosen.shape[:2], seen + 1), -torch.inf, dtype=k.dtype)
        bias.scatter_(2, chosen.long().remainder_(seen + 1), 0.0)
        few = q[:, :, start:end].to(k.dtype)
        keys, values = k[:, :, :seen], v[:, :, :seen]
        found: Tensor = softmax_attention(few, keys, values, bias=bias[:, None, :, :seen], scale=scale)
        return found

    o: Tensor = joined(rows, spans(m, max(1, BIASES // max(1, q.shape[0] * n))))
    return o.to(q.dtype)


def choose(index_q: Tensor, index_k: Tensor, index_w: Tensor, seen: int, top: int) -> Tensor:
    """Keys of the ``top`` best scores of each query, int32 ``(b, m, top)`` ascending, -1 in places left over.

    The queries are the last of the first ``seen`` positions; ``index_w`` is float32.
    """
    index_q, index_k = (x if x.stride(3) == 1 else x.contiguous() for x in (index_q, index_k[:, :, :seen]))
    (b, h, m, d), g = index_q.shape, index_k.shape[1]
    chosen = torch.empty(b, m, top, dtype=torch.int32)
    native.run(
        "indexer_forward",
        native.pack_indexer(
            *(x.data_ptr() for x in (index_q, index_k, index_w, chosen)),
            *(b, h, g, m, seen, d, top),
            *(step for x in (index_q, index_k) for step in x.stride()[:3]),
            *index_w.stride(),
            torch.get_num_threads(),
            native.DTYPES[index_q.dtype],
        ),
    )
    return chosen
