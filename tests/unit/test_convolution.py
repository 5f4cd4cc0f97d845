"""The short convolution: loops over rows, any split through its tail, rows that do not count, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from attnkit.convolution import ShortConvolution


def made(taps: int) -> tuple[ShortConvolution, torch.Tensor]:
    torch.manual_seed(taps)
    return ShortConvolution(5, taps, bias=True).double(), torch.randn(2, 9, 5, dtype=torch.float64)


@pytest.mark.parametrize("taps", [2, 4])
def test_equals_loops(taps: int) -> None:
    conv, x = made(taps)
    assert conv.bias is not None
    torch.nn.init.normal_(conv.bias)
    with torch.no_grad():
        y, tail = conv(x)
    weight, bias = conv.weight.detach(), conv.bias.detach()
    for b in range(2):
        for t in range(9):
            for c in range(5):
                read = range(max(0, t - taps + 1), t + 1)
                total = float(bias[c]) + sum(float(weight[c, 0, taps - 1 - t + i] * x[b, i, c]) for i in read)
                assert abs(float(y[b, t, c]) - total / (1 + math.exp(-total))) < 1e-12
    assert torch.equal(tail, x[:, 10 - taps :]), "the tail is what came in, not what went out"


def test_any_split_gives_the_same_rows() -> None:
    conv, x = made(4)
    whole, last = conv(x)
    for sizes in ([1] * 9, [2, 7], [5, 1, 3]):
        tail, rows = None, []
        for part in x.split(sizes, 1):
            y, tail = conv(part, tail)
            rows.append(y)
        assert (torch.cat(rows, 1) - whole).abs().max() < 1e-14
        assert torch.equal(tail, last)


def test_rows_beyond_the_lengths_leave_no_trace_in_the_tail() -> None:
    conv, x = made(4)
    tail = torch.randn(2, 3, 5, dtype=torch.float64)
    found = conv(x, tail, torch.tensor([7, 0]))[1]
    assert torch.equal(found[0], conv(x[:1, :7], tail[:1])[1][0])
    assert torch.equal(found[1], tail[1])


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"got 0 channels and 4 taps, expected >= 1 and >= 2"):
        ShortConvolution(0)
    with pytest.raises(ValueError, match=r"got 3 channels and 1 taps"):
        ShortConvolution(3, 1)
