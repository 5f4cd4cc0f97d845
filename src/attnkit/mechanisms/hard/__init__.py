"""Hard attention: each query takes the value of one key, the best or one drawn, instead of a mean of all."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import Mask, causal, checked
from attnkit.mechanisms.hard import chunk
from attnkit.mechanisms.hard.reference import forward as reference
from attnkit.mechanisms.hard.reinforce import ReinforceLoss
from attnkit.positions import Rotary
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import KVState

__all__ = ["SPEC", "HardAttention", "HardConfig", "ReinforceLoss", "hard_attention"]

Kind = Literal["argmax", "gumbel", "sample"]


def hard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    kind: Kind = "argmax",
    temperature: float = 1.0,
    seed: int | None = None,
    return_log_prob: bool = False,
    backend: str | None = None,
) -> Any:
    """Hard attention of ``m`` queries over ``n`` keys: the value of one key, ``o_i = v_j``.

    "argmax" takes the key of the largest logit ``q k^T * scale``, the first of equals. "gumbel" adds Gumbel noise to
    the logits, which makes the largest a draw of their softmax. Both are straight-through: backwards, logits get the
    gradient of ``softmax(logits / temperature) v``, noise included. "sample" draws the same key as "gumbel" and gives
    logits no gradient but through its log-probability, see ``ReinforceLoss``. Values get a gradient where they were
    taken. For masks and noise the queries are the last ``m`` of the ``n`` positions.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    mask: what may be seen, as in ``softmax_attention``; a row that may see no key gives 0 and no gradient.
    scale: multiplies ``q k^T``; ``d ** -0.5`` when None.
    kind: "argmax", "gumbel" or "sample".
    temperature: of the weights whose gradient is taken; it does not change which key is. Not for "sample".
    seed: replays the noise, which goes by batch, head and the positions of query and key; drawn from torch's generator
        when None. Not for "argmax".
    return_log_prob: also return the logarithm of the softmax weight of the key drawn, and the entropy of the weights;
        0 and 0 for a row that may see no key. For "sample" only.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype; with ``return_log_prob`` the triple of it, log_prob and entropy, (b, h, m) each,
        float32 (float64 for float64).

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Xu et al. 2015, arXiv 1502.03044; Jang et al. 2016, arXiv 1611.01144.
    """
    checked_call = call(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        kind=kind,
        temperature=temperature,
        seed=seed,
        return_log_prob=return_log_prob,
    )
    return run(SPEC, checked_call, backend)


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    kind: Kind = "argmax",
    temperature: float = 1.0,
    seed: int | None = None,
    return_log_prob: bool = False,
) -> dict[str, Any]:
    """Check the arguments of ``hard_attention``; return them by name, as every backend gets them."""
    where = "hard_attention"
    sizes = shapes.check_call(where, q=(q, "b h m d"), k=(k, "b g n d"), v=(v, "b g n e"))
    if sizes["d"] == 0:
        raise ValueError(f"{where}: key size is 0, expected at least 1")
    if kind not in ("argmax", "gumbel", "sample"):
        raise ValueError(f"{where}: kind is {kind!r}, expected 'argmax', 'gumbel' or 'sample'")
    if not temperature > 0:
        raise ValueError(f"{where}: temperature is {temperature}, expected a positive number")
    if kind == "sample" and temperature != 1:
        raise ValueError(
            f"{where}: temperature is {temperature} and kind 'sample', which draws from the softmax of the logits: "
            f"divide scale by it"
        )
    if kind == "argmax" and seed is not None:
        raise ValueError(f"{where}: seed is {seed} and kind 'argmax', which draws nothing: drop one")
    if return_log_prob and kind != "sample":
        raise ValueError(f"{where}: return_log_prob is True and kind {kind!r}, expected kind 'sample': drop one")
    if kind != "argmax" and seed is None:
        seed = int(torch.randint(1 << 62, ()))
    return {
        "q": q,
        "k": k,
        "v": v,
        "mask": checked(where, mask, *(sizes[axis] for axis in "bhmn")),
        "scale": sizes["d"] ** -0.5 if scale is None else float(scale),
        "kind": kind,
        "temperature": float(temperature),
        "seed": seed,
        "return_log_prob": return_log_prob,
    }


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``hard_attention``, causal, in which no query has two keys whose scores rounding could swap.

    A query that has is drawn again; where half precision makes keys equal, they are so for every order of the sums.
    """
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = drawn(s.b, s.h, s.m, s.d), drawn(s.b, s.g, s.n, s.d), drawn(s.b, s.g, s.n, s.e)
    for _ in range(8 if s.n > 1 else 0):
        scores = q.double() @ k.double().repeat_interleave(s.h // s.g, 1).mT
        close = scores.sort(-1).values.diff(dim=-1) < 1e-5 * scores.abs().amax(-1, keepdim=True)
        q = torch.where(close.any(-1, keepdim=True), drawn(*q.shape), q)
    return {"q": q.to(device), "k": k.to(device), "v": v.to(device), "mask": causal(), "temperature": 0.5}


def cost(sizes: Sizes, *, mask: Mask | None = None, itemsize: int = 4) -> Cost:
    """Cost of one call: scores of all pairs, but one value a query; a token's state is its key and its value."""
    s = sizes
    pairs = s.m * s.n if mask is None else mask.visible_pairs(s.m, s.n) // (mask.batches * mask.heads)
    values = min(s.h * s.m, s.g * s.n)
    return Cost(
        flops=2 * s.b * s.h * pairs * s.d,
        bytes=s.b * (s.h * s.m * (s.d + s.e) + s.g * s.n * s.d + values * s.e) * itemsize,
        state_bytes_per_token=s.g * (s.d + s.e) * itemsize,
        state_bytes_fixed=0,
    )


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.hard.layer import HardAttention, HardConfig  # noqa: E402


def _argmax(place: LayerPlace) -> HardConfig:
    rotary = Rotary(place.width // place.heads)
    return HardConfig(place.width, place.heads, rotary=rotary, qk_norm=place.qk_norm)


def _gumbel(place: LayerPlace) -> HardConfig:
    rotary = Rotary(place.width // place.heads)
    return HardConfig(place.width, place.heads, kind="gumbel", rotary=rotary, qk_norm=place.qk_norm)


SPEC = Mechanism(
    name="hard",
    title="Hard attention",
    equation="o_i = v_j with j = argmax(mask(q k^T * scale) + noise)",
    papers=("arXiv 1502.03044", "arXiv 1611.01144", "arXiv 1611.00712"),
    call=call,
    function=hard_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk), Backend("reference", _reference)),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True, soft=False),
    cost=cost,
    layer=HardAttention,
    state=KVState,
    presets=(
        Preset("hard_argmax", "Hard, best key", "arXiv 1502.03044", _argmax),
        Preset("hard_gumbel", "Hard, Gumbel straight-through", "arXiv 1611.01144", _gumbel),
    ),
)
