"""The native decode kernel over a state: pages, rings and quantised keys and values are read where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit import native
from attnkit.masks import UNBOUNDED, Mask, Moved
from attnkit.native.softmax import MOST_SIZE, as_float32, scale_refused, steps
from attnkit.spec import Call
from attnkit.state import KVState, PagedKVState, WindowState
from attnkit.state.codec import CHANNELS, GROUP

MOST_QUERIES = native.BLOCK_QUERIES
TILE = 32  # keys that the kernel works off together, which lie on one page where they are codes


def rejects(call: Call) -> tuple[str, ...]:
    q, state, mask = call["q"], call["state"], call["mask"]
    reasons = []
    if not native.STATUS.available:
        reasons.append(native.STATUS.reason)
    if q.device.type != "cpu":
        reasons.append(f"device is {q.device.type}, the native kernel needs cpu")
    if q.dtype not in native.DTYPES:
        reasons.append(f"dtype is {q.dtype}, the native kernel takes float32, bfloat16 and float16")
    if q.shape[2] > MOST_QUERIES:
        reasons.append(f"there are {q.shape[2]} queries, the native kernel takes at most {MOST_QUERIES}")
    for name, size in (("key", state.layout.key_size), ("value", state.layout.value_size)):
        if not 1 <= size <= MOST_SIZE:
            reasons.append(f"{name} size is {size}, the native kernel takes 1 to {MOST_SIZE}")
    if isinstance(state, PagedKVState) and state.pool.codec and (page := state.pool.page) % TILE:
        reasons.append(f"{state.pool.codec} codes are on pages of {page} tokens, the kernel takes multiples of {TILE}")
    if isinstance(state, PagedKVState) and len(set(state.lengths)) > 1 and mask.interval() is None:
        reasons.append(
            f"lengths are {state.lengths} and the mask is {mask!r}, the native kernel takes causal and windows"
        )
    if torch.is_grad_enabled():
        tensors = {name: call[name] for name in ("q", "bias", "alibi", "sink") if call[name] is not None}
        if wanted := [name for name, x in tensors.items() if x.requires_grad]:
            reasons.append(f"gradients are wanted for {', '.join(wanted)}, the native kernel is forward only")
    reasons += scale_refused(call["scale"])
    return tuple(reasons)


def native_step(
    q: Tensor,
    state: KVState | PagedKVState | WindowState,
    mask: Mask,
    scale: float,
    bias: Tensor | None,
    alibi: Tensor | None,
    softcap: float | None,
    sink: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    q = q if q.stride(3) == 1 else q.contiguous()
    b, h, m, d = q.shape
    g, e = state.layout.heads, state.layout.value_size
    n, (left, right) = state.length, mask.interval() or (UNBOUNDED, UNBOUNDED)
    own: Mask | None = None if mask.interval() is not None else mask
    held: tuple[dict[str, Tensor], dict[str, Tensor]]
    lengths = pages = None
    page = page_count = 0
    codec = None
    if isinstance(state, WindowState):
        view = state.view()
        held, n = ({"numbers": view.k}, {"numbers": view.v}), view.k.shape[2]
        assert view.positions is not None
        queries = view.queries(m)
        own, (left, right) = Moved(mask, queries, view.positions), (UNBOUNDED, UNBOUNDED)
        if m == 1 and mask.interval() is not None and _all_seen(mask, queries, view.positions):
            own = None
        if alibi is not None:
            far = -alibi.float()[:, None, None] * (queries[:, None] - view.positions).abs()
            bias, alibi = far.expand(b, h, m, n) if bias is None else bias.float() + far, None
    elif isinstance(state, PagedKVState):
        pages, lengths = state.packed()
        codec, held, page, page_count = state.pool.codec, state.rows, state.pool.page, len(state.pool.k)
        if own is not None:
            lengths = None  # all have n
    else:
        codec, held = state.codec, state.rows
    k, v = (x["numbers" if codec is None else "codes"] for x in held)
    (k_scale, v_scale), (k_zero, v_zero) = ([x.get(name) for x in held] for name in ("scale", "zero"))
    recent = held[0].get("recent")
    o = q.new_empty(b, h, m, e)
    lse = q.new_empty(b, h, m, dtype=torch.float32) if return_lse else None
    blocks = None if own is None else own.block_list(m, n, native.BLOCK_QUERIES, native.BLOCK_KEYS)
    bias, alibi, sink = as_float32(bias), as_float32(alibi), as_float32(sink)
    lists = (blocks.offsets, blocks.columns, blocks.pattern, blocks.patterns) if blocks else (None,) * 4
    addresses = [q, k, v, o, lse, bias, alibi, sink, *lists, lengths, pages, k_scale, k_zero, v_scale, v_zero, recent]
    native.run(
        "cache_forward",
        native.pack_cache(
            *(0 if x is None else x.data_ptr() for x in addresses),
            *(b, h, g, m, n, d, e),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *o.stride()[:3],
            *steps(bias),
            *((0, 0) if k_scale is None else k_scale.stride()[:2]),
            *((0, 0) if v_scale is None else v_scale.stride()[:2]),
            *((0, 0) if recent is None else recent.stride()[:2]),
            *(left, right),
            *((blocks.batches, blocks.heads) if blocks else (1, 1)),
            *(page, page_count, 0 if pages is None else pages.shape[1]),
            *(GROUP, CHANNELS),
            torch.get_num_threads(),
            native.DTYPES[q.dtype],
            native.cache.FORMS[codec],
            scale,
            softcap or 0.0,
        ),
    )
    return o if lse is None else (o, lse)


def _all_seen(mask: Mask, query: Tensor, positions: Tensor) -> bool:
    zero = positions.new_zeros(1)
    return bool(mask.visible(zero, zero, query, positions).all())
