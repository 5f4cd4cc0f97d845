"""Tensor product attention (TPA): queries, keys and values as sums of (head x channel) products, cached as factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import causal as causal_mask
from attnkit.mechanisms.tensor_product import chunk
from attnkit.mechanisms.tensor_product.reference import forward as reference
from attnkit.positions import Rotary
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import TokenState

__all__ = [
    "SPEC",
    "TensorProductAttention",
    "TensorProductConfig",
    "tensor_product_attention",
    "tensor_product_attention_step",
]


def tensor_product_attention(
    a_q: Tensor,
    b_q: Tensor,
    a_k: Tensor,
    b_k: Tensor,
    a_v: Tensor,
    b_v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of ``q = a_q b_q / R_q`` over ``k = a_k b_k / R_k`` and ``v = a_v b_v / R_v``, token by token.

    A token's ``a`` says how much of each of its ``R`` vectors ``b`` a head takes. The queries are the last ``m`` of the
    ``n`` positions. Ranks may differ.

    Parameters
    ----------
    a_q: (b, h, m, R_q), float64, float32, bfloat16 or float16; ``m`` is at most ``n``.
    b_q: (b, R_q, m, d), same dtype and device as all others.
    a_k: (b, h, n, R_k). b_k: (b, R_k, n, d). There are as many key heads as query heads.
    a_v: (b, h, n, R_v). b_v: (b, R_v, n, e).
    causal: hide later keys; otherwise every query sees every key.
    scale: multiplies ``q k^T``; ``d ** -0.5`` when None.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in a_q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Zhang et al. 2025, arXiv 2501.06425.
    """
    result: Tensor = run(SPEC, call(a_q, b_q, a_k, b_k, a_v, b_v, causal=causal, scale=scale), backend)
    return result


def call(
    a_q: Tensor,
    b_q: Tensor,
    a_k: Tensor,
    b_k: Tensor,
    a_v: Tensor,
    b_v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``tensor_product_attention``; return them by name, as every backend gets them."""
    _check("tensor_product_attention", a_q=a_q, b_q=b_q, a_k=a_k, b_k=b_k, a_v=a_v, b_v=b_v)
    factors = {"a_q": a_q, "b_q": b_q, "a_k": a_k, "b_k": b_k, "a_v": a_v, "b_v": b_v}
    return {**factors, "causal": causal, "scale": b_q.shape[3] ** -0.5 if scale is None else float(scale)}


def tensor_product_attention_step(
    a_q: Tensor, b_q: Tensor, a_k: Tensor, b_k: Tensor, a_v: Tensor, b_v: Tensor, *, scale: float | None = None
) -> Tensor:
    """The causal form for a few new tokens, from cached factors alone: no head's keys or values are ever formed.

    Arguments and result are those of ``tensor_product_attention``.
    """
    _check("tensor_product_attention_step", a_q=a_q, b_q=b_q, a_k=a_k, b_k=b_k, a_v=a_v, b_v=b_v)
    return chunk.step(a_q, b_q, a_k, b_k, a_v, b_v, b_q.shape[3] ** -0.5 if scale is None else scale)


def _check(where: str, **factors: Tensor) -> None:
    heads = {f"a_{x}": (factors[f"a_{x}"], f"b h {'m' if x == 'q' else 'n'} R_{x}") for x in "qkv"}
    channels = {
        f"b_{x}": (factors[f"b_{x}"], f"b R_{x} {'m' if x == 'q' else 'n'} {'e' if x == 'v' else 'd'}") for x in "qkv"
    }
    sizes = shapes.check(where, **heads, **channels)
    shapes.check_same(where, **factors)
    shapes.check_last(where, sizes["m"], sizes["n"])


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``tensor_product_attention``; ranks 5 and 7 are unlike most numbers of heads, so mix-ups show."""
    s = sizes or Sizes(b=2, h=4, g=4, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    shaped = {
        "a_q": (s.b, s.h, s.m, 5),
        "b_q": (s.b, 5, s.m, s.d),
        "a_k": (s.b, s.h, s.n, 7),
        "b_k": (s.b, 7, s.n, s.d),
        "a_v": (s.b, s.h, s.n, 5),
        "b_v": (s.b, 5, s.n, s.e),
    }
    # Twice a normal number: a mean of R products is smaller than its factors.
    return {
        name: (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)
        for name, shape in shaped.items()
    }


def cost(sizes: Sizes, *, ranks: tuple[int, int, int] = (6, 2, 2), itemsize: int = 4) -> Cost:
    """Cost of one causal call with ranks (R_q, R_k, R_v); a token's state is its factors of key and value."""
    s, (r_q, r_k, r_v) = sizes, ranks
    token = (r_k * (s.h + s.d) + r_v * (s.h + s.e)) * itemsize
    pairs = causal_mask().visible_pairs(s.m, s.n)
    expanded = s.h * (s.m * r_q * s.d + s.n * (r_k * s.d + r_v * s.e))
    return Cost(
        flops=2 * s.b * (expanded + s.h * pairs * (s.d + s.e)),
        bytes=s.b * (s.m * (r_q * (s.h + s.d) + s.h * s.e) * itemsize + s.n * token),
        state_bytes_per_token=token,
        state_bytes_fixed=0,
    )


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.tensor_product.layer import TensorProductAttention, TensorProductConfig  # noqa: E402


def _preset(place: LayerPlace) -> TensorProductConfig:
    rotary = Rotary(place.width // place.heads)
    return TensorProductConfig(place.width, place.heads, rotary=rotary, qk_norm=place.qk_norm)


SPEC = Mechanism(
    name="tensor_product",
    title="Tensor product attention",
    equation="o = softmax(causal(q k^T * scale)) v with q_h = sum_r a_q[h, r] b_q[r] / R_q, and k, v likewise",
    papers=("arXiv 2501.06425",),
    call=call,
    function=tensor_product_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk, finite_only=True), Backend("reference", _reference)),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True),
    cost=cost,
    layer=TensorProductAttention,
    state=TokenState,
    presets=(Preset("tpa", "Tensor product (TPA)", "arXiv 2501.06425", _preset),),
)
