"""The arithmetic of costs: pairs in closed form equal pairs counted, bytes equal what states allocate."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import attnkit
from attnkit.costs import Band, compressed, convolution, delta, dsa, gla, interval_pairs, mla, retention, softmax
from attnkit.masks.lowering import visible_pairs
from attnkit.masks.patterns import UNBOUNDED, Interval
from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.state import KVState, RecurrentState, WindowState

LENGTHS = [(1, 1), (1, 200), (7, 7), (65, 65), (130, 200), (9, 4), (0, 5)]


@pytest.mark.parametrize(("m", "n"), LENGTHS)
@pytest.mark.parametrize(("left", "right"), [(None, 0), (None, None), (0, 0), (5, 0), (63, 3), (1000, 0), (4, None)])
def test_pairs_in_closed_form_are_those_of_the_tiles(m: int, n: int, left: int | None, right: int | None) -> None:
    mask = Interval(*(UNBOUNDED if side is None else side for side in (left, right)))
    assert interval_pairs(m, n, left, right) == mask.visible_pairs(m, n) == visible_pairs(mask, m, n)


@pytest.mark.parametrize(("m", "n"), [sizes for sizes in LENGTHS if sizes[0] <= sizes[1]])
@pytest.mark.parametrize("window", [1, 5, 64, 500])
@pytest.mark.parametrize("sinks", [0, 1, 4, 70])
def test_a_band_counts_what_its_mask_counts(m: int, n: int, window: int, sinks: int) -> None:
    mask = attnkit.window(window)
    if sinks:
        mask = attnkit.causal() & (mask | attnkit.predicate(lambda b, h, q, k: k < sinks))
    assert Band(window, sinks).visible_pairs(m, n) == mask.visible_pairs(m, n)


def test_pairs_of_a_million_tokens_take_no_time() -> None:
    n = 1 << 20
    assert attnkit.causal().visible_pairs(n, n) == n * (n + 1) // 2
    assert attnkit.window(4).visible_pairs(n, n) == 4 * n - 6


@pytest.mark.parametrize("codec", [None, "int8", "fp8", "int4"])
@pytest.mark.parametrize("size", [16, 20, 64, 100, 128, 192])
@pytest.mark.parametrize("capacity", [1, 31, 32, 33, 1000])
def test_quantised_bytes_are_those_allocated(codec: str | None, size: int, capacity: int) -> None:
    state = KVState(1, 3, capacity, size, size // 2, dtype=torch.bfloat16, device="meta", codec=codec)
    found = softmax(Sizes(h=6, g=3, n=capacity, d=size, e=size // 2), codec=codec, itemsize=2)
    assert found.state_bytes(capacity) == state.nbytes


def test_a_window_and_its_sinks_are_what_a_ring_allocates() -> None:
    found = softmax(Sizes(h=4, g=2, n=500, d=32, e=32), mask=Band(window=64, sinks=4), itemsize=2)
    ring = WindowState(1, 2, 64, 32, sinks=4, dtype=torch.bfloat16, device="meta")
    assert found.state_bytes(500) == ring.nbytes
    assert found.bytes < softmax(Sizes(h=4, g=2, n=500, d=32, e=32), itemsize=2).bytes


def test_a_convolution_keeps_its_tail() -> None:
    tails = {"conv": (3, 96)}
    state = RecurrentState(1, {"state": (4, 16, 24)}, tails=tails, dtype=torch.bfloat16, device="meta")
    assert gla(Sizes(h=4, g=4, d=16, e=24), tail=3 * 96, itemsize=2).state_bytes(99) == state.nbytes
    assert convolution(Sizes(d=96), tail=3 * 96, itemsize=2).state_bytes(99) == 3 * 96 * 2


def test_a_shared_choice_keeps_no_index() -> None:
    sizes = Sizes(h=8, m=1, n=9000, d=192, e=128)
    alone, shared = dsa(sizes, itemsize=2), dsa(sizes, index_heads=0, itemsize=2)
    assert alone.state_bytes_per_token - shared.state_bytes_per_token == 128 * 2
    assert shared.flops < alone.flops


def test_records_hold_these_functions() -> None:
    for function in (softmax, mla, dsa, compressed, delta, gla, retention):
        assert get(function.__name__).cost is function


def test_nothing_here_imports_torch() -> None:
    body = "import sys; sys.modules['torch'] = None; import attnkit.costs"
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
