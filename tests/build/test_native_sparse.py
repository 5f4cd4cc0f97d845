"""Learned-sparse attention natively: levels against the reference, bits for any threads and batch, what is hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnkit
from attnkit import native
from attnkit.dispatch import watch
from attnkit.mechanisms.dsa import cpu as dsa
from attnkit.mechanisms.dsa import dsa_attention
from attnkit.mechanisms.moba import listed, moba_attention, selected_attention
from attnkit.mechanisms.moba.cpu import attend
from attnkit.mechanisms.nsa import nsa_attention
from attnkit.mechanisms.topk import topk_attention
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
@pytest.mark.parametrize("name", ["moba", "nsa", "dsa", "topk"])
def test_levels_agree_with_the_reference(level: str, name: str) -> None:
    spec = get(name)
    for seed in range(4):
        given = spec.sample(seed)
        exact = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in given.items()}
        with native.use_level(level):
            got = spec.function(**given, backend="cpu")
        gold, naive = spec.function(**exact, backend="reference"), spec.function(**given, backend="reference")
        assert_within(got, gold, naive, torch.float32)


def chosen_of(n: int, m: int, block: int, most: int, lists: int = 2, causal: bool = True) -> torch.Tensor:
    """Lists of different blocks, of different lengths."""
    own = torch.arange(n - m, n)[:, None] // block
    ranked = torch.rand(1, lists, m, -(-n // block), generator=torch.Generator().manual_seed(3))
    number = torch.arange(ranked.shape[3])
    ranked.masked_fill_((number >= own) if causal else (number == own), -1.0)
    found = ranked.topk(min(most, ranked.shape[3]))
    return found.indices.masked_fill(found.values < 0.1, -1)


def seen_through(chosen: torch.Tensor, n: int, block: int, heads: int, causal: bool = True) -> torch.Tensor:
    """The same as a dense mask ``(1, h, m, n)``."""
    m, count = chosen.shape[2], -(-n // block)
    seen = torch.zeros(*chosen.shape[:3], count + 1, dtype=torch.bool).scatter(3, chosen % (count + 1), True)
    tokens, positions = torch.arange(n), torch.arange(n - m, n)[:, None]
    here = (tokens // block == positions // block) & ((tokens <= positions) | (not causal))
    return (seen[..., :-1][..., tokens // block] | here).repeat_interleave(heads // chosen.shape[1], 1)


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("block", [5, 64, 100])
@pytest.mark.parametrize(("d", "e"), [(64, 64), (59, 111)])
def test_chosen_blocks_of_any_size(level: str, block: int, d: int, e: int) -> None:
    """Blocks that begin and end within a panel of keys, more queries than one span, lists with gaps."""
    n, m = 401, 390
    q, k, v = numbers(1, 6, m, d), numbers(1, 2, n, d, seed=1), numbers(1, 2, n, e, seed=2)
    chosen = chosen_of(n, m, block, 3)
    mask = seen_through(chosen, n, block, 6)
    wide = tuple(x.double() for x in (q, k, v))
    gold = attnkit.softmax_attention(*wide, mask=mask, backend="reference")
    naive = attnkit.softmax_attention(q, k, v, mask=mask, backend="reference")
    with native.use_level(level):
        got = selected_attention(q, k, v, chosen, block=block)
    assert_within(got, gold, naive, torch.float32)


def slopes_of(o: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(o, leaves, numbers(*o.shape, seed=11).to(o.dtype))


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize(("block", "causal"), [(5, True), (64, True), (100, True), (100, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_chosen_blocks(
    level: str, block: int, causal: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that begin and end within a tile of keys, tiles of rows of more than one span, lists with gaps."""
    monkeypatch.setattr(listed, "NUMBERS", 1 << 18)
    n, m = 301, 290
    given = [numbers(1, h, t, 24, seed=h).to(dtype) for h, t in ((4, m), (2, n), (1, n))]
    given[2] = given[2].expand(1, 2, n, 24) + numbers(1, 2, n, 24).to(dtype)
    chosen = chosen_of(n, m, block, 3, causal=causal)
    mask = seen_through(chosen, n, block, 4, causal)
    found = []
    for kind in (torch.float64, dtype):
        leaves = [x.to(kind).requires_grad_() for x in given]
        found.append(slopes_of(attnkit.softmax_attention(*leaves, mask=mask, backend="reference"), leaves))
    leaves = [x.clone().requires_grad_() for x in given]
    with native.use_level(level):
        got = slopes_of(attend(*leaves, chosen, block, 24**-0.5, causal), leaves)
    for slope, gold, naive in zip(got, *found, strict=True):
        assert_within(slope, gold, naive, dtype, gradient=True)


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_gradients_depend_on_neither_threads_nor_batch(level: str, dtype: torch.dtype, threads: Any) -> None:
    given = [numbers(2, h, 260, 40, seed=h).to(dtype) for h in (4, 2, 2)]

    def slopes(batch: slice) -> tuple[torch.Tensor, ...]:
        leaves = [x[batch].clone().requires_grad_() for x in given]
        return slopes_of(moba_attention(*leaves, block=32, top=3, backend="cpu"), leaves)

    with native.use_level(level):
        threads(1)
        one = slopes(slice(0, 1))
        threads(2)
        assert all(torch.equal(x, y[:1]) for x, y in zip(one, slopes(slice(None)), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [260, 33])
def test_gradients_of_all_branches(dtype: torch.dtype, m: int) -> None:
    """Compressed blocks end at every place within a tile, and blocks of 32 are trained natively."""
    sizes = {"length": 16, "stride": 8, "block": 32, "selected": 4, "window": 50}
    shapes = [(4, m, 24), (2, 260, 24), (2, 260, 24), (2, 31, 24), (2, 31, 24), (2, 260, 24), (2, 260, 24), (4, m, 3)]
    given = [numbers(2, *shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    found = []
    for kind, backend in ((torch.float64, "reference"), (dtype, "reference"), (dtype, "cpu")):
        leaves = [x.to(kind).requires_grad_() for x in given]
        with watch() as ran:
            found.append(slopes_of(nsa_attention(*leaves, **sizes, backend=backend), leaves))
        assert backend == "reference" or set(ran) == {("nsa", "cpu"), ("softmax", "cpu")}
    for gold, naive, got in zip(*found, strict=True):
        assert_within(got, gold, naive, dtype, gradient=True)


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_key_that_nobody_chose_does_not_leak_into_gradients(level: str, odd: float) -> None:
    """Key 70 shares a tile with keys that are seen."""
    given = [numbers(1, 2, t, 16, seed=t) for t in (100, 300, 300)]
    chosen, found = chosen_of(300, 100, 50, 4), []
    chosen = chosen.masked_fill(chosen == 1, -1)
    for value in (1.0, odd):
        given[1][:, :, 70], given[2][:, :, 70] = value, value
        leaves = [x.clone().requires_grad_() for x in given]
        with native.use_level(level):
            found.append(slopes_of(selected_attention(*leaves, chosen, block=50), leaves))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    assert not any(x[:, :, 50:100].any() for x in found[1][1:])


def runs(dtype: torch.dtype, batch: slice) -> dict[str, Callable[[], torch.Tensor]]:
    q, k, v = (numbers(3, h, 700, 64, seed=h).to(dtype)[batch] for h in (4, 2, 2))
    compressed, gates = numbers(3, 2, 87, 64, seed=9).to(dtype)[batch], numbers(3, 4, 700, 3, seed=8).to(dtype)[batch]
    sizes = {"length": 16, "stride": 8, "block": 32, "selected": 5, "window": 50}
    index_q, index_k, index_w = (
        numbers(3, *shape, seed=7).to(dtype)[batch] for shape in ((4, 300, 32), (1, 700, 32), (4, 300))
    )
    latent, kv_b = numbers(3, 1, 700, 64, seed=6).to(dtype)[batch], numbers(4, 64, 48, seed=5).to(dtype) / 7
    return {
        "dsa": lambda: dsa_attention(
            q[:, :, :300, :48], latent, kv_b, index_q, index_k, index_w, top=120, backend="cpu"
        ),
        "topk": lambda: topk_attention(q, k, v, density=0.1, mask=attnkit.window(400), backend="cpu"),
        "moba": lambda: moba_attention(q, k, v, block=64, top=4, backend="cpu"),
        "nsa": lambda: nsa_attention(q, k, v, compressed, compressed, k, v, gates, **sizes, backend="cpu"),
    }


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["moba", "nsa", "dsa", "topk"])
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


def by_sorting(scores: torch.Tensor, top: int) -> torch.Tensor:
    """The ``top`` best keys of each row, ascending, the first of equals; -1 behind them where fewer are visible."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :top]
    hidden = scores.gather(-1, order) == -torch.inf
    return order.masked_fill(hidden, scores.shape[-1]).sort(-1).values.masked_fill(hidden.sort(-1).values, -1)


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "top"), [(1, 1, 3), (300, 300, 1), (9, 1000, 70), (130, 400, 64), (5, 90, 200)])
def test_the_indexer_chooses_as_a_stable_sort(level: str, dtype: torch.dtype, m: int, n: int, top: int) -> None:
    """Small whole numbers: every score is exact, and most are one of a few, so that ties decide who is chosen."""
    index_q, index_k = (numbers(2, h, t, 5, seed=t).round().to(dtype) for h, t in ((4, m), (2, n)))
    index_w = numbers(2, 4, m).round()
    products = torch.einsum("bgrmd,bgnd->bgrmn", index_q.float().unflatten(1, (2, 2)), index_k.float()).flatten(1, 2)
    scores = torch.einsum("bhmn,bhm->bmn", products.relu(), index_w)
    scores.masked_fill_(~attnkit.causal().dense(m, n)[0], -torch.inf)
    with native.use_level(level):
        found = dsa.choose(index_q, index_k, index_w, n, top).long()
    assert torch.equal(found, by_sorting(torch.nn.functional.pad(scores, (0, top), value=-torch.inf), top))


@pytest.mark.parametrize("level", native.STATUS.levels)
def test_of_keys_that_are_all_alike_the_first_are_chosen(level: str) -> None:
    index_q, index_w = numbers(1, 4, 1000, 8), numbers(1, 4, 1000)
    with native.use_level(level):
        found = dsa.choose(index_q, torch.zeros(1, 1, 1000, 8), index_w, 1000, 70).long()
    expected = torch.arange(70).where(torch.arange(70) <= torch.arange(1000)[:, None], -1)
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("few", [{"top": 1}, {"top": 4}, {"top": 70}, {"density": 0.3}])
@pytest.mark.parametrize("shown", [attnkit.causal(), attnkit.causal() & ~attnkit.window(90), None], ids=str)
def test_ties_are_settled_as_by_a_stable_sort(level: str, few: dict[str, Any], shown: attnkit.Mask | None) -> None:
    """Whole numbers again, most scores being one of a few; values are sharp enough to tell who was kept."""
    q, k, v = numbers(1, 2, 300, 3).round(), numbers(1, 1, 300, 3, seed=1).round(), numbers(1, 1, 300, 70, seed=2)
    with native.use_level(level):
        found = topk_attention(q, k, v, **few, mask=shown, backend="cpu")
    gold = topk_attention(q.double(), k.double(), v.double(), **few, mask=shown, backend="reference")
    naive = topk_attention(q, k, v, **few, mask=shown, backend="reference")
    assert_within(found, gold, naive, torch.float32)


KEYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda k: k,
    "of all sizes": lambda k: k * torch.logspace(-6, 6, k.shape[2])[torch.randperm(k.shape[2])][:, None],
    "one channel far above the rest": lambda k: torch.cat([k[..., :-1], 1000 * k[..., -1:]], -1),
    "tiny": lambda k: k * 2.0**-60,
    "huge": lambda k: k * 2.0**90,
    "mostly nothing": lambda k: k * (torch.arange(k.shape[2]) % 7 == 3)[:, None],
    "all alike": lambda k: k[:, :, :1].expand_as(k).contiguous(),
}


@pytest.mark.parametrize("level", native.STATUS.levels[-1:])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.1, -0.1, 0.0])
@pytest.mark.parametrize("kind", KEYS)
def test_bounds_leave_out_nothing_that_is_kept(level: str, dtype: torch.dtype, scale: float, kind: str) -> None:
    """Few keys of many, which byte products look for: the same keys as when all are scored, and the same result.

    Values tell which keys were kept.
    """
    q, k = numbers(1, 2, 60, 45).to(dtype), numbers(1, 1, 900, 45, seed=1)
    k = KEYS[kind](k).clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else KEYS[kind](k).to(dtype)
    v = torch.nn.functional.one_hot(torch.arange(900) % 450).to(dtype).view(1, 1, 900, 450)
    with native.use_level(level):
        few = topk_attention(q, k, v, top=4, scale=scale, mask=attnkit.causal(), backend="cpu")
    wide = (x.double() for x in (q, k, v))
    gold = topk_attention(*wide, top=4, scale=scale, mask=attnkit.causal(), backend="reference")
    naive = topk_attention(q, k, v, top=4, scale=scale, mask=attnkit.causal(), backend="reference")
    assert_within(few, gold, naive, dtype)


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_hidden_key_and_a_value_that_is_not_kept_do_not_leak(level: str, odd: float) -> None:
    q, k, v = (numbers(1, 2, 100, 20, seed=seed) for seed in range(3))
    q[..., 0], k[:, :, 7] = 1.0, 0.0
    k[:, :, 7, 0] = -1e3  # nobody's best
    with native.use_level(level):
        clean = topk_attention(q, k, v, top=5, mask=attnkit.causal(), backend="cpu")
        v[:, :, 7], k[:, :, 60] = odd, odd
        dirty = topk_attention(q, k, v, top=5, mask=attnkit.causal(), backend="cpu")
        all_kept = topk_attention(q, k, v, top=20, mask=attnkit.causal(), backend="cpu")
    assert torch.equal(clean[:, :, 12:60], dirty[:, :, 12:60])
    assert not all_kept[:, :, 7].isfinite().any(), "who keeps it is not spared"


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_was_not_chosen_does_not_leak(
    level: str, gathers: bool, odd: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A latent that nobody chose, in the second of two sequences, and an index key of the future."""
    monkeypatch.setattr(dsa, "gathers", lambda *call: gathers)
    given = get("dsa").sample(3)
    given["index_k"][1, :, 11] = 0.0
    given["index_q"], given["index_w"] = given["index_q"].abs(), given["index_w"].abs()
    given["index_k"] = given["index_k"].abs()
    with native.use_level(level):
        clean = dsa_attention(**given, backend="cpu")
        given["latent"][1, :, 11] = odd
        given["index_k"][:, :, 36] = odd
        dirty = dsa_attention(**given, backend="cpu")
    early = 11 + given["top"]  # by then there are keys enough of a score above 0
    assert torch.equal(clean[0, :, :36], dirty[0, :, :36])
    assert torch.equal(clean[1, :, :11], dirty[1, :, :11])
    if gathers:
        assert torch.equal(clean[1, :, early:36], dirty[1, :, early:36])
    assert dirty[1, :, early:36].isfinite().all()
    assert not dirty[1, :, 11].isfinite().all(), "whoever sees it is not spared"


def test_what_cannot_run_is_refused_with_its_value() -> None:
    q = numbers(1, 1, 100, 16)
    with pytest.raises(NotImplementedError, match="gradients are wanted for q"):
        topk_attention(q.clone().requires_grad_(), q, q, top=2, backend="cpu")
    with pytest.raises(NotImplementedError, match=r"scale is -1\.0"):
        moba_attention(q, q, q, block=8, top=2, scale=-1.0, backend="cpu")


def test_a_number_that_is_no_block_stands_for_none() -> None:
    q = numbers(1, 1, 100, 16)
    none = torch.full((1, 1, 100, 2), -1)
    wild = torch.tensor([-(2**31), 2**31 - 1]).expand(1, 1, 100, 2)
    assert torch.equal(selected_attention(q, q, q, none, block=8), selected_attention(q, q, q, wild, block=8))
