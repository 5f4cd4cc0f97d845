"""Lives of states under a policy against lists: append, crop, fork, select; budgets, refusals, planted faults."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor

import attnkit
from attnkit.mechanisms.softmax import SoftmaxAttention, SoftmaxConfig
from attnkit.models.decoder import Decoder, DecoderConfig, empty_state
from attnkit.positions import Rotary, YaRN
from attnkit.state.policies import (
    H2O,
    TOVA,
    AShape,
    BlockSparse,
    Evicting,
    KeptState,
    PagewiseState,
    PerHead,
    PyramidKV,
    Quest,
    Seen,
    SnapKV,
    StreamingLLM,
    VerticalSlash,
    XAttention,
    base,
    kept,
)
from attnkit.testing import policies as oracle_of
from attnkit.testing.budgets import assert_within
from attnkit.testing.policies import EVICTING, B, D, E, G, H, Oracle, drawn

WHICH = st.integers(0, 9)
MOST = 40


class Branch:
    """A state and what it should hold, at every length that it has had."""

    def __init__(self, state: Any, oracles: list[Oracle]) -> None:
        self.state, self.oracles = state, oracles
        self.history: dict[int, list[Any]] = {0: self.books()}

    def books(self) -> list[Any]:
        return copy.deepcopy([(oracle.held, oracle.totals) for oracle in self.oracles])

    def go_back(self, length: int) -> None:
        for oracle, (held, totals) in zip(self.oracles, copy.deepcopy(self.history[length]), strict=True):
            oracle.held, oracle.totals, oracle.length = held, totals, length
            for rows in (*oracle.q, *oracle.k):
                del rows[length:]
        self.history = {at: books for at, books in self.history.items() if at <= length}


class KeptMachine(RuleBasedStateMachine):
    """States of one policy; a crop that is not refused leaves what was there before, as far as anybody can see."""

    policy: Evicting

    def __init__(self) -> None:
        super().__init__()
        self.branches: list[Branch] = []
        self.drawn = 0

    @initialize()
    def start(self) -> None:
        nothing = torch.zeros(H, 0, D), torch.zeros(G, 0, D)
        oracles = [Oracle(self.policy, *nothing) for _ in range(B)]
        self.branches = [Branch(self.policy.state(B, G, MOST, D, E, dtype=torch.float64), oracles)]

    def pick(self, which: int) -> Branch:
        return self.branches[which % len(self.branches)]

    @rule(which=WHICH, m=st.sampled_from([1, 1, 1, 2, 6, 11]))
    def append(self, which: int, m: int) -> None:
        branch = self.pick(which)
        state, before = branch.state, branch.state.nbytes
        self.drawn += 1
        x = drawn(m, self.drawn)
        if state.length + m > MOST:
            with pytest.raises(ValueError, match=f"of {MOST} tokens and got {m} more"):
                state.append(**x)
            return self.compare(branch)
        view = state.append(**x)
        for b, oracle in enumerate(branch.oracles):
            for mine, new in ((oracle.q, x["q"][b]), (oracle.k, x["k"][b])):
                for rows, more in zip(mine, new.tolist(), strict=True):
                    rows.extend(more)
            for group, positions in enumerate(oracle.append(m)):
                wanted = torch.tensor([oracle.k[group][j] for j in positions], dtype=torch.float64)
                assert view.k[b, group].sort(0).values.equal(wanted.sort(0).values)
                assert view.k[b, group, -m:].equal(wanted[-m:]), "the new tokens come last"
        branch.history[state.length] = branch.books()
        assert state.nbytes == before or before < state.nbytes <= before + 8 * B * H * self.policy.window * D
        self.compare(branch)

    @rule(which=WHICH, length=st.integers(0, MOST))
    def crop(self, which: int, length: int) -> None:
        branch = self.pick(which)
        try:
            branch.state.crop(length)
        except ValueError as refusal:
            assert "\n" not in str(refusal)
            left = any(sorted(oracle.held[0]) != list(range(oracle.length)) for oracle in branch.oracles)
            remembers = self.policy.totals or self.policy.window
            assert length > branch.state.length or left or remembers, f"{branch.state.length} to {length}: {refusal}"
        else:
            if length not in branch.history:  # inside an append, of which every token is still there
                assert max(len(oracle.held[0]) for oracle in branch.oracles) < MOST
                start = max(at for at in branch.history if at < length)
                branch.history[length] = [
                    ([[*kept, *range(start, length)] for kept in held], totals)
                    for held, totals in branch.history[start]
                ]
            branch.go_back(length)
        self.compare(branch)

    @rule(which=WHICH)
    def fork(self, which: int) -> None:
        if len(self.branches) < 4:
            branch = self.pick(which)
            other = Branch(branch.state.fork(), copy.deepcopy(branch.oracles))
            other.history = copy.deepcopy(branch.history)
            self.branches.append(other)

    @rule(which=WHICH, rows=st.lists(st.integers(0, B - 1), min_size=B, max_size=B))
    def select(self, which: int, rows: list[int]) -> None:
        branch = self.pick(which)
        branch.state = branch.state.select(torch.tensor(rows))
        branch.oracles = [copy.deepcopy(branch.oracles[row]) for row in rows]
        branch.history = {at: [copy.deepcopy(books[row]) for row in rows] for at, books in branch.history.items()}
        self.compare(branch)

    def compare(self, branch: Branch) -> None:
        state = branch.state
        state.check()
        assert state.held <= self.policy.budget
        for b, oracle in enumerate(branch.oracles):
            assert state.length == oracle.length
            for group in range(G):
                positions = state.positions[b, group].tolist()
                assert sorted(positions) == oracle.held[group]
                assert state.view().k[b, group].tolist() == [oracle.k[group][j] for j in positions]


QUICK = settings(max_examples=15, stateful_step_count=20, deadline=None, derandomize=True)


def machine_of(of: Evicting) -> type[KeptMachine]:
    class Machine(KeptMachine):
        policy = of

    return Machine


@pytest.mark.parametrize("name", ["streaming", "h2o", "h2o by threes", "tova", "snapkv max"])
def test_lives_of_kept_tokens(name: str, live: Any) -> None:
    live(machine_of(EVICTING[name]), 15, 20)


def by_slots(policy: StreamingLLM, x: dict[str, Tensor], n: int, past: list[int], new: list[int]) -> Tensor:
    """StreamingLLM as in the paper: keys kept as they were, turned by their place in the cache at every use."""
    rotary, among = policy.rotary, past + new
    assert rotary is not None
    slots = torch.arange(len(among))
    q, k = rotary.rotate(x["q"][:, :, new], slots[len(past) :]), rotary.rotate(x["k"][:, :, among], slots)
    return attnkit.softmax_attention(q, k, x["v"][:, :, among], mask=attnkit.causal(), backend="reference")


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_streaming_gives_positions_inside_the_cache(style: Any) -> None:
    policy = StreamingLLM(9, sinks=3, rotary=Rotary(D, style=style))
    x = drawn(60, 7)
    state, past, n = policy.state(B, G, 100, D, E, dtype=torch.float64), [], 0
    for m in [2, 1, 5, *[1] * 20, 6, 14, *[1] * 12]:
        new = list(range(n, n + m))
        wanted = by_slots(policy, x, n, past, new)
        turned = {name: policy.rotary.rotate(x[name][:, :, new], torch.tensor(new)) for name in ("q", "k")}
        view = state.append(turned["k"], x["v"][:, :, new], turned["q"])
        found = attnkit.softmax_attention(turned["q"], view.k, view.v, mask=attnkit.causal(), backend="reference")
        assert_within(found, wanted, wanted.clone(), torch.float64)
        n += m
        past = [j for j in past + new if j < 3 or j >= n - 6]
        state = state.fork()


def test_streaming_without_rotary_is_a_mask() -> None:
    """One by one, the sinks and the window, the query itself not counted."""
    x = drawn(30, 2)
    state = StreamingLLM(8, sinks=2).state(B, G, 100, D, E, dtype=torch.float64)
    mask = (attnkit.window(7) | attnkit.global_tokens(2)) & attnkit.causal()
    whole_run = attnkit.softmax_attention(**x, mask=mask, backend="reference")
    for i in range(30):
        new = {name: t[:, :, i : i + 1] for name, t in x.items()}
        view = state.append(**new)
        found = attnkit.softmax_attention(new["q"], view.k, view.v, backend="reference")
        wanted = whole_run[:, :, i : i + 1]
        assert_within(found, wanted, wanted.clone(), torch.float64)


def test_bounds_of_pages_survive_crops_and_forks() -> None:
    state = Quest(12, page=4).state(B, G, 60, D, E, dtype=torch.float64)
    for seed, (m, back) in enumerate([(10, 3), (1, 0), (9, 9), (4, 1), (13, 5), (2, 2), (1, 0), (6, 0)]):
        state.append(**drawn(m, seed))
        other = state.fork()
        other.append(**drawn(7, 99))
        state.crop(state.length - back)
        state = state.select(torch.tensor([1, 0]))
        for one in (state, other):
            one.check()
    assert isinstance(state, PagewiseState)
    state.bounds[0, 0, 0] += 1
    with pytest.raises(AssertionError):
        state.check()


def decoder(layers: int = 3, **settings: Any) -> Decoder:
    torch.manual_seed(0)
    config = SoftmaxConfig(32, 4, kv_heads=2, **settings)
    model = Decoder(DecoderConfig(50, 32, layers), lambda layer: SoftmaxAttention(config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    "policy",
    [
        StreamingLLM(60, rotary=Rotary(8)),
        H2O(60),
        TOVA(60),
        SnapKV(60, observed=8),
        PyramidKV(70, observed=8, beta=1),
        Quest(64, page=4),
        AShape(4, 60),
        XAttention(1.0),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_a_model_under_a_policy(policy: Any) -> None:
    """The same text while the budget covers it; another once it does not; states of the size that was asked for."""
    model, tokens = decoder(rotary=Rotary(8)), torch.randint(50, (2, 30), generator=torch.Generator().manual_seed(0))
    plain = model.generate(tokens, 20)
    assert model.generate(tokens, 20, policy=policy).equal(plain)
    with torch.no_grad():
        state = model.state(2, 400, policy=policy)
        model.step(torch.randint(50, (2, 200), generator=torch.Generator().manual_seed(1)), state)
        if isinstance(policy, Evicting):
            assert [layer.held for layer in state.layers] == [
                policy.for_layer(i, 3).budget  # type: ignore[attr-defined]
                for i in range(3)
            ]
            assert state.nbytes < model.state(2, 200).nbytes
        elif isinstance(policy, Quest):
            assert [isinstance(layer, PagewiseState) for layer in state.layers] == [False, False, True]
        for _ in range(3):
            model.step(tokens[:, :1], state)
        state.check()
        assert state.length == 203


def test_budgets_of_a_pyramid() -> None:
    for layers, budget, observed, beta in ((32, 256, 32, 20.0), (4, 100, 8, 2.0), (1, 50, 8, 5.0), (2, 20, 8, 1.0)):
        policy = PyramidKV(budget, observed=observed, beta=beta, every=1)
        budgets, average = policy.budgets(layers), budget - observed
        assert budgets == sorted(budgets, reverse=True)
        assert layers * (budget - 1) < sum(budgets) <= layers * budget
        if layers > 1:
            assert budgets[-1] == observed + int(average / beta)
            assert budgets[0] == observed + int(2 * average - average / beta)
    # The doc's example: n = 4096, half of it, 32 layers (kvpress counts the window in both).
    assert PyramidKV(256, observed=32, prompt=300).budgets(2) == [300, 212]


def test_limits_in_bytes_hold() -> None:
    for policy in (StreamingLLM(100), StreamingLLM(100, rotary=Rotary(8)), H2O(100, recent=4), TOVA(100)):
        fitted = policy.within(50_000, 1, 2, 8, 6, dtype=torch.bfloat16)
        state = fitted.state(1, 2, 10_000, 8, 6, dtype=torch.bfloat16, limit=50_000)
        more = copy.copy(fitted)
        object.__setattr__(more, "budget", fitted.budget + 1)
        assert state.nbytes <= 50_000
        with pytest.raises(ValueError, match=r"takes \d+ bytes and the limit is 50000"):
            more.state(1, 2, 10_000, 8, 6, dtype=torch.bfloat16, limit=50_000)
    state = SnapKV(60, observed=8).state(B, G, 100, D, E, dtype=torch.float64, limit=16_000)
    before = state.nbytes
    with pytest.raises(ValueError, match="the limit is 16000"):
        state.append(**drawn(70))
    assert (state.length, state.held, state.nbytes) == (0, 0, before)


X = drawn(3)
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: H2O(0), ValueError, "H2O: budget is 0"),
    (lambda: TOVA(4, every=5), ValueError, "budget is 4 and every 5, expected 1 <= every <= budget"),
    (lambda: H2O(4, recent=5), ValueError, "recent is 5, expected 1 to 4"),
    (lambda: StreamingLLM(4, sinks=4), ValueError, "sinks is 4, expected 0 to 3"),
    (lambda: StreamingLLM(9, rotary=Rotary(4, scaling=YaRN(4.0, 64))), ValueError, "only turns them"),
    (lambda: SnapKV(40, observed=32), ValueError, "budget is 40, expected more than 47"),
    (lambda: SnapKV(99, kernel=4), ValueError, "kernel is 4"),
    (lambda: PyramidKV(60, observed=32, beta=29), ValueError, "beta is 29, expected 1 to 28"),
    (lambda: Quest(40), ValueError, "budget is 40 and page 16, expected at least 3 pages"),
    (lambda: AShape(-1, 4), ValueError, "sinks is -1"),
    (lambda: VerticalSlash(0), ValueError, "vertical is 0"),
    (lambda: BlockSparse(0), ValueError, "blocks is 0"),
    (lambda: XAttention(0.0), ValueError, "threshold is 0.0"),
    (lambda: XAttention(stride=7), ValueError, "stride is 7 and block 128"),
    (lambda: PerHead([AShape()]).mask(X["q"], X["k"], 1.0), ValueError, "PerHead has 1 policies and the call 4 heads"),
    (lambda: TOVA(4).state(0, 1, 1, 1), ValueError, "KeptState got batch 0"),
    (lambda: TOVA(4).state(B, G, 9, D, E).append(**X), TypeError, "torch.float64 on cpu but the state torch.float32"),
    (
        lambda: TOVA(4).state(B, G, 9, D, E, dtype=torch.float64).append(X["k"], X["v"], X["q"][:, :3]),
        ValueError,
        "3",
    ),
    (lambda: TOVA(4).state(B, G, 9, D, E).crop(1), ValueError, "length is 1, expected 0 to 0"),
    (
        lambda: AShape().state(B, G, 9, D, E, limit=100),
        ValueError,
        "takes 1008 bytes and the limit is 100",
    ),
    (lambda: Quest(48).state(B, G, 9, D, E, limit=100), ValueError, "takes 1136 bytes and the limit is 100"),
    (lambda: H2O(9).within(50, 1, 1, 64, 64), ValueError, "the limit is 50 bytes and one token takes 524"),
    (
        lambda: decoder(mask=attnkit.window(9)).state(1, 9, policy=TOVA(4)),
        NotImplementedError,
        "a policy chooses among all tokens",
    ),
    (
        lambda: decoder(alibi=True, softcap=3.0).state(1, 9, policy=TOVA(4)),
        NotImplementedError,
        "the layer has alibi and softcap",
    ),
    (
        lambda: decoder(rotary=Rotary(8)).state(1, 9, policy=StreamingLLM(5, rotary=Rotary(8, base=5.0))),
        ValueError,
        "expected the same",
    ),
    (lambda: decoder().generate(torch.ones(1, 2).long(), 1, cache=False, policy=TOVA(4)), ValueError, "cache=True"),
]


@pytest.mark.parametrize(("act", "error", "said"), REFUSED)
def test_refusals_are_one_sentence(act: Callable[[], Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        act()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_policies_are_for_softmax_attention() -> None:
    with pytest.raises(NotImplementedError, match="policies are for SoftmaxAttention"):
        empty_state([torch.nn.Identity()], 1, 9, like=torch.zeros(1), policy=TOVA(4))


def seeing_later_keys(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def weights(self: Seen, q: Tensor) -> Tensor:
        return torch.cat([right(self, q[:, :, i : i + 1]) for i in range(q.shape[2])], 2)

    return weights


def without_scale(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, q: right(replace(self, scale=1.0), q)


def a_sink_too_few(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, seen: right(replace(self, sinks=self.sinks - 1), seen)


def sums_left_behind(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def taken(x: Tensor, slots: Tensor) -> Tensor:
        return x[:, :, : slots.shape[2]] if x.dim() == 3 and x.is_floating_point() else right(x, slots)

    return taken


def each_head_for_itself(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def score(self: TOVA, seen: Seen) -> Tensor:
        mean = base.per_group(seen.weights(seen.q[:, :, -1:])[:, :, 0], G)
        return mean.masked_fill(seen.positions == seen.length - 1, torch.inf)

    return score


FAULTS: dict[str, tuple[str, Any, str, Callable[[Any], Any]]] = {
    "queries see later keys": ("h2o", Seen, "weights", seeing_later_keys),
    "the scale is left out": ("tova", Seen, "weights", without_scale),
    "heads take turns": ("h2o", base, "per_group", lambda _: lambda x, groups: x.unflatten(1, (-1, groups)).mean(1)),
    "one of the newest leaves": ("h2o", H2O, "newest", lambda right: property(lambda self: right.fget(self) - 1)),
    "a sink too few": ("streaming", StreamingLLM, "score", a_sink_too_few),
    "sums stay in their slots": ("h2o by threes", kept, "taken", sums_left_behind),
    "the lowest stays": ("tova", kept, "_lowest", lambda right: lambda score, positions: right(-score, positions)),
    "the highest leaves": ("snapkv max", kept, "_highest", lambda right: lambda s, p, count: right(-s, p, count)),
    "each head for itself": ("tova", TOVA, "score", each_head_for_itself),
    "neighbours are not pooled": ("snapkv", torch.nn.functional, "avg_pool1d", lambda right: lambda x, *sizes: x),
    "old queries are forgotten": (
        "snapkv",
        KeptState,
        "_remember",
        lambda right: lambda self, q: setattr(self, "_recent", q[:, :, -1:].expand(-1, -1, self.policy.window, -1)),
    ),
    "nothing leaves": ("h2o by threes", KeptState, "_settle", lambda right: lambda self: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault: str) -> None:
    name, owner, attribute, wrong = FAULTS[fault]
    planted = mock.patch.object(owner, attribute, wrong(getattr(owner, attribute)))
    with planted, pytest.raises((AssertionError, RuntimeError, KeyError)):
        for seed, chunks in enumerate(([20, 1, 1, 1, 5, 1, 1], [1] * 25, [6, 7, 1, 1, 9, 1])):
            oracle_of.check(EVICTING[name], chunks, seed)


LIFE_FAULTS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "forks share memory": ("tova", "fork", lambda right: copy.copy),
    "crop leaves a token": (
        "streaming",
        "crop",
        lambda right: lambda self, length: right(self, min(length + 1, self.length)),
    ),
    "crop brings back what left": (
        "streaming",
        "crop",
        lambda right: lambda self, length: (setattr(self, "_settled", 0), right(self, length)),
    ),
    "sums are cropped": (
        "h2o",
        "crop",
        lambda right: lambda self, length: self.__dict__.update(length=length, _held=length),
    ),
}


@pytest.mark.parametrize("fault", LIFE_FAULTS)
def test_faults_of_lives_are_noticed(fault: str) -> None:
    name, attribute, wrong = LIFE_FAULTS[fault]
    quick = settings(QUICK, max_examples=60, phases=[Phase.generate], report_multiple_bugs=False, print_blob=False)
    planted = mock.patch.object(KeptState, attribute, wrong(getattr(KeptState, attribute)))
    with planted, pytest.raises((AssertionError, RuntimeError, KeyError, IndexError, ValueError, ExceptionGroup)):
        run_state_machine_as_test(machine_of(EVICTING[name]), settings=quick)


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_wrong_turn_of_sinks_is_noticed(wrong: int) -> None:
    def turned(self: StreamingLLM, sinks: Tensor, shift: int) -> Tensor:
        assert self.rotary is not None
        return self.rotary.rotate(sinks, torch.full((sinks.shape[2],), wrong and shift + 1))

    with mock.patch.object(StreamingLLM, "turned", turned), pytest.raises(AssertionError):
        test_streaming_gives_positions_inside_the_cache("half")


def test_wrong_pages_are_noticed() -> None:
    with mock.patch.object(PagewiseState, "_bound", lambda self, k, first: None), pytest.raises(AssertionError):
        test_bounds_of_pages_survive_crops_and_forks()
