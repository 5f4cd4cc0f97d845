"""The native softmax kernels at the edges: overflow, far offsets, repeats, threads, NaN and infinity, subnormals.

Random calls of all native kernels are in ``test_fuzz.py`` and, under the sanitizers, in ``csrc/tests``.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit import native
from attnkit.testing.budgets import assert_within
from attnkit.testing.runs import threads

pytestmark = pytest.mark.skipif(not native.STATUS.available, reason=native.STATUS.reason)

LEVELS = pytest.mark.parametrize("level", native.STATUS.levels)
DTYPES = pytest.mark.parametrize("dtype", native.DTYPES, ids=str)

Arguments = dict[str, Any]


def attend(arguments: Arguments, backend: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; floating arguments of the kernel's dtype are converted to ``dtype`` first."""

    def converted(x: Any) -> Any:
        return x.to(dtype) if dtype is not None and isinstance(x, Tensor) and x.is_floating_point() else x

    return attnkit.softmax_attention(
        **{name: converted(x) for name, x in arguments.items()}, backend=backend, return_lse=True
    )


def assert_right(arguments: Arguments) -> None:
    dtype = arguments["q"].dtype
    got = attend(arguments)
    gold = attend(arguments, "reference", torch.float64)
    naive = attend(arguments, "reference")
    for what, x, true, plain in zip(("o", "lse"), got, gold, naive, strict=True):
        assert_within(x, true, plain, dtype, what=what)


def test_the_library_refuses_what_would_overflow() -> None:
    fields = [name for name, _ in native.SOFTMAX_FIELDS]
    x = torch.ones(64)
    good = dict.fromkeys(fields, 0) | {name: x.data_ptr() for name in ("q", "k", "v", "o")}
    good |= dict.fromkeys(("b", "h", "g", "m", "n", "d", "e", "mask_batches", "mask_heads", "threads"), 1) | {
        "scale": 1.0
    }
    native.run("softmax_forward", native.pack_softmax(*good.values()))
    for wrong in (
        {"n": -1},
        {"n": 2**62},
        {"m": 2**33, "b": 2**33},
        {"q_b": 2**62},
        {"v_n": -(2**63)},
        {"threads": 2**31},
        {"k": 0},
        {"left": 2**63 - 1},
        {"dtype": 9},
        {"kernel": 2},
        {"drop_below": -1},
        {"drop_below": 1 << 24},
    ):
        with pytest.raises(RuntimeError, match="the native kernel softmax_forward refused a call: "):
            native.run("softmax_forward", native.pack_softmax(*(good | wrong).values()))


@pytest.mark.parametrize("queries", [2, 60])
@pytest.mark.parametrize("axis", [0, 1, 2])
@DTYPES
def test_offsets_have_64_bits(queries: int, axis: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Batches, heads and rows that lie further apart than 32 bits count, in a file of which only a few pages exist."""
    numbers = 2**32 + 2**20
    file = tmp_path / "numbers"
    with file.open("wb") as opened:
        opened.truncate(numbers * dtype.itemsize)
    wide = torch.from_file(str(file), shared=True, size=numbers, dtype=dtype)
    heads, n = (2 if axis == 1 else 1), (2 if axis == 2 else 100)
    lengths = {"q": queries, "k": n, "v": n}
    call = {}
    for i, (name, length) in enumerate(lengths.items()):
        shape = (2 if axis == 0 else 1, heads, length, 40)
        strides = [heads * length * 40, length * 40, 40, 1]
        if name != "q" or axis != 2:
            strides[axis] = 2**32 + 40  # 32 bits alone would read 40 numbers on
        call[name] = wide.as_strided(shape, strides, 200_000 * i)
        call[name].copy_(torch.randn(shape))
    got = attend(call)
    near = {name: x.contiguous() for name, x in call.items()}
    assert all(a.equal(b) for a, b in zip(got, attend(near), strict=True))
    assert_right(near)


@LEVELS
@DTYPES
@pytest.mark.parametrize("queries", [1, 5, 60])
def test_fifty_repeats_have_the_same_bits(level: str, dtype: torch.dtype, queries: int) -> None:
    """Of a row alone, and in a batch of any size at any place, with one thread and with two."""
    rng = random.Random(0)
    q, k, v = (torch.randn(4, heads, n, 59).to(dtype) for heads, n in ((4, queries), (2, 700), (2, 700)))
    with native.use_level(level):
        alone = attend({"q": q[:1], "k": k[:1], "v": v[:1], "mask": attnkit.causal()})
        for _ in range(50):
            order = rng.sample(range(4), rng.randrange(1, 5))
            order = order if 0 in order else [*order, 0]
            with threads(rng.choice((1, 2))):
                got = attend({"q": q[order], "k": k[order], "v": v[order], "mask": attnkit.causal()})
            place = order.index(0)
            assert all(x[place].equal(y[0]) for x, y in zip(got, alone, strict=True))


@DTYPES
def test_threads_may_call_at_once(dtype: torch.dtype) -> None:
    """While the calls of others run, and while another level is chosen again and again."""
    calls: list[Arguments] = []
    for queries in (1, 3, 50, 130):
        q, k, v = (torch.randn(2, heads, n, 64).to(dtype) for heads, n in ((4, queries), (2, 300), (2, 300)))
        calls.append({"q": q, "k": k, "v": v, "mask": attnkit.causal()})
    expected = {}
    for level in native.STATUS.levels:
        with native.use_level(level):
            expected[level] = [attend(call)[0] for call in calls]

    def work(number: int) -> None:
        torch.set_num_threads(1 + number % 2)
        for _ in range(30):
            assert attend(calls[number])[0].equal(expected[native.STATUS.level][number])

    def restless(number: int) -> int:
        done = 0
        for _ in range(30):
            try:
                got = attend(calls[number])[0]
            except RuntimeError as refusal:  # the level changed between the two halves of a call
                assert "the scratch memory is too small" in str(refusal)
            else:
                done += any(got.equal(expected[level][number]) for level in native.STATUS.levels)
                assert done, "the result of no level"
        return done

    with ThreadPoolExecutor(len(calls)) as pool:
        with native.use_level(native.STATUS.level):
            list(pool.map(work, range(len(calls))))
        before = native.get_level()
        try:
            running = [pool.submit(restless, number) for number in range(len(calls))]
            while not all(future.done() for future in running):
                for level in native.STATUS.levels:
                    native.set_level(level)
            assert all(future.result() for future in running)
        finally:
            native.set_level(before)


@LEVELS
@DTYPES
@pytest.mark.parametrize("queries", [2, 60])
@pytest.mark.parametrize("special", [float("inf"), -float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("where", "qkv")
def test_specials_are_where_the_reference_has_them(
    level: str, dtype: torch.dtype, queries: int, special: float, where: str
) -> None:
    call: Arguments = {name: torch.randn(1, 2, n, 20).to(dtype) for name, n in (("q", queries), ("k", 100), ("v", 100))}
    call[where][0, 1, 1, 3] = special
    for mask in (None, attnkit.causal(), torch.arange(100).expand(queries, 100) % 7 > 1):  # the last one hides key 1
        with native.use_level(level):
            assert_right(call | {"mask": mask})


@LEVELS
@DTYPES
@pytest.mark.parametrize("queries", [2, 60])
def test_smallest_numbers(level: str, dtype: torch.dtype, queries: int) -> None:
    """Subnormal inputs, among others and alone."""
    tiny = torch.finfo(dtype).smallest_normal
    q, k, v = (torch.randn(1, 2, n, 20) for n in (queries, 100, 100))
    with native.use_level(level):
        k[:, :, ::2] *= tiny / 4
        v[:, :, 1::2] *= tiny / 4
        assert_right({"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)})
        assert_right({"q": q.to(dtype), "k": (k * tiny).to(dtype), "v": v.to(dtype)})
