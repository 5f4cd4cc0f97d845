"""How far a result may be from the truth: one rule for every backend, dtype and test.

Nobody types a tolerance. A result is judged against ``gold``, the definition in float64 on the same stored inputs, with
a budget taken from ``naive``, what plain arithmetic of the result's own precision makes of the same call. See
``attnkit.testing.runs`` for both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """Bounds on an error; ``M`` is the largest magnitude in ``gold``, ``eps`` that of the dtype judged.

    ``largest``: no element is off by more than ``naive * (largest error of the naive run) + floor * eps * M``.
    ``spread``: the error's root mean square, relative to gold's. Sees a scale 1 % off, which ``largest`` misses in
    bfloat16. In float32, where the naive run is an honest program, ``naive`` times its spread is allowed as well: a
    layer that normalises small means loses digits whoever computes it.
    ``drift``: the mean error, relative to gold's mean magnitude. Sees rounding that always goes one way.
    """

    naive: float
    floor: float
    spread: float | None = None
    drift: float | None = None


# Two correct orders of the same sums differ by up to 2.1 naive errors, so a factor below 2 would measure luck. A good
# kernel's spread was 2.6e-3 in bfloat16, 3.5e-4 in float16 and 7.7e-7 in float32 over 150 random configurations.
_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
FORWARD = {
    torch.float64: Gate(0, 1e-12 / _EPS[torch.float64], 1e-14),
    torch.float32: Gate(2, 16, 2e-6, 1e-6),
    torch.bfloat16: Gate(2, 2, 0.5 * _EPS[torch.bfloat16], 0.25 * _EPS[torch.bfloat16]),
    torch.float16: Gate(2, 2, 0.5 * _EPS[torch.float16], 0.25 * _EPS[torch.float16]),
}
GRADIENT = {
    torch.float64: Gate(0, 1e-11 / _EPS[torch.float64]),
    torch.float32: Gate(4, 16),
    torch.bfloat16: Gate(3, 2),
    torch.float16: Gate(3, 2),
}


@dataclass(frozen=True)
class Quality:
    """Bounds on what a reader notices of a language model.

    ``mean``, ``largest``: by how much the log-probability of a token may be off. ``perplexity``: by what share.
    """

    mean: float
    largest: float
    perplexity: float

    def beside(self, naive: Tensor, codec: str) -> Quality:
        """What a cache of ``codec`` may change where a plain one is off by ``naive`` ``(t,)``, token by token.

        The factor is that of the gates, rounding comes on top, and of perplexity what the form of the cache promises.
        """
        times = FORWARD[torch.float32].naive
        mean, largest = naive.double().mean().item(), naive.max().item()
        return Quality(self.mean + times * mean, self.largest + times * largest, PROMISED[codec])


# What a swap of backends may change (property P31), and by what share a quantised cache may change perplexity.
QUALITY = {
    torch.float32: Quality(1e-4, 1e-4, 1e-3),
    torch.bfloat16: Quality(0.01, 0.1, 1e-3),
    torch.float16: Quality(0.01, 0.1, 1e-3),
}
PROMISED = {"int8": 5e-3, "fp8": 0.01, "int4": 0.03}
# A relative spread says nothing about a handful of elements that happen to cancel, nor a mean about a few hundred.
SPREAD_FROM, DRIFT_FROM = 256, 4096


def allowed(gold: Tensor, naive: Tensor, dtype: torch.dtype, gradient: bool = False, depth: int | None = None) -> float:
    """The largest error an element may have; ``depth`` as for ``used``."""
    gate = (GRADIENT if gradient else FORWARD)[dtype]
    finite = torch.isfinite(gold)
    magnitude = _largest(gold[finite])
    plain = _largest((naive.to(gold.dtype) - gold)[finite & torch.isfinite(naive)])
    return gate.naive * plain + gate.floor * _EPS[dtype] * magnitude * math.sqrt(depth or 1)


@dataclass(frozen=True)
class Use:
    """How much of its budget a result used; above 1 it is wrong, and ``problem`` says what is and where."""

    share: float
    problem: str | None = None


def assert_within(
    got: Tensor, gold: Tensor, naive: Tensor, dtype: torch.dtype, gradient: bool = False, what: str = "result"
) -> float:
    """Raise ``AssertionError`` unless ``got`` keeps to the budget; return the share of the budget that it used.

    Parameters
    ----------
    got: any shape, the result judged.
    gold: same shape, float64: the definition on the same inputs.
    naive: same shape: plain arithmetic in ``dtype`` on the same inputs.
    dtype: precision of the call, which sets the gates; a log-sum-exp is float32 but judged by its call's.
    gradient: use the gates for gradients.
    what: name of the tensor in messages.
    """
    found = used(got, gold, naive, dtype, gradient=gradient, what=what)
    assert found.problem is None, found.problem
    return found.share


def used(
    got: Tensor,
    gold: Tensor,
    naive: Tensor,
    dtype: torch.dtype,
    *,
    gradient: bool = False,
    depth: int | None = None,
    what: str = "result",
) -> Use:
    """The budget that ``got`` used, right or wrong; arguments as for ``assert_within``.

    depth: how many layers of a model the result went through, when it is not one operation's. Their rounding adds up
        like the steps of a random walk, so floors grow with its root; and the spread and the drift of the naive run are
        allowed in every dtype, ``naive`` times, as the spread is in float32. In SmolLM2, whose last layers hold numbers
        of 4000 beside ones of 1, a correct program was 24 eps of the largest off after 30 layers, and the naive run 2.
    """
    assert_distinct(got=got, gold=gold, naive=naive)
    assert got.shape == gold.shape == naive.shape, (
        f"{what} has shape {tuple(got.shape)}, expected {tuple(gold.shape)} (naive {tuple(naive.shape)})"
    )
    assert gold.dtype == torch.float64, f"gold of {what} is {gold.dtype}, expected float64"
    gold = torch.where(gold.to(got.dtype).isinf(), gold.sign() * torch.inf, gold)  # beyond what the result can hold
    got, naive = got.detach().to(gold.dtype), naive.detach().to(gold.dtype)
    if problem := _wrong_specials(got, gold, what):
        return Use(math.inf, problem)
    finite = torch.isfinite(gold)
    if not finite.any():
        return Use(0.0)
    error, plain = torch.where(finite, got - gold, 0.0), (naive - gold)[finite]
    gate = (GRADIENT if gradient else FORWARD)[dtype]
    judged = [("largest error", _largest(error), allowed(gold, naive, dtype, gradient, depth))]
    count = int(finite.sum())
    if gate.spread is not None and count >= SPREAD_FROM:
        bound = gate.spread * gold[finite].square().mean().sqrt().item() * math.sqrt(depth or 1)
        if dtype == torch.float32 or depth:
            bound = _or_naive(bound, gate.naive * plain.square().mean().sqrt().item())
        judged.append(("error spread", error[finite].square().mean().sqrt().item(), bound))
    if gate.drift is not None and count >= DRIFT_FROM:
        bound = gate.drift * gold[finite].abs().mean().item() * math.sqrt(depth or 1)
        if depth:
            bound = _or_naive(bound, gate.naive * abs(plain.mean().item()))
        judged.append(("error drift", abs(error[finite].mean().item()), bound))
    for name, found, bound in judged:
        if not found <= bound:
            share = found / bound if bound else math.inf
            return Use(share, _message(what, name, found, bound, got, gold, error))
    return Use(max((found / bound for _, found, bound in judged if bound), default=0.0))


def _or_naive(bound: float, plain: float) -> float:
    return max(bound, plain) if math.isfinite(plain) else bound


def assert_distinct(**tensors: Tensor) -> None:
    """Raise ``AssertionError`` when two tensors share memory: a result compared with itself always passes."""
    owner: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            other = owner.setdefault(tensor.untyped_storage().data_ptr(), name)
            assert other == name, f"{name} shares memory with {other}: clone the inputs of each run"


def _wrong_specials(got: Tensor, gold: Tensor, what: str) -> str | None:
    for kind, found, wanted in (
        ("NaN", got.isnan(), gold.isnan()),
        ("+inf", got == torch.inf, gold == torch.inf),
        ("-inf", got == -torch.inf, gold == -torch.inf),
    ):
        wrong = (found != wanted).nonzero()
        if len(wrong):
            place = tuple(wrong[0].tolist())
            return (
                f"{what}: {kind} in {len(wrong)} wrong places, first at {place}: got {got[place].item()}, expected "
                f"{gold[place].item()}"
            )
    return None


def _message(what: str, name: str, found: float, bound: float, got: Tensor, gold: Tensor, error: Tensor) -> str:
    place = tuple(torch.unravel_index(error.abs().argmax(), error.shape)) if error.dim() else ()
    index = tuple(int(i) for i in place)
    return (
        f"{what}: {name} is {found:.3g}, allowed {bound:.3g}; worst at {index}: got {got[index].item():.9g}, expected "
        f"{gold[index].item():.9g}"
    )


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
