"""Block lists made natively: against the same lists made in Python, and what a long one takes in time and memory."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnkit
from attnkit import native
from attnkit.masks import lowering, program
from attnkit.masks.chosen import ChosenBlocks, Lines
from attnkit.native import sparse
from attnkit.testing import rules

ROOT = Path(__file__).parents[2]
FORMULAS = sorted(set(rules.KINDS) - {"predicate", "explicit"})
LONG = 131072

pytestmark = pytest.mark.skipif(not native.STATUS.available, reason=native.STATUS.reason)


def listed(mask: attnkit.Mask, m: int, n: int, block_q: int, block_k: int) -> lowering.BlockList:
    return lowering.block_list.__wrapped__(mask, m, n, block_q, block_k)


def tiles(blocks: lowering.BlockList) -> list[tuple[int, tuple[int, ...] | None]]:
    """Columns and bits of all entries; two lists may number their patterns differently."""
    stored = [tuple(words) for words in blocks.patterns.tolist()]
    assert len(set(stored)) == len(stored), "equal patterns are stored once"
    found = blocks.pattern.tolist()
    return [(c, stored[p] if p >= 0 else None) for c, p in zip(blocks.columns.tolist(), found, strict=True)]


@pytest.mark.parametrize("level", native.STATUS.levels)
def test_the_native_list_is_the_one_that_python_makes(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "FIRST_ROOM", 3)  # more patterns than that are common: room has to grow
    for seed in range(60):
        rng = random.Random(seed)
        n = rng.choice((1, 63, 64, 65, 131, 300))
        b, h, m = rng.choice((1, 2)), rng.choice((1, 3)), rng.choice((1, n, max(1, n - 50)))
        mask = rules.KINDS[rng.choice(FORMULAS)](rng, b, h, m, n).mask
        for _ in range(rng.randrange(4)):
            other = rules.KINDS[rng.choice(FORMULAS)](rng, b, h, m, n).mask
            mask = rng.choice((mask & other, mask | other, ~mask, ~mask & other))
        for block_q, block_k in ((48, 64), (64, 64), (5, 7)):
            with native.use_level(level):
                assert program.build(mask, m, n, block_q, block_k) is not None, repr(mask)
                found = listed(mask, m, n, block_q, block_k)
            with monkeypatch.context() as patch:
                patch.setattr(program, "build", lambda *_: None)
                wanted = listed(mask, m, n, block_q, block_k)
            assert torch.equal(found.offsets, wanted.offsets), repr(mask)
            assert tiles(found) == tiles(wanted), (repr(mask), m, n, block_q, block_k)


def test_more_queries_than_keys_stand_before_the_first() -> None:
    for mask in (attnkit.causal(), attnkit.strided(7), attnkit.fixed(8, 2), attnkit.chunked(5), ~attnkit.prefix(3)):
        found = lowering.visible_pairs(mask | attnkit.dilated_window(3, 2), 150, 70)
        assert found == int((mask | attnkit.dilated_window(3, 2)).dense(150, 70).sum()), repr(mask)


def test_a_mask_with_a_rule_of_its_own_is_not_taken_for_a_built_in_one() -> None:
    class Odd(type(attnkit.causal())):  # type: ignore[misc]
        def visible(self, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return super().visible(b, h, q, k) & (k % 2 == 1)

    assert program.build(Odd(5, 0), 9, 9, 48, 64) is None
    assert program.build(attnkit.causal() & Odd(5, 0), 9, 9, 48, 64) is None
    found, odd = listed(Odd(5, 0) & attnkit.causal(), 70, 70, 48, 64), (Odd(5, 0) & attnkit.causal()).dense(70, 70)
    words = [word & (1 << 64) - 1 for pattern in found.pattern.tolist() for word in found.patterns[pattern].tolist()]
    assert odd.sum() == sum(word.bit_count() for word in words)
    assert program.build(attnkit.predicate(lambda b, h, q, k: k <= q), 9, 9, 48, 64) is None


@pytest.mark.parametrize("batches", [1, 2])
def test_what_a_policy_chose_is_listed_as_it_is_seen(batches: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for n, m in ((300, 300), (300, 40), (64, 1), (5, 5)):
        marks = torch.rand(2, batches, 3, n, generator=generator) < 0.1
        layout = torch.rand(batches, 3, -(-n // 64), -(-n // 64), generator=generator) < 0.5
        for mask in (Lines(marks), Lines(marks) & attnkit.causal(), ChosenBlocks(layout, 64) & attnkit.causal()):
            wanted = mask.dense(m, n)
            for block_q, block_k in ((48, 64), (64, 64), (5, 7)):
                found = listed(mask, m, n, block_q, block_k)
                seen = torch.zeros_like(wanted)
                rows = torch.arange(len(found.offsets) - 1).repeat_interleave(found.offsets.diff())
                per_head = -(-m // block_q)
                for row, column, pattern in zip(
                    *(x.tolist() for x in (rows, found.columns, found.pattern)), strict=True
                ):
                    b, h, i = row // per_head // 3, row // per_head % 3, row % per_head
                    part = seen[b, h, i * block_q : (i + 1) * block_q, column * block_k : (column + 1) * block_k]
                    words = found.patterns[pattern, : len(part), None] if pattern >= 0 else torch.tensor(-1)
                    part.copy_((words >> torch.arange(part.shape[1]) & 1).bool())
                assert torch.equal(seen, wanted), (repr(mask), m, n, block_q, block_k)
    native_list = program.build(ChosenBlocks(layout, 64), 5, 5, 48, 64)
    assert (native_list is None) == (batches > 1)


def test_node_numbers_match_the_header() -> None:
    header = (ROOT / "csrc" / "abi" / "sparse.h").read_text()
    numbers = {name: int(value) for name, value in re.findall(r"ATTNKIT_MASK_(\w+) = (\d+)", header)}
    assert numbers == {name: getattr(sparse, name) for name in numbers}
    assert len(numbers) == 13


def test_a_call_that_does_not_fit_together_is_refused() -> None:
    out = torch.zeros(2, dtype=torch.int64)
    sizes = (1, 1, 1, 9, 9, 48, 64)
    for node in ((sparse.NOT, 0, 0), (sparse.AND, -1, 0), (99, 1, 1), (sparse.STRIDED, 0, 0), (sparse.PADDING, 8, 0)):
        packed = native.pack_mask_node(0, *node, 1, 1)
        nodes = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        call = native.pack_block_list(nodes.data_ptr(), *(0,) * 5, out.data_ptr(), *sizes, 0, 0, 0)
        with pytest.raises(RuntimeError, match="block_bounds refused a call"):
            native.run("block_bounds", call)


def long_masks() -> dict[str, attnkit.Mask]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 200, (1, LONG), generator=generator).sort().values
    keep = torch.arange(LONG)[None] < LONG - 1000
    layout = torch.rand(1, 1024, 1024, generator=generator) < 0.1
    return {
        "causal": attnkit.causal(),
        "window": attnkit.window(4096),
        "symmetric_window": attnkit.symmetric_window(2048),
        "dilated_window": attnkit.dilated_window(128, 64),
        "strided": attnkit.strided(1024),
        "fixed": attnkit.fixed(1024, 32),
        "block_sparse": attnkit.block_sparse(layout, 128),
        "global_tokens": attnkit.global_tokens(4),
        "prefix": attnkit.prefix(1000),
        "documents": attnkit.documents(ids),
        "padding": attnkit.padding(keep),
        "chunked": attnkit.chunked(8192),
        "combined": (attnkit.window(4096) | attnkit.global_tokens(4)) & attnkit.causal() & ~attnkit.documents(ids),
    }


def measured(name: str) -> tuple[float, float]:
    """Seconds of processor time of the list of one long mask, and the megabytes by which memory peaked above before."""
    code = f"""
        import time, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_block_lists import LONG, listed, long_masks
        mask = long_masks()[{name!r}]
        listed(mask, 64, LONG, 48, 64)  # what is loaded at the first call
        def memory(line):
            with open("/proc/self/status") as status:
                return next(int(row.split()[1]) for row in status if row.startswith(line))
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
        before = memory("VmRSS")
        start = time.process_time()
        blocks = listed(mask, LONG, LONG, 48, 64)
        taken = time.process_time() - start
        peak = memory("VmHWM")
        for _ in range(2):
            start = time.process_time()
            listed(mask, LONG, LONG, 48, 64)
            taken = min(taken, time.process_time() - start)
        print(taken, (peak - before) / 1024)
    """
    lines = "\n".join(line[8:] for line in code.splitlines())
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    ran = subprocess.run([sys.executable, "-c", lines], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    seconds, megabytes = map(float, ran.stdout.split())
    return seconds, megabytes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a process anew")
@pytest.mark.parametrize("name", long_masks())
def test_a_long_list_takes_a_fifth_of_a_second_and_64_megabytes(name: str) -> None:
    seconds, megabytes = measured(name)
    print(f"{name}: {seconds:.3f} s, {megabytes:.1f} MB")
    assert seconds < 0.2
    assert megabytes < 64
