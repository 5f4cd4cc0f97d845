"""Random forms of states: pages scattered over a poisoned pool, codes of numbers of every size and spread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnkit
from attnkit import native
from attnkit.state import KVState, PagedKVState, PagePool, codec
from attnkit.state.codec import CHANNELS, GROUP

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference", *(["cpu"] if native.STATUS.available else [])]


def runs(full: bool, quick: int, long: int, **more: Any) -> settings:
    return settings(max_examples=long if full else quick, derandomize=True, deadline=None, **more)


def pages_are_one_buffer(how: settings) -> None:
    """Sequences on scrambled pages, every slot that holds no token broken, against each alone in one buffer."""

    @how
    @given(
        page=st.sampled_from([1, 8, 16, 32]),
        form=st.sampled_from([None, None, "int8", "fp8", "int4"]),
        lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3),
        dropped=st.integers(0, 20),
        queries=st.integers(1, 3),
        window=st.none() | st.integers(1, 40),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 99),
    )
    def check(
        page: int,
        form: Any,
        lengths: list[int],
        dropped: int,
        queries: int,
        window: int | None,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        page = page if form is None else 32 * (1 + page // 32)
        generator = torch.Generator().manual_seed(seed)
        b, n = len(lengths), max(lengths) + dropped
        q, k, v = (torch.randn(b, h, n, 16, generator=generator).to(dtype) for h in (4, 2, 2))
        pool = PagePool(b * -(-n // page) + 3, page, 2, 16, dtype=dtype, codec=form)
        pool._free[:] = [pool._free[i] for i in torch.randperm(pool.free, generator=generator).tolist()]
        for x in pool.tensors:
            broken(x)
        state = PagedKVState(pool, b)
        state.append(k, v, [length + dropped for length in lengths])
        state.crop_each(lengths)
        poison(state)
        queries = min(queries, *lengths)
        mask = attnkit.causal() if window is None else attnkit.window(window)
        newest = torch.cat([q[row : row + 1, :, end - queries : end] for row, end in enumerate(lengths)])
        for backend in BACKENDS:
            together = attnkit.softmax_attention_step(newest, state, mask=mask, backend=backend)
            assert together.isfinite().all(), "a slot without a token was read"
            for row, length in enumerate(lengths):
                alone = KVState(1, 2, length, 16, dtype=dtype, codec=form)
                alone.append(k[row : row + 1, :, :length], v[row : row + 1, :, :length])
                wanted = attnkit.softmax_attention_step(newest[row : row + 1], alone, mask=mask, backend=backend)
                assert together[row : row + 1].equal(wanted)

    check()


def poison(state: PagedKVState) -> None:
    """NaN, or codes of nothing, into every slot behind the last token of a sequence, or behind its last full group."""
    pool = state.pool
    for row, length in enumerate(state.lengths):
        last = state.pages(row)[-1]
        if length % pool.page:
            for x in pool.tensors:
                broken(x[last, :, length % pool.page * x.shape[2] // pool.page :])


def broken(x: Tensor) -> None:
    x.fill_(torch.nan if x.is_floating_point() else 0x7F)


def test_pages_have_the_bits_of_one_buffer(full: bool) -> None:
    pages_are_one_buffer(runs(full, 20, 300))


def off_by_one_page(right: Callable[..., Any]) -> Callable[..., Any]:
    def packed(self: PagedKVState) -> tuple[Tensor, Tensor]:
        tables, lengths = right(self)
        return tables.roll(1, -1), lengths

    return packed


def a_slot_too_many(right: Callable[..., Any]) -> Callable[..., Any]:
    def numbers(self: PagedKVState, row: int) -> tuple[Tensor, Tensor]:
        pages = torch.tensor(self.pages(row))
        k, v = (x[pages].transpose(0, 1).flatten(1, 2)[:, : self.lengths[row] + 1] for x in (self.pool.k, self.pool.v))
        return k, v

    return numbers


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "a slot behind the last token is read": ("numbers", a_slot_too_many),
    **({"tables are shifted": ("packed", off_by_one_page)} if native.STATUS.available else {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_pages_are_noticed(fault: str) -> None:
    name, wrong = FAULTS[fault]
    planted = mock.patch.object(PagedKVState, name, wrong(getattr(PagedKVState, name)))
    with planted, pytest.raises((AssertionError, RuntimeError)):
        pages_are_one_buffer(runs(False, 40, 40, phases=[Phase.generate]))


def drawn(kind: str, n: int, size: int, seed: int) -> Tensor:
    x = torch.randn(1, 2, n, size, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "outliers":
            x[..., seed % size] *= 8
        case "far":
            x += 50
        case "small":
            x *= 1e-20
        case "constant":
            x = torch.full_like(x, seed - 3.3)
        case "zero":
            x = torch.zeros_like(x)
    return x


# Relative error in the 2-norm of Gaussian numbers with outliers: measured 0.008 to 0.021 for int8 and 0.15 to 0.19 for
# int4; with 3 bits of mantissa no number of fp8 is off by more than 1/16.
SPREAD = {"int8": 0.03, "int4": 0.22, "fp8": 1 / 16}


def codes_keep_their_promise(how: settings) -> None:
    @how
    @given(
        form=st.sampled_from(sorted(SPREAD)),
        kind=st.sampled_from(["gaussian", "outliers", "far", "small", "constant", "zero"]),
        n=st.integers(1, 150),
        size=st.integers(1, 140),
        seed=st.integers(0, 99),
        pieces=st.lists(st.integers(1, 40), max_size=4),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def check(form: Any, kind: str, n: int, size: int, seed: int, pieces: list[int], dtype: torch.dtype) -> None:
        k, v = (drawn(kind, n, size, seed + i).to(dtype) for i in (0, 1))
        state, start = KVState(1, 2, n, size, dtype=dtype, codec=form), 0
        for m in [*pieces, n]:
            m = min(m, n - start)
            state.store(k[:, :, start : start + m], v[:, :, start : start + m])
            start += m
        for which, (x, read) in enumerate(zip((k.float(), v.float()), state.numbers(), strict=True)):
            allowed = steps(form, which, x) / 2 + 1e-6 * x.abs()
            assert ((read - x).abs() <= allowed).all(), "off by more than half a step"
            if kind in ("gaussian", "outliers") and size >= 32 and n >= 64:
                assert (read - x).norm() <= SPREAD[form] * x.norm()
        if form == "int4":
            encoded = n // GROUP * GROUP
            assert state.numbers()[0][:, :, encoded:].equal(k[:, :, encoded:].float()), "waiting tokens are whole"
            if kind == "gaussian" and encoded:
                assert not state.numbers()[0][:, :, :encoded].equal(k[:, :, :encoded].float()), "full groups are not"
        # What was read is stored as it is.
        again = KVState(1, 2, n, size, dtype=torch.float32, codec=form)
        again.store(*state.numbers())
        for one, other, x in zip(again.numbers(), state.numbers(), (k, v), strict=True):
            if form != "int4":
                assert (one - other).abs().max() <= 1e-6 * x.abs().max()

    check()


def steps(form: str, which: int, x: Tensor) -> Tensor:
    """Distance of neighbouring codes at each number: from the definition, not from the scales that were stored."""
    if form == "int8":
        return (x.abs().amax(-1, keepdim=True) / 127).expand(x.shape)
    if form == "fp8":
        most = x.abs().amax(-1, keepdim=True)
        return torch.maximum(x.abs() / 8, most / 448 * 2.0**-6)
    axis = 2 if which == 0 else 3
    count = GROUP if which == 0 else CHANNELS
    parts = []
    for part in x.split(count, axis):
        if which == 0 and part.shape[2] < GROUP:
            parts.append(torch.zeros_like(part))  # these wait
            continue
        low, high = part.amin(axis, keepdim=True), part.amax(axis, keepdim=True)
        # Zero and scale are rounded outward to bfloat16, a factor of 1 + 2^-7 each.
        parts.append((((high - low) + low.abs() * 2.0**-7) / 15 * (1 + 2.0**-7) + 1e-37).expand(part.shape))
    return torch.cat(parts, axis)


def test_codes_keep_their_promise(full: bool) -> None:
    codes_keep_their_promise(runs(full, 60, 600))


CODE_FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "codes are cut, not rounded": (torch.Tensor, "round", lambda right: torch.Tensor.trunc),
    "the scale is 1 % large": (
        codec,
        "decode_scaled",
        lambda right: lambda form, codes, scale: right(form, codes, scale * 1.01),
    ),
    "zero is rounded inward": (
        codec,
        "_toward",
        lambda right: lambda x, end: x.to(torch.bfloat16),
    ),
    "a full group waits on": (codec, "put_group", lambda right: lambda tensors, group, made: None),
    "groups begin one token late": (
        codec.KeyGroups,
        "encode",
        lambda right: lambda self, x: right(self, x.roll(1, 2)),
    ),
    "values share the keys' axis": (
        codec,
        "encode_affine",
        lambda right: lambda x, dim: right(x, 2),
    ),
}


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_faults_of_codes_are_noticed(fault: str) -> None:
    owner, name, wrong = CODE_FAULTS[fault]
    planted = mock.patch.object(owner, name, wrong(getattr(owner, name)))
    with planted, pytest.raises((AssertionError, RuntimeError, IndexError)):
        codes_keep_their_promise(runs(False, 60, 60, phases=[Phase.generate]))
