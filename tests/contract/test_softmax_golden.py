"""Golden vectors, computed once in float64 by a program that is not in this repository."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.positions import Llama3, Rotary, T5Buckets, YaRN, alibi_slopes

PLACES = 8  # the vectors were printed with nine digits after the point


def generated(seed: int, *shape: int) -> Tensor:
    """``sin(0.37 k^2 + 1.1 k + seed)`` in row-major order."""
    k = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.37 * k**2 + 1.1 * k + seed).reshape(shape)


def inputs() -> list[Tensor]:
    return [generated(seed, 1, 1, 8, 4) for seed in (1, 2, 3)]


ATTENTION: dict[str, tuple[dict[str, Any], float, float, list[float]]] = {
    "causal": (
        {"mask": attnkit.causal()}, -5.632637789, 11.126692916, [-0.036029, -0.447398, -0.285471, -0.033004],
    ),
    "bidirectional": ({}, -5.463729149, 7.749282669, [-0.036029, -0.447398, -0.285471, -0.033004]),
    "window 3": (
        {"mask": attnkit.window(3)}, -4.960221167, 12.224123600, [-0.325325, 0.279174, -0.930619, -0.074499],
    ),
    "dilated 3, 2": (
        {"mask": attnkit.dilated_window(3, 2)}, -5.030850574, 13.494809483, [-0.064618, 0.069681, -0.586473, 0.067681],
    ),
    "strided 4": (
        {"mask": attnkit.strided(4)}, -5.338727814, 11.272774805, [-0.040548, -0.036098, -0.660513, 0.187063],
    ),
    "softcap 1.5": (
        {"mask": attnkit.causal(), "softcap": 1.5},
        -5.746889266, 11.029880201, [-0.030778, -0.448108, -0.291040, -0.031337],
    ),
    "sink 0.25": (
        {"mask": attnkit.causal(), "sink": torch.tensor([0.25])},
        -4.383957041, 8.433830018, [-0.032737, -0.406523, -0.259390, -0.029989],
    ),
    "alibi 0.5": (
        {"mask": attnkit.causal(), "alibi": torch.tensor([0.5])},
        -5.424238811, 12.559901975, [-0.234057, 0.122475, -0.794543, 0.057446],
    ),
}  # fmt: skip


def assert_golden(found: Tensor, total: float, magnitude: float, last: list[float]) -> None:
    assert found.sum().item() == pytest.approx(total, abs=10**-PLACES)
    assert found.abs().sum().item() == pytest.approx(magnitude, abs=10**-PLACES)
    assert found[0, 0, -1].tolist() == pytest.approx(last, abs=1e-6)  # printed with six digits


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_softmax_golden(name: str, backend: str) -> None:
    settings, *expected = ATTENTION[name]
    if "softcap" in settings and backend == "sdpa":
        with pytest.raises(NotImplementedError, match=r"softcap is 1.5"):
            attnkit.softmax_attention(*inputs(), **settings, backend=backend)
        return
    assert_golden(attnkit.softmax_attention(*inputs(), **settings, backend=backend), *expected)


def test_rotary_golden() -> None:
    q, k, v = inputs()
    half, interleaved = Rotary(4), Rotary(4, style="interleaved")
    at = torch.arange(8)
    assert_golden(half.rotate(q, at), 4.717636935, 23.568063812, [0.394715, -1.058131, 1.055667, 0.824824])
    assert_golden(interleaved.rotate(q, at), 5.434471426, 23.650758796, [1.402793, -0.101118, 0.472508, 0.932144])
    o = attnkit.softmax_attention(half.rotate(q, at), half.rotate(k, at), v, mask=attnkit.causal(), backend="reference")
    assert_golden(o, -5.855268194, 11.063760795, [-0.104474, -0.481004, -0.244381, -0.058012])


def test_yarn_golden() -> None:
    """DeepSeek-V3's: base 10,000, 64 channels, factor 40 over 4,096."""
    scaling = YaRN(40, 4096)
    assert scaling.bounds(64, 10000.0) == (10, 23)
    found = Rotary(64, scaling=scaling).frequencies()[[0, 8, 10, 11, 16, 22, 23, 31]]
    expected = [1, 0.1, 0.0562341325, 0.0390069266, 0.0055, 0.000177827941, 3.33380358e-05, 3.33380358e-06]
    assert found.tolist() == pytest.approx(expected, rel=1e-8)


def test_llama3_golden() -> None:
    found = Rotary(128, 5e5, scaling=Llama3()).frequencies()[[0, 28, 29, 32, 34, 36, 40, 63]]
    expected = [
        1, 0.00321144599, 0.00216657076, 0.000524846161, 0.000178507813, 7.78465527e-05, 3.4281022e-05, 3.06892599e-07,
    ]  # fmt: skip
    assert found.tolist() == pytest.approx(expected, rel=1e-8)


def test_t5_buckets_golden() -> None:
    distances = torch.tensor([0, 1, 15, 16, 20, 40, 64, 127, 128, 500])
    found = T5Buckets().index(distances, torch.zeros(1, dtype=torch.int64))[:, 0]
    assert found.tolist() == [0, 1, 15, 16, 17, 23, 26, 31, 31, 31]


def test_alibi_golden() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    expected = [2.0**-i for i in range(1, 9)] + [0.707107, 0.353553, 0.176777, 0.088388]
    assert alibi_slopes(12).tolist() == pytest.approx(expected, abs=1e-6)
