"""Learned-sparse attention natively: levels against the reference, bits for any threads and batch, what is hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnkit
from attnkit import native
from attnkit.mechanisms.moba import moba_attention, selected_attention
from attnkit.mechanisms.nsa import nsa_attention
from attnkit.registry import get
from attnkit.testing.budgets import assert_within

pytestmark = pytest.mark.skipif(not native.STATUS.available, reason=native.STATUS.reason)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("name", ["moba", "nsa"])
def test_levels_agree_with_the_reference(level: str, name: str) -> None:
    spec = get(name)
    for seed in range(4):
        given = spec.sample(seed)
        exact = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in given.items()}
        with native.use_level(level):
            got = spec.function(**given, backend="cpu")
        gold, naive = spec.function(**exact, backend="reference"), spec.function(**given, backend="reference")
        assert_within(got, gold, naive, torch.float32)


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("block", [5, 64, 100])
@pytest.mark.parametrize(("d", "e"), [(64, 64), (59, 111)])
def test_chosen_blocks_of_any_size(level: str, block: int, d: int, e: int) -> None:
    """Blocks that begin and end within a panel of keys, more queries than one span, lists with gaps."""
    n, m = 401, 390
    q, k, v = numbers(1, 6, m, d), numbers(1, 2, n, d, seed=1), numbers(1, 2, n, e, seed=2)
    own = torch.arange(n - m, n)[:, None] // block
    ranked = torch.rand(1, 2, m, -(-n // block), generator=torch.Generator().manual_seed(3))
    found = ranked.masked_fill(torch.arange(ranked.shape[3]) >= own, -1.0).topk(min(3, ranked.shape[3]))
    chosen = found.indices.masked_fill(found.values < 0, -1)
    seen = torch.zeros(1, 2, m, ranked.shape[3] + 1, dtype=torch.bool).scatter(3, chosen % (ranked.shape[3] + 1), True)
    tokens, positions = torch.arange(n), torch.arange(n - m, n)[:, None]
    here = (tokens // block == own) & (tokens <= positions)
    mask = (seen[..., :-1][..., tokens // block] | here).repeat_interleave(3, 1)
    wide = tuple(x.double() for x in (q, k, v))
    gold = attnkit.softmax_attention(*wide, mask=mask, backend="reference")
    naive = attnkit.softmax_attention(q, k, v, mask=mask, backend="reference")
    with native.use_level(level):
        got = selected_attention(q, k, v, chosen, block=block)
    assert_within(got, gold, naive, torch.float32)


def runs(dtype: torch.dtype, batch: slice) -> dict[str, Callable[[], torch.Tensor]]:
    q, k, v = (numbers(3, h, 700, 64, seed=h).to(dtype)[batch] for h in (4, 2, 2))
    compressed, gates = numbers(3, 2, 87, 64, seed=9).to(dtype)[batch], numbers(3, 4, 700, 3, seed=8).to(dtype)[batch]
    sizes = {"length": 16, "stride": 8, "block": 32, "selected": 5, "window": 50}
    return {
        "moba": lambda: moba_attention(q, k, v, block=64, top=4, backend="cpu"),
        "nsa": lambda: nsa_attention(q, k, v, compressed, compressed, k, v, gates, **sizes, backend="cpu"),
    }


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["moba", "nsa"])
def test_bits_depend_on_neither_threads_nor_batch(level: str, dtype: torch.dtype, name: str, threads: Any) -> None:
    with native.use_level(level):
        threads(1)
        alone = torch.cat([runs(dtype, slice(i, i + 1))[name]() for i in range(3)])
        one = runs(dtype, slice(None))[name]()
        threads(2)
        assert torch.equal(alone, one)
        assert torch.equal(one, runs(dtype, slice(None))[name]())


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_later_key_or_value_does_not_leak(level: str, odd: float) -> None:
    q, k, v = (numbers(1, 2, 300, 64, seed=seed) for seed in range(3))
    with native.use_level(level):
        clean = moba_attention(q, k, v, block=50, top=3, backend="cpu")
        k[:, :, 170], v[:, :, 171] = odd, odd
        dirty = moba_attention(q, k, v, block=50, top=3, backend="cpu")
    assert torch.equal(clean[:, :, :170], dirty[:, :, :170])
    assert not dirty[:, :, 171].isfinite().all(), "whoever sees it is not spared"


def test_what_cannot_run_is_refused_with_its_value() -> None:
    q = numbers(1, 1, 100, 16)
    with pytest.raises(NotImplementedError, match="gradients are wanted for q"):
        moba_attention(q.clone().requires_grad_(), q, q, block=8, top=2, backend="cpu")
    with pytest.raises(NotImplementedError, match=r"scale is -1\.0"):
        moba_attention(q, q, q, block=8, top=2, scale=-1.0, backend="cpu")


def test_a_number_that_is_no_block_stands_for_none() -> None:
    q = numbers(1, 1, 100, 16)
    none = torch.full((1, 1, 100, 2), -1)
    wild = torch.tensor([-(2**31), 2**31 - 1]).expand(1, 1, 100, 2)
    assert torch.equal(selected_attention(q, q, q, none, block=8), selected_attention(q, q, q, wild, block=8))
