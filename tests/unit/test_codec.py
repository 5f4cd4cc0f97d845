"""Quantised states: how far a number may be off, what is allocated, going back; pages beside a plain list of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import attnkit
from attnkit import native
from attnkit.state import KVState, PagedKVState, PagePool
from attnkit.state.codec import CHANNELS, GROUP, encode_affine, pack, packed_bytes, unpack

CODED = ["int8", "fp8", "int4"]


def numbers(kind: str, n: int, size: int) -> torch.Tensor:
    x = torch.randn(1, 2, n, size, generator=torch.Generator().manual_seed(0))
    match kind:
        case "outliers":
            x[..., 3] *= 8
        case "far":
            x += 100
        case "constant":
            x[:] = 2.5
        case "zero":
            x[:] = 0
    return x


@pytest.mark.parametrize("kind", ["gaussian", "outliers", "far", "constant", "zero"])
@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize("size", [1, 59, 64, 130])
def test_no_number_is_off_by_more_than_half_a_step(codec: Any, kind: str, size: int) -> None:
    n = 100
    k, v = numbers(kind, n, max(size, 4))[..., :size], numbers(kind, n, max(size, 4))[..., :size].flip(2)
    state = KVState(1, 2, n, size, codec=codec)
    state.store(k, v)
    for x, read, rows in zip((k, v), state.numbers(), state.rows, strict=True):
        if codec == "int8":
            step = rows["scale"][..., None] / 2
        elif codec == "fp8":  # 3 bits of mantissa; and the smallest code
            step = x.abs() / 16 + rows["scale"][..., None] * 2.0**-7
        elif x is k:
            full = n // GROUP
            step = torch.zeros_like(x)
            step[:, :, : full * GROUP] = rows["scale"][:, :, :full].float().repeat_interleave(GROUP, 2) / 2
        else:
            step = rows["scale"].float().repeat_interleave(CHANNELS, 3)[..., :size] / 2
        assert ((read - x).abs() <= step + 1e-6 * x.abs()).all()
        if kind == "zero":
            assert not read.any()


@pytest.mark.parametrize("size", [1, 31, 64, 65, 128, 129, 200, 300])
def test_packing_loses_nothing(size: int) -> None:
    codes = torch.randint(16, (3, 2, size), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (3, 2, packed_bytes(size))
    assert unpack(packed, size).equal(codes)


def test_the_range_of_a_group_is_covered() -> None:
    x = torch.randn(50, 32) * torch.logspace(-3, 3, 50)[:, None] + 10
    scale, zero, codes = encode_affine(x, 1)
    assert (zero.float() <= x).all()
    assert (zero.float() + 15 * scale.float() >= x).all()
    assert codes.max() <= 15


@pytest.mark.parametrize("codec", CODED)
def test_a_token_that_is_no_number_makes_only_its_group_none(codec: Any) -> None:
    k = numbers("gaussian", 70, 8)
    k[0, 0, 40, 2] = torch.inf
    state = KVState(1, 2, 70, 8, codec=codec)
    state.store(k, k)
    for read in state.numbers():
        assert read[0, 0, 40].isnan().any()
        assert read[0, 1].isfinite().all() and read[0, 0, :32].isfinite().all() and read[0, 0, 64:].isfinite().all()


@pytest.mark.parametrize("codec", CODED)
def test_bytes_are_those_of_the_layout(codec: Any) -> None:
    plain = KVState(1, 8, 4096, 128, dtype=torch.bfloat16).nbytes
    share = KVState(1, 8, 4096, 128, dtype=torch.bfloat16, codec=codec).nbytes / plain
    layout = {"int8": 132 / 256, "fp8": 132 / 256, "int4": (64 + 16) / 256}[codec]
    assert layout <= share < layout * 1.03


@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize("pieces", [[1] * 100, [37, 63], [64, 36], [5, 90, 5]])
def test_pieces_are_stored_as_the_whole(codec: Any, pieces: list[int]) -> None:
    k, v = numbers("gaussian", 100, 16), numbers("far", 100, 16)
    whole, parts = KVState(1, 2, 100, 16, codec=codec), KVState(1, 2, 100, 16, codec=codec)
    whole.store(k, v)
    for one, other in zip(k.split(pieces, 2), v.split(pieces, 2), strict=True):
        parts.store(one, other)
    for found, wanted in zip(parts.numbers(), whole.numbers(), strict=True):
        assert found.equal(wanted)


@pytest.mark.parametrize("codec", CODED)
def test_going_back_is_as_if_never_appended_or_refused(codec: Any) -> None:
    k, v = numbers("gaussian", 150, 16), numbers("far", 150, 16)
    for n in (1, 31, 32, 70, 96, 149):
        for length in range(n):
            state, never = KVState(1, 2, 150, 16, codec=codec), KVState(1, 2, 150, 16, codec=codec)
            state.store(k[:, :, :n], v[:, :, :n])
            never.store(k[:, :, :length], v[:, :, :length])
            try:
                state.crop(length)
            except ValueError as refusal:
                assert codec == "int4" and n - length >= GROUP and length % GROUP and "keep a fork" in str(refusal)
                assert state.length == n
                continue
            for both in (state, never):
                both.store(k[:, :, 100:140], v[:, :, 100:140]) if length + 40 <= 150 else None
            assert all(a.equal(b) for a, b in zip(state.numbers(), never.numbers(), strict=True))


PAGES, PAGE = 12, 3


class PagedMachine(RuleBasedStateMachine):
    """Several states on one small pool beside plain lists of the tokens that each sequence should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES, PAGE, 1, 1, 2)
        self.pool.k.fill_(torch.nan)  # what nobody wrote must never be read
        self.states: list[tuple[PagedKVState, list[list[float]]]] = [(PagedKVState(self.pool, 2), [[], []])]
        self.names = 0.0

    def pick(self, which: int) -> tuple[PagedKVState, list[list[float]]]:
        return self.states[which % len(self.states)]

    @rule(which=st.integers(0, 9), counts=st.lists(st.integers(0, 7), min_size=2, max_size=2))
    def append(self, which: int, counts: list[int]) -> None:
        state, held = self.pick(which)
        k = torch.arange(2 * 7).reshape(2, 1, 7, 1) + self.names + 1
        self.names += 14
        free = self.pool.free
        try:
            state.append(k, torch.cat([k, -k], -1), counts)
        except ValueError as refusal:
            assert self.pool.free == free and f"and {free} are free" in str(refusal)
            needed = int(str(refusal).split("needs ")[1].split()[0])
            assert needed > free
        else:
            for row, count in enumerate(counts):
                held[row] += k[row, 0, :count, 0].tolist()

    @rule(which=st.integers(0, 9), cut=st.lists(st.integers(0, 9), min_size=2, max_size=2))
    def crop(self, which: int, cut: list[int]) -> None:
        state, held = self.pick(which)
        lengths = [max(0, len(row) - less) for row, less in zip(held, cut, strict=True)]
        state.crop_each(lengths)
        for row, length in zip(held, lengths, strict=True):
            del row[length:]

    @rule(which=st.integers(0, 9), rows=st.lists(st.integers(0, 1), min_size=2, max_size=2))
    def fork(self, which: int, rows: list[int]) -> None:
        state, held = self.pick(which)
        if len(self.states) < 5:
            self.states.append((state.select(torch.tensor(rows)), [list(held[row]) for row in rows]))

    @rule(which=st.integers(0, 9))
    def release(self, which: int) -> None:
        state, held = self.pick(which)
        state.release()
        for row in held:
            row.clear()

    @invariant()
    def every_sequence_reads_what_it_was_given(self) -> None:
        tables: list[int] = []
        for state, held in self.states:
            state.check()
            assert state.lengths == [len(row) for row in held]
            for row, wanted in enumerate(held):
                k, v = state.read(row)
                assert k.flatten().tolist() == wanted
                assert v[0, :, 1].tolist() == [-x for x in wanted]
                tables += state._tables[row]
        assert [self.pool.owners(page) for page in range(PAGES)] == [tables.count(page) for page in range(PAGES)]
        assert self.pool.free == PAGES - len(set(tables))


def test_lives_of_pages(live: Any) -> None:
    live(PagedMachine, 40)


class CodedPagedMachine(RuleBasedStateMachine):
    """States on one pool of codes: each sequence reads as one that was stored at once in one buffer."""

    @initialize(codec=st.sampled_from(CODED), size=st.sampled_from([1, 40]), page=st.sampled_from([GROUP, 2 * GROUP]))
    def begin(self, codec: Any, size: int, page: int) -> None:
        self.codec, self.size, self.drawn = codec, size, torch.Generator().manual_seed(size)
        self.pool = PagePool(12, page, 1, size, size + 1, codec=codec)
        nothing = (torch.zeros(1, 0, size), torch.zeros(1, 0, size + 1))
        self.states = [(PagedKVState(self.pool, 2), [nothing, nothing])]

    @rule(which=st.integers(0, 9), counts=st.lists(st.sampled_from([0, 1, 5, 33, 70]), min_size=2, max_size=2))
    def append(self, which: int, counts: list[int]) -> None:
        state, held = self.states[which % len(self.states)]
        k, v = (torch.randn(2, 1, max(counts), size, generator=self.drawn) for size in (self.size, self.size + 1))
        try:
            state.append(k, v, counts)
        except ValueError as refusal:
            assert "are free" in str(refusal)
            return
        for row, count in enumerate(counts):
            new = (k[row, :, :count], v[row, :, :count])
            held[row] = tuple(torch.cat(pair, 1) for pair in zip(held[row], new, strict=True))

    @rule(which=st.integers(0, 9), cut=st.sampled_from([0, 1, 20, 34, 64]))
    def crop(self, which: int, cut: int) -> None:
        state, held = self.states[which % len(self.states)]
        lengths = [max(0, length - cut) for length in state.lengths]
        try:
            state.crop_each(lengths)
        except ValueError as refusal:
            assert self.codec == "int4" and any(length % GROUP for length in lengths) and "keep a fork" in str(refusal)
        else:
            held[:] = [(k[:, :length], v[:, :length]) for (k, v), length in zip(held, lengths, strict=True)]

    @precondition(lambda self: len(self.states) < 4)
    @rule(which=st.integers(0, 9), rows=st.lists(st.integers(0, 1), min_size=2, max_size=2))
    def fork(self, which: int, rows: list[int]) -> None:
        state, held = self.states[which % len(self.states)]
        self.states.append((state.select(torch.tensor(rows)), [held[row] for row in rows]))

    @invariant()
    def every_sequence_reads_as_if_alone(self) -> None:
        for state, held in getattr(self, "states", []):
            state.check()
            for row, (k, v) in enumerate(held):
                alone = KVState(1, 1, max(1, k.shape[1]), self.size, self.size + 1, codec=self.codec)
                alone.store(k[None], v[None])
                for got, want in zip(state.numbers(row), alone.numbers(), strict=True):
                    assert got.equal(want[0])


def test_lives_of_pages_of_codes(live: Any) -> None:
    live(CodedPagedMachine, 25)


def test_pages_that_cut_groups_are_refused_or_read_by_the_definition() -> None:
    with pytest.raises(ValueError, match="int4 and pages of 16 tokens, expected a multiple of 32"):
        PagePool(2, 16, 1, 8, codec="int4")
    state = PagedKVState(PagePool(4, 16, 1, 8, codec="int8"), 1)
    state.append(torch.ones(1, 1, 20, 8), torch.ones(1, 1, 20, 8))
    why = attnkit.explain(attnkit.softmax_attention_step, torch.ones(1, 1, 1, 8), state)
    assert why.chosen == "reference"
    if native.STATUS.available:
        assert "int8 codes are on pages of 16 tokens, the kernel takes multiples of 32" in str(why)


@pytest.mark.parametrize("codec", [None, *CODED])
def test_a_copy_may_begin_later(codec: Any) -> None:
    x = torch.randn(2, 1, 200, 40, generator=torch.Generator().manual_seed(0))
    state = KVState(2, 1, 150, 40, codec=codec)
    state.store(x[:, :, :150], x[:, :, :150])
    later = state.grown(140, 64)
    later.store(x[:, :, 150:], x[:, :, 150:])
    want = KVState(2, 1, 200, 40, codec=codec)
    want.store(x, x)
    for got, whole in zip(later.numbers(), want.numbers(), strict=True):
        assert got.equal(whole[:, :, 64:])
    if codec == "int4":
        with pytest.raises(ValueError, match="start is 32, expected a multiple of 64 with int4"):
            state.grown(200, 32)
    with pytest.raises(ValueError, match="start is 151, expected 0 to 150"):
        state.grown(200, 151)
    with pytest.raises(ValueError, match="capacity is 85, expected at least 86"):
        state.grown(85, 64)


def test_an_empty_pool_refuses_with_both_numbers() -> None:
    state = PagedKVState(PagePool(2, 4, 1, 8), 1)
    x = torch.zeros(1, 1, 9, 8)
    with pytest.raises(ValueError, match="needs 3 more pages of 4 tokens and 2 are free"):
        state.append(x, x)
    assert state.lengths == [0] and state.pool.free == 2
    state.append(x[:, :, :8], x[:, :, :8])
    other = state.fork()
    assert state.pool.free == 0
    del state
    other.release()
    assert other.pool.free == 2
