"""Blocks of queries: they cover the call, see what the mask says, and are computed again in the backward."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.blocks import joined, seen, spans
from attnkit.testing.rules import any_rule

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9])
def test_spans_cover_every_row_once(count: int) -> None:
    found = spans(count, 4)
    assert [i for start, end in found for i in range(start, end)] == list(range(count))
    assert len(found) == max(1, -(-count // 4))


@pytest.mark.parametrize("seed", range(40))
def test_a_block_sees_what_the_mask_shows(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randint(1, 20)
    m = rng.randint(1, n + 2)
    mask = any_rule(rng, 2, 3, m, n).mask
    dense = mask.dense(m, n)
    for start, end in spans(m, 4):
        low, high, keep = seen(mask, start, end, m, n, CPU)
        rows = dense[:, :, start:end]
        assert not rows[..., :low].any() and not rows[..., high:].any()
        assert bool(rows[..., low:high].all()) if keep is None else torch.equal(keep, rows[..., low:high])


def test_a_window_cuts_keys_and_a_last_query_needs_no_mask() -> None:
    assert seen(attnkit.window(3), 8, 12, 16, 16, CPU)[:2] == (6, 12)
    assert seen(attnkit.causal(), 0, 1, 1, 9, CPU) == (0, 9, None)
    assert seen(attnkit.window(2), 0, 1, 1, 9, CPU) == (7, 9, None)
    assert seen(attnkit.causal(), 0, 2, 2, 0, CPU)[:2] == (0, 0)


@pytest.mark.parametrize("pair", [False, True])
def test_blocks_are_computed_again_in_the_backward(pair: bool) -> None:
    calls = []

    def rows(x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        calls.append(len(x))
        return (x.square(), x.sum(-1)) if pair else x.square()

    x = torch.randn(1, 1, 9, 2, requires_grad=True)
    whole = joined(rows, [(x,)])
    parts = joined(rows, [(x[:, :, start:end],) for start, end in spans(9, 4)])
    assert torch.equal(parts[0] if pair else parts, whole[0] if pair else whole)
    assert len(calls) == 4
    (parts[0] if pair else parts).sum().backward()
    assert torch.equal(x.grad, 2 * x) and len(calls) == 7


def test_a_block_that_is_cut_when_it_is_asked_for_gives_its_gradient_back_at_once() -> None:
    seen = []

    def rows(x: Tensor, block: int) -> Tensor:
        seen.append(("computed", block))
        return x.square()

    def cut(block: int) -> tuple[Tensor, int]:
        part = x[:, :, 2 * block : 2 * block + 2]
        part.register_hook(lambda _: seen.append(("gradient", block)))
        return part, block

    x = torch.randn(1, 1, 8, 2, requires_grad=True)
    o = joined(rows, (cut(block) for block in range(4)))
    seen.clear()
    o.sum().backward()
    # The first two are looked at together, to know whether there is more than one.
    assert seen[:4] == [(what, block) for block in (3, 2) for what in ("computed", "gradient")]
