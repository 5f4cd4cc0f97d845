"""Interleaved head attention (IHA): each head attends over several mixtures of all heads, side by side in one text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import causal as earlier
from attnkit.masks import window as last
from attnkit.mechanisms.iha import chunk
from attnkit.mechanisms.iha.reference import forward as reference
from attnkit.mechanisms.iha.virtual import Order, check_order, pseudo_tokens, visibility
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.positions import Rotary
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import KVState

__all__ = [
    "SPEC",
    "InterleavedHeadAttention",
    "InterleavedHeadConfig",
    "iha_attention",
    "iha_attention_step",
    "pseudo_tokens",
]


def iha_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_q: Tensor,
    mix_k: Tensor,
    mix_v: Tensor,
    collapse: Tensor,
    *,
    causal: Order | None = "flat",
    window: int | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of each head over ``n p`` pseudo tokens: ``p`` mixtures of all heads for each of ``n`` tokens.

    The queries are the last ``m`` of the ``n`` tokens. Pseudo token ``i`` of token ``t`` stands at ``t p + i``.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16; ``m`` is at most ``n``.
    k: (b, h, n, d), same dtype and device; as many heads as queries have.
    v: (b, h, n, e); ``e`` may differ from ``d``.
    mix_q, mix_k, mix_v: (h, h, p), floating: what each head (first axis) gives to pseudo token ``i`` of each head.
    collapse: (h, h * p), floating: what each head takes of pseudo token ``i`` of head ``j``, in column ``j p + i``; or
        (h, p) for its own alone.
    causal: "flat" lets a pseudo token see those at its own position and before, so that not all of its own token's
        are seen; "token" lets it see all of its own token's as well; None lets all see all.
    window: number of visible *tokens*, the query's own included; None for all. Needs a causal order.
    rotary: turns queries and keys after the mixture, by the positions of pseudo tokens. For positions of tokens, turn
        ``q`` and ``k`` before the call: the mixture does not mind.
    scale: multiplies ``q k^T``; ``d ** -0.5`` when None, whatever ``p``.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Duvvuri et al. 2026, arXiv 2602.21371.
    """
    given = call(
        q, k, v, mix_q, mix_k, mix_v, collapse, causal=causal, window=window, rotary=rotary, scale=scale
    )  # fmt: skip
    result: Tensor = run(SPEC, given, backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_q: Tensor,
    mix_k: Tensor,
    mix_v: Tensor,
    collapse: Tensor,
    *,
    causal: Order | None = "flat",
    window: int | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``iha_attention``; return them by name, as every backend gets them."""
    where = "iha_attention"
    mixtures = {"mix_q": mix_q, "mix_k": mix_k, "mix_v": mix_v}
    sizes = _check(where, q, k, v, mixtures, collapse, rotary)
    shapes.check_last(where, sizes["m"], sizes["n"])
    check_order(where, causal, window)
    return {
        **{"q": q, "k": k, "v": v, **mixtures, "collapse": collapse},
        **{"causal": causal, "window": window, "rotary": rotary},
        "scale": q.shape[3] ** -0.5 if scale is None else float(scale),
    }


def iha_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_q: Tensor,
    collapse: Tensor,
    *,
    causal: Order = "flat",
    window: int | None = None,
    rotary: Rotary | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same for the newest ``m`` tokens over a state of pseudo keys and values.

    Parameters
    ----------
    q: (b, h, m, d): queries of the new tokens, not mixed yet.
    k: (b, h, n * p, d), v: (b, h, n * p, e): what ``pseudo_tokens`` gave for each token, the new ones included.
    mix_q, collapse, causal, window, rotary, scale: as in ``iha_attention``.
    positions: int64 (n,), where the tokens of the state stand when that is not 0 to n - 1, as in a ring.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.
    """
    where = "iha_attention_step"
    sizes = _check(where, q, k, v, {"mix_q": mix_q}, collapse, rotary)
    check_order(where, causal, window)
    m, p = sizes["m"], sizes["pseudo_tokens"]
    n = sizes["n"] // p
    if n * p != sizes["n"]:
        raise ValueError(f"{where}: got {sizes['n']} pseudo keys, expected {p} for each token of the state")
    shapes.check_last(where, m, n)
    first, length = (0, n) if positions is None else (int(positions.min()), int(positions.max()) + 1)
    queries = pseudo_tokens(q, mix_q, rotary=rotary, start=length - m).to(k.dtype)
    if window is not None and window >= length - first:
        window = None
    # One query of the order "token" sees all that is left: no mask to make for every length anew.
    mask = None if m == 1 and causal == "token" and window is None else visibility(causal, window, p)
    bias = None
    if positions is not None and mask is not None and bool((positions.diff() != 1).any()):
        each = torch.arange(p, device=positions.device)
        new = torch.arange(length - m, length, device=positions.device)
        stand, held = ((of[:, None] * p + each).flatten() for of in (new, positions))
        zero = stand.new_zeros(1)
        hidden = ~mask.visible(zero, zero, stand[:, None], held)
        mask, bias = None, torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o = softmax_attention(queries, k, v, mask=mask, bias=bias, scale=scale)
    return chunk.collapsed(o, collapse, p)


def _check(
    where: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixtures: dict[str, Tensor],
    collapse: Tensor,
    rotary: Rotary | None,
) -> dict[str, int]:
    for name, x in (("k", k), ("v", v)):
        if isinstance(x, Tensor) and isinstance(q, Tensor) and x.dim() == q.dim() == 4 and x.shape[1] != q.shape[1]:
            raise ValueError(
                f"{where}: got {q.shape[1]} query heads and {x.shape[1]} heads in {name}, expected as many: each head "
                f"is mixed of all, and the paper has no shared KV heads: repeat them"
            )
    patterns: dict[str, tuple[Any, str]] = {"q": (q, "b h m d"), "k": (k, "b h n d"), "v": (v, "b h n e")}
    for name, x in mixtures.items():
        patterns[name] = (x, "h given_heads pseudo_tokens")
    sizes = shapes.check(where, **patterns, collapse=(collapse, "h collapsed"))
    shapes.check_same(where, q=q, k=k, v=v)
    shapes.check_device(where, q=q, **mixtures, collapse=collapse)
    h, p = sizes["h"], sizes["pseudo_tokens"]
    if sizes["given_heads"] != h or p == 0:
        name, x = next(iter(mixtures.items()))
        raise ValueError(f"{where}: {name} has shape {tuple(x.shape)}, expected ({h}, {h}, p) with p at least 1")
    if sizes["collapsed"] not in (p, h * p):
        raise ValueError(
            f"{where}: collapse has shape {tuple(collapse.shape)}, expected ({h}, {h * p}) to mix the heads again, or "
            f"({h}, {p}) to keep them apart"
        )
    if rotary is not None and rotary.head_size != sizes["d"]:
        raise ValueError(f"{where}: rotary is made for head size {rotary.head_size}, heads have {sizes['d']}")
    return sizes


PSEUDO = 3
"""Pseudo tokens of ``sample`` and ``cost``."""


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``iha_attention``: three pseudo tokens, rotary, a window that long calls feel, ``h`` KV heads."""
    s = sizes or Sizes(b=2, h=4, g=4, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    mix = (s.h, s.h, PSEUDO)
    shapes_of = {
        **{"q": (s.b, s.h, s.m, s.d), "k": (s.b, s.h, s.n, s.d), "v": (s.b, s.h, s.n, s.e)},
        **{"mix_q": mix, "mix_k": mix, "mix_v": mix, "collapse": (s.h, s.h * PSEUDO)},
    }
    drawn = {name: torch.randn(of, generator=generator, dtype=torch.float64) for name, of in shapes_of.items()}
    for name in ("mix_q", "mix_k", "mix_v", "collapse"):
        drawn[name] /= s.h**0.5
    rotary = Rotary(s.d, rotary_size=s.d // 2 * 2) if s.d > 1 else None
    return {**{name: x.to(device, dtype) for name, x in drawn.items()}, "window": 60, "rotary": rotary}


def cost(
    sizes: Sizes,
    *,
    pseudo: int = PSEUDO,
    causal: Order | None = "flat",
    window: int | None = None,
    separate: bool = False,
    itemsize: int = 4,
) -> Cost:
    """Cost of the newest ``m`` tokens over ``n``; the earlier ones' pseudo keys and values come from the state.

    ``separate`` is the collapse that keeps heads apart. A window needs a fixed state instead of a growing one.
    """
    s, p = sizes, pseudo
    if window is not None and window >= s.n:
        window = None  # nothing to let go of yet
    if causal is None:
        pairs = s.m * s.n * p * p
    else:
        tokens = (earlier() if window is None else last(window)).visible_pairs(s.m, s.n)
        # A flat order hides the later pseudo tokens of the query's own token.
        pairs = tokens * p * p - (s.m * p * (p - 1) // 2 if causal == "flat" else 0)
    mixed = s.m * s.h * p * (s.h * (2 * s.d + s.e) + (1 if separate else s.h) * s.e)
    token = s.h * p * (s.d + s.e) * itemsize
    return Cost(
        flops=2 * s.b * (s.h * pairs * (s.d + s.e) + mixed),
        bytes=s.b * (s.h * s.m * (s.d + s.e) * itemsize + s.n * token),
        state_bytes_per_token=0 if window else token,
        state_bytes_fixed=window * token if window else 0,
    )


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.iha.layer import InterleavedHeadAttention, InterleavedHeadConfig  # noqa: E402


def _flat(place: LayerPlace, window: int | None = None) -> InterleavedHeadConfig:
    rotary = Rotary(place.width // place.heads)
    return InterleavedHeadConfig(place.width, place.heads, window=window, rotary=rotary, qk_norm=place.qk_norm)


SPEC = Mechanism(
    name="iha",
    title="Interleaved head attention",
    equation="o = collapse(softmax(causal(rotary(mix(q)) rotary(mix(k))^T * scale)) mix(v)) over n p pseudo tokens",
    papers=("arXiv 2602.21371",),
    call=call,
    function=iha_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk, finite_only=True), Backend("reference", _reference)),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True, separate_heads=False),
    cost=cost,
    layer=InterleavedHeadAttention,
    state=KVState,
    presets=(
        Preset("iha_flat", "Interleaved heads (IHA)", "arXiv 2602.21371", _flat),
        Preset("iha_window", "IHA in a window", "arXiv 2602.21371", lambda place: _flat(place, place.window)),
    ),
)
