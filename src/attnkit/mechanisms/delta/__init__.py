"""The delta rule: a state that forgets, unlearns what it says about a key, and learns the new value for that key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from attnkit import shapes
from attnkit.costs import delta as cost
from attnkit.dispatch import run
from attnkit.mechanisms.delta import chunk, cpu
from attnkit.mechanisms.delta.reference import forward as reference
from attnkit.recurrence import exactly
from attnkit.spec import Backend, Call, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import RecurrentState

__all__ = [
    "SPEC",
    "DeltaAttention",
    "DeltaConfig",
    "delta_attention",
    "kimi_linear_weights",
    "qwen3_next_weights",
]


def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    scale: float | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention with the delta rule: DeltaNet, Gated DeltaNet or Kimi Delta Attention, as ``log_decay`` says.

    Token by token, ``S <- exp(log_decay_t) S``, then ``S <- S + beta_t k_t (v_t - S^T k_t)^T``, then
    ``o_t = scale * S^T q_t``. Any split of a sequence gives the same rows when each part gets the state of the last.

    Parameters
    ----------
    q: (b, h, n, d), float64, float32, bfloat16 or float16; only ``q`` is scaled.
    k: (b, g, n, d), same dtype and device, of unit length; ``g`` divides ``h``, and head ``i`` reads key head
        ``i // (h / g)``.
    v: (b, h, n, e); ``e`` may differ from ``d``.
    beta: (b, h, n), any floating dtype: how much of the old value goes, 0 to 1, or to 2 for negative eigenvalues.
    log_decay: natural logarithms, at most 0, any floating dtype. None keeps all (DeltaNet), (b, h, n) is one a head
        (Gated DeltaNet), (b, h, n, d) one a channel (Kimi). -inf forgets everything.
    state: (b, h, d, e), float32 (float64 for float64): what earlier tokens left; None is zeros.
    scale: multiplies what is read; ``d ** -0.5`` when None.
    return_state: return the state after the last token as well.
    backend: "cpu", "chunk" or "reference", which then runs or raises; None takes the first that can run.

    A token with ``beta |k|^2`` outside 0 to 2.1, a positive ``log_decay`` or a value that is not finite is no step of a
    delta rule: results are NaN from it on, and so is the state.

    Returns
    -------
    o: (b, h, n, e) in q's dtype.
    state: (b, h, d, e), float32 or float64, with ``return_state``.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Yang et al. 2024, arXiv 2406.06484; with decay arXiv 2412.06464 and, a channel, arXiv 2510.26692.
    """
    checked = call(q, k, v, beta, log_decay, state, scale=scale, return_state=return_state)
    with exactly(q.device):
        found: Tensor | tuple[Tensor, Tensor] = run(SPEC, checked, backend)
    return found


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    scale: float | None = None,
    return_state: bool = False,
) -> dict[str, Any]:
    """Check the arguments of ``delta_attention``; return them by name, as every backend gets them.

    The scale is called ``read_scale`` there: a ``scale`` may be multiplied into the keys, and these also write.
    """
    where = "delta_attention"
    patterns = {"q": (q, "b h n d"), "k": (k, "b g n d"), "v": (v, "b h n e"), "beta": (beta, "b h n")}
    if log_decay is not None:
        channels = isinstance(log_decay, Tensor) and log_decay.dim() == 4
        patterns["log_decay"] = (log_decay, "b h n d" if channels else "b h n")
    if state is not None:
        patterns["state"] = (state, "b h d e")
    shapes.check_call(where, **patterns)
    shapes.check_floating(where, **{name: x for name, (x, _) in patterns.items()})
    wide = torch.promote_types(q.dtype, torch.float32)
    if state is not None and state.dtype != wide:
        raise TypeError(f"{where}: state has dtype {state.dtype}, expected {wide} for {q.dtype}: it is a sum")
    given = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "state": state}
    read_scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return {**given, "read_scale": read_scale, "return_state": return_state}


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``delta_attention`` and a state: ``m`` tokens after others, so that each of its parts shows.

    Seeds in turn decay each channel, each head, and nothing. ``beta`` is 0.2 to 1.8, a decay 0.4 to 0.99.
    """
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    q, k, v, beta, gates, state = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (
            (s.b, s.h, s.m, s.d),
            (s.b, s.g, s.m, s.d),
            (s.b, s.h, s.m, s.e),
            (s.b, s.h, s.m),
            (s.b, s.h, s.m, s.d),
            (s.b, s.h, s.d, s.e),
        )
    )
    drawn = {"q": q, "k": normalize(k, dim=-1), "v": v, "beta": 0.2 + 1.6 * torch.sigmoid(beta)}
    decays = logsigmoid(2 + gates)
    log_decay = (decays, decays[..., 0], None)[seed % 3]
    drawn |= {} if log_decay is None else {"log_decay": log_decay}
    made: dict[str, Any] = {name: x.to(device, dtype) for name, x in drawn.items()}
    made["state"] = state.to(device, torch.promote_types(dtype, torch.float32))
    return made | {"return_state": True}


def _short(call: Call) -> tuple[str, ...]:
    n = call["q"].shape[2]
    return (f"{n} token is one step of the recurrence",) if n == 1 else ()


def _cpu() -> Any:
    return cpu.forward


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.delta.layer import DeltaAttention, DeltaConfig  # noqa: E402
from attnkit.mechanisms.delta.weights import kimi_linear_weights, qwen3_next_weights  # noqa: E402


def _deltanet(place: LayerPlace) -> DeltaConfig:
    return DeltaConfig(place.width, place.heads)


def _gated(place: LayerPlace) -> DeltaConfig:
    keys = place.heads // 2 if place.heads % 2 == 0 else place.heads
    return DeltaConfig(place.width, place.heads, key_heads=keys, decay="head", gate="silu")


def _kda(place: LayerPlace) -> DeltaConfig:
    rank = place.width // place.heads
    return DeltaConfig(place.width, place.heads, decay="channel", gate="sigmoid", rank=rank, eps=1e-5)


SPEC = Mechanism(
    name="delta",
    title="Delta rule",
    equation="o = scale * S^T q with S <- exp(log_decay) S, then S <- S + beta k (v - S^T k)^T",
    papers=("arXiv 2102.11174", "arXiv 2406.06484", "arXiv 2412.06464", "arXiv 2510.26692"),
    call=call,
    function=delta_attention,
    sample=sample,
    reference=reference,
    backends=(
        Backend("cpu", _cpu, rejects=cpu.rejects),
        Backend("chunk", _chunk, declines=_short),
        Backend("reference", _reference),
    ),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True, weights_sum_to_one=False),
    cost=cost,
    layer=DeltaAttention,
    state=RecurrentState,
    presets=(
        Preset("deltanet", "DeltaNet", "arXiv 2406.06484", _deltanet),
        Preset("gated_deltanet", "Gated DeltaNet", "arXiv 2412.06464", _gated),
        Preset("kda", "Kimi Delta Attention", "arXiv 2510.26692", _kda),
    ),
)
