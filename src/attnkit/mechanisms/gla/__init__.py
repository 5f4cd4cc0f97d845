"""Gated linear attention (GLA): a sum over the past in which the data says how fast each channel fades."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from attnkit import shapes
from attnkit.costs import gla as cost
from attnkit.dispatch import run
from attnkit.mechanisms.gla import chunk, cpu
from attnkit.mechanisms.gla.reference import forward as reference
from attnkit.recurrence import exactly
from attnkit.spec import Backend, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import RecurrentState

__all__ = ["SPEC", "GatedLinearAttention", "GatedLinearConfig", "gla_attention", "gla_attention_step"]


def gla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    keep: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal sums whose channels fade by gates: ``o_i = scale * sum_{j <= i} sum_c q_ic k_jc e^(G_ic - G_jc) v_j``.

    ``G`` sums ``log_decay`` along the sequence. The queries are the last ``m`` of the ``n`` positions. Nothing divides
    the sums: a norm after it is the layer's.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16; ``m`` is at most ``n``. Sums are float32 at least.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    log_decay: (b, g, n, d), or (b, g, n) for one gate a token, any floating dtype: natural logarithms of the gates,
        finite and at most 0. 0 everywhere never fades.
    scale: multiplies the products, not the gates; ``d ** -0.5`` when None.
    keep: (b, n) bool, False for padding, which neither adds to a sum nor lets it fade.
    backend: "cpu", "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Yang et al. 2023, arXiv 2312.06635; one gate a token as in Mamba-2, Dao and Gu 2024, arXiv 2405.21060.
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
    """Check the arguments of ``gla_attention``; return them by name, as every backend gets them."""
    sizes = _check("gla_attention", "n", keep, q=q, k=k, v=v, log_decay=log_decay)
    shapes.check_last("gla_attention", sizes["m"], sizes["n"])
    scale = sizes["d"] ** -0.5 if scale is None else float(scale)
    return {"q": q, "k": k, "v": v, "log_decay": log_decay, "scale": scale, "keep": keep}


def gla_attention_step(
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
    q: (b, h, m, d). k: (b, g, m, d). v: (b, g, m, e). log_decay: (b, g, m, d) or (b, g, m). scale, keep: as in
        ``gla_attention``.
    state: (b, g, d, e), float32 or float64, zeros at first.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.
    state: the same after the new tokens.
    """
    sizes = _check("gla_attention_step", "m", keep, q=q, k=k, v=v, log_decay=log_decay, state=state)
    scale = sizes["d"] ** -0.5 if scale is None else float(scale)
    with exactly(q.device):
        return chunk.step(q, k, v, log_decay, state, scale, keep)


def _check(where: str, keys: str, keep: Tensor | None, **given: Tensor) -> dict[str, int]:
    """Sizes of the axes; ``keys`` is the letter of the tokens that keys are of."""
    by_token = isinstance(given["log_decay"], Tensor) and given["log_decay"].dim() == 3
    patterns = {"q": "b h m d", "k": f"b g {keys} d", "v": f"b g {keys} e", "state": "b g d e"}
    patterns["log_decay"] = f"b g {keys}" if by_token else f"b g {keys} d"
    sizes = shapes.check_padded(where, keys, keep, **{name: (x, patterns[name]) for name, x in given.items()})
    shapes.check_floating(where, log_decay=given["log_decay"])
    return sizes


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``gla_attention``: gates of 0.4 to 0.99, one a channel, or for every third seed one a token."""
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    gates = (s.b, s.g, s.n) if seed % 3 == 2 else (s.b, s.g, s.n, s.d)
    q, k, v, drawn = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((s.b, s.h, s.m, s.d), (s.b, s.g, s.n, s.d), (s.b, s.g, s.n, s.e), gates)
    )
    made = {"q": q, "k": k, "v": v, "log_decay": logsigmoid(2 + drawn)}
    return {name: x.to(device, dtype) for name, x in made.items()}


def _cpu() -> Any:
    return cpu.forward


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.gla.layer import GatedLinearAttention, GatedLinearConfig  # noqa: E402


def _gated(place: LayerPlace) -> GatedLinearConfig:
    return GatedLinearConfig(place.width, place.heads)


SPEC = Mechanism(
    name="gla",
    title="Gated linear attention",
    equation="o_i = scale * q_i S_i with S_i = diag(e^log_decay_i) S_{i-1} + k_i v_i^T",
    papers=("arXiv 2312.06635", "arXiv 2405.21060"),
    call=call,
    function=gla_attention,
    sample=sample,
    reference=reference,
    backends=(
        Backend("cpu", _cpu, rejects=cpu.rejects, finite_only=True),
        Backend("chunk", _chunk, finite_only=True),
        Backend("reference", _reference),
    ),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True, weights_sum_to_one=False),
    cost=cost,
    layer=GatedLinearAttention,
    state=RecurrentState,
    presets=(Preset("gated_linear", "Gated linear (GLA)", "arXiv 2312.06635", _gated),),
)
