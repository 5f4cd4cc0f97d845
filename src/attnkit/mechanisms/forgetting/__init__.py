"""Forgetting attention (FoX): softmax attention whose keys fade by learned, data-dependent gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from attnkit import shapes
from attnkit.dispatch import decide, run
from attnkit.masks import causal
from attnkit.mechanisms.forgetting import chunk, cpu
from attnkit.mechanisms.forgetting.reference import forward as reference
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import TokenState

__all__ = [
    "SPEC",
    "ForgettingAttention",
    "ForgettingConfig",
    "forgetting_attention",
    "forgetting_attention_step",
]


def forgetting_attention(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Causal softmax attention with forget gates: ``logit_ij = scale * q_i k_j + log f_{j+1} + ... + log f_i``.

    The queries are the last ``m`` of the ``n`` positions.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16; ``m`` is at most ``n``.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    log_f: (b, h, n), any floating dtype: natural logarithms of the forget gates, finite and at most 0. They are summed
        in float32 at least. 0 everywhere is causal softmax attention.
    scale: multiplies ``q k^T``, not the gates; ``d ** -0.5`` when None.
    backend: "cpu", "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together; NotImplementedError: the named backend cannot run them.

    Source: Lin et al. 2025, arXiv 2503.02130.
    """
    result: Tensor = run(SPEC, call(q, k, v, log_f, scale=scale), backend)
    return result


def call(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, *, scale: float | None = None) -> dict[str, Any]:
    """Check the arguments of ``forgetting_attention``; return them by name, as every backend gets them."""
    _check("forgetting_attention", q, k, v, log_f=log_f)
    return {"q": q, "k": k, "v": v, "log_f": log_f, "scale": q.shape[3] ** -0.5 if scale is None else float(scale)}


def forgetting_attention_step(q: Tensor, k: Tensor, v: Tensor, total: Tensor, *, scale: float | None = None) -> Tensor:
    """The same for the newest ``m`` tokens over a state, which keeps sums of gates so that none is added up twice.

    Parameters
    ----------
    q: (b, h, m, d). k: (b, g, n, d). v: (b, g, n, e). scale: as in ``forgetting_attention``.
    total: (b, h, n), float32 or float64: ``log f_1 + ... + log f_j`` of every token.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.
    """
    _check("forgetting_attention_step", q, k, v, total=total)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    chosen, _ = decide(SPEC, {"q": q, "k": k, "v": v, "log_f": total, "scale": scale})
    attend = cpu.attend if chosen.name == "cpu" else chunk.attend
    return attend(q, k, v, total, scale)


def _check(where: str, q: Tensor, k: Tensor, v: Tensor, **gates: Tensor) -> None:
    ((name, gate),) = gates.items()
    patterns = {"q": (q, "b h m d"), "k": (k, "b g n d"), "v": (v, "b g n e"), name: (gate, "b h n")}
    sizes = shapes.check_call(where, **patterns)
    shapes.check_last(where, sizes["m"], sizes["n"])
    if not gate.is_floating_point():
        raise TypeError(f"{where}: {name} has dtype {gate.dtype}, expected a floating one: logarithms of gates")


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``forgetting_attention``: gates between 0.4 and 0.99, so that both near and far keys count."""
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    q, k, v, gates = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((s.b, s.h, s.m, s.d), (s.b, s.g, s.n, s.d), (s.b, s.g, s.n, s.e), (s.b, s.h, s.n))
    )
    drawn = {"q": q, "k": k, "v": v, "log_f": logsigmoid(2 + gates)}
    return {name: x.to(device, dtype) for name, x in drawn.items()}


def cost(sizes: Sizes, *, itemsize: int = 4) -> Cost:
    """Cost of one call; a token's state is its key, its value and one float64 sum of gates a query head."""
    s = sizes
    token = s.g * (s.d + s.e) * itemsize + 8 * s.h
    return Cost(
        flops=2 * s.b * s.h * causal().visible_pairs(s.m, s.n) * (s.d + s.e),
        bytes=s.b * (s.h * s.m * (s.d + s.e) * itemsize + s.n * token),
        state_bytes_per_token=token,
        state_bytes_fixed=0,
    )


def _cpu() -> Any:
    return cpu.forward


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.forgetting.layer import ForgettingAttention, ForgettingConfig  # noqa: E402


def _fox(place: LayerPlace) -> ForgettingConfig:
    return ForgettingConfig(place.width, place.heads, qk_norm=place.qk_norm)


def _pro(place: LayerPlace) -> ForgettingConfig:
    return ForgettingConfig(place.width, place.heads, qk_norm=True, output_norm=True, output_gate=True)


SPEC = Mechanism(
    name="forgetting",
    title="Forgetting attention",
    equation="o = softmax(causal(q k^T * scale + c_i - c_j)) v with c = cumsum(log f)",
    papers=("arXiv 2503.02130",),
    call=call,
    function=forgetting_attention,
    sample=sample,
    reference=reference,
    backends=(
        Backend("cpu", _cpu, cpu.rejects),
        Backend("chunk", _chunk, finite_only=True),
        Backend("reference", _reference),
    ),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True),
    cost=cost,
    layer=ForgettingAttention,
    state=TokenState,
    presets=(
        Preset("fox", "Forgetting (FoX)", "arXiv 2503.02130", _fox),
        Preset("fox_pro", "FoX with norms and gate", "arXiv 2503.02130", _pro),
    ),
)
