"""The tolerance itself: right results pass, wrong ones do not, and what it cannot see is written down."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.testing import runs
from attnkit.testing.budgets import FORWARD, allowed, assert_distinct, assert_within, used

SPEC = get("softmax")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]


def three(dtype: torch.dtype, seed: int = 0, **changed: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A result computed exactly (with something changed) and rounded, the truth, and the naive run."""
    right = SPEC.sample(seed, Sizes(b=2, h=4, g=2, m=64, n=128, d=64, e=64), dtype)
    wrong = runs.gold(SPEC, {**right, **changed})[0].to(dtype)
    return wrong.clone(), runs.gold(SPEC, right)[0], runs.naive(SPEC, right)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rounded_truth_uses_little(dtype: torch.dtype) -> None:
    assert assert_within(*three(dtype), dtype) < 0.5


def test_another_order_of_the_same_sums_is_within() -> None:
    """A correct program that multiplies in another order has to pass, or the budget would ask for luck."""
    for seed in range(20):
        _, gold, naive = three(torch.float32, seed)
        right = SPEC.sample(seed, Sizes(b=2, h=4, g=2, m=64, n=128, d=64, e=64), torch.float32)
        assert_within(runs.run(SPEC, "reference", right)[0], gold, naive, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_scale_is_seen(dtype: torch.dtype) -> None:
    """1 % off: the largest error misses it in bfloat16, the spread does not."""
    with pytest.raises(AssertionError, match="error"):
        assert_within(*three(dtype, scale=64**-0.5 * 1.01), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_is_seen(dtype: torch.dtype) -> None:
    got, gold, naive = three(dtype)
    got[1, 2, 3, 4] += 3 * allowed(gold, naive, dtype) + 1e-9
    with pytest.raises(AssertionError, match=r"largest error is .* worst at \(1, 2, 3, 4\)"):
        assert_within(got, gold, naive, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_that_always_goes_up_is_seen(dtype: torch.dtype) -> None:
    """Each element moves by less than its own budget, all of them the same way."""
    got, gold, naive = three(dtype)
    step = 0.4 * FORWARD[dtype].spread * gold.square().mean().sqrt()
    assert step < allowed(gold, naive, dtype)
    shifted = gold + step * 2
    with pytest.raises(AssertionError, match="error drift"):
        assert_within(shifted.clone(), gold, naive, dtype)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_specials_must_stand_in_the_same_places(value: float) -> None:
    got, gold, naive = three(torch.float32)
    got[0, 0, 0, 0] = value
    with pytest.raises(AssertionError, match="1 wrong places, first at"):
        assert_within(got, gold, naive, torch.float32)
    gold[0, 0, 0, 0] = value
    assert_within(got, gold, naive, torch.float32)
    with pytest.raises(AssertionError, match="wrong places"):
        assert_within(naive.clone(), gold, naive, torch.float32)


def test_a_truth_that_the_dtype_cannot_hold_is_infinite() -> None:
    gold = torch.tensor([1.0, 70000.0, -70000.0], dtype=torch.float64)
    assert_within(gold.half(), gold, gold.float(), torch.float16)
    with pytest.raises(AssertionError, match="inf in 1 wrong places"):
        assert_within(gold.half().clamp(max=65504), gold, gold.float(), torch.float16)


def test_all_zero_leaves_no_room() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert assert_within(torch.zeros(3), zero, torch.zeros(3), torch.float32) == 0
    with pytest.raises(AssertionError):
        assert_within(torch.full((3,), 1e-30), zero, torch.zeros(3), torch.float32)


def test_a_result_compared_with_itself_is_refused() -> None:
    _, gold, naive = three(torch.float64)
    with pytest.raises(AssertionError, match="gold shares memory with got: clone the inputs of each run"):
        assert_within(gold, gold, naive, torch.float64)
    with pytest.raises(AssertionError, match="b shares memory with a"):
        assert_distinct(a=gold, b=gold[0])
    assert_distinct(a=gold, b=gold.clone())


def test_wrong_shapes_and_golds_are_refused() -> None:
    got, gold, naive = three(torch.float32)
    with pytest.raises(AssertionError, match="has shape"):
        assert_within(got[0], gold, naive, torch.float32)
    with pytest.raises(AssertionError, match="expected float64"):
        assert_within(got, gold.float(), naive, torch.float32)


def test_poisoned_memory_shows_what_was_never_written() -> None:
    with runs.poisoned_memory():
        assert torch.empty(5).isnan().all()
        assert torch.zeros(2).new_empty(5).isnan().all()
        assert not torch.are_deterministic_algorithms_enabled() or torch.empty(3, dtype=torch.int64).gt(1 << 62).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_changed_input_is_noticed() -> None:
    import dataclasses

    from attnkit.spec import Backend

    def spoils(**call: Any) -> torch.Tensor:
        call["q"].zero_()
        return SPEC.reference(**call)

    spec = dataclasses.replace(SPEC, backends=(Backend("spoils", lambda: spoils),))
    with pytest.raises(AssertionError, match="spoils changed its argument q"):
        runs.run(spec, "spoils", SPEC.sample(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_adds_up_over_layers_and_mistakes_are_seen_all_the_same(dtype: torch.dtype) -> None:
    """What is too much rounding of one operation is little of many layers; a mistake is too much of both."""
    numbers = torch.Generator().manual_seed(0)
    gold = torch.randn(64, 64, generator=numbers, dtype=torch.float64)
    noise = torch.randn(64, 64, generator=numbers, dtype=torch.float64) * torch.finfo(dtype).eps
    naive, got = (gold + 8 * noise).to(dtype), (gold + 12 * noise.flip(0)).to(dtype)
    if dtype == torch.bfloat16:
        assert used(got, gold, naive, dtype).problem
    assert used(got, gold, naive, dtype, depth=30).problem is None
    assert used((gold * 1.3).to(dtype), gold, naive, dtype, depth=30).problem
