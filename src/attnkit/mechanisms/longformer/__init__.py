"""Longformer attention: a window for every token, and a few global tokens with projections of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import symmetric_window
from attnkit.mechanisms.longformer import chunk, cpu
from attnkit.mechanisms.longformer.reference import forward as reference
from attnkit.spec import Backend, Cost, Laws, Mechanism, Sizes

__all__ = ["SPEC", "LongformerAttention", "LongformerConfig", "longformer_attention"]


def longformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_q: Tensor,
    global_k: Tensor,
    global_v: Tensor,
    global_positions: Tensor,
    *,
    radius: int,
    keep: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Bidirectional attention of each token to its neighbours and the global tokens, and of those to all tokens.

    A local token takes one softmax over the keys at most ``radius`` away and the global tokens, all of them ``k`` and
    ``v``, each key once. A global token asks with ``global_q`` and reads ``global_k`` and ``global_v`` of all tokens.

    Parameters
    ----------
    q: (b, h, n, d), float64, float32, bfloat16 or float16.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    global_q: (b, h, c, d), queries of the global tokens.
    global_k: (b, g, n, d). global_v: (b, g, n, e).
    global_positions: (b, c), integers: where the token of each of ``global_q`` stands; -1 for a place without one, so
        that sequences of a batch may have more and fewer. No position twice.
    radius: how far a local token sees on either side; the paper's window is ``2 * radius``.
    keep: (b, n), bool, True for a real token; padding is seen by none, is never global, and its own rows are 0.
    scale: multiplies ``q k^T`` of both kinds; ``d ** -0.5`` when None.
    backend: "cpu", "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, n, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together; NotImplementedError: the named backend cannot run them.

    Source: Beltagy, Peters and Cohan 2020, arXiv 2004.05150.
    """
    checked = call(q, k, v, global_q, global_k, global_v, global_positions, radius=radius, keep=keep, scale=scale)
    result: Tensor = run(SPEC, checked, backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_q: Tensor,
    global_k: Tensor,
    global_v: Tensor,
    global_positions: Tensor,
    *,
    radius: int,
    keep: Tensor | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``longformer_attention``; return them by name, with padding no longer among the global."""
    where = "longformer_attention"
    sizes = shapes.check(
        where,
        q=(q, "b h n d"),
        k=(k, "b g n d"),
        v=(v, "b g n e"),
        global_q=(global_q, "b h globals d"),
        global_k=(global_k, "b g n d"),
        global_v=(global_v, "b g n e"),
        global_positions=(global_positions, "b globals"),
    )
    shapes.check_same(where, q=q, k=k, v=v, global_q=global_q, global_k=global_k, global_v=global_v)
    shapes.check_device(where, q=q, global_positions=global_positions)
    shapes.check_groups(where, sizes["h"], sizes["g"])
    if radius < 0:
        raise ValueError(f"{where}: radius is {radius}, expected at least 0")
    keep = shapes.kept(where, q, keep)
    return {
        "q": q,
        "k": k,
        "v": v,
        "global_q": global_q,
        "global_k": global_k,
        "global_v": global_v,
        "global_positions": _checked_positions(where, global_positions, keep),
        "radius": radius,
        "keep": keep,
        "scale": q.shape[3] ** -0.5 if scale is None else float(scale),
    }


def _checked_positions(where: str, positions: Tensor, keep: Tensor) -> Tensor:
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise TypeError(f"{where}: global_positions has dtype {positions.dtype}, expected integers, -1 for none")
    if positions.numel() == 0 or keep.numel() == 0:
        return positions.long()
    # Looking at values would break a graph that is being traced, and `attnkit explain` asks with tensors without any.
    if not (torch.compiler.is_compiling() or isinstance(positions, FakeTensor)):
        low, high = positions.min().item(), positions.max().item()
        if low < -1 or high >= keep.shape[1]:
            wrong = low if low < -1 else high
            raise ValueError(
                f"{where}: global_positions holds {wrong}, expected 0 to {keep.shape[1] - 1}, or -1 for none"
            )
        ordered = positions.sort(-1).values
        twice = ordered[:, 1:][(ordered.diff(dim=-1) == 0) & (ordered[:, 1:] >= 0)]
        if len(twice):
            raise ValueError(f"{where}: global_positions holds {twice[0]} twice in a sequence, expected each once")
    positions = positions.long()
    return torch.where(keep.gather(1, positions.clamp(min=0)), positions, -1)


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``longformer_attention``: two global tokens, one in every other sequence, radius 5.

    One is among the first, so that it also lies in windows. Every other seed pads up to a third of each sequence.
    There are as many queries as keys, whatever ``sizes.m``.
    """
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    globals_ = min(2, s.n)
    drawn = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for name, shape in {
            "q": (s.b, s.h, s.n, s.d),
            "k": (s.b, s.g, s.n, s.d),
            "v": (s.b, s.g, s.n, s.e),
            "global_q": (s.b, s.h, globals_, s.d),
            "global_k": (s.b, s.g, s.n, s.d),
            "global_v": (s.b, s.g, s.n, s.e),
        }.items()
    }
    places = torch.rand(s.b, s.n, generator=generator).argsort(-1)[:, :globals_]
    if s.n > 4:
        places[:, 0], places[:, 1] = places[:, 0] % 3, 3 + places[:, 1] % (s.n - 3)
    places[1::2, 1:] = -1
    given = {**drawn, "global_positions": places.to(device), "radius": 5}
    if seed % 2:
        real = s.n - torch.randint(s.n // 3 + 1, (s.b, 1), generator=generator)
        given["keep"] = (torch.arange(s.n) < real).to(device)
    return given


def cost(sizes: Sizes, *, radius: int = 256, tokens: int = 1, itemsize: int = 4) -> Cost:
    """Cost of one call over ``sizes.n`` tokens with ``tokens`` global ones; there is no decoding and no state."""
    s = sizes
    pairs = symmetric_window(radius).visible_pairs(s.n, s.n) + 2 * tokens * s.n
    moved = s.h * (s.n + tokens) * s.d + s.h * s.n * s.e + 2 * s.g * s.n * (s.d + s.e)
    return Cost(
        flops=2 * s.b * s.h * pairs * (s.d + s.e),
        bytes=s.b * moved * itemsize,
        state_bytes_per_token=0,
        state_bytes_fixed=0,
    )


def _cpu() -> Any:
    return cpu.forward


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.longformer.layer import LongformerAttention, LongformerConfig  # noqa: E402

SPEC = Mechanism(
    name="longformer",
    title="Longformer attention",
    equation="o = softmax(window(q k^T * scale) and global keys) v; global rows softmax(q_g k_g^T * scale) v_g",
    papers=("arXiv 2004.05150",),
    call=call,
    function=longformer_attention,
    sample=sample,
    reference=reference,
    backends=(
        Backend("cpu", _cpu, cpu.rejects),
        Backend("chunk", _chunk, finite_only=True),
        Backend("reference", _reference),
    ),
    # Windows and global tokens look both ways, so no later token can be added: an encoder's layer, with no state and,
    # for the same reason, no presets, which are rows of decoders.
    laws=Laws(causal=False, stateful=False, step_equals_prefill=False, length_invariant=True),
    cost=cost,
    layer=LongformerAttention,
)
