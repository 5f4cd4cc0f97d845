"""Linear attention: weights that are products of features, so that sums over keys take the place of the keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.mechanisms.linear import chunk, cpu, maps
from attnkit.mechanisms.linear.maps import FeatureMap, random_features
from attnkit.mechanisms.linear.reference import forward as reference
from attnkit.recurrence import CHUNK, exactly
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import RecurrentState

__all__ = [
    "SPEC",
    "LinearAttention",
    "LinearConfig",
    "linear_attention",
    "linear_attention_step",
    "random_features",
]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None = None,
    *,
    feature_map: FeatureMap = "elu",
    causal: bool = True,
    keep: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention with the weights ``phi(q_i) . phi(k_j)``, divided by their sum: ``o_i = sum_j w_ij v_j / sum_j w_ij``.

    A query whose keys all have no weight gives 0.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16. Features and sums are float32 at least.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    projection: (f, d), any floating dtype, for "favor" and for no other map: see ``random_features``.
    feature_map: "elu", which is ``elu(x) + 1``; "relu"; "taylor", whose product is ``1 + s + s^2 / 2`` with
        ``s = q k / sqrt(d)``, of 1 + d + d^2 features; "favor", Performer's positive random features, whose product is
        ``exp(q k / sqrt(d))`` in the mean.
    causal: the queries are the last ``m`` of the ``n`` positions and see no later key; False lets all see all.
    keep: (b, n) bool, False for padding, which no query sees.
    backend: "cpu", "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Katharopoulos et al. 2020, arXiv 2006.16236; Choromanski et al. 2021, arXiv 2009.14794 ("favor");
    Arora et al. 2024, arXiv 2402.18668 ("taylor").
    """
    with exactly(q.device):
        result: Tensor = run(
            SPEC, call(q, k, v, projection, feature_map=feature_map, causal=causal, keep=keep), backend
        )
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None = None,
    *,
    feature_map: FeatureMap = "elu",
    causal: bool = True,
    keep: Tensor | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``linear_attention``; return them by name, as every backend gets them."""
    sizes = _check("linear_attention", q, k, v, projection, feature_map, keep)
    if causal:
        shapes.check_last("linear_attention", sizes["m"], sizes["n"])
    given = {"q": q, "k": k, "v": v, "projection": projection}
    return {**given, "feature_map": feature_map, "causal": bool(causal), "keep": keep}


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Mapping[str, Tensor],
    projection: Tensor | None = None,
    *,
    feature_map: FeatureMap = "elu",
    keep: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, causal, for ``m`` new tokens after those that a state holds. Gradients flow through the state.

    Parameters
    ----------
    q: (b, h, m, d). k: (b, g, m, d). v: (b, g, m, e). projection, feature_map, keep: as in ``linear_attention``.
    held: ``state`` (b, g, f, e + 1), float32 or float64, the sum of ``phi(k) v^T`` with the normaliser as its last
        column, zeros at first; for "favor" also ``largest`` (b, g, 1), the logarithm of the unit that it is in.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.
    held: the same after the new tokens.
    """
    where = "linear_attention_step"
    sizes = _check(where, q, k, v, projection, feature_map, keep, "m")
    f = maps.count(feature_map, sizes["d"], 0 if projection is None else projection.shape[0])
    wanted: dict[str, tuple[int, ...]] = {"state": (sizes["b"], sizes["g"], f, sizes["e"] + 1)}
    wanted |= {"largest": (sizes["b"], sizes["g"], 1)} if projection is not None else {}
    shapes_held = {name: tuple(x.shape) for name, x in held.items()}
    if shapes_held != wanted:
        raise ValueError(f"{where}: held is {shapes_held}, expected {wanted}")
    largest = held["largest"][..., 0] if "largest" in held else None
    with exactly(q.device):
        o, state, unit = chunk.step(q, k, v, held["state"], largest, feature_map, projection, keep)
    return o, {"state": state} if unit is None else {"state": state, "largest": unit[..., None]}


def _check(
    where: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    feature_map: str,
    keep: Tensor | None,
    keys: str = "n",
) -> dict[str, int]:
    maps.check(where, feature_map, projection is not None)
    given: dict[str, tuple[Tensor, str]] = {"q": (q, "b h m d"), "k": (k, f"b g {keys} d"), "v": (v, f"b g {keys} e")}
    if projection is not None:
        given["projection"] = (projection, "f d")
    return shapes.check_padded(where, keys, keep, **given)


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``linear_attention``, causal; every other one has random features."""
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for shape in ((s.b, s.h, s.m, s.d), (s.b, s.g, s.n, s.d), (s.b, s.g, s.n, s.e))
    )
    if seed % 2 == 0:
        return {"q": q, "k": k, "v": v, "feature_map": "elu"}
    projection = random_features(random_count(s.d), s.d, seed=seed).to(device, dtype)
    return {"q": q, "k": k, "v": v, "projection": projection, "feature_map": "favor"}


def random_count(d: int) -> int:
    """How many random features the paper takes for ``d`` channels: d ln d."""
    return max(1, int(d * math.log(d)))


def cost(sizes: Sizes, *, feature_map: FeatureMap = "elu", random: int = 0, causal: bool = True) -> Cost:
    """Cost of one call with ``random`` features for "favor": the state is fixed, and always float32."""
    s = sizes
    f = maps.count(feature_map, s.d, random)
    inside = s.h * min(s.n, CHUNK) * s.m * (f + s.e + 1) if causal and s.m > 1 else 0
    mapping = 2 * (s.h * s.m + s.g * s.n) * s.d * f if feature_map == "favor" else 0
    state = s.g * (f * (s.e + 1) + (feature_map == "favor"))
    return Cost(
        flops=s.b * (2 * (s.h * s.m + s.g * (s.n if s.m > 1 else 1)) * f * (s.e + 1) + inside + mapping),
        bytes=4 * s.b * ((s.h + s.g) * s.m * (s.d + s.e) + 2 * state),
        state_bytes_per_token=0,
        state_bytes_fixed=4 * state,
    )


def _cpu() -> Any:
    return cpu.forward


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.linear.layer import LinearAttention, LinearConfig  # noqa: E402


def _elu(place: LayerPlace) -> LinearConfig:
    return LinearConfig(place.width, place.heads, qk_norm=place.qk_norm)


def _performer(place: LayerPlace) -> LinearConfig:
    return LinearConfig(place.width, place.heads, feature_map="favor", seed=place.layer, qk_norm=place.qk_norm)


SPEC = Mechanism(
    name="linear",
    title="Linear attention",
    equation="o_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j)",
    papers=("arXiv 2006.16236", "arXiv 2009.14794", "arXiv 2402.18668"),
    call=call,
    function=linear_attention,
    sample=sample,
    reference=reference,
    backends=(
        Backend("cpu", _cpu, rejects=cpu.rejects, finite_only=True),
        Backend("chunk", _chunk, finite_only=True),
        Backend("reference", _reference, finite_only=True),
    ),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True),
    cost=cost,
    layer=LinearAttention,
    state=RecurrentState,
    presets=(
        Preset("elu_linear", "Linear (elu + 1)", "arXiv 2006.16236", _elu),
        Preset("performer", "Performer (FAVOR+)", "arXiv 2009.14794", _performer),
    ),
)
