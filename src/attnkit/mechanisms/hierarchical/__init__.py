"""Hierarchical attention: a pyramid of causal softmax attentions, each over every second token of the one below."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import causal
from attnkit.mechanisms.hierarchical import chunk
from attnkit.mechanisms.hierarchical.reference import forward as reference
from attnkit.positions import Rotary
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import PyramidState

__all__ = [
    "SPEC",
    "HierarchicalAttention",
    "HierarchicalConfig",
    "hierarchical_attention",
    "hierarchical_attention_step",
]


def hierarchical_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    down: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    v_weight: Tensor | None = None,
    *,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    rotary: Rotary | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal softmax attention on ``1 + p`` levels, of which level ``l`` has every ``2^l``-th token.

    Position ``i`` takes from each level what the token last kept there, number ``floor(i / 2^l)``, has found.
    The tokens of level ``l + 1`` are ``x_j = down_l y_{2 j}``, ``y`` being the results of level ``l``. Logits are
    divided by ``sqrt(d)`` on every level.

    Parameters
    ----------
    q: (b, h, n, d), float64, float32, bfloat16 or float16: queries of level 0, a whole sequence.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    down: (p, h, e, x), floating: from a token's result, all heads, to its ``x`` numbers one level up; None for no
        level but the first, which is causal softmax attention.
    q_weight: (p, h, x, d), k_weight: (p, g, x, d), v_weight: (p, g, x, e): what each higher level attends with.
    q_gain, k_gain: (1 + p, d), floating: queries and keys of every level are divided by their root mean square and
        multiplied by these before they turn; None leaves them as they are.
    rotary: turns queries and keys of every level by the positions of their tokens, ``j 2^l``; None for none.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, n, (1 + p) e) in q's dtype: the levels' results side by side, the finest first.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.
    """
    checked = call(q, k, v, down, q_weight, k_weight, v_weight, q_gain=q_gain, k_gain=k_gain, rotary=rotary)
    result: Tensor = run(SPEC, checked, backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    down: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    v_weight: Tensor | None = None,
    *,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    rotary: Rotary | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``hierarchical_attention``; return them by name, as every backend gets them."""
    where = "hierarchical_attention"
    weights = {"down": down, "q_weight": q_weight, "k_weight": k_weight, "v_weight": v_weight}
    given = {name: x for name, x in weights.items() if x is not None}
    if 0 < len(given) < len(weights):
        raise ValueError(f"{where}: got {', '.join(given)}, expected all of {', '.join(weights)} or none of them")
    patterns = {
        "down": "levels h e x",
        "q_weight": "levels h x d",
        "k_weight": "levels g x d",
        "v_weight": "levels g x e",
    }
    sizes = shapes.check(
        where,
        q=(q, "b h n d"),
        k=(k, "b g n d"),
        v=(v, "b g n e"),
        **{name: (x, patterns[name]) for name, x in given.items()},
    )
    shapes.check_same(where, q=q, k=k, v=v)
    for name, x in (("q_gain", q_gain), ("k_gain", k_gain)):
        if x is not None:
            given[name] = x
            expected = (1 + sizes.get("levels", 0), sizes["d"])
            if x.shape != expected:
                raise ValueError(f"{where}: {name} has shape {tuple(x.shape)}, expected {expected}, a row a level")
    shapes.check_device(where, q=q, **given)
    shapes.check_groups(where, sizes["h"], sizes["g"])
    shapes.check_floating(where, **given)
    if rotary is not None and rotary.head_size != sizes["d"]:
        raise ValueError(f"{where}: rotary is made for head size {rotary.head_size}, keys have {sizes['d']}")
    return {"q": q, "k": k, "v": v, **weights, "q_gain": q_gain, "k_gain": k_gain, "rotary": rotary}


def hierarchical_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: PyramidState,
    down: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    v_weight: Tensor | None = None,
    *,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    rotary: Rotary | None = None,
) -> Tensor:
    """The same for the next ``m`` tokens after those that ``state`` holds, which it holds as well afterwards.

    Parameters
    ----------
    q: (b, h, m, d). k: (b, g, m, d). v: (b, g, m, e): of the new tokens, level 0, before any rotation.
    state: with as many levels as the weights make, ``1 + p``.
    down, q_weight, k_weight, v_weight, q_gain, k_gain, rotary: as in ``hierarchical_attention``.

    Returns
    -------
    o: (b, h, m, (1 + p) e) in q's dtype: rows of the new tokens.
    """
    checked = call(q, k, v, down, q_weight, k_weight, v_weight, q_gain=q_gain, k_gain=k_gain, rotary=rotary)
    levels = 1 if down is None else 1 + len(down)
    if state.levels != levels:
        raise ValueError(
            f"hierarchical_attention_step: the state has {state.levels} levels and the weights make {levels}, "
            f"expected one number: make the state for {levels}"
        )
    return chunk.step(state=state, **checked)


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``hierarchical_attention``: two levels, five or normalised ones with every third seed."""
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    levels, inner = (1, 4, 1)[seed % 3], 4
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return drawn.to(device, dtype)

    made = {
        "q": normal(s.b, s.h, s.n, s.d),
        "k": normal(s.b, s.g, s.n, s.d),
        "v": normal(s.b, s.g, s.n, s.e),
        "down": normal(levels, s.h, s.e, inner, scale=(s.h * s.e) ** -0.5),
        **{
            name: normal(levels, heads, inner, size, scale=inner**-0.5)
            for name, heads, size in (("q_weight", s.h, s.d), ("k_weight", s.g, s.d), ("v_weight", s.g, s.e))
        },
    }
    return made if seed % 3 != 2 else made | {name: normal(1 + levels, s.d) for name in ("q_gain", "k_gain")}


def cost(sizes: Sizes, *, levels: int = 2, inner: int = 4, itemsize: int = 4) -> Cost:
    """Cost of the last ``m`` of ``n`` tokens on ``levels`` levels, whose tokens have ``inner`` numbers between them.

    A token's share of the state is what every ``2^(levels - 1)`` tokens add, divided by as many; the rest, levels not
    full to the last token and the results they hold, counts as fixed.
    """
    s = sizes
    flops = moved = held = 0
    for level in range(levels):
        n, before = -(-s.n // 2**level), -(-(s.n - s.m) // 2**level)
        flops += 2 * s.h * causal().visible_pairs(n - before, n) * (s.d + s.e)
        if level:
            flops += 2 * (n - before) * inner * (s.h * s.e + s.h * s.d + s.g * (s.d + s.e))
        moved += (n - before) * s.h * s.d + s.m * s.h * s.e
        held += n * s.g * (s.d + s.e)
    token = s.g * (s.d + s.e) * itemsize * (2**levels - 1) // 2 ** (levels - 1)
    state = (held + (levels - 1) * s.h * s.e) * itemsize
    return Cost(
        flops=s.b * flops,
        bytes=s.b * (moved + held) * itemsize,
        state_bytes_per_token=token,
        state_bytes_fixed=state - token * s.n,
    )


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.hierarchical.layer import HierarchicalAttention, HierarchicalConfig  # noqa: E402


def _pyramid(place: LayerPlace) -> HierarchicalConfig:
    # Narrow higher levels: with full ones, two of them would outweigh a whole block of an ordinary decoder.
    inner = max(1, place.width // 4)
    rotary = Rotary(place.width // place.heads)
    return HierarchicalConfig(place.width, place.heads, inner=inner, rotary=rotary, qk_norm=place.qk_norm)


SPEC = Mechanism(
    name="hierarchical",
    title="Hierarchical attention",
    equation="y_l = softmax(causal(q_l k_l^T / sqrt(d))) v_l with x_{l+1} = down_l y_l[::2]; o_i = [y_l[i // 2^l]]_l",
    papers=("no paper: the pyramid of tutorials, made causal",),
    call=call,
    function=hierarchical_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk, finite_only=True), Backend("reference", _reference)),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True, separate_heads=False),
    cost=cost,
    layer=HierarchicalAttention,
    state=PyramidState,
    presets=(Preset("pyramid", "Multi-scale pyramid", "no paper", _pyramid),),
)
