"""PaTH attention: data-dependent reflections between key and query in place of rotary, with forget gates or without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import causal
from attnkit.mechanisms.path import chunk
from attnkit.mechanisms.path.reference import forward as reference
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import RewrittenState

__all__ = ["SPEC", "PathAttention", "PathConfig", "path_attention", "path_attention_step"]


def path_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    log_f: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal softmax attention over ``logit_ij = scale * k_j^T H_{j+1} ... H_i q_i`` with ``H = I - beta w w^T``.

    The queries are the last ``m`` of the ``n`` positions. With ``log_f`` it is PaTH-FoX: the sum of ``log_f`` from
    ``j + 1`` to ``i`` is added to the logit, after the scale.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16; ``m`` is at most ``n``.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    w: (b, g, n, d), same dtype: directions of unit length.
    beta: (b, g, n), any floating dtype, 0 to 2. 0 everywhere is softmax attention without positions. A token whose
        ``beta |w|^2`` is negative or beyond 2.1 is no reflection: results are NaN from it on.
    log_f: (b, h, n), any floating dtype, finite and at most 0, or None.
    scale: multiplies the product of queries and keys, not the gates; ``d ** -0.5`` when None.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Yang et al. 2025, arXiv 2505.16381.
    """
    result: Tensor = run(SPEC, call(q, k, v, w, beta, log_f, scale=scale), backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    log_f: Tensor | None = None,
    *,
    scale: float | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``path_attention``; return them by name, as every backend gets them."""
    _check("path_attention", {"q": q, "k": k, "v": v, "w": w}, {"beta": beta, "log_f": log_f}, "n")
    given = {"q": q, "k": k, "v": v, "w": w, "beta": beta, "log_f": log_f}
    return {**given, "scale": q.shape[3] ** -0.5 if scale is None else float(scale)}


def path_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    total: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same for the newest ``m`` tokens over a state, whose keys move on by the reflections of these tokens.

    Parameters
    ----------
    q: (b, h, m, d). v: (b, g, n, e). scale: as in ``path_attention``.
    k: (b, g, n, d): the keys that the last step returned, then the new ones as they are.
    w: (b, g, m, d) and beta: (b, g, m), of the new tokens.
    total: (b, h, n), float32 or float64: ``log f_1 + ... + log f_j`` of every token, or None.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.
    keys: (b, g, n, d), float32 or float64: all keys as the next step wants them.
    """
    _check("path_attention_step", {"q": q, "k": k, "v": v, "w": w}, {"beta": beta, "total": total}, "m")
    return chunk.step(q, k, v, w, beta, total, q.shape[3] ** -0.5 if scale is None else scale)


def _check(where: str, main: dict[str, Tensor], side: dict[str, Tensor | None], reflected: str) -> None:
    """``reflected`` is the axis of the tokens that have reflections: all ``n`` keys, or the newest ``m``."""
    patterns = {"q": "b h m d", "k": "b g n d", "v": "b g n e", "w": f"b g {reflected} d", "beta": f"b g {reflected}"}
    patterns |= {"log_f": "b h n", "total": "b h n"}
    given = {**main, **{name: x for name, x in side.items() if x is not None}}
    sizes = shapes.check(where, **{name: (x, patterns[name]) for name, x in given.items()})
    shapes.check_same(where, **main)
    shapes.check_device(where, **given)
    shapes.check_groups(where, sizes["h"], sizes["g"])
    shapes.check_last(where, sizes["m"], sizes["n"])
    shapes.check_floating(where, **given)


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``path_attention``: strong reflections (beta 0.2 to 1.8) and gates, so that every part shows."""
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    q, k, v, w, beta, gates = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (
            (s.b, s.h, s.m, s.d),
            (s.b, s.g, s.n, s.d),
            (s.b, s.g, s.n, s.e),
            (s.b, s.g, s.n, s.d),
            (s.b, s.g, s.n),
            (s.b, s.h, s.n),
        )
    )
    drawn = {"q": q, "k": k, "v": v, "w": normalize(w, dim=-1), "beta": 0.2 + 1.6 * torch.sigmoid(beta)}
    drawn["log_f"] = logsigmoid(2 + gates)
    return {name: x.to(device, dtype) for name, x in drawn.items()}


def cost(sizes: Sizes, *, gates: bool = False, itemsize: int = 4) -> Cost:
    """Cost of one call: beside softmax attention's, the walk over blocks, or in a step the rewriting of every key.

    A token's state is its key, its value and, with gates, a float32 sum a query head; the layer's short convolution
    keeps two rows.
    """
    s = sizes
    pairs = causal().visible_pairs(s.m, s.n)
    moving = 4 * s.g * s.n * s.d if s.m == 1 else 2 * s.h * pairs * s.d * s.d // chunk.BLOCK
    token = s.g * (s.d + s.e) * itemsize + (4 * s.h if gates else 0)
    rewritten = s.g * s.n * s.d * itemsize if s.m == 1 else 0
    return Cost(
        flops=s.b * (2 * s.h * pairs * (s.d + s.e) + moving),
        bytes=s.b * (s.h * s.m * (s.d + s.e) * itemsize + s.n * token + s.g * s.m * s.d * itemsize + rewritten),
        state_bytes_per_token=token,
        state_bytes_fixed=2 * s.g * s.d * itemsize,
    )


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.path.layer import PathAttention, PathConfig  # noqa: E402


def _path(place: LayerPlace) -> PathConfig:
    return PathConfig(place.width, place.heads, qk_norm=place.qk_norm)


def _path_fox(place: LayerPlace) -> PathConfig:
    return PathConfig(place.width, place.heads, gates=True, qk_norm=place.qk_norm)


SPEC = Mechanism(
    name="path",
    title="PaTH attention",
    equation="o = softmax(causal(k_j^T H_{j+1} ... H_i q_i * scale + c_i - c_j)) v with H = I - beta w w^T",
    papers=("arXiv 2505.16381", "arXiv 2503.02130"),
    call=call,
    function=path_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk, finite_only=True), Backend("reference", _reference)),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True),
    cost=cost,
    layer=PathAttention,
    state=RewrittenState,
    presets=(
        Preset("path_plain", "PaTH", "arXiv 2505.16381", _path),
        Preset("path_fox", "PaTH with forget gates", "arXiv 2505.16381", _path_fox),
    ),
)
