"""Softmax attention: MHA, MQA, GQA, cross, windows, sinks, soft-cap, ALiBi, documents are all this one equation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.costs import softmax as cost
from attnkit.dispatch import decide, run
from attnkit.masks import UNBOUNDED, Mask, causal, checked
from attnkit.masks.patterns import Interval
from attnkit.mechanisms.softmax import cpu, flex, sdpa, varlen
from attnkit.mechanisms.softmax.reference import forward as reference
from attnkit.spec import Backend, Laws, Mechanism, Sizes
from attnkit.state import KVState

__all__ = [
    "SPEC",
    "SoftmaxAttention",
    "SoftmaxConfig",
    "merge",
    "softmax_attention",
    "softmax_attention_step",
    "softmax_attention_varlen",
]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Softmax attention of ``m`` queries over ``n`` keys: ``softmax(q k^T * scale) v``.

    The queries are the last ``m`` of the ``n`` positions (bottom-right alignment). Query head ``i`` reads KV head
    ``i // (h / g)``. A row that may see no key gives 0, log-sum-exp -inf and no gradient.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h`` (MHA ``g = h``, MQA ``g = 1``).
    v: (b, g, n, e); ``e`` may differ from ``d``.
    mask: what may be seen: ``attnkit.causal()``, ``attnkit.window(128)``, any combination with ``& | ~``, a bool tensor
        (True may attend) of shape (m, n), (b, m, n) or (b, h, m, n); None lets every query see every key.
    scale: multiplies ``q k^T``; ``d ** -0.5`` when None.
    bias: added to the logits after scale and soft-cap; broadcasts to (b, h, m, n); differentiable. Values at or under
        half its dtype's lowest number mean "masked", as -inf does.
    alibi: (h,) slopes, see ``attnkit.positions.alibi_slopes``: ``logit -= alibi * |q - k|`` on positions.
    softcap: logits become ``softcap * tanh(logits / softcap)`` before bias and mask (Gemma 2).
    sink: (h,) logits of one more key with value 0, so that weights may sum to less than 1 (gpt-oss).
    dropout: probability of dropping a weight; ``seed`` replays it, and is drawn from torch's generator when None.
    return_lse: also return the log-sum-exp of the logits, sink included, natural log.
    backend: "cpu", "sdpa", "flex" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype; with ``return_lse`` the pair (o, lse), lse (b, h, m) float32 (float64 for float64).

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together; NotImplementedError: the named backend cannot run them.

    Source: Vaswani et al. 2017, arXiv 1706.03762; GQA arXiv 2305.13245; online softmax arXiv 2205.14135.
    """
    checked = call(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        bias=bias,
        alibi=alibi,
        softcap=softcap,
        sink=sink,
        dropout=dropout,
        seed=seed,
        return_lse=return_lse,
    )
    return run(SPEC, checked, backend)


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
) -> dict[str, Any]:
    """Check the arguments of ``softmax_attention``; return them by name, defaults filled in and masks simplified."""
    where = "softmax_attention"
    b, h, _, m, n, d, _ = shapes.check_attention(where, q, k, v)
    if d == 0:
        raise ValueError(f"{where}: key size is 0, expected at least 1")
    logits = checked_logits(where, q, n, bias=bias, alibi=alibi, softcap=softcap, sink=sink)
    if not 0 <= dropout < 1:
        raise ValueError(f"{where}: dropout is {dropout}, expected 0 <= dropout < 1")
    if seed is not None and not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"{where}: seed is {seed}, expected a whole number of 64 bits, -2^63 to 2^63 - 1")
    number: int | Tensor | None = seed
    if dropout and seed is None:
        # While a call is traced it stays a tensor: a number would be the same in every run of the graph.
        drawn = torch.randint(1 << 62, ())
        number = drawn if torch.compiler.is_compiling() else int(drawn)
    return {
        "q": q,
        "k": k,
        "v": v,
        "mask": _checked_mask(where, mask, b, h, m, n),
        "scale": d**-0.5 if scale is None else float(scale),
        **logits,
        "dropout": dropout,
        "seed": number,
        "return_lse": return_lse,
    }


def checked_logits(
    where: str,
    q: Tensor,
    n: int,
    *,
    bias: Tensor | None,
    alibi: Tensor | None,
    softcap: float | None,
    sink: Tensor | None,
) -> dict[str, Any]:
    """What changes the logits of ``q`` (b, h, m, d) over ``n`` keys, checked, by name."""
    if bias is not None:
        bias = _checked_bias(where, bias, (*q.shape[:3], n), q)
    for name, heads in (("alibi", alibi), ("sink", sink)):
        if heads is not None:
            shapes.check(where, q=(q, "b h m d"), **{name: (heads, "h")})
            shapes.check_device(where, q=q, **{name: heads})
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{where}: softcap is {softcap}, expected a positive number or None")
    return {"bias": bias, "alibi": alibi, "softcap": softcap, "sink": sink}


def _checked_mask(where: str, mask: Mask | Tensor | None, b: int, h: int, m: int, n: int) -> Mask | None:
    mask = checked(where, mask, b, h, m, n)
    interval = mask.interval() if mask is not None else None
    if interval is None:
        return mask
    # A bound that no pair of this call reaches is no bound: one query under causal() is plain attention over a cache.
    left = UNBOUNDED if interval[0] >= n - 1 else interval[0]
    right = UNBOUNDED if interval[1] >= m - 1 and m <= n else interval[1]
    return None if left == right == UNBOUNDED else Interval(left, right)


def _checked_bias(where: str, bias: Tensor, target: tuple[int, int, int, int], q: Tensor) -> Tensor:
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        got = f"a {bias.dtype} tensor" if isinstance(bias, Tensor) else f"a {type(bias).__name__}"
        raise TypeError(
            f"{where}: bias is {got}, expected a floating tensor to add to the logits (a bool one is a mask=)"
        )
    shapes.check_device(where, q=q, bias=bias)
    fits = bias.dim() <= 4 and all(
        size in (1, wanted) for size, wanted in zip(reversed(bias.shape), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(f"{where}: bias has shape {tuple(bias.shape)}, expected one that broadcasts to {target}")
    lowest = torch.finfo(bias.dtype).min
    return torch.where(bias <= lowest / 2, -torch.inf, bias).expand(target)


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint sets of keys into attention over both; associative and commutative.

    Serves split KV, ring attention, shared prefixes. A part with no visible key (lse -inf) adds nothing.

    Parameters
    ----------
    o1, o2: (b, h, m, e), any floating dtype.
    lse1, lse2: (b, h, m), natural log, as ``softmax_attention(..., return_lse=True)`` gives.

    Returns
    -------
    o: (b, h, m, e) in ``o1``'s dtype, lse: (b, h, m).

    Source: flash-decoding; the rule of online softmax (Milakov and Gimelshein, arXiv 1805.02867).
    """
    shapes.check("merge", o1=(o1, "b h m e"), lse1=(lse1, "b h m"), o2=(o2, "b h m e"), lse2=(lse2, "b h m"))
    lse = torch.logaddexp(lse1, lse2)
    base = torch.where(lse == -torch.inf, 0.0, lse)
    share1, share2 = torch.exp(lse1 - base)[..., None], torch.exp(lse2 - base)[..., None]
    return (o1.to(lse.dtype) * share1 + o2.to(lse.dtype) * share2).to(o1.dtype), lse


def softmax_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_offsets: Tensor,
    k_offsets: Tensor | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    alibi: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of packed documents that do not see each other; positions restart in each.

    Parameters
    ----------
    q: (h, t, d), all documents' queries in a row. k: (g, t', d). v: (g, t', e).
    q_offsets: integers (documents + 1,), where each document starts, then the end: FlashAttention's ``cu_seqlens``.
    k_offsets: the same for keys; those of the queries when None. Empty documents are allowed.
    mask, scale, alibi, softcap, sink, backend: as in ``softmax_attention``, for each document.

    Returns
    -------
    o: (h, t, e). Each document has the bits of a call of its own. Backend "cpu" takes all documents in one call where
    the mask is causal, a window or None and ``alibi`` wants no gradient, and one by one otherwise, as others do.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together; NotImplementedError: the named backend cannot run them.
    """
    where = "softmax_attention_varlen"
    if k_offsets is None:
        k_offsets = q_offsets
    shapes.check(where, k=(k, "g n d"), v=(v, "g n e"))
    shapes.check(where, q=(q, "h m d"), q_offsets=(q_offsets, "documents"), k_offsets=(k_offsets, "documents"))
    if alibi is not None:
        shapes.check(where, q=(q, "h m d"), alibi=(alibi, "h"))
    interval = (UNBOUNDED, UNBOUNDED) if mask is None else mask.interval() if isinstance(mask, Mask) else None
    if interval is not None and backend in (None, "cpu") and not (alibi is not None and alibi.requires_grad):
        whole = call(q[None], k[None], v[None], mask=mask, scale=scale, alibi=alibi, softcap=softcap, sink=sink)
        if decide(SPEC, whole, backend)[0].name == "cpu":
            return varlen.forward(q, k, v, q_offsets, k_offsets, *interval, whole["scale"], alibi, softcap, sink)
    q_edges, k_edges = varlen.checked("q_offsets", q_offsets, q), varlen.checked("k_offsets", k_offsets, k)
    parts = [
        softmax_attention(
            q[None, :, q_edges[i] : q_edges[i + 1]],
            k[None, :, k_edges[i] : k_edges[i + 1]],
            v[None, :, k_edges[i] : k_edges[i + 1]],
            mask=mask,
            scale=scale,
            alibi=alibi,
            softcap=softcap,
            sink=sink,
            backend=backend,
        )
        for i in range(len(q_edges) - 1)
    ]
    return torch.cat(parts, 2)[0]


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``softmax_attention``: grouped heads, a value size of its own, causal."""
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for shape in ((s.b, s.h, s.m, s.d), (s.b, s.g, s.n, s.d), (s.b, s.g, s.n, s.e))
    )
    return {"q": q, "k": k, "v": v, "mask": causal()}


def _cpu() -> Any:
    return cpu.forward


def _sdpa() -> Any:
    return sdpa.forward


def _flex() -> Any:
    return flex.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.softmax.layer import SoftmaxAttention, SoftmaxConfig  # noqa: E402
from attnkit.mechanisms.softmax.presets import PRESETS  # noqa: E402

SPEC: Mechanism = Mechanism(
    name="softmax",
    title="Softmax attention",
    equation="o = softmax(mask(softcap(q k^T * scale) + bias)) v",
    papers=(
        "arXiv 1706.03762",
        "arXiv 1911.02150",
        "arXiv 2305.13245",
        "arXiv 1904.10509",
        "arXiv 2108.12409",
    ),
    call=call,
    function=softmax_attention,
    sample=sample,
    reference=reference,
    backends=(
        Backend("cpu", _cpu, cpu.rejects),
        Backend("sdpa", _sdpa, sdpa.rejects, finite_only=True),
        Backend("flex", _flex, flex.rejects, flex.declines, finite_only=True),
        Backend("reference", _reference),
    ),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True),
    cost=cost,
    layer=SoftmaxAttention,
    state=KVState,
    presets=PRESETS,
)

# Its own record names this one.
from attnkit.mechanisms.softmax.step import softmax_attention_step  # noqa: E402
