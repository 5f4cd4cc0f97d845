"""CASTLE: causal attention with lookahead keys, which every later token updates; over all later tokens or a window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import causal
from attnkit.masks import window as window_mask
from attnkit.mechanisms.castle import chunk
from attnkit.mechanisms.castle.reference import forward as reference
from attnkit.positions import Rotary
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import RewrittenState

__all__ = ["SPEC", "CastleAttention", "CastleConfig", "castle_attention", "castle_attention_step"]


def castle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lookahead_q: Tensor,
    lookahead_k: Tensor,
    lookahead_v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    lookahead_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal softmax attention over logits ``scale * q_i k_s - SiLU(lookahead_scale * q_i u_s)``.

    The lookahead key ``u_s``, as query ``i`` meets it, is the sum over ``s < j <= i`` of ``lookahead_v_j``, each times
    ``sigmoid(lookahead_scale * lookahead_q_s lookahead_k_j)``; query ``s`` itself meets 0. The queries are the last
    ``m`` of the ``n`` positions.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16; ``m`` is at most ``n``.
    k: (b, h, n, d), same dtype and device. There are as many key heads as query heads.
    v: (b, h, n, e); ``e`` may differ from ``d``.
    lookahead_q, lookahead_k, lookahead_v: (b, h, n, d), same dtype.
    window: how many tokens after its own a lookahead key takes up (CASTLE-SWL); None for all. ``k`` has no window.
    scale: multiplies ``q k^T``; ``d ** -0.5`` when None.
    lookahead_scale: multiplies the other two products; ``scale`` when None, as in the paper.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Song et al. 2025, arXiv 2509.07301.
    """
    checked = call(
        q,
        k,
        v,
        lookahead_q,
        lookahead_k,
        lookahead_v,
        window=window,
        scale=scale,
        lookahead_scale=lookahead_scale,
    )
    result: Tensor = run(SPEC, checked, backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lookahead_q: Tensor,
    lookahead_k: Tensor,
    lookahead_v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    lookahead_scale: float | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``castle_attention``; return them by name, with a window of all tokens for none."""
    where = "castle_attention"
    lookahead = {"lookahead_q": lookahead_q, "lookahead_k": lookahead_k, "lookahead_v": lookahead_v}
    sizes = _check(where, {"q": q, "k": k, "v": v}, lookahead, "n")
    shapes.check_last(where, sizes["m"], sizes["n"])
    return {
        "q": q,
        "k": k,
        "v": v,
        **lookahead,
        "window": _window(where, window, sizes["n"]),
        **_scales(sizes["d"], scale, lookahead_scale),
    }


def castle_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lookahead_q: Tensor,
    lookahead_k: Tensor,
    lookahead_v: Tensor,
    u: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    lookahead_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same for the newest ``m`` tokens over a state, whose lookahead keys these tokens update.

    Parameters
    ----------
    q: (b, h, m, d). k: (b, h, n, d). v: (b, h, n, e). window, scale, lookahead_scale: as in ``castle_attention``.
    lookahead_q: (b, h, w, d) of the last ``w`` tokens, all that the new ones can reach: ``n`` of them, or
        ``min(n, window + m)``.
    lookahead_k, lookahead_v: (b, h, m, d), of the new tokens; no later step needs them.
    u: (b, h, n, d), float32 or float64: lookahead keys as the last step left them, zeros for the new tokens.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.
    u: (b, h, w, d) in u's dtype: the lookahead keys of the last ``w`` tokens as the next step wants them.
    """
    where = "castle_attention_step"
    lookahead = {"lookahead_k": lookahead_k, "lookahead_v": lookahead_v}
    sizes = _check(where, {"q": q, "k": k, "v": v}, lookahead, "m")
    more = shapes.check(
        where, q=(q, "b h m d"), k=(k, "b h n d"), lookahead_q=(lookahead_q, "b h w d"), u=(u, "b h n d")
    )
    shapes.check_same(where, q=q, lookahead_q=lookahead_q)
    m, n = sizes["m"], sizes["n"]
    shapes.check_last(where, m, n)
    reach = _window(where, window, n)
    if more["w"] != min(n, reach + m):
        raise ValueError(
            f"{where}: got lookahead_q of {more['w']} tokens, expected the last {min(n, reach + m)} of {n}: those that "
            f"{m} new tokens reach with window {window}"
        )
    if u.dtype != torch.promote_types(q.dtype, torch.float32) or u.device != q.device:
        raise TypeError(
            f"{where}: u is {u.dtype} on {u.device}, expected {torch.promote_types(q.dtype, torch.float32)} on "
            f"{q.device}: it is a sum over tokens"
        )
    return chunk.step(
        q, k, v, lookahead_q, lookahead_k, lookahead_v, u, reach, **_scales(sizes["d"], scale, lookahead_scale)
    )


def _check(where: str, main: dict[str, Tensor], lookahead: dict[str, Tensor], axis: str) -> dict[str, int]:
    """``axis`` is that of the tokens whose lookahead tensors are given: all ``n``, or the newest ``m``."""
    patterns = {"q": "b h m d", "k": "b g n d", "v": "b g n e"}
    patterns |= dict.fromkeys(lookahead, f"b g {axis} d")
    given = {**main, **lookahead}
    sizes = shapes.check(where, **{name: (x, patterns[name]) for name, x in given.items()})
    shapes.check_same(where, **given)
    if sizes["h"] != sizes["g"]:
        raise ValueError(
            f"{where}: got {sizes['h']} query heads and {sizes['g']} KV heads, expected one number: CASTLE defines no "
            f"sharing of lookahead keys, so repeat the KV heads"
        )
    return sizes


def _window(where: str, window: int | None, n: int) -> int:
    if window is None:
        return n
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"{where}: window is {window!r}, expected a number of later tokens, or None for all")
    if window < 1:
        raise ValueError(
            f"{where}: window is {window}, expected at least 1; without lookahead keys it is softmax attention"
        )
    return min(window, n)


def _scales(d: int, scale: float | None, lookahead_scale: float | None) -> dict[str, float]:
    scale = d**-0.5 if scale is None else float(scale)
    return {"scale": scale, "lookahead_scale": scale if lookahead_scale is None else float(lookahead_scale)}


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``castle_attention``; every other seed has a window of a third of the tokens.

    CASTLE shares no KV heads: there are ``sizes.h`` of them.
    """
    s = sizes or Sizes(b=2, h=4, g=4, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    key = (s.b, s.h, s.n, s.d)
    shaped = {"q": (s.b, s.h, s.m, s.d), "k": key, "v": (s.b, s.h, s.n, s.e)}
    shaped |= {"lookahead_q": key, "lookahead_k": key, "lookahead_v": key}
    drawn = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for name, shape in shaped.items()
    }
    return {**drawn, "window": max(1, s.n) if seed % 2 else 1 + s.n // 3}


def cost(sizes: Sizes, *, window: int | None = None, itemsize: int = 4) -> Cost:
    """Cost of the last ``m`` of ``n`` tokens over a state: about three times softmax attention's, and keys rewritten.

    A token's state is a key, a value, a lookahead query and a lookahead key, the last in float32; with a window only
    the last ``window`` tokens keep their lookahead query.
    """
    s = sizes
    reach = s.n if window is None else min(window, s.n)
    pairs = causal().visible_pairs(s.m, s.n)
    taken = window_mask(reach + 1).visible_pairs(s.m, s.n) - s.m  # a token takes up later ones, never itself
    key, summed = s.h * s.d * itemsize, s.h * s.d * max(4, itemsize)
    token = key + s.h * s.e * itemsize + summed
    return Cost(
        flops=2 * s.b * s.h * (pairs * (2 * s.d + s.e) + 2 * taken * s.d),
        bytes=s.b * (s.m * (3 * key + s.h * s.e * itemsize) + s.n * token + min(s.n, reach + s.m) * (key + summed)),
        state_bytes_per_token=token + (key if window is None else 0),
        state_bytes_fixed=0 if window is None else reach * key,
    )


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.castle.layer import CastleAttention, CastleConfig  # noqa: E402


def _full(place: LayerPlace) -> CastleConfig:
    size = place.width // place.heads
    # Seven maps a head in place of four: 4/7 of the heads have as many parameters, as in the paper's comparison.
    heads = max(1, round(place.heads * 4 / 7))
    rotary = Rotary(size) if size % 2 == 0 else None
    return CastleConfig(place.width, heads, size, rotary=rotary, qk_norm=place.qk_norm)


def _window_of(place: LayerPlace) -> CastleConfig:
    return replace(_full(place), window=place.window)


SPEC = Mechanism(
    name="castle",
    title="CASTLE",
    equation="o_i = softmax(causal(q_i k_s - SiLU(q_i u_s))) v with u_s = sum_{s<j<=i} sigmoid(q'_s k'_j) v'_j",
    papers=("arXiv 2509.07301",),
    call=call,
    function=castle_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk, finite_only=True), Backend("reference", _reference)),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True),
    cost=cost,
    layer=CastleAttention,
    state=RewrittenState,
    presets=(
        Preset("castle_full", "CASTLE", "arXiv 2509.07301", _full),
        Preset("castle_window", "CASTLE, lookahead keys with a window", "arXiv 2509.07301", _window_of),
    ),
)
