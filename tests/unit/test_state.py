"""Decoding states against a list of tokens, under any order of append, crop, fork and select; and clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from attnkit.state import KVState, LayeredState, RecurrentState, TokenState, View, WindowState

BATCH, HEADS, KEY, VALUE = 2, 1, 1, 2


def tokens(names: list[int], rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that carry the name of their token and their row, so that a read shows where it came from."""
    marks = torch.tensor([[float(name * 10 + row) for name in names] for row in rows]).reshape(len(rows), 1, -1, 1)
    return marks, torch.cat([marks, -marks], -1)


class _Machine(RuleBasedStateMachine):
    """A state beside a plain list of the tokens it should hold; forks are kept and used again later."""

    def __init__(self) -> None:
        super().__init__()
        self.branches: list[tuple[Any, list[int], list[int]]] = []
        self.names = 0

    def fresh(self) -> Any:
        raise NotImplementedError

    def visible(self, held: list[int]) -> set[int]:
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.branches = [(self.fresh(), [], list(range(BATCH)))]

    @rule(branch=st.integers(0, 9), m=st.integers(0, 7))
    def append(self, branch: int, m: int) -> None:
        state, held, rows = self.branches[branch % len(self.branches)]
        if len(held) + m > 40:
            return
        new = [self.names + i for i in range(m)]
        self.names += m
        before = list(held)
        view = state.append(*tokens(new, rows))
        held += new
        if m:
            self.check_view(view, before, held, rows, m)

    @rule(branch=st.integers(0, 9), length=st.integers(0, 40))
    def crop(self, branch: int, length: int) -> None:
        state, held, _ = self.branches[branch % len(self.branches)]
        try:
            state.crop(length)
        except ValueError as refusal:
            assert self.may_refuse(held, length), f"crop of {len(held)} to {length} is refused: {refusal}"
            assert "\n" not in str(refusal)
        else:
            del held[length:]

    @rule(branch=st.integers(0, 9))
    def fork(self, branch: int) -> None:
        state, held, rows = self.branches[branch % len(self.branches)]
        if len(self.branches) < 6:
            self.branches.append((state.fork(), list(held), list(rows)))

    @rule(branch=st.integers(0, 9), picked=st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH))
    def select(self, branch: int, picked: list[int]) -> None:
        index = branch % len(self.branches)
        state, held, rows = self.branches[index]
        self.branches[index] = (state.select(torch.tensor(picked)), held, rows)
        if picked != list(range(BATCH)):
            # Rows now carry the marks of others; a fresh prefix keeps the model a plain list.
            self.branches[index] = (self.fresh(), [], rows)

    def may_refuse(self, held: list[int], length: int) -> bool:
        return length > len(held)

    def check_view(self, view: View, before: list[int], held: list[int], rows: list[int], m: int) -> None:
        assert view.length == len(held)
        positions = list(range(len(held))) if view.positions is None else view.positions.tolist()
        assert len(set(positions)) == len(positions) == view.k.shape[2]
        assert self.visible(before) | set(range(len(before), len(held))) <= set(positions)
        k, v = tokens([held[position] for position in positions], rows)
        assert torch.equal(view.k, k)
        assert torch.equal(view.v, v)

    @invariant()
    def every_branch_reads_what_it_was_given(self) -> None:
        for state, held, rows in self.branches:
            state.check()
            assert state.length == len(held)
            if held:
                view = state.view()
                positions = list(range(len(held))) if view.positions is None else view.positions.tolist()
                assert self.visible(held) <= set(positions)
                k, v = tokens([held[position] for position in positions], rows)
                assert torch.equal(view.k, k) and torch.equal(view.v, v)


class KVMachine(_Machine):
    def fresh(self) -> KVState:
        return KVState(BATCH, HEADS, 40, KEY, VALUE)

    def visible(self, held: list[int]) -> set[int]:
        return set(range(len(held)))


class _AsView:
    """A ``TokenState`` of keys, values and a lone column, seen as the machine sees a state of keys and values."""

    def __init__(self, tokens: TokenState) -> None:
        self.tokens = tokens

    def append(self, k: torch.Tensor, v: torch.Tensor) -> View:
        return self._view(self.tokens.append(k=k, v=v, mark=k.double()))

    def view(self) -> View:
        return self._view(self.tokens.view())

    def fork(self) -> _AsView:
        return _AsView(self.tokens.fork())

    def select(self, rows: torch.Tensor) -> _AsView:
        return _AsView(self.tokens.select(rows))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokens, name)

    def _view(self, held: dict[str, torch.Tensor]) -> View:
        assert torch.equal(held["mark"], held["k"].double())
        return View(held["k"], held["v"], self.tokens.length)


class TokenMachine(KVMachine):
    def fresh(self) -> Any:
        fields = {"k": (HEADS, KEY), "v": (HEADS, VALUE), "mark": (HEADS, 1)}
        return _AsView(TokenState(BATCH, 40, fields, dtypes={"mark": torch.float64}))


class WindowMachine(_Machine):
    window, sinks = 4, 2

    def fresh(self) -> WindowState:
        return WindowState(BATCH, HEADS, self.window, KEY, VALUE, sinks=self.sinks)

    def visible(self, held: list[int]) -> set[int]:
        """Positions that the next token may see."""
        n = len(held)
        return set(range(max(0, n - self.window + 1), n)) | set(range(min(n, self.sinks)))

    def may_refuse(self, held: list[int], length: int) -> bool:
        # A short sequence has overwritten nothing yet; a longer one may have lost what would be visible again.
        return length > len(held) or length < len(held) > self.window + self.sinks


class WindowWithoutSinksMachine(WindowMachine):
    window, sinks = 3, 0


QUICK = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)


@pytest.mark.parametrize("machine", [KVMachine, TokenMachine, WindowMachine, WindowWithoutSinksMachine])
def test_lives_of_states(machine: type[_Machine], live: Any) -> None:
    live(machine, 60)


def test_a_broken_ring_is_noticed() -> None:
    """The inverse: the machine fails when a ring writes one slot late after it wrapped."""
    from attnkit.registry import get
    from attnkit.testing.mutants.softmax import MUTANTS

    with MUTANTS["ring_off_by_one"].planted(get("softmax")), pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(WindowMachine, settings=settings(QUICK, phases=[Phase.generate]))


@pytest.mark.parametrize("kept", range(8))
def test_cropping_what_was_just_appended_leaves_no_trace(kept: int) -> None:
    """Rejected draft tokens: append and crop equals never appended, or is refused in words once the ring lost a key."""
    for state in (KVState(1, 1, 30, KEY, VALUE), WindowState(1, 1, 6, KEY, VALUE, sinks=1)):
        for name in range(kept):
            state.append(*tokens([name], [0]))
        before = state.view()
        k, v, order = before.k.clone(), before.v.clone(), before.positions
        draft = state.fork()
        draft.append(*tokens([100, 101, 102], [0]))
        try:
            draft.crop(kept)
        except ValueError as refusal:
            assert "would be visible: crop less, or keep a fork" in str(refusal)
            continue
        after = draft.view()
        if order is not None:
            assert after.positions is not None
            ranks = after.positions.argsort()
            order, k, v = order.sort().values, k[:, :, order.argsort()], v[:, :, order.argsort()]
            late = order >= kept - 5
            assert set(order[late].tolist()) <= set(after.positions.tolist())
            assert set(after.positions[ranks].tolist()) <= set(order.tolist())
        else:
            assert torch.equal(after.k, k) and torch.equal(after.v, v)


def test_no_tokens_change_nothing() -> None:
    """After a crop a ring has a slot without a token, which an empty append once took for one."""
    state = WindowState(1, 1, 3, KEY, VALUE)
    state.append(*tokens(list(range(6)), [0]))
    state.crop(5)
    view = state.append(*tokens([], [0]))
    state.check()
    assert view.positions is not None and view.positions.tolist() == [3, 4]


def test_a_sum_goes_back_to_where_a_snapshot_was_taken() -> None:
    """As if what came later had never been, in forks as well; elsewhere it says what to do."""
    state = RecurrentState(2, {"sum": (3,)}, tails={"last": (2,)})

    def feed(of: RecurrentState, count: int) -> None:
        for name, x in of.view().items():
            x += torch.arange(x.numel()).reshape(x.shape) + of.length + (name == "last")  # in place, like a kernel
        of.advance(count)

    feed(state, 3)
    state.snapshot()
    at_3 = {name: x.clone() for name, x in state.view().items()}
    alone = state.nbytes // 2
    feed(state, 2)
    state.snapshot(keep=2)
    feed(state, 4)
    assert state.nbytes == 3 * alone
    other = state.select(torch.tensor([1, 0]))
    layered = LayeredState([state.fork()])
    for length in (0, 4, 8, 10):
        with pytest.raises(NotImplementedError, match=r"take a snapshot\(\) or fork before drafting"):
            layered.crop(length)
    layered.crop(5)
    layered.snapshot()
    assert layered.nbytes == 2 * alone, "one snapshot unless more are asked for"
    state.crop(9)
    state.crop(3)
    state.check()
    assert (state.length, state.nbytes) == (3, 2 * alone)
    assert all(x.equal(at_3[name]) for name, x in state.view().items())
    feed(state, 1)
    state.crop(3)
    assert all(x.equal(at_3[name]) for name, x in state.view().items())
    other.crop(3)
    assert all(x.equal(at_3[name].flip(0)) for name, x in other.view().items())
    with pytest.raises(ValueError, match="keep is 0"):
        state.snapshot(keep=0)


def test_bytes_are_those_allocated() -> None:
    assert KVState(2, 3, 10, 4, 8, dtype=torch.bfloat16).nbytes == 2 * 3 * 10 * (4 + 8) * 2
    tokens = TokenState(2, 10, {"a": (3, 4), "b": (5, 1)}, dtype=torch.bfloat16, dtypes={"b": torch.float32})
    assert tokens.nbytes == 2 * 10 * (3 * 4 * 2 + 5 * 1 * 4)
    assert WindowState(2, 3, 6, 4, 8, sinks=2).nbytes == 2 * 3 * (6 + 2) * (4 + 8) * 4


def test_fresh_memory_is_not_read() -> None:
    """An uninitialised NaN behind a mask is NaN to a backend that multiplies by 0."""
    state = KVState(1, 1, 5, 2)
    state.append(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    for buffer in state._tokens._buffers.values():
        assert not buffer[:, :, 2:].any()


K1 = torch.zeros(1, 2, 3, 4)
REFUSALS: list[tuple[Any, type[Exception], str]] = [
    (lambda: KVState(0, 1, 5, 4), ValueError, "KVState got batch 0"),
    (lambda: KVState(1, 1, 0, 4), ValueError, "capacity 0"),
    (lambda: WindowState(1, 1, 0, 4), ValueError, "window 0"),
    (lambda: WindowState(1, 1, 3, 4, sinks=-1), ValueError, "sinks -1"),
    (lambda: KVState(1, 2, 2, 4).append(K1, K1), ValueError, "holds 0 of 2 tokens and got 3 more"),
    (lambda: KVState(1, 2, 9, 4).append(K1, K1[:, :, :2]), ValueError, "is 2 in v"),
    (lambda: KVState(1, 1, 9, 4).append(K1, K1), ValueError, "k has shape (1, 2, 3, 4), expected (1, 1, 3, 4)"),
    (lambda: KVState(1, 2, 9, 5).append(K1, K1), ValueError, "expected (1, 2, 3, 5)"),
    (lambda: KVState(1, 2, 9, 4).append(K1.double(), K1.double()), TypeError, "torch.float64 on cpu but the state"),
    (lambda: KVState(1, 2, 9, 4).append(K1[0], K1[0]), ValueError, "k has 3 dimensions"),
    (lambda: KVState(1, 2, 9, 4).crop(1), ValueError, "length is 1, expected 0 to 0"),
    (lambda: WindowState(1, 2, 9, 4).crop(-1), ValueError, "length is -1"),
    (lambda: TokenState(1, 2, {"u": (0, 4)}), ValueError, "TokenState got batch 1, capacity 2 and u 0 x 4"),
    (lambda: TokenState(1, 2, {}), ValueError, "no tensors, expected >= 1 of each"),
    (lambda: TokenState(1, 2, {"u": (2, 4)}, dtypes={"x": torch.half}), ValueError, "dtypes names ['x'], expected"),
    (lambda: TokenState(1, 9, {"u": (2, 4)}).append(x=K1), TypeError, "got ['x'], expected ['u']"),
    (
        lambda: TokenState(1, 9, {"u": (2, 5)}).append(u=K1),
        ValueError,
        "u has shape (1, 2, 3, 4), expected (1, 2, 3, 5)",
    ),
    (
        lambda: TokenState(1, 2, {"u": (2, 4)}).append(u=K1),
        ValueError,
        "TokenState.append: holds 0 of 2 tokens and got",
    ),
]


@pytest.mark.parametrize(("act", "error", "said"), REFUSALS)
def test_refusals_are_one_sentence(act: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        act()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refused_append_changes_nothing() -> None:
    state = KVState(1, 1, 3, KEY, VALUE)
    state.append(*tokens([1, 2], [0]))
    with pytest.raises(ValueError):
        state.append(*tokens([3, 4], [0]))
    assert state.length == 2
    assert torch.equal(state.view().k, tokens([1, 2], [0])[0])


def recurrent(dtype: torch.dtype = torch.float32) -> RecurrentState:
    return RecurrentState(2, {"state": (3, 4, 5), "norm": (3, 4)}, tails={"conv": (2, 7)}, dtype=dtype)


def test_a_recurrent_state_keeps_its_size_and_its_sums_in_float32() -> None:
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        state = recurrent(dtype)
        held = state.view()
        assert {name: x.dtype for name, x in held.items()} == {"state": wide, "norm": wide, "conv": dtype}
        assert not any(x.any() for x in held.values())
        assert state.nbytes == 2 * (3 * 4 * 5 + 3 * 4) * wide.itemsize + 2 * 2 * 7 * dtype.itemsize
        state.advance(9, state=torch.ones(2, 3, 4, 5), norm=held["norm"].add_(2))
        assert state.length == 9 and held["state"].min() == 1 and held["norm"].max() == 2
        state.check()


def test_a_recurrent_fork_is_a_snapshot_and_rows_are_selected() -> None:
    state = recurrent()
    state.advance(1, state=torch.arange(2.0)[:, None, None, None].expand(2, 3, 4, 5))
    fork, flipped = state.fork(), state.select(torch.tensor([1, 0]))
    state.advance(1, state=torch.full((2, 3, 4, 5), 7.0), conv=torch.ones(2, 2, 7))
    assert fork.view()["state"][:, 0, 0, 0].tolist() == [0, 1] and not fork.view()["conv"].any()
    assert flipped.view()["state"][:, 0, 0, 0].tolist() == [1, 0]
    assert (state.length, fork.length, flipped.length) == (2, 1, 1)


def test_what_a_recurrent_state_refuses() -> None:
    state = recurrent()
    state.advance(3)
    state.crop(3)
    with pytest.raises(NotImplementedError, match="cannot go back from 3 to 2 tokens.*fork before drafting"):
        state.crop(2)
    with pytest.raises(ValueError, match=r"norm has shape \(2, 3, 5\), expected \(2, 3, 4\)"):
        state.advance(1, norm=torch.zeros(2, 3, 5))
    with pytest.raises(TypeError, match="got 'nrom', expected some of"):
        state.advance(1, nrom=torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="got batch 2 and no tensors"):
        RecurrentState(2, {})
    with pytest.raises(ValueError, match=r"got batch 0 and state \(1,\), expected >= 1"):
        RecurrentState(0, {"state": (1,)})
