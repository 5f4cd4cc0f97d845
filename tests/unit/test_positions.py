"""Rotary embeddings, their scalings, ALiBi slopes and T5 buckets: what they promise beside the golden vectors."""

from __future__ import annotations

import math

import pytest
import torch

from attnkit.positions import Linear, Llama3, Rotary, T5Buckets, YaRN, alibi_slopes, distance
from attnkit.testing.budgets import assert_within

SCALINGS = (None, Linear(4.0), YaRN(8.0, 64), Llama3(8.0, 1.0, 4.0, 64))


def scores(rotary: Rotary, q: torch.Tensor, k: torch.Tensor, offset: int) -> torch.Tensor:
    positions = torch.arange(offset, offset + q.shape[2])
    return rotary.rotate(q, positions) @ rotary.rotate(k, positions).mT


@pytest.mark.parametrize("offset", [0, 1, 4095, 16_000, 131_071])
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_scores_depend_on_differences_only(offset: int, style: str, scaling: object) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 9, 64), torch.randn(2, 3, 9, 64)
    rotary = Rotary(64, style=style, scaling=scaling)  # type: ignore[arg-type]
    gold = scores(rotary, q.double(), k.double(), 0)
    assert_within(scores(rotary, q, k, offset), gold, scores(rotary, q, k, 0).clone(), torch.float32)


def test_half_precision_angles_would_be_noticed() -> None:
    """The inverse: tables made from bfloat16 angles fail the shift test from position 16,000 on."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 9, 64), torch.randn(1, 1, 9, 64)
    rotary = Rotary(64)
    gold = scores(rotary, q.double(), k.double(), 0)

    def turned(x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(16_000, 16_009).bfloat16()
        angle = (positions[:, None] * rotary.frequencies().bfloat16()).float()
        one, two = x.chunk(2, -1)
        return torch.cat([one * angle.cos() - two * angle.sin(), one * angle.sin() + two * angle.cos()], -1)

    with pytest.raises(AssertionError):
        assert_within(turned(q) @ turned(k).mT, gold, scores(rotary, q, k, 0).clone(), torch.float32)


def test_styles_are_a_permutation_of_each_other() -> None:
    torch.manual_seed(0)
    x, positions = torch.randn(1, 2, 5, 8, dtype=torch.float64), torch.arange(3, 8)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    half = Rotary(8).rotate(x[..., order], positions)
    interleaved = Rotary(8, style="interleaved").rotate(x, positions)[..., order]
    assert_within(half, interleaved.clone(), interleaved.clone(), torch.float64)
    plain = Rotary(8).rotate(x, positions)[..., order]
    assert (plain - interleaved).abs().max() > 0.1, "the styles are not the same thing"


def test_partial_rotary_leaves_the_rest() -> None:
    x = torch.randn(1, 2, 5, 16)
    turned = Rotary(16, rotary_size=4).rotate(x, torch.arange(5))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[..., :4], Rotary(4).rotate(x[..., :4], torch.arange(5)))


def test_positions_of_each_sequence() -> None:
    x = torch.randn(2, 3, 4, 8)
    positions = torch.stack([torch.arange(4), torch.arange(10, 14)])
    both = Rotary(8).rotate(x, positions)
    for row in range(2):
        assert torch.equal(both[row : row + 1], Rotary(8).rotate(x[row : row + 1], positions[row]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rotation_keeps_dtype_and_position_0(dtype: torch.dtype) -> None:
    x = torch.randn(1, 1, 3, 8).to(dtype)
    turned = Rotary(8).rotate(x, torch.arange(3))
    assert turned.dtype == dtype
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_neutral_scalings_change_nothing() -> None:
    plain = Rotary(64).frequencies()
    for scaling in (Linear(1.0), YaRN(1.0, 4096), Llama3(1.0)):
        found = Rotary(64, scaling=scaling).frequencies()
        assert_within(found, plain.clone(), plain.clone(), torch.float64)
        assert scaling.attention_factor == 1.0
    assert YaRN(40, 4096).attention_factor == 0.1 * math.log(40) + 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Rotary(8, style="neox"), "style is 'neox', expected 'half' or 'interleaved'"),
        (lambda: Rotary(7), "rotary size is 7, expected an even number up to head size 7"),
        (lambda: Rotary(8, rotary_size=10), "rotary size is 10"),
        (lambda: Rotary(8).rotate(torch.zeros(1, 1, 2, 4), torch.arange(2)), "head size 4, expected 8"),
        (lambda: alibi_slopes(0), "heads is 0"),
        (lambda: T5Buckets().bias(torch.zeros(31, 2), torch.arange(2), torch.arange(2)), "expected (32, heads)"),
    ],
)
def test_bad_positions_are_one_sentence(make: object, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()  # type: ignore[operator]
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_distance_is_bottom_right() -> None:
    assert distance(2, 4).tolist() == [[2, 1, 0, 1], [3, 2, 1, 0]]


def test_t5_buckets() -> None:
    near, far = T5Buckets(), T5Buckets(bidirectional=True)
    q, k = torch.tensor([300]), torch.arange(601)
    both = far.index(q, k)[0]
    assert both[300] == 0
    assert both[:300].max() == 15 and both[301:].min() == 17 and both[301:].max() == 31
    assert torch.equal(both[:300].flip(0), both[301:] - 16), "the two sides mirror each other"
    assert torch.equal(near.index(q, k)[0, 300:], torch.zeros(301, dtype=torch.int64)), "the future is distance 0"
    table = torch.randn(32, 3)
    bias = near.bias(table, torch.arange(5, 7), torch.arange(7))
    assert bias.shape == (1, 3, 2, 7)
    assert torch.equal(bias[0, :, 1, 4], table[2])
