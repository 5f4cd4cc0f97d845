"""Additive (Bahdanau) attention: a small network with one hidden layer scores each pair of query and key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import Mask, causal, checked
from attnkit.mechanisms.additive import chunk
from attnkit.mechanisms.additive.reference import forward as reference
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import KVState

__all__ = ["SPEC", "AdditiveAttention", "AdditiveConfig", "additive_attention"]


def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    gain: Tensor | None = None,
    *,
    mask: Mask | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Additive attention of ``m`` queries over ``n`` keys: ``softmax(weight . tanh(q_i + k_j)) v``.

    ``q`` and ``k`` are projected already, ``q = W_a s + b`` and ``k = U_a h``: a key's projection is paid once and not
    for every query. For masks the queries are the last ``m`` of the ``n`` positions. Values that are the unit matrix
    give the weights.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16; ``d`` is the hidden width, the paper's alignment width.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e), what is averaged; in the paper the encoder's states themselves.
    weight: (h, d), the paper's ``v_a``, one a head. There is no scale.
    gain: (h,) for the normalised form, in which ``gain * weight / |weight|`` scores; None scores with ``weight``.
    mask: what may be seen, as in ``softmax_attention``; a row that may see no key gives 0 and no gradient.
    return_lse: also return the log-sum-exp of each row's scores.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype; with ``return_lse`` the pair of it and lse (b, h, m), float32 (float64 for float64).

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Bahdanau, Cho and Bengio 2014, arXiv 1409.0473.
    """
    return run(SPEC, call(q, k, v, weight, gain, mask=mask, return_lse=return_lse), backend)


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    gain: Tensor | None = None,
    *,
    mask: Mask | Tensor | None = None,
    return_lse: bool = False,
) -> dict[str, Any]:
    """Check the arguments of ``additive_attention``; return them by name, as every backend gets them."""
    where = "additive_attention"
    sizes = shapes.check_call(where, q=(q, "b h m d"), k=(k, "b g n d"), v=(v, "b g n e"), weight=(weight, "h d"))
    if gain is not None:
        shapes.check(where, q=(q, "b h m d"), gain=(gain, "h"))
        shapes.check_device(where, q=q, gain=gain)
    mask = checked(where, mask, *(sizes[axis] for axis in "bhmn"))
    return {"q": q, "k": k, "v": v, "weight": weight, "gain": gain, "mask": mask, "return_lse": return_lse}


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``additive_attention``, causal, every other one normalised.

    ``tanh`` bounds what a key can do, so the weights add up to about 30: one key may then outweigh a hundred.
    """
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    q, k, v, noise = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((s.b, s.h, s.m, s.d), (s.b, s.g, s.n, s.d), (s.b, s.g, s.n, s.e), (s.h, s.d))
    )
    drawn = {"q": q, "k": k, "v": v, "weight": (30 + 5 * noise) / s.d}
    if seed % 2:
        drawn["gain"] = 30 * s.d**-0.5 + torch.rand(s.h, generator=generator, dtype=torch.float64)
    return {name: x.to(device, dtype) for name, x in drawn.items()} | {"mask": causal()}


def cost(sizes: Sizes, *, mask: Mask | None = None, itemsize: int = 4) -> Cost:
    """Cost of one call, a hyperbolic tangent counted as one operation; a token's state is its key and its value."""
    s = sizes
    pairs = s.m * s.n if mask is None else mask.visible_pairs(s.m, s.n) // (mask.batches * mask.heads)
    token = s.g * (s.d + s.e) * itemsize
    return Cost(
        flops=s.b * s.h * pairs * (4 * s.d + 2 * s.e),
        bytes=s.b * (s.h * s.m * (s.d + s.e) * itemsize + s.n * token) + s.h * s.d * itemsize,
        state_bytes_per_token=token,
        state_bytes_fixed=0,
    )


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.additive.layer import AdditiveAttention, AdditiveConfig  # noqa: E402


def _additive(place: LayerPlace) -> AdditiveConfig:
    return AdditiveConfig(place.width, place.heads)


def _normalised(place: LayerPlace) -> AdditiveConfig:
    return AdditiveConfig(place.width, place.heads, normalised=True)


SPEC = Mechanism(
    name="additive",
    title="Additive attention",
    equation="o = softmax(mask(weight . tanh(q_i + k_j))) v",
    papers=("arXiv 1409.0473",),
    call=call,
    function=additive_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk, finite_only=True), Backend("reference", _reference)),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True),
    cost=cost,
    layer=AdditiveAttention,
    state=KVState,
    presets=(
        Preset("bahdanau", "Additive (Bahdanau)", "arXiv 1409.0473", _additive),
        Preset("bahdanau_normalised", "Additive, normalised", "arXiv 1409.0473", _normalised),
    ),
)
