"""Retention: a sum over the past that fades at one fixed rate a head, without softmax and without a normaliser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.costs import retention as cost
from attnkit.dispatch import run
from attnkit.mechanisms.retention import chunk, cpu
from attnkit.mechanisms.retention.decays import minimax_decays, retnet_decays
from attnkit.mechanisms.retention.reference import forward as reference
from attnkit.positions import Rotary
from attnkit.recurrence import exactly
from attnkit.spec import Backend, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import RecurrentState

__all__ = [
    "SPEC",
    "RetentionAttention",
    "RetentionConfig",
    "minimax_decays",
    "retention_attention",
    "retention_attention_step",
    "retnet_decays",
]


def retention_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    keep: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal sums with a fixed decay a head: ``o_i = scale * sum_{j <= i} e^((i - j) log_decay) (q_i . k_j) v_j``.

    The queries are the last ``m`` of the ``n`` positions. Nothing divides the sums: a norm after it is the layer's.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16; ``m`` is at most ``n``. Sums are float32 at least.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    log_decay: (h,), any floating dtype: natural logarithms of the decays, finite and at most 0, which never fades. See
        ``retnet_decays`` and ``minimax_decays``.
    scale: multiplies the products; ``d ** -0.5`` when None.
    keep: (b, n) bool, False for padding, which neither adds to a sum nor lets it fade.
    backend: "cpu", "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Sun et al. 2023, arXiv 2307.08621 (RetNet); Qin et al. 2024, arXiv 2401.04658 (lightning attention).
    """
    with exactly(q.device):
        result: Tensor = run(SPEC, call(q, k, v, log_decay, scale=scale, keep=keep), backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    keep: Tensor | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``retention_attention``; return them by name, as every backend gets them."""
    sizes = _check("retention_attention", "n", keep, q=q, k=k, v=v, log_decay=log_decay)
    shapes.check_last("retention_attention", sizes["m"], sizes["n"])
    scale = sizes["d"] ** -0.5 if scale is None else float(scale)
    return {"q": q, "k": k, "v": v, "log_decay": log_decay, "scale": scale, "keep": keep}


def retention_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same for ``m`` new tokens after those that a state holds. Gradients flow through the state.

    Parameters
    ----------
    q: (b, h, m, d). k: (b, g, m, d). v: (b, g, m, e). log_decay, scale, keep: as in ``retention_attention``.
    state: (b, h, d, e), float32 or float64, zeros at first.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.
    state: the same after the new tokens.
    """
    sizes = _check("retention_attention_step", "m", keep, q=q, k=k, v=v, log_decay=log_decay, state=state)
    scale = sizes["d"] ** -0.5 if scale is None else float(scale)
    with exactly(q.device):
        return chunk.step(q, k, v, log_decay, state, scale, keep)


def _check(where: str, keys: str, keep: Tensor | None, **given: Tensor) -> dict[str, int]:
    """Sizes of the axes; ``keys`` is the letter of the tokens that keys are of."""
    patterns = {"q": "b h m d", "k": f"b g {keys} d", "v": f"b g {keys} e", "log_decay": "h", "state": "b h d e"}
    sizes = shapes.check_padded(where, keys, keep, **{name: (x, patterns[name]) for name, x in given.items()})
    shapes.check_floating(where, log_decay=given["log_decay"])
    return sizes


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``retention_attention``: decays from 0.99 down to 0.45, so that near and far keys count."""
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((s.b, s.h, s.m, s.d), (s.b, s.g, s.n, s.d), (s.b, s.g, s.n, s.e))
    )
    drawn = {"q": q, "k": k, "v": v, "log_decay": -torch.linspace(0.01, 0.8, s.h, dtype=torch.float64)}
    return {name: x.to(device, dtype) for name, x in drawn.items()}


def _cpu() -> Any:
    return cpu.forward


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.retention.layer import RetentionAttention, RetentionConfig  # noqa: E402


def _retnet(place: LayerPlace) -> RetentionConfig:
    size = place.width // place.heads
    rotary = Rotary(size, style="interleaved") if size % 2 == 0 else None
    return RetentionConfig(
        place.width, place.heads, retnet_decays(place.heads), value_size=2 * size, rotary=rotary, gate="swish"
    )


def _lightning(place: LayerPlace) -> RetentionConfig:
    decays = minimax_decays(place.heads, place.layer, place.layers)
    return RetentionConfig(place.width, place.heads, decays, scale=1.0, activation="silu", norm="all", gate="sigmoid")


SPEC = Mechanism(
    name="retention",
    title="Retention",
    equation="o_i = scale * sum_{j <= i} e^((i - j) log_decay) (q_i . k_j) v_j",
    papers=("arXiv 2307.08621", "arXiv 2401.04658", "arXiv 2501.08313"),
    call=call,
    function=retention_attention,
    sample=sample,
    reference=reference,
    backends=(
        Backend("cpu", _cpu, rejects=cpu.rejects, finite_only=True),
        Backend("chunk", _chunk, finite_only=True),
        Backend("reference", _reference),
    ),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True, weights_sum_to_one=False),
    cost=cost,
    layer=RetentionAttention,
    state=RecurrentState,
    presets=(
        Preset("retnet", "RetNet", "arXiv 2307.08621", _retnet),
        Preset("lightning", "Lightning (MiniMax-01)", "arXiv 2501.08313", _lightning),
    ),
)
