"""Going back, for every state there is: what was appended and cropped leaves no bit behind, or is refused in words."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from attnkit.registry import mechanisms
from attnkit.spec import Mechanism
from attnkit.state import KVState, RecurrentState, WindowState, kv
from attnkit.state.policies import H2O, TOVA, AShape, Quest, SnapKV, StreamingLLM
from attnkit.testing.laws.decoding import layer

WIDTH = 32
DECODING = [name for name, spec in mechanisms().items() if spec.laws.stateful and spec.layer is not None]
Feed = Callable[[Any, int], torch.Tensor]


def assert_no_trace(fresh: Callable[[], Any], feed: Feed, rng: random.Random) -> None:
    """``fresh()`` is an empty state, ``feed(state, count)`` lets it take the next tokens and returns what came out."""
    before, draft = rng.choice((0, 1, 5, 9, 25)), rng.randint(1, 4)
    state = fresh()
    for count in [before] if rng.random() < 0.5 else [1] * before:
        feed(state, count)
    never = state.fork()
    if isinstance(state, RecurrentState):
        state.snapshot()
    for count in [draft] if rng.random() < 0.5 else [1] * draft:
        feed(state, count)
    for wrong in (state.length + 1, -1):
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            state.crop(wrong)
        assert "\n" not in str(caught.value)
    state.crop(state.length)
    assert state.length == before + draft
    try:
        state.crop(before)
    except (ValueError, NotImplementedError) as refusal:
        assert not isinstance(state, RecurrentState), "a snapshot was taken"
        assert "\n" not in str(refusal) and state.length == before + draft
    else:
        state.check()
        assert state.length == before
        for count in (1, 2, 1):
            assert feed(state, count).equal(feed(never, count)), "something is left of what was cropped"
    try:
        state.crop(0)
    except (ValueError, NotImplementedError):
        return
    empty = fresh()
    assert state.length == 0
    for count in (3, 1):
        assert feed(state, count).equal(feed(empty, count)), "something is left of what was cropped to nothing"


def of_layer(spec: Mechanism, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    made = layer(spec, "reference", rng)
    x = torch.randn(2, 60, WIDTH)

    def feed(state: Any, count: int) -> torch.Tensor:
        with torch.no_grad():
            y, after = made.step(x[:, state.length : state.length + count], state)
        assert after is state
        return y

    assert_no_trace(lambda: made.state(2, 60), feed, rng)


@pytest.mark.parametrize("name", DECODING)
def test_layers_go_back_without_a_trace(name: str, full: bool) -> None:
    for seed in range(200 if full else 4):
        of_layer(mechanisms()[name], seed)


STATES: dict[str, Callable[[], Any]] = {
    **{str(codec): lambda codec=codec: KVState(2, 2, 60, 8, codec=codec) for codec in (None, "int8", "fp8", "int4")},
    "window": lambda: WindowState(2, 2, 6, 8, sinks=2),
    "streaming": lambda: StreamingLLM(12, sinks=2).state(2, 2, 60, 8),
    "h2o": lambda: H2O(12).state(2, 2, 60, 8),
    "tova": lambda: TOVA(12).state(2, 2, 60, 8),
    "snapkv": lambda: SnapKV(12, observed=4, every=2).state(2, 2, 60, 8),
    "quest": lambda: Quest(12, page=4).state(2, 2, 60, 8),
    "a shape": lambda: AShape(2, 4).state(2, 2, 60, 8),
}


def of_state(name: str, seed: int) -> None:
    q, k, v = torch.randn(3, 2, 2, 80, 8, generator=torch.Generator().manual_seed(seed))

    def feed(state: Any, count: int) -> torch.Tensor:
        new = [x[:, :, state.length : state.length + count] for x in (k, v, q)]
        view = state.append(*new[: 2 if isinstance(state, KVState | WindowState) else 3])
        order = None if view.positions is None else view.positions.argsort()
        return torch.cat([x if order is None else x[:, :, order] for x in (view.k, view.v)], -1).clone()

    assert_no_trace(STATES[name], feed, random.Random(seed))


@pytest.mark.parametrize("name", [name for name in STATES if name != "window"])
def test_states_go_back_without_a_trace(name: str, full: bool) -> None:
    for seed in range(200 if full else 20):
        of_state(name, seed)


FAULTS: dict[str, tuple[type, Callable[[Any], Any], Callable[[int], None]]] = {
    "crop does nothing": (kv.TokenState, lambda right: lambda self, length: None, lambda seed: of_state("None", seed)),
    "crop to nothing keeps all": (
        kv.TokenState,
        lambda right: lambda self, length: right(self, length or self.length),
        lambda seed: of_state("None", seed),
    ),
    "one stale token stays": (
        kv.TokenState,
        lambda right: lambda self, length: right(self, min(self.length, length + 1)),
        lambda seed: of_state("None", seed),
    ),
    "more than there is": (
        kv.TokenState,
        lambda right: lambda self, length: right(self, min(self.length, length)),
        lambda seed: of_state("None", seed),
    ),
    "the waiting keys of a group are lost": (
        kv.GroupedKeys,
        lambda right: lambda self, length: self.waiting.recent.zero_() and None,
        lambda seed: of_state("int4", seed),
    ),
    "a sum goes back by name only": (
        RecurrentState,
        lambda right: lambda self, length: setattr(self, "length", length),
        lambda seed: of_layer(mechanisms()["gla"], seed),
    ),
    "a window brings back what is overwritten": (
        WindowState,
        lambda right: lambda self, length: self.__dict__.update(length=length, _held=min(self._held, length)),
        lambda seed: of_layer(mechanisms()["softmax"], seed),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault: str) -> None:
    owner, wrong, tried = FAULTS[fault]
    noticed = (AssertionError, RuntimeError, IndexError, pytest.fail.Exception)
    with mock.patch.object(owner, "crop", wrong(owner.crop)), pytest.raises(noticed):
        for seed in range(40):
            tried(seed)
