"""Feature maps: what makes a product of queries and keys a weight that is never negative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import Function

FeatureMap = Literal["elu", "relu", "taylor", "favor"]
MAPS: tuple[FeatureMap, ...] = get_args(FeatureMap)
# Products of two such features and a value are still far from where float32 loses digits. Computed as written, float32
# gives 0 for elu(x) + 1 from x = -17 on.
LOWEST = -32.0


@dataclass(frozen=True)
class Features:
    """Queries (b, h, m, f) and keys (b, g, n, f) after the map, float32 at least.

    Keys of ``favor`` are in units that grow along the sequence: ``log_decay`` (b, g, n) says what a sum in the unit of
    the token before is multiplied by, and ``largest`` (b, g) is the logarithm of the last unit. Others have neither.
    """

    q: Tensor
    k: Tensor
    log_decay: Tensor | None = None
    largest: Tensor | None = None


def check(where: str, feature_map: str, random: bool) -> None:
    """Raise ``ValueError`` for a map that there is not, or one without the random features that it needs."""
    if feature_map not in MAPS:
        raise ValueError(f"{where}: feature_map is {feature_map!r}, expected one of {', '.join(MAPS)}")
    if random != (feature_map == "favor"):
        had = "a" if random else "no"
        raise ValueError(
            f"{where}: got feature_map {feature_map!r} with {had} projection, expected one for 'favor' alone"
        )


def count(feature_map: FeatureMap, d: int, random: int = 0) -> int:
    """How many features a vector of ``d`` channels has."""
    return {"taylor": 1 + d + d * d, "favor": random}.get(feature_map, d)


def features(
    q: Tensor,
    k: Tensor,
    feature_map: FeatureMap,
    projection: Tensor | None,
    *,
    largest: Tensor | None = None,
    keep: Tensor | None = None,
    running: bool = True,
) -> Features:
    """``q`` and ``k`` after the map, keys of tokens that ``keep`` (b, n) hides as zeros.

    ``largest`` (b, g) is the unit of a state to go on from, -inf when nothing was seen. Without ``running`` all keys
    have one unit, for a sum that no query sees a part of.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(work), k.to(work)
    if feature_map != "favor":
        q, k = (MAP[feature_map](x) for x in (q, k))
        return Features(q, k if keep is None else k.masked_fill(~keep[:, None, :, None], 0.0))
    assert projection is not None
    q, k = _exponents(q, projection), _exponents(k, projection)
    if keep is not None:
        k = k.masked_fill(~keep[:, None, :, None], -torch.inf)
    # A unit is what numerator and denominator share, so that it needs no gradient.
    top = k.detach().amax(-1)
    start = top.new_full((*top.shape[:2], 1), -torch.inf) if largest is None else largest[..., None].to(work)
    units = torch.cat([start, top], -1)
    units = units.cummax(-1).values if running else units.amax(-1, keepdim=True).expand_as(units)
    before, now = units[..., :-1], units[..., 1:]
    log_decay = torch.where(before == -torch.inf, 0.0, before - now)
    q = (q - q.detach().amax(-1, keepdim=True)).exp()
    return Features(q, (k - now.masked_fill(now == -torch.inf, 0.0)[..., None]).exp(), log_decay, units[..., -1])


def random_features(count: int, size: int, *, seed: int = 0, normed: bool = False) -> Tensor:
    """The directions of FAVOR+, float32 ``(count, size)``: orthogonal in blocks of ``size``, from ``seed``.

    Lengths are those of independent Gaussian vectors, or with ``normed`` all ``size ** 0.5``.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-count // size)):
        gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
        orthogonal, upper = torch.linalg.qr(gaussian)
        blocks.append((orthogonal * upper.diagonal().sign()).T)  # without the signs directions are not uniform
    lengths = torch.randn(count, size, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    drawn: Tensor = torch.cat(blocks)[:count] * (size**0.5 if normed else lengths)
    return drawn.float()


class Elu(Function):
    """``elu(x) + 1``, without the cancellation of the 1 for negative numbers, and never below ``e^LOWEST``.

    Its slope is read off its result, which is kept anyway, where autograd would keep every part.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp(LOWEST, 0).exp_().add_(x.clamp(min=0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        found: Tensor = ctx.saved_tensors[0]
        return slopes[0] * found.clamp(max=1)


def _exponents(x: Tensor, projection: Tensor) -> Tensor:
    """Logarithms of the positive random features of ``x`` at the scale of softmax attention; 1 / sqrt(f) cancels."""
    x = x * x.shape[-1] ** -0.25
    return x @ projection.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2


def _taylor(x: Tensor) -> Tensor:
    """Features whose product is ``1 + s + s^2 / 2`` of the product ``s`` at the scale of softmax attention."""
    x = x * x.shape[-1] ** -0.25
    pairs = (x[..., :, None] * x[..., None, :]).flatten(-2) * 0.5**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, pairs], -1)


MAP: dict[str, Callable[[Tensor], Tensor]] = {"elu": Elu.apply, "relu": torch.relu, "taylor": _taylor}
