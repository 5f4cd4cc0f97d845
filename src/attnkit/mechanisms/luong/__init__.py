"""Luong attention: dot, general, concat and location scores, over the whole source or a window around a place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.mechanisms.luong import chunk
from attnkit.mechanisms.luong.reference import forward as reference
from attnkit.spec import Backend, Cost, Laws, Mechanism, Sizes

__all__ = ["SPEC", "LuongAttention", "LuongConfig", "luong_attention"]

SCORES = ("dot", "general", "concat", "location")


def luong_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    vector: Tensor | None = None,
    place_weight: Tensor | None = None,
    place_vector: Tensor | None = None,
    *,
    score: str = "general",
    local: str | None = None,
    radius: int = 10,
    start: int = 0,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of decoder states ``q`` to a source, with one of Luong's four scores; there is no ``1 / sqrt(d)``.

    ``local`` None is global. ``"m"`` looks within ``radius`` of the query's own place ``p = start + i``, ``"p"`` of the
    place that it predicts, ``p = length * sigmoid(place_vector . tanh(place_weight q))``, and then multiplies the
    weights, which are not normalised again, by ``exp(-(s - p)^2 / (2 sigma^2))`` with ``sigma = radius / 2``.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16.
    k: (b, g, n, c), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); in the paper the same states as ``k``.
    weight: "dot" None; "general" (h, d, c), score ``q W k``; "concat" (h, x, d + c), score ``vector . tanh(W [q; k])``;
        "location" (h, largest source, d), score of position ``s`` the row ``s`` of ``W q``, whatever ``k`` is.
    vector: (h, x) for "concat", else None.
    place_weight: (h, y, d) and place_vector: (h, y) for local "p", else None.
    radius: the paper's ``D``, at least 1; a window has up to ``2 radius + 1`` positions.
    start: position of the first query, for local "m" in a decoder that steps.
    lengths: (b,) integers, true lengths of the sources, from 0 to n; None where all have ``n``, which "p" refuses.
        What lies behind them is never read. A query whose window has no position gives 0.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype, the paper's context vectors.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Luong, Pham and Manning 2015, arXiv 1508.04025; positions count from 0.
    """
    settings: dict[str, Any] = {"score": score, "local": local, "radius": radius, "start": start, "lengths": lengths}
    result: Tensor = run(SPEC, call(q, k, v, weight, vector, place_weight, place_vector, **settings), backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    vector: Tensor | None = None,
    place_weight: Tensor | None = None,
    place_vector: Tensor | None = None,
    *,
    score: str = "general",
    local: str | None = None,
    radius: int = 10,
    start: int = 0,
    lengths: Tensor | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``luong_attention``; return them by name, as every backend gets them."""
    where = "luong_attention"
    if score not in SCORES:
        raise ValueError(f"{where}: score is {score!r}, expected one of {', '.join(SCORES)}")
    if local not in (None, "m", "p"):
        raise ValueError(f"{where}: local is {local!r}, expected None, 'm' (monotonic) or 'p' (predictive)")
    if score == "location" and local:
        raise ValueError(
            f"{where}: got location scores and local {local!r}, expected global: each score stands for a fixed place"
        )
    if radius < 1 or start < 0:
        raise ValueError(f"{where}: radius is {radius} and start {start}, expected at least 1 and at least 0")
    base = {"q": (q, "b h m d"), "k": (k, "b g n c"), "v": (v, "b g n e")}
    sizes = shapes.check(where, **base)
    if score == "dot" and sizes["d"] != sizes["c"]:
        raise ValueError(
            f"{where}: queries have size {sizes['d']} and keys {sizes['c']}, expected one for dot: take general"
        )
    wanted = {
        "weight": {"general": "h d c", "concat": "h hidden joined", "location": "h places d"}.get(score),
        "vector": "h hidden" if score == "concat" else None,
        "place_weight": "h predicted d" if local == "p" else None,
        "place_vector": "h predicted" if local == "p" else None,
    }
    given = {"weight": weight, "vector": vector, "place_weight": place_weight, "place_vector": place_vector}
    setting = f"score {score!r} and local {local!r}"
    for name, pattern in wanted.items():
        if (given[name] is None) != (pattern is None):
            got, expected = ("none", "one") if pattern else ("one", "none")
            raise ValueError(f"{where}: got {got} for {name}, expected {expected} with {setting}")
    parts = {name: (given[name], pattern) for name, pattern in wanted.items() if pattern}
    sizes = shapes.check(where, **base, **parts)
    if score == "concat" and sizes["joined"] != sizes["d"] + sizes["c"]:
        raise ValueError(
            f"{where}: weight takes {sizes['joined']} channels, expected {sizes['d']} of q and {sizes['c']} of k"
        )
    if score == "location" and sizes["n"] > sizes["places"]:
        raise ValueError(
            f"{where}: the source has {sizes['n']} positions and weight {sizes['places']}, expected no more than it has"
        )
    if local == "p" and lengths is None:
        raise ValueError(f"{where}: local 'p' predicts a place in the true source, expected lengths=, got None")
    shapes.check_same(where, q=q, k=k, v=v)
    shapes.check_groups(where, sizes["h"], sizes["g"])
    if lengths is not None:
        shapes.check(where, q=(q, "b h m d"), lengths=(lengths, "b"))
        if lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise TypeError(f"{where}: lengths has dtype {lengths.dtype}, expected integers")
    tensors = {name: x for name, x in {**given, "lengths": lengths}.items() if x is not None}
    shapes.check_device(where, q=q, **tensors)
    settings = {"score": score, "local": local, "radius": radius, "start": start, "lengths": lengths}
    return {"q": q, "k": k, "v": v, **given, **settings}


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``luong_attention``; ten seeds in a row have every score with every kind of window it may have."""
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    local, score = ((None, "m", "p")[seed % 10 % 3], SCORES[seed % 10 // 3])
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return drawn.to(device, dtype)

    small = s.d**-0.5
    weight = {
        "general": (s.h, s.d, s.d),
        "concat": (s.h, 6, 2 * s.d),
        "location": (s.h, s.n + 3, s.d),
    }.get(score)
    shortest = s.n // 2 + 1
    lengths = shortest + torch.randint(s.n - shortest + 1, (s.b,), generator=generator) if s.n else torch.zeros(s.b)
    predicts = local == "p"
    return {
        "q": normal(s.b, s.h, s.m, s.d),
        "k": normal(s.b, s.g, s.n, s.d, scale=small if score == "dot" else 1.0),
        "v": normal(s.b, s.g, s.n, s.e),
        "weight": None if weight is None else normal(*weight, scale=small if score != "general" else small**2),
        "vector": normal(s.h, 6) if score == "concat" else None,
        "place_weight": normal(s.h, 5, s.d, scale=small) if predicts else None,
        "place_vector": normal(s.h, 5) if predicts else None,
        "score": score,
        "local": local,
        "radius": 3,
        "start": seed % 4,
        "lengths": lengths.long().to(device),
    }


def cost(sizes: Sizes, *, radius: int | None = None, itemsize: int = 4) -> Cost:
    """Cost of one call with dot scores, local with a ``radius``. The source is the caller's: no state grows with it."""
    s = sizes
    seen = s.n if radius is None else min(s.n, 2 * radius + 1)
    return Cost(
        flops=2 * s.b * s.h * s.m * seen * (s.d + s.e),
        bytes=s.b * (s.h * s.m + s.g * s.n) * (s.d + s.e) * itemsize,
        state_bytes_per_token=0,
        state_bytes_fixed=0,
    )


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.luong.layer import LuongAttention, LuongConfig  # noqa: E402

SPEC = Mechanism(
    name="luong",
    title="Luong attention",
    equation="o = softmax(score(q, k)) v, over all keys or a window; times exp(-(s - p)^2 / (2 sigma^2)) for local-p",
    papers=("arXiv 1508.04025",),
    call=call,
    function=luong_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk), Backend("reference", _reference)),
    # It reads another sequence, whole: there is no causal form and nothing to keep of the sequence that asks. For the
    # same reason it has no presets: it cannot be the mixer of a decoder.
    laws=Laws(causal=False, stateful=False, step_equals_prefill=False, length_invariant=True),
    cost=cost,
    layer=LuongAttention,
)
