"""The layer and its state: any way of feeding the tokens gives the rows of feeding them all at once."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from attnkit.spec import LayerPlace, Mechanism
from attnkit.testing.budgets import assert_within
from attnkit.testing.laws.base import Refused, assert_same, has_own_bits, law

WINDOW = 6


def layer(spec: Mechanism, backend: str, rng: random.Random, **settings: Any) -> Any:
    """A small layer of a random preset that runs on the backend, all but its linear maps off their neutral start."""
    preset = rng.choice(spec.presets)
    place = LayerPlace(width=32, heads=4, window=WINDOW, layer=rng.randrange(2), layers=2)
    config = preset.configure(place)
    fields = {field.name for field in dataclasses.fields(config)}
    settings = {name: value for name, value in {"backend": backend, **settings}.items() if name in fields}
    torch.manual_seed(rng.randrange(1 << 30))
    made = spec.layer(dataclasses.replace(config, **settings))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() != 2:  # a linear map has no neutral start; a kernel's taps share the noise of one number
                taps = parameter[0].numel() if parameter.dim() > 2 else 1
                parameter.add_(0.3 * taps**-0.5 * torch.randn_like(parameter))
    return made.eval()


def _forward(made: Any, x: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            y: Tensor = made(x)
    except NotImplementedError:
        raise Refused from None
    return y


def _truth(made: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the whole sequence in one go, which rows of a decoding run are judged by: exact, and in plain float32."""
    exact, plain = copy.deepcopy(made).double(), copy.deepcopy(made)
    for twin in (exact, plain):
        if hasattr(twin.config, "backend"):
            twin.config = dataclasses.replace(twin.config, backend="reference")
    return _forward(exact, x.double()), _forward(plain, x)


def _assert_rows(found: Tensor, truth: tuple[Tensor, Tensor], what: str, rows: slice = slice(None)) -> None:
    gold, naive = (x[:, rows].clone() for x in truth)
    assert_within(found.clone(), gold, naive, torch.float32, what=what)


def _feed(made: Any, x: Tensor, state: Any, sizes: list[int]) -> Tensor:
    rows = []
    with torch.no_grad():
        for part in x.split(sizes, 1):
            y, state = made.step(part, state)
            state.check()
            rows.append(y)
    return torch.cat(rows, 1)


@law(examples=24, promised="step_equals_prefill", layer=True)
def steps(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """Token by token, at every position of a run several windows long, gives the rows of one pass."""
    made = layer(spec, backend, rng)
    n = rng.choice((WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 1))
    x = torch.randn(2, n, 32)
    _forward(made, x)
    found = _feed(made, x, made.state(2, n), [1] * n)
    _assert_rows(found, _truth(made, x), "steps")


@law(examples=24, full=400, promised="step_equals_prefill", layer=True)
def chunks(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """Any partition of the sequence into chunks gives the rows of one pass."""
    made = layer(spec, backend, rng)
    n = rng.choice((2, 3 * WINDOW + 2, 40))
    x = torch.randn(1, n, 32)
    whole = _forward(made, x)
    cuts = sorted({rng.randint(1, n) for _ in range(rng.randint(1, 5))} | {n})
    sizes = [end - start for start, end in zip([0, *cuts], cuts, strict=False)]
    found, truth = _feed(made, x, made.state(1, n + rng.randint(0, 5)), sizes), _truth(made, x)
    _assert_rows(found, truth, f"chunks of {sizes}")
    _assert_rows(whole, truth, "one pass")


@law(examples=16, promised="step_equals_prefill", layer=True)
def forks_and_crops(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """A fork and its origin go their own ways; cropped tokens leave no trace; selected rows are those rows."""
    made = layer(spec, backend, rng)
    n, wrong = 3 * WINDOW + 1, rng.randint(1, 3)
    x, junk = torch.randn(2, n, 32), torch.randn(2, wrong, 32)
    _forward(made, x)
    split = rng.randint(1, n - 1)
    state = made.state(2, n + wrong)
    _feed(made, x[:, :split], state, [split])
    fork = state.fork()
    _feed(made, junk, fork, [wrong])
    try:
        fork.crop(split)
    except (ValueError, NotImplementedError):  # refused in words: later tokens have overwritten what would be visible
        fork = state.fork()
    rest, truth = [1] * (n - split), _truth(made, x)
    first = _feed(made, x[:, split:], fork, rest)
    _assert_rows(first, truth, "after a crop", slice(split, None))

    def assert_alike(found: Tensor, what: str) -> None:
        _assert_rows(found, truth, what, slice(split, None))
        if has_own_bits(spec, backend):  # torch's SDPA on two threads rounds a row by its place in the batch
            assert_same(found, first, what)

    flipped = state.select(torch.tensor([1, 0]))
    assert_alike(_feed(made, x[:, split:].flip(0), flipped, rest).flip(0), "selected rows")
    fork = state.fork()
    head = _feed(made, x[:, split : split + 1], state, [1])
    _feed(made, junk, fork, [wrong])  # where they share memory, this writes over what the origin has just stored
    tail = _feed(made, x[:, split + 1 :], state, rest[1:]) if rest[1:] else head[:, :0]
    assert_alike(torch.cat([head, tail], 1), "the origin of a fork that goes its own way")


@law(examples=8, promised="causal", layer=True)
def layer_causality(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """Later tokens change no bit of the layer's earlier outputs."""
    made = layer(spec, backend, rng)
    x = torch.randn(2, 20, 32)
    cut = rng.randint(1, 19)
    before = _forward(made, x)[:, :cut]
    changed = x.clone()
    changed[:, cut:] = 100
    assert_same(_forward(made, changed)[:, :cut], before, f"tokens after {cut}")


@law(examples=6, layer=True)
def evaluation_has_no_dropout(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """``eval()`` turns dropout off and repeats itself; ``train()`` turns it on, replayable from torch's seed."""
    made = layer(spec, backend, rng, dropout=0.5)
    x = torch.randn(1, 12, 32)
    calm = _forward(made, x)
    assert_same(_forward(made, x), calm, "a second evaluation")
    if not hasattr(made.config, "dropout"):
        return
    still = copy.deepcopy(made)
    still.config = dataclasses.replace(made.config, dropout=0.0)
    _assert_rows(calm, _truth(still, x), "evaluation")
    made.train()
    try:
        torch.manual_seed(5)
        first = _forward(made, x)
    except Refused:
        return  # the backend has no dropout, and says so
    assert not torch.equal(first, calm), "training with dropout equals evaluation"
    torch.manual_seed(5)
    assert_same(_forward(made, x), first, "a replay of the seed")
    assert not torch.equal(_forward(made, x), first), "two training passes drop the same weights"


@law(examples=12, promised="stateful", layer=True)
def predicted_bytes(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """The bytes that ``cost`` predicts for decoding are the bytes that the state allocates."""
    made = layer(spec, backend, rng)
    for capacity in (1, WINDOW - 1, WINDOW, WINDOW + 4, 100):
        allocated = made.state(1, capacity).nbytes
        predicted = made.cost(1, capacity).state_bytes(capacity)
        assert predicted == allocated, f"{capacity} tokens: {predicted} bytes predicted, {allocated} allocated"
