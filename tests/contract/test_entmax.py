"""Entmax attention: golden rows, the entmax package, bisection, block edges, bounded memory, refusals."""

from __future__ import annotations

from typing import Any

import entmax
import pytest
import torch
from torch import Tensor

from attnkit.mechanisms.entmax import EntmaxConfig, chunk, entmax_attention
from attnkit.mechanisms.entmax.reference import entmax15, sparsemax
from attnkit.registry import get
from attnkit.spec import Sizes

BACKENDS = ("chunk", "reference")
ALPHAS = (1.5, 2.0)
ORACLES = {1.5: entmax.entmax15, 2.0: entmax.sparsemax}


def sampled(n: int, m: int | None = None, seed: int = 0, **sizes: int) -> dict[str, Any]:
    size = {"b": 2, "h": 4, "g": 2, "m": m or n, "n": n, "d": 5, "e": 3, **sizes}
    return get("entmax").sample(seed, Sizes(**size), torch.float64)


def weights(scores: Tensor, alpha: float, backend: str) -> Tensor:
    """Weights of rows of scores ``(rows, n)``: a query of one channel with the score as key."""
    rows, n = scores.shape
    one, eye = scores.new_ones(rows, 1, 1, 1), torch.eye(n, dtype=scores.dtype).expand(rows, 1, n, n)
    return entmax_attention(one, scores[:, None, :, None], eye, alpha=alpha, scale=1.0, backend=backend)[:, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend: str) -> None:
    scores = torch.tensor([[1.2, 0.8, 0.1, -0.5]], dtype=torch.float64)
    assert weights(scores, 2.0, backend)[0].tolist() == pytest.approx([0.7, 0.3, 0, 0], abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_weights_and_gradients_equal_the_entmax_package(alpha: float, backend: str) -> None:
    torch.manual_seed(0)
    for spread in (0.01, 1.0, 30.0):
        ours = (spread * torch.randn(40, 23, dtype=torch.float64)).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        direction = torch.randn(40, 23, dtype=torch.float64)
        got, true = weights(ours, alpha, backend), ORACLES[alpha](theirs, dim=-1)
        assert (got - true).abs().max() < 1e-12
        (slope,) = torch.autograd.grad(got, ours, direction)
        (wanted,) = torch.autograd.grad(true, theirs, direction)
        assert (slope - wanted).abs().max() < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_weights_solve_the_equation_of_the_threshold(alpha: float, backend: str) -> None:
    """A threshold found by bisection, with no sorting."""
    scores = 3 * torch.randn(20, 9, dtype=torch.float64)
    low, high = scores.amin(-1, keepdim=True) - 3, scores.amax(-1, keepdim=True)
    for _ in range(80):
        middle = (low + high) / 2
        p = (((alpha - 1) * scores - middle).clamp(min=0)) ** (1 / (alpha - 1))
        low, high = (
            torch.where(p.sum(-1, keepdim=True) > 1, middle, low),
            torch.where(p.sum(-1, keepdim=True) > 1, high, middle),
        )
    assert (weights(scores, alpha, backend) - p).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_equal_scores_are_equal_and_far_keys_have_none(backend: str) -> None:
    even = torch.zeros(1, 7, dtype=torch.float64)
    for alpha, far in ((2.0, 1.0), (1.5, 2.0)):
        assert (weights(even, alpha, backend) - 1 / 7).abs().max() < 1e-12
        lone = torch.tensor([[0.0, -far, -far - 1e6]], dtype=torch.float64)
        assert weights(lone, alpha, backend)[0].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("m", [1, 7, 23])
def test_blocks_equal_the_definition_with_gradients(monkeypatch: pytest.MonkeyPatch, alpha: float, m: int) -> None:
    monkeypatch.setattr(chunk, "ELEMENTS", 4 * 2 * 4 * 23)  # four queries a block
    inputs = sampled(23, m) | {"alpha": alpha}
    leaves = {name: inputs[name].requires_grad_() for name in ("q", "k", "v")}
    found, true = (entmax_attention(**inputs, backend=backend) for backend in BACKENDS)
    assert (found - true).abs().max() < 1e-12
    direction = torch.randn_like(found)
    slopes, exact = (torch.autograd.grad(o, list(leaves.values()), direction) for o in (found, true))
    assert all((one - two).abs().max() < 1e-10 for one, two in zip(slopes, exact, strict=True))


def test_long_input_keeps_no_table_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    right = chunk.Entmax.apply

    def watched(scores: Tensor, alpha: float) -> Tensor:
        shapes.append(scores.numel())
        return right(scores, alpha)

    monkeypatch.setattr(chunk, "ELEMENTS", 1 << 12)
    monkeypatch.setattr(chunk.Entmax, "apply", watched)
    inputs = sampled(200, b=1)
    inputs["q"].requires_grad_()
    entmax_attention(**inputs).sum().backward()
    assert max(shapes) <= 1 << 12 and len(shapes) >= 2 * 4 * 200 * 200 / (1 << 13)


def test_the_reference_hides_what_may_not_be_seen() -> None:
    scores, visible = torch.tensor([[5.0, 1.0, 0.9]]), torch.tensor([[False, True, True]])
    for rule in (sparsemax, entmax15):
        row = rule(scores, visible)[0]
        assert row[0] == 0 and row.sum().item() == pytest.approx(1.0)
        assert not rule(scores, torch.zeros_like(visible)).any()


@pytest.mark.parametrize("alpha", [1, 1.0, 3, 0.0, float("nan")])
def test_an_alpha_without_a_solution_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha is .*, expected 1\.5 or 2 \(sparsemax\)"):
        entmax_attention(**{**sampled(4), "alpha": alpha})
    with pytest.raises(ValueError, match="EntmaxConfig: alpha is"):
        EntmaxConfig(16, 2, alpha=alpha)
