"""Multi-head latent attention (MLA): keys and values of all heads are maps of one small latent a token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.costs import latent_forms
from attnkit.costs import mla as cost
from attnkit.dispatch import run
from attnkit.masks import Mask, causal, checked
from attnkit.mechanisms.mla import absorbed, cpu, expanded
from attnkit.mechanisms.mla.keys import mla_expand, parts
from attnkit.mechanisms.mla.reference import forward as reference
from attnkit.positions import Rotary
from attnkit.spec import Backend, Call, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import LatentState

__all__ = ["SPEC", "MLAConfig", "MLAttention", "mla_attention", "mla_expand", "mla_listed"]


def mla_attention(
    q: Tensor,
    latent: Tensor,
    kv_b: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention whose keys ``[U_h c_j ; r_j]`` and values ``V_h c_j`` are made of latents ``c_j``.

    ``r_j`` is a rotary key that all heads share. The queries are the last ``m`` of the ``n`` positions.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16: each head's query, its rotary part of ``r`` channels last.
    latent: (b, g, n, c + r), same dtype and device: the latents, normalised, with the turned rotary keys behind them;
        ``r`` may be 0. ``g`` divides ``h`` and is 1 in DeepSeek's models; head ``i`` reads latent ``i // (h / g)``.
    kv_b: (h, d - r + e, c), same dtype and device: for each head ``U_h`` and below it ``V_h``, the rows of DeepSeek's
        ``kv_b_proj``. It says what ``c``, ``r`` and ``e`` are.
    mask: as in ``softmax_attention``; None lets every query see every key.
    scale: multiplies ``q k^T``; ``d ** -0.5`` when None, whichever form runs. YaRN has its own, see ``MLAConfig``.
    backend: "cpu" (native, attends to the latents themselves), "absorbed" (the same in torch), "expanded" (makes keys
        and values first) or "reference", which then runs; None takes the form with fewer multiply-adds, and "cpu" for
        the absorbed one where it can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: DeepSeek-V2, arXiv 2405.04434.
    """
    result: Tensor = run(SPEC, call(q, latent, kv_b, mask=mask, scale=scale), backend)
    return result


def mla_listed(q: Tensor, latent: Tensor, kv_b: Tensor, places: Tensor, *, scale: float | None = None) -> Tensor:
    """The same, natively and forward only, of each query to the latents that are listed for it.

    Parameters
    ----------
    q, latent, kv_b, scale: as in ``mla_attention``, on the CPU, float32, bfloat16 or float16.
    places: (b, m, c), int32, contiguous: for each query numbers of latents, -1 in places left over, which come last.

    Returns
    -------
    o: (b, h, m, e) in q's dtype; 0 where nothing is listed.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.
    """
    where = "mla_listed"
    check(where, q, latent, kv_b)
    shapes.check(where, q=(q, "b h m d"), places=(places, "b m c"))
    if places.dtype != torch.int32 or not places.is_contiguous():
        raise TypeError(f"{where}: places is {places.dtype} of strides {places.stride()}, expected contiguous int32")
    return cpu.attend_to(q, latent, kv_b, places, q.shape[3] ** -0.5 if scale is None else float(scale))


def call(
    q: Tensor, latent: Tensor, kv_b: Tensor, *, mask: Mask | Tensor | None = None, scale: float | None = None
) -> dict[str, Any]:
    """Check the arguments of ``mla_attention``; return them by name, as every backend gets them."""
    check("mla_attention", q, latent, kv_b)
    b, h, m, _ = q.shape
    mask = checked("mla_attention", mask, b, h, m, latent.shape[2])
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return {"q": q, "latent": latent, "kv_b": kv_b, "mask": mask, "scale": scale}


def check(where: str, q: Tensor, latent: Tensor, kv_b: Tensor) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless the three fit together."""
    sizes = shapes.check(where, q=(q, "b h m d"), latent=(latent, "b g n joined"), kv_b=(kv_b, "h rows c"))
    shapes.check_same(where, q=q, latent=latent, kv_b=kv_b)
    shapes.check_groups(where, sizes["h"], sizes["g"])
    nope, rotary, e, c = parts(q, latent, kv_b)
    if rotary < 0 or nope < 0 or e < 1 or c < 1 or sizes["d"] < 1:
        raise ValueError(
            f"{where}: q has {sizes['d']} channels, latent {sizes['joined']} and kv_b {sizes['rows']} rows of {c}, "
            f"which makes latents of {c}, rotary keys of {rotary}, other keys of {nope} and values of {e}: expected at "
            f"least 1, 0, 0 and 1"
        )


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``mla_attention``: a third of each key is rotary, latents are no larger than a key and a value."""
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    rotary, c = s.d // 3, min(s.d + s.e, 24)
    generator = torch.Generator().manual_seed(seed)
    q, latent, kv_b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((s.b, s.h, s.m, s.d), (s.b, s.g, s.n, c + rotary), (s.h, s.d - rotary + s.e, c))
    )
    drawn = {"q": q, "latent": latent, "kv_b": kv_b * c**-0.5}
    return {name: x.to(device, dtype) for name, x in drawn.items()} | {"mask": causal()}


def _dearer(call: Call) -> tuple[str, ...]:
    """Why the absorbed form is not taken unless it is named."""
    q, latent, kv_b = call["q"], call["latent"], call["kv_b"]
    (_, h, m, d), n = q.shape, latent.shape[2]
    _, rotary, e, c = parts(q, latent, kv_b)
    absorbed_, expanded_ = latent_forms(Sizes(h=h, m=m, n=n, d=d, e=e), c, rotary, m * n)
    if absorbed_ <= expanded_:
        return ()
    return (f"{m} queries of {n} latents take {absorbed_:,} multiply-adds, {expanded_:,} expanded",)


def _cpu() -> Any:
    return cpu.forward


def _absorbed() -> Any:
    return absorbed.forward


def _expanded() -> Any:
    return expanded.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.mla.layer import MLAConfig, MLAttention  # noqa: E402


def _nope(place: LayerPlace) -> MLAConfig:
    """DeepSeek's proportions: latents of four heads, half a head of rotary channels beside it."""
    head = place.width // place.heads
    rotary = max(2, head // 4 * 2)
    return MLAConfig(place.width, place.heads, latent=4 * head, nope_size=head, rope_size=rotary, value_size=head)


def _rope(place: LayerPlace) -> MLAConfig:
    plain = _nope(place)
    return replace(plain, rotary=Rotary(plain.rope_size, style="interleaved"))


SPEC = Mechanism(
    name="mla",
    title="Multi-head latent attention",
    equation="o = softmax(mask(q [U c ; r]^T * scale)) V c",
    papers=("arXiv 2405.04434", "arXiv 2412.19437"),
    call=call,
    function=mla_attention,
    sample=sample,
    reference=reference,
    backends=(
        Backend("cpu", _cpu, cpu.rejects, _dearer, grad=False),
        Backend("absorbed", _absorbed, declines=_dearer, finite_only=True),
        Backend("expanded", _expanded, finite_only=True),
        Backend("reference", _reference),
    ),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True),
    cost=cost,
    layer=MLAttention,
    state=LatentState,
    presets=(
        Preset("mla_rope", "Multi-head latent (MLA)", "arXiv 2405.04434", _rope),
        Preset("mla_nope", "MLA without positions", "arXiv 2510.26692", _nope),
    ),
)
