"""Differential attention: one softmax attention minus a share of a second one, so that what both heed cancels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.costs import differential as cost
from attnkit.dispatch import run
from attnkit.masks import Mask, causal, checked
from attnkit.mechanisms.differential import chunk
from attnkit.mechanisms.differential.reference import forward as reference
from attnkit.positions import Rotary
from attnkit.spec import Backend, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import KVState

__all__ = ["SPEC", "DifferentialAttention", "DifferentialConfig", "differential_attention", "initial_share"]


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    share: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Difference of two softmax attentions over the same values: ``(softmax(q1 k1^T) - share * softmax(q2 k2^T)) v``.

    Queries and keys hold both halves of a head side by side: ``q1`` is the first half of the channels of ``q``, ``q2``
    the second, and so for ``k``. The queries are the last ``m`` of the ``n`` positions. The paper's norm of each head's
    result is part of the layer. A row that may see no key gives 0 and no gradient.

    Parameters
    ----------
    q: (b, h, m, 2 d), float64, float32, bfloat16 or float16.
    k: (b, g, n, 2 d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); in the paper ``e`` is ``2 d``.
    share: (h,), any floating dtype: the paper's lambda, how much of the second attention a head takes off.
    mask: what may be seen, by both attentions, as in ``softmax_attention``; None lets every query see every key.
    scale: multiplies the products of both halves; ``d ** -0.5``, of one half, when None.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Ye et al. 2024, arXiv 2410.05258.
    """
    result: Tensor = run(SPEC, call(q, k, v, share, mask=mask, scale=scale), backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    share: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``differential_attention``; return them by name, as every backend gets them."""
    where = "differential_attention"
    sizes = shapes.check_call(where, q=(q, "b h m d"), k=(k, "b g n d"), v=(v, "b g n e"), share=(share, "h"))
    if sizes["d"] == 0 or sizes["d"] % 2:
        raise ValueError(f"{where}: q has {sizes['d']} channels a head, expected an even number: two halves")
    shapes.check_floating(where, share=share)
    return {
        "q": q,
        "k": k,
        "v": v,
        "share": share,
        "mask": checked(where, mask, *(sizes[axis] for axis in "bhmn")),
        "scale": (sizes["d"] // 2) ** -0.5 if scale is None else float(scale),
    }


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``differential_attention``, causal; ``sizes.d`` is that of one half, shares are 0.1 to 0.4."""
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((s.b, s.h, s.m, 2 * s.d), (s.b, s.g, s.n, 2 * s.d), (s.b, s.g, s.n, s.e))
    )
    drawn = {"q": q, "k": k, "v": v, "share": 0.1 + 0.3 * torch.rand(s.h, generator=generator, dtype=torch.float64)}
    return {name: x.to(device, dtype) for name, x in drawn.items()} | {"mask": causal()}


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.differential.layer import (  # noqa: E402
    DifferentialAttention,
    DifferentialConfig,
    initial_share,
)


def _preset(place: LayerPlace) -> DifferentialConfig:
    """Half the heads, each twice as wide, so that parameters and cache stay those of multi-head attention."""
    heads = max(1, place.heads // 2)
    return DifferentialConfig(
        place.width,
        heads,
        rotary=Rotary(place.width // heads // 2),
        initial_share=initial_share(place.layer),
        qk_norm=place.qk_norm,
    )


SPEC = Mechanism(
    name="differential",
    title="Differential attention",
    equation="o = (softmax(mask(q1 k1^T * scale)) - share * softmax(mask(q2 k2^T * scale))) v",
    papers=("arXiv 2410.05258",),
    call=call,
    function=differential_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk, finite_only=True), Backend("reference", _reference)),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True),
    cost=cost,
    layer=DifferentialAttention,
    state=KVState,
    presets=(Preset("diff", "Differential", "arXiv 2410.05258", _preset),),
)
