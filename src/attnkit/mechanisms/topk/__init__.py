"""Top-k attention: each query keeps its few best keys and takes the softmax over these alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import Mask, causal, checked
from attnkit.mechanisms.topk import chunk, cpu
from attnkit.mechanisms.topk.counts import check, most
from attnkit.mechanisms.topk.reference import forward as reference
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import KVState

__all__ = ["SPEC", "TopKAttention", "TopKConfig", "topk_attention"]


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top: int | None = None,
    density: float | None = None,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of each query over its best keys only: ``softmax(best(mask(q k^T * scale))) v``.

    Visibility comes first: the best keys are the best of those that a query may see. Of equal scores the earlier key
    wins. Which keys are kept is a constant to the gradient, which reaches a query and the keys and values that it kept.
    A query that may see no more keys than it keeps attends as in ``softmax_attention``.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16. Scores are compared in float32 at least.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    top: keys that a query keeps, at least 1.
    density: in the place of ``top``, the share of its visible keys that a query keeps, above 0 and at most 1; a part of
        a key is a whole key.
    mask: what may be seen, as in ``softmax_attention``; a row that may see no key gives 0 and no gradient.
    scale: multiplies ``q k^T``; ``d ** -0.5`` when None.
    backend: "cpu", "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Zhao et al. 2019, Explicit Sparse Transformer, arXiv 1912.11637.
    """
    result: Tensor = run(SPEC, call(q, k, v, top=top, density=density, mask=mask, scale=scale), backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top: int | None = None,
    density: float | None = None,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``topk_attention``; return them by name, as every backend gets them."""
    where = "topk_attention"
    sizes = shapes.check_call(where, q=(q, "b h m d"), k=(k, "b g n d"), v=(v, "b g n e"))
    check(where, top, density)
    mask = checked(where, mask, *(sizes[axis] for axis in "bhmn"))
    scale = sizes["d"] ** -0.5 if scale is None else float(scale)
    return {"q": q, "k": k, "v": v, "top": top, "density": density, "mask": mask, "scale": scale}


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``topk_attention``, causal: a quarter of the keys, a share of the visible ones, or two.

    Two correct programs differ in the last digit of a score, and where two scores differ by no more, one digit decides
    which value is taken. So products are exact in every precision, and no two keys in 256 score alike: all channels but
    the last are small integers, and the last has multiples of 1/256, another for each key.
    """
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randint(-1, 2, shape, generator=generator).double()
        for shape in ((s.b, s.h, s.m, s.d), (s.b, s.g, s.n, s.d))
    )
    q[..., -1] = torch.randint(2, (s.b, s.h, s.m), generator=generator) * 2 - 1
    k[..., -1] = torch.rand(s.b, s.g, s.n, generator=generator).argsort(-1) % 256 / 256 - 0.5
    v = torch.randn(s.b, s.g, s.n, s.e, generator=generator, dtype=torch.float64)
    share = min(1.0, max(0.29, 2 / max(1, s.n)))  # two keys at least: the gradient of a lone one is 0, and all rounding
    drawn: dict[str, Any] = {name: x.to(device, dtype) for name, x in {"q": q, "k": k, "v": v}.items()}
    few = ({"top": max(2, s.n // 4)}, {"density": share}, {"top": max(2, s.n // 4)}, {"top": 2})
    return drawn | few[seed % 4] | {"mask": causal()}


def cost(
    sizes: Sizes,
    *,
    top: int | None = 32,
    density: float | None = None,
    mask: Mask | None = None,
    itemsize: int = 4,
) -> Cost:
    """Cost of one call: every visible pair is scored, and the kept ones are weighed; ``density`` rules over ``top``."""
    s = sizes
    pairs = s.m * s.n if mask is None else mask.visible_pairs(s.m, s.n) // (mask.batches * mask.heads)
    kept = min(pairs, s.m * most(s.n, top if density is None else None, density))
    token = s.g * (s.d + s.e) * itemsize
    return Cost(
        flops=2 * s.b * s.h * (pairs * s.d + kept * s.e),
        bytes=s.b * (s.h * s.m * (s.d + s.e) * itemsize + s.n * token),
        state_bytes_per_token=token,
        state_bytes_fixed=0,
    )


def _cpu() -> Any:
    return cpu.forward


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.topk.layer import TopKAttention, TopKConfig  # noqa: E402
from attnkit.positions import Rotary  # noqa: E402


def _top(place: LayerPlace) -> TopKConfig:
    """32 keys where a window has 128; 8, the least that the paper tried, where windows are tiny."""
    rotary = Rotary(place.width // place.heads)
    return TopKConfig(place.width, place.heads, top=max(8, place.window // 4), rotary=rotary, qk_norm=place.qk_norm)


def _density(place: LayerPlace) -> TopKConfig:
    rotary = Rotary(place.width // place.heads)
    return TopKConfig(place.width, place.heads, density=0.25, rotary=rotary, qk_norm=place.qk_norm)


SPEC = Mechanism(
    name="topk",
    title="Top-k attention",
    equation="o = softmax(best_k(mask(q k^T * scale))) v",
    papers=("arXiv 1912.11637",),
    call=call,
    function=topk_attention,
    sample=sample,
    reference=reference,
    backends=(
        Backend("cpu", _cpu, cpu.rejects, cpu.declines, grad=False),
        Backend("chunk", _chunk, finite_only=True),
        Backend("reference", _reference),
    ),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True, every_key=False),
    cost=cost,
    layer=TopKAttention,
    state=KVState,
    presets=(
        Preset("topk_32", "Top 32 keys a query", "arXiv 1912.11637", _top),
        Preset("topk_density", "Top quarter of the keys", "arXiv 1912.11637", _density),
    ),
)
