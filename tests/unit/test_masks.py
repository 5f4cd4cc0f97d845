"""The mask algebra: every kind against its rule in plain Python, every lowering against every other, the pictures."""

from __future__ import annotations

import random
import textwrap

import pytest
import torch

import attnkit
from attnkit.masks import UNBOUNDED, Mask, Moved
from attnkit.masks.lowering import BlockList, grid
from attnkit.testing import rules

SIZES = ((1, 1), (1, 9), (5, 9), (9, 9), (48, 64), (49, 65), (100, 130))


def random_rule(seed: int) -> tuple[rules.Rule, int, int, int, int]:
    rng = random.Random(seed)
    b, h, (m, n) = rng.choice((1, 2)), rng.choice((1, 2, 3)), rng.choice(SIZES)
    return rules.any_rule(rng, b, h, m, n, depth=2), b, h, m, n


def unpacked(blocks: BlockList, m: int, n: int) -> torch.Tensor:
    """The dense mask that a block list stands for, read as the native kernels read it."""
    rows = -(-m // blocks.block_q)
    dense = torch.zeros(blocks.batches * blocks.heads, rows * blocks.block_q, n + blocks.block_k, dtype=torch.bool)
    for row in range(len(blocks.offsets) - 1):
        span = slice(int(blocks.offsets[row]), int(blocks.offsets[row + 1]))
        columns = blocks.columns[span].tolist()
        assert columns == sorted(set(columns))
        for column, pattern in zip(columns, blocks.pattern[span].tolist(), strict=True):
            words = blocks.patterns[pattern] if pattern >= 0 else torch.full((blocks.block_q,), -1)
            bits = ((words[:, None] >> torch.arange(blocks.block_k)) & 1).bool()
            top, left = row % rows * blocks.block_q, column * blocks.block_k
            dense[row // rows, top : top + blocks.block_q, left : left + blocks.block_k] = bits
    return dense[:, :m, :n].unflatten(0, (blocks.batches, blocks.heads))


@pytest.mark.parametrize("kind", rules.KINDS)
def test_kinds_mean_what_their_rules_say(kind: str) -> None:
    for seed in range(15):
        rng = random.Random(seed)
        b, h, (m, n) = 2, 2, rng.choice(SIZES[:5])
        rule = rules.KINDS[kind](rng, b, h, m, n)
        assert torch.equal(rule.mask.dense(m, n).expand(b, h, m, n), rule.table(b, h, m, n)), repr(rule.mask)


def test_lowerings_agree() -> None:
    for seed in range(150):
        rule, b, h, m, n = random_rule(seed)
        table = rule.table(b, h, m, n)
        dense = rule.mask.dense(m, n)
        assert torch.equal(dense.expand(b, h, m, n), table), repr(rule.mask)
        for block_q, block_k in ((48, 64), (16, 7), (1, 1)):
            blocks = rule.mask.block_list(m, n, block_q, block_k)
            assert torch.equal(unpacked(blocks, m, n), dense), (repr(rule.mask), block_q, block_k)
        assert rule.mask.visible_pairs(m, n) == int(dense.sum())
        interval = rule.mask.interval()
        if interval is not None:
            position, key = torch.arange(n - m, n)[:, None], torch.arange(n)
            left, right = interval
            assert torch.equal((key >= position - left) & (key <= position + right), dense[0, 0])


def test_blocks_of_queries_see_the_rows_of_the_dense_mask_within_reach() -> None:
    for seed in range(150):
        rule, _, _, m, n = random_rule(seed)
        rng = random.Random(seed)
        start = rng.randrange(m)
        end = rng.randint(start + 1, m)
        low, high = rule.mask.reached((n - m + start, n - m + end), n)
        rows = rule.mask.dense(m, n)[:, :, start:end]
        assert torch.equal(rule.mask.part((n - m + start, n - m + end), (low, high)), rows[..., low:high])
        assert low < high <= n and not rows[..., :low].any() and not rows[..., high:].any(), repr(rule.mask)
        if rule.mask.interval() is not None and rows.any():
            assert rows[..., low].any() and rows[..., high - 1].any(), f"{rule.mask!r} reaches less than it says"


def test_tiles_never_lie() -> None:
    """A tile said to be empty shows nothing, one said to be full shows everything."""
    for seed in range(150):
        rule, b, h, m, n = random_rule(seed)
        dense = rule.mask.dense(m, n)
        t = grid(m, n, 8, 8)
        some, every = (x.expand(rule.mask.batches, rule.mask.heads, *x.shape[-2:]) for x in rule.mask.tiles(t))
        for i, q0 in enumerate(range(0, m, 8)):
            for j, k0 in enumerate(range(0, n, 8)):
                tile = dense[:, :, q0 : q0 + 8, k0 : k0 + 8].flatten(2)
                assert not (tile.any(-1) & ~some[:, :, i, j]).any(), f"{rule.mask!r}: tile {i}, {j} is not empty"
                assert not (~tile.all(-1) & every[:, :, i, j]).any(), f"{rule.mask!r}: tile {i}, {j} is not full"


def test_reach_keeps_all_that_a_later_query_sees() -> None:
    """What a state of that reach lets go of is hidden from every later query; ``exact`` means it keeps no more."""
    for seed in range(200):
        rng = random.Random(seed)
        rule = rules.any_rule(rng, 1, 1, 40, 40, depth=2)
        mask = rule.mask & attnkit.causal()
        reach = mask.reach()
        if reach is None or mask.length is not None:
            continue
        sees = mask.dense(40, 40)[0, 0]
        q, k = torch.arange(40)[:, None], torch.arange(40)
        kept = ((k > q - reach.window) | (k < reach.sinks)) & (k <= q)
        late = q >= reach.sinks
        assert not (sees & ~kept & late).any(), f"{mask!r} lets go of visible keys"
        if reach.exact:
            assert not (kept & ~sees & late).any(), f"{mask!r} is not exact"


def test_equal_masks_share_what_was_lowered() -> None:
    ids = torch.tensor([0, 0, 1])
    assert attnkit.documents(ids) == attnkit.documents(ids.clone())
    assert hash(attnkit.documents(ids)) == hash(attnkit.documents(ids.clone()))
    assert attnkit.documents(ids) != attnkit.documents(torch.tensor([0, 1, 1]))
    assert attnkit.padding(torch.ones(1, 3, dtype=torch.bool)) != attnkit.explicit(torch.ones(1, 3, dtype=torch.bool))
    mask = attnkit.window(5) | attnkit.global_tokens(2)
    assert mask == attnkit.window(5) | attnkit.global_tokens(2)
    assert mask.block_list(70, 70, 48) is (attnkit.window(5) | attnkit.global_tokens(2)).block_list(70, 70, 48)
    assert mask != attnkit.window(6) | attnkit.global_tokens(2)


def test_simplest_form() -> None:
    assert attnkit.causal().interval() == (UNBOUNDED, 0)
    assert attnkit.window(4).interval() == (3, 0)
    assert (attnkit.causal() & attnkit.window(4)).interval() == (3, 0)
    assert (attnkit.symmetric_window(4) & attnkit.causal()).interval() == (4, 0)
    assert (attnkit.causal() | attnkit.window(4)).interval() is None


def test_moved_keys() -> None:
    """A ring hands its keys over in the order of its slots."""
    keys, queries = torch.tensor([6, 7, 3, 4, 5]), torch.tensor([7])
    moved = Moved(attnkit.window(3), queries, keys)
    assert moved.dense(1, 5)[0, 0, 0].tolist() == [True, True, False, False, True]


def test_bigbird() -> None:
    mask = attnkit.bigbird(256, 16, window=3, random=2, heads=2, seed=1)
    layout = mask.dense(256, 256)[0, :, ::16, ::16]
    i = torch.arange(16)
    assert bool(layout[:, [0, -1]].all()) and bool(layout[:, :, [0, -1]].all())
    assert bool(layout[:, (i[:, None] - i).abs() <= 1].all())
    assert layout[:, 4:12].sum(-1).eq(3 + 2 + 2).all(), "window, globals and exactly two random blocks"
    assert not torch.equal(layout[0], layout[1]), "random blocks differ by head"
    assert mask == attnkit.bigbird(256, 16, window=3, random=2, heads=2, seed=1)
    assert mask != attnkit.bigbird(256, 16, window=3, random=2, heads=2, seed=2)


PICTURES: list[tuple[Mask, int, int | None, int, str]] = [
    (
        attnkit.window(3), 5, None, 24,
        """\
        window(3): 5 queries x 5 keys
        ■ · · · ·
        ■ ■ · · ·
        ■ ■ ■ · ·
        · ■ ■ ■ ·
        · · ■ ■ ■""",
    ),
    (
        attnkit.causal(), 6, 2, 24,
        """\
        causal(): 2 queries x 6 keys
        ■ ■ ■ ■ ■ ·
        ■ ■ ■ ■ ■ ■""",
    ),
    (
        (attnkit.window(2) | attnkit.global_tokens(1)) & attnkit.causal(), 5, None, 24,
        """\
        ((window(2) | global_tokens(1)) & causal()): 5 queries x 5 keys
        ■ · · · ·
        ■ ■ · · ·
        ■ ■ ■ · ·
        ■ · ■ ■ ·
        ■ · · ■ ■""",
    ),
    (
        attnkit.causal(), 8, None, 4,
        """\
        causal(): 8 queries x 8 keys, a cell is 2 x 2
        ▪ · · ·
        ■ ▪ · ·
        ■ ■ ▪ ·
        ■ ■ ■ ▪""",
    ),
    (
        ~attnkit.documents(torch.tensor([0, 0, 1])), 3, None, 24,
        """\
        ~documents(1x3): 3 queries x 3 keys
        · · ■
        · · ■
        ■ ■ ·""",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("mask", "n", "m", "cells", "picture"), PICTURES, ids=[repr(p[0]) for p in PICTURES])
def test_pictures(mask: Mask, n: int, m: int | None, cells: int, picture: str) -> None:
    assert mask.draw(n, m, cells) == textwrap.dedent(picture)


def test_print_draws() -> None:
    assert str(attnkit.window(3)) == attnkit.window(3).draw()
    assert repr(attnkit.window(3)) == "window(3)"
    big = attnkit.causal().draw(100_000)
    assert len(big.splitlines()) == 25, "a long mask is drawn from its tiles, without being made"


def test_block_words_hold_at_most_64_keys() -> None:
    with pytest.raises(ValueError, match="block_k is 65, expected 1 to 64"):
        attnkit.prefix(3).block_list(10, 10, 48, 65)
