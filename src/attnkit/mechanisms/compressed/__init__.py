"""Compressed attention (DeepSeek-V4's CSA and HCA): a window of tokens beside entries that each stand for many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.costs import compressed as cost
from attnkit.dispatch import run
from attnkit.mechanisms.compressed import chunk
from attnkit.mechanisms.compressed.pooling import check_windows, choose, compress
from attnkit.mechanisms.compressed.reference import forward as reference
from attnkit.spec import Backend, Laws, Mechanism, Sizes
from attnkit.state import CompressedState

__all__ = [
    "SPEC",
    "CompressedAttention",
    "CompressedConfig",
    "choose",
    "compress",
    "compressed_attention",
]


def compressed_attention(
    q: Tensor,
    kv: Tensor,
    entries: Tensor | None = None,
    chosen: Tensor | None = None,
    *,
    window: int,
    rate: int | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    length: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """One softmax over the last ``window`` tokens, the compressed entries of whole windows, and a sink.

    A vector is key and value at once. The query at position ``t`` may see entry ``w``, which stands for tokens
    ``w * rate`` to ``(w + 1) * rate - 1``, when all of them are there: ``w < (t + 1) // rate``.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16: queries of the last ``m`` tokens.
    kv: (b, g, n, d), same dtype and device: vectors of the last ``n`` tokens, ``m`` at least and all that the window of
        the first query holds. ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``; DeepSeek-V4 has
        ``g = 1``.
    entries: (b, g, w, d), one for each whole window at least; None for a layer that has the window alone.
    chosen: (b, m, c), int64: entries that a query may see, as ``choose`` gives them, all heads the same; -1 for none.
        None lets it see all that are closed.
    window: tokens that a query sees one by one, its own included.
    rate: tokens of an entry's window.
    sink: (h,), logits of one more key with value 0.
    scale: multiplies the products; ``d ** -0.5`` when None.
    length: tokens there are so far, ``n`` when None.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, d) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: DeepSeek-V4 technical report, 2026.
    """
    checked = call(q, kv, entries, chosen, window=window, rate=rate, sink=sink, scale=scale, length=length)
    result: Tensor = run(SPEC, checked, backend)
    return result


def call(
    q: Tensor,
    kv: Tensor,
    entries: Tensor | None = None,
    chosen: Tensor | None = None,
    *,
    window: int,
    rate: int | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    length: int | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``compressed_attention``; return them by name, as every backend gets them."""
    where = "compressed_attention"
    given = {"q": (q, "b h m d"), "kv": (kv, "b g n d")}
    if entries is not None:
        given["entries"] = (entries, "b g entries d")
    if chosen is not None:
        given["chosen"] = (chosen, "b m choices")
    if sink is not None:
        given["sink"] = (sink, "h")
    sizes = shapes.check(where, **given)
    h, m, n = (sizes[axis] for axis in "hmn")
    shapes.check_same(where, q=q, kv=kv, **({} if entries is None else {"entries": entries}))
    shapes.check_device(where, **{name: x for name, (x, _) in given.items()})
    shapes.check_groups(where, h, sizes["g"])
    shapes.check_last(where, m, n)
    length = n if length is None else length
    if sizes["d"] == 0 or window < 1:
        raise ValueError(f"{where}: key size is {sizes['d']} and window {window}, expected at least 1 of each")
    if (entries is None) != (rate is None) or (entries is None and chosen is not None):
        got = [name for name, x in (("entries", entries), ("chosen", chosen), ("rate", rate)) if x is not None]
        raise ValueError(
            f"{where}: got {' and '.join(got)} alone, expected entries and their rate, or neither and nothing chosen"
        )
    if length < n or n < min(length, window - 1 + m):
        raise ValueError(
            f"{where}: got {n} of {length} tokens for {m} queries and a window of {window}, expected the last "
            f"{min(max(length, n), window - 1 + m)} at least and no more than there are"
        )
    if entries is not None and rate is not None:
        check_windows(where, rate, sizes["entries"], m, length)
    if chosen is not None and chosen.dtype != torch.int64:
        raise TypeError(f"{where}: chosen has dtype {chosen.dtype}, expected int64: indices of entries, -1 for none")
    return {
        "q": q,
        "kv": kv,
        "entries": entries,
        "chosen": chosen,
        "window": window,
        "rate": rate,
        "sink": sink,
        "scale": sizes["d"] ** -0.5 if scale is None else float(scale),
        "length": length,
    }


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``compressed_attention``: short and long windows, now and then an entry that is not closed yet.

    The value size is that of keys, since a vector is both, and no entries are chosen: ``Sizes`` has no axis for these.
    """
    s = sizes or Sizes(b=2, h=4, g=1, m=37, n=37, d=16, e=16)
    generator = torch.Generator().manual_seed(seed)
    window, rate = (5, 2, 16, 40)[seed % 4], (4, 3, 1, 7, 16)[seed % 5]
    drawn = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in (
            ("q", (s.b, s.h, s.m, s.d)),
            ("kv", (s.b, s.g, s.n, s.d)),
            ("entries", (s.b, s.g, s.n // rate + seed % 2, s.d)),
        )
    }
    return {name: x.to(device, dtype) for name, x in drawn.items()} | {"window": window, "rate": rate}


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.compressed.layer import CompressedAttention, CompressedConfig  # noqa: E402
from attnkit.mechanisms.compressed.presets import PRESETS  # noqa: E402

SPEC = Mechanism(
    name="compressed",
    title="Compressed attention (CSA, HCA)",
    equation="o = softmax([window(q kv^T), closed(q c^T), sink]) [kv, c, 0] with c = pooled windows of tokens",
    papers=("DeepSeek-V4 technical report, 2026",),
    call=call,
    function=compressed_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk, finite_only=True), Backend("reference", _reference)),
    laws=Laws(
        causal=True,
        stateful=True,
        step_equals_prefill=True,
        length_invariant=True,
        every_key=False,
        weights_sum_to_one=False,
    ),
    cost=cost,
    layer=CompressedAttention,
    state=CompressedState,
    presets=PRESETS,
)
