"""Entmax attention: weights that are exactly 0 for keys far below the best, by sparsemax or 1.5-entmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import Mask, causal, checked
from attnkit.mechanisms.entmax import chunk
from attnkit.mechanisms.entmax.reference import forward as reference
from attnkit.positions import Rotary
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import KVState

__all__ = ["SPEC", "EntmaxAttention", "EntmaxConfig", "check_alpha", "entmax_attention"]


def entmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: float = 1.5,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention whose weights are the alpha-entmax of the scores: ``entmax(mask(q k^T * scale)) v``.

    Weights add up to 1, and those of keys far enough below the best are exactly 0. The queries are the last ``m``
    of the ``n`` positions. A row that may see no key gives 0 and no gradient.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16. Scores and weights are float32 at least.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    alpha: 1.5, or 2 for sparsemax; these two have exact solutions by sorting. 1 would be ``softmax_attention``.
    mask: what may be seen, as in ``softmax_attention``; None lets every query see every key.
    scale: multiplies ``q k^T``; ``d ** -0.5`` when None.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Martins and Astudillo 2016, arXiv 1602.02068 (sparsemax); Peters et al. 2019, arXiv 1905.05702 (entmax).
    """
    result: Tensor = run(SPEC, call(q, k, v, alpha=alpha, mask=mask, scale=scale), backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: float = 1.5,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``entmax_attention``; return them by name, as every backend gets them."""
    where = "entmax_attention"
    sizes = shapes.check_call(where, q=(q, "b h m d"), k=(k, "b g n d"), v=(v, "b g n e"))
    check_alpha(where, alpha)
    return {
        "q": q,
        "k": k,
        "v": v,
        "alpha": float(alpha),
        "mask": checked(where, mask, *(sizes[axis] for axis in "bhmn")),
        "scale": sizes["d"] ** -0.5 if scale is None else float(scale),
    }


def check_alpha(where: str, alpha: float) -> None:
    """Raise ``ValueError`` for an alpha without an exact solution."""
    if alpha not in (1.5, 2):
        raise ValueError(
            f"{where}: alpha is {alpha}, expected 1.5 or 2 (sparsemax), which sorting solves exactly; for 1 take "
            f"softmax_attention"
        )


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``entmax_attention``, causal; every other one is sparsemax."""
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for shape in ((s.b, s.h, s.m, s.d), (s.b, s.g, s.n, s.d), (s.b, s.g, s.n, s.e))
    )
    return {"q": q, "k": k, "v": v, "alpha": 2.0 if seed % 2 else 1.5, "mask": causal()}


def cost(sizes: Sizes, *, mask: Mask | None = None, itemsize: int = 4) -> Cost:
    """Cost of one call, sorting apart; the state is that of softmax attention."""
    s = sizes
    pairs = s.m * s.n if mask is None else mask.visible_pairs(s.m, s.n) // (mask.batches * mask.heads)
    token = s.g * (s.d + s.e) * itemsize
    return Cost(
        flops=2 * s.b * s.h * pairs * (s.d + s.e),
        bytes=s.b * (s.h * s.m * (s.d + s.e) * itemsize + s.n * token),
        state_bytes_per_token=token,
        state_bytes_fixed=0,
    )


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.entmax.layer import EntmaxAttention, EntmaxConfig  # noqa: E402


def _config(place: LayerPlace, alpha: float) -> EntmaxConfig:
    rotary = Rotary(place.width // place.heads)
    return EntmaxConfig(place.width, place.heads, alpha=alpha, rotary=rotary, qk_norm=place.qk_norm)


SPEC = Mechanism(
    name="entmax",
    title="Entmax attention",
    equation="o = entmax_alpha(mask(q k^T * scale)) v",
    papers=("arXiv 1602.02068", "arXiv 1905.05702"),
    call=call,
    function=entmax_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk, finite_only=True), Backend("reference", _reference)),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True, every_key=False),
    cost=cost,
    layer=EntmaxAttention,
    state=KVState,
    presets=(
        Preset("sparsemax", "Sparsemax", "arXiv 1602.02068", lambda place: _config(place, 2.0)),
        Preset("entmax15", "1.5-entmax", "arXiv 1905.05702", lambda place: _config(place, 1.5)),
    ),
)
