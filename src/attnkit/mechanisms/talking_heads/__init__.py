"""Talking-heads attention: heads mix their logits before the softmax and their weights after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import Mask, causal, checked
from attnkit.mechanisms.talking_heads import chunk
from attnkit.mechanisms.talking_heads.reference import forward as reference
from attnkit.positions import Rotary
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import TokenState

__all__ = ["SPEC", "TalkingHeadsAttention", "TalkingHeadsConfig", "talking_heads_attention"]


def talking_heads_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_logits: Tensor | None = None,
    mix_weights: Tensor | None = None,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention whose logits and weights are mixed across heads: ``(N softmax(M (q k^T * scale))) v``.

    There may be other numbers of heads for queries, inside the softmax, and for values: ``M`` and ``N`` lead from one
    to the next. The queries are the last ``m`` of the ``n`` positions. Mixed weights of a row need not sum to 1. A row
    that may see no key gives 0 and no gradient.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g', n, e); ``g'`` divides the number of value heads and may differ from ``g``.
    mix_logits: (softmax heads, h), floating: how much each softmax head takes of the logits of each query head; None
        for its own.
    mix_weights: (value heads, softmax heads), floating: the same for the weights of value heads.
    mask: what may be seen, as in ``softmax_attention``. A mask of each head needs one number of heads throughout, and
        what a head may not see it neither gives to other heads nor takes from them.
    scale: multiplies ``q k^T``; ``d ** -0.5`` when None.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, value heads, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Shazeer et al. 2020, arXiv 2003.02436.
    """
    result: Tensor = run(SPEC, call(q, k, v, mix_logits, mix_weights, mask=mask, scale=scale), backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_logits: Tensor | None = None,
    mix_weights: Tensor | None = None,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``talking_heads_attention``; return them by name, as every backend gets them."""
    where = "talking_heads_attention"
    inside = "h" if mix_logits is None else "softmax_heads"
    after = inside if mix_weights is None else "value_heads"
    patterns = {"mix_logits": f"{inside} h", "mix_weights": f"{after} {inside}"}
    given = {"mix_logits": mix_logits, "mix_weights": mix_weights}
    mixtures = {name: x for name, x in given.items() if x is not None}
    sizes = shapes.check_call(
        where,
        q=(q, "b h m d"),
        k=(k, "b g n d"),
        v=(v, "b value_groups n e"),
        **{name: (x, patterns[name]) for name, x in mixtures.items()},
    )
    heads = (sizes["h"], sizes[inside], sizes[after])
    if sizes["value_groups"] == 0 or heads[2] % sizes["value_groups"]:
        raise ValueError(
            f"{where}: v has {sizes['value_groups']} heads, expected a number that divides the {heads[2]} value heads"
        )
    for name, x in mixtures.items():
        if not x.is_floating_point():
            raise TypeError(f"{where}: {name} has dtype {x.dtype}, expected a floating one")
    mask = checked(where, mask, sizes["b"], heads[1], sizes["m"], sizes["n"])
    if mask is not None and mask.heads > 1 and len(set(heads)) > 1:
        raise ValueError(
            f"{where}: the mask has {mask.heads} heads and there are {heads[0]} query, {heads[1]} softmax and "
            f"{heads[2]} value heads, expected one mask for all heads or one number of heads"
        )
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return {"q": q, "k": k, "v": v, **given, "mask": mask, "scale": scale}


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``talking_heads_attention``, causal, with one number of heads.

    Mixtures are far from the identity and asymmetric, so that mix-ups show. Most of what a head uses is its own and
    nothing is negative, so that its rows of weights stay positive and add up to 0.6 to 1.2.
    """
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((s.b, s.h, s.m, s.d), (s.b, s.g, s.n, s.d), (s.b, s.g, s.n, s.e))
    )
    logits, weights = (torch.rand(s.h, s.h, generator=generator, dtype=torch.float64) / s.h for _ in range(2))
    own = torch.eye(s.h, dtype=torch.float64)
    drawn = {"q": q, "k": k, "v": v, "mix_logits": own + logits, "mix_weights": 0.6 * own + 0.6 * weights}
    return {name: x.to(device, dtype) for name, x in drawn.items()} | {"mask": causal()}


def cost(
    sizes: Sizes,
    *,
    softmax_heads: int | None = None,
    value_heads: int | None = None,
    value_groups: int | None = None,
    mask: Mask | None = None,
    itemsize: int = 4,
) -> Cost:
    """Cost of one call; numbers of heads that are None are those of queries, or of keys. The state is a plain cache."""
    s = sizes
    inside, after, groups = softmax_heads or s.h, value_heads or s.h, value_groups or s.g
    pairs = s.m * s.n if mask is None else mask.visible_pairs(s.m, s.n) // (mask.batches * mask.heads)
    token = (s.g * s.d + groups * s.e) * itemsize
    return Cost(
        flops=2 * s.b * pairs * (s.h * s.d + inside * (s.h + after) + after * s.e),
        bytes=s.b * (s.m * (s.h * s.d + after * s.e) * itemsize + s.n * token) + inside * (s.h + after) * itemsize,
        state_bytes_per_token=token,
        state_bytes_fixed=0,
    )


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.talking_heads.layer import TalkingHeadsAttention, TalkingHeadsConfig  # noqa: E402


def _preset(place: LayerPlace) -> TalkingHeadsConfig:
    rotary = Rotary(place.width // place.heads)
    return TalkingHeadsConfig(place.width, place.heads, rotary=rotary, qk_norm=place.qk_norm)


SPEC = Mechanism(
    name="talking_heads",
    title="Talking-heads attention",
    equation="o = (N softmax(mask(M (q k^T * scale)))) v with M and N over heads",
    papers=("arXiv 2003.02436",),
    call=call,
    function=talking_heads_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk, finite_only=True), Backend("reference", _reference)),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True, separate_heads=False),
    cost=cost,
    layer=TalkingHeadsAttention,
    state=TokenState,
    presets=(Preset("talking", "Talking heads", "arXiv 2003.02436", _preset),),
)
