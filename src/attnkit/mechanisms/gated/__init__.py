"""Gated attention: softmax attention whose result each head multiplies by a sigmoid gate of the query's token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import Mask, causal, checked
from attnkit.mechanisms.gated import chunk
from attnkit.mechanisms.gated.reference import forward as reference
from attnkit.positions import Rotary
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import KVState

__all__ = ["SPEC", "GatedAttention", "GatedConfig", "gated_attention"]


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention times a gate for each query: ``sigmoid(gate) * softmax(mask(q k^T * scale)) v``.

    A gate of one number a head is the same as a gate of that head's weights, which then no longer add up to 1. The
    queries are the last ``m`` of the ``n`` positions. A row that may see no key gives 0 and no gradient.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    gate: (b, h, m, 1) for one gate a head or (b, h, m, e) for one a channel, any floating dtype: before the sigmoid.
    mask: what may be seen, as in ``softmax_attention``; None lets every query see every key.
    scale: multiplies ``q k^T``; ``d ** -0.5`` when None.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Qiu et al. 2025, Gated Attention for Large Language Models, arXiv 2505.06708.
    """
    result: Tensor = run(SPEC, call(q, k, v, gate, mask=mask, scale=scale), backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``gated_attention``; return them by name, as every backend gets them."""
    where = "gated_attention"
    sizes = shapes.check_call(where, q=(q, "b h m d"), k=(k, "b g n d"), v=(v, "b g n e"), gate=(gate, "b h m gates"))
    if sizes["gates"] not in (1, sizes["e"]):
        raise ValueError(
            f"{where}: gate has {sizes['gates']} numbers a head, expected 1, or {sizes['e']}: one for each channel of v"
        )
    if not gate.is_floating_point():
        raise TypeError(f"{where}: gate has dtype {gate.dtype}, expected a floating one: the sigmoid is taken here")
    return {
        "q": q,
        "k": k,
        "v": v,
        "gate": gate,
        "mask": checked(where, mask, *(sizes[axis] for axis in "bhmn")),
        "scale": sizes["d"] ** -0.5 if scale is None else float(scale),
    }


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``gated_attention``, causal; every other one has a gate a channel.

    Queries are half as large as keys: with logits above 10, the gradients of torch's fused attention, which stands
    behind this one, are up to 1.3 times the budget off.
    """
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    sizes_ = (
        (s.b, s.h, s.m, s.e if seed % 2 else 1),
        (s.b, s.h, s.m, s.d),
        (s.b, s.g, s.n, s.d),
        (s.b, s.g, s.n, s.e),
    )
    gate, q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in sizes_)
    drawn = {"q": q / 2, "k": k, "v": v, "gate": 2 * gate}
    return {name: x.to(device, dtype) for name, x in drawn.items()} | {"mask": causal()}


def cost(sizes: Sizes, *, mask: Mask | None = None, gates: int = 1, itemsize: int = 4) -> Cost:
    """Cost of one call with ``gates`` numbers a head and query; the state is that of softmax attention."""
    s = sizes
    pairs = s.m * s.n if mask is None else mask.visible_pairs(s.m, s.n) // (mask.batches * mask.heads)
    token = s.g * (s.d + s.e) * itemsize
    return Cost(
        flops=s.b * s.h * (2 * pairs * (s.d + s.e) + s.m * s.e),
        bytes=s.b * (s.h * s.m * (s.d + s.e + gates) * itemsize + s.n * token),
        state_bytes_per_token=token,
        state_bytes_fixed=0,
    )


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.gated.layer import GatedAttention, GatedConfig  # noqa: E402


def _config(place: LayerPlace, *, by_channel: bool) -> GatedConfig:
    rotary = Rotary(place.width // place.heads)
    return GatedConfig(place.width, place.heads, by_channel=by_channel, rotary=rotary, qk_norm=place.qk_norm)


SPEC = Mechanism(
    name="gated",
    title="Gated attention",
    equation="o = sigmoid(gate) * softmax(mask(q k^T * scale)) v",
    papers=("arXiv 2505.06708",),
    call=call,
    function=gated_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk, finite_only=True), Backend("reference", _reference)),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True, weights_sum_to_one=False),
    cost=cost,
    layer=GatedAttention,
    state=KVState,
    presets=(
        Preset("gate_heads", "Gated, one gate a head", "arXiv 2505.06708", lambda p: _config(p, by_channel=False)),
        Preset("gate_channels", "Gated, one gate a channel", "arXiv 2505.06708", lambda p: _config(p, by_channel=True)),
    ),
)
