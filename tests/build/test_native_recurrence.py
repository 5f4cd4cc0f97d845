"""The native sums that fade, at every level: against the recurrence in float64, and bits that nothing else moves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from attnkit import native, recurrence
from attnkit.mechanisms.delta import delta_attention
from attnkit.mechanisms.linear import linear_attention
from attnkit.native.recurrence import recurrence as run
from attnkit.testing.budgets import assert_within

pytestmark = pytest.mark.skipif(not native.STATUS.available, reason=native.STATUS.reason)

# b, states, n, d, e: one token, whole chunks, a part of one after a span of them, rows that are no whole vectors.
SIZES = ((1, 1, 1, 5, 3), (2, 3, 37, 16, 8), (1, 2, 128, 64, 64), (1, 1, 300, 59, 33))
KINDS = ("none", "token", "channel")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN, scratch memory too: what a kernel reads without having written it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def drawn(sizes: tuple[int, ...], kind: str, delta: bool, seed: int = 0) -> dict[str, Tensor]:
    b, s, n, d, e = sizes
    make = torch.Generator().manual_seed(seed)
    found = {
        "q": torch.randn(b, s, n, d, generator=make),
        "k": normalize(torch.randn(b, s, n, d, generator=make), dim=-1),
        "v": torch.randn(b, s, n, e, generator=make),
        "state": torch.randn(b, s, d, e, generator=make),
    }
    if kind != "none":
        shape = (b, s, n, d) if kind == "channel" else (b, s, n)
        found["log_decay"] = -torch.rand(shape, generator=make)
    if delta:
        found["beta"] = 0.2 + 1.6 * torch.rand(b, s, n, generator=make)
    return found


def with_gradients(form, given: dict[str, Tensor], seed: int = 1) -> list[Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    o, state = form(leaves)
    make = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=make).to(x.dtype) for x in (o, state)]
    total = (o * weights[0]).sum() + (state * weights[1]).sum()
    return [o.detach(), state.detach(), *torch.autograd.grad(total, list(leaves.values()))]


def plain(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if "beta" in given:
        return delta_attention(**given, scale=0.3, return_state=True, backend="reference")
    return recurrence.recurrent(**given, scale=0.3)


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("delta", (False, True), ids=("sum", "delta"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_level_agrees_with_the_recurrence(poisoned, sizes, kind, delta, level):
    given = drawn(sizes, kind, delta)
    true = with_gradients(plain, {name: x.double() for name, x in given.items()})
    rough = with_gradients(plain, given)
    with native.use_level(level):
        got = with_gradients(lambda x: run(**x, scale=0.3), given)
    for i, name in enumerate(("o", "state", *given)):
        assert_within(got[i], true[i], rough[i], torch.float32, gradient=i > 1, what=name)


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
@pytest.mark.parametrize("feature_map", ("elu", "relu"))
def test_maps_means_and_padding_agree_with_the_definition(poisoned, feature_map, sizes, level):
    """Two query heads a state, whose queries are the last tokens; hidden tokens are among all others."""
    b, s, n, d, e = sizes
    given = {name: x for name, x in drawn(sizes, "none", False).items() if name in "qkv"}
    given["q"] = torch.randn(b, 2 * s, n - 5, d, generator=torch.Generator().manual_seed(2))
    keep = torch.arange(n).remainder(7) != 2
    keep = keep[None].repeat(b, 1)
    keep[-1, :3] = False

    def by(backend: str):
        def form(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            o = linear_attention(**x, feature_map=feature_map, keep=keep, backend=backend)
            return o, o.new_zeros(1)

        return form

    true = with_gradients(by("reference"), {name: x.double() for name, x in given.items()})
    rough = with_gradients(by("reference"), given)
    with native.use_level(level):
        got = with_gradients(by("cpu"), given)
    for i, name in ((0, "o"), *enumerate(given, 2)):
        assert_within(got[i], true[i], rough[i], torch.float32, gradient=i > 1, what=name)
    assert not got[3][~keep[:, None].expand(-1, s, -1)].any(), "hidden keys have a gradient"


@pytest.mark.parametrize("kind", ("token", "channel"))
def test_hidden_tokens_neither_add_nor_fade(kind):
    """The same as without them, with gradients of 0, whatever they hold."""
    given = drawn((2, 2, 70, 16, 8), kind, False)
    keep = torch.arange(70).remainder(5) != 1
    given["k"][:, :, ~keep], given["v"][:, :, ~keep] = torch.nan, torch.inf
    hidden = with_gradients(lambda x: run(**x, keep=keep[None].repeat(2, 1)), given)
    shown = {name: x if name == "state" else x[:, :, keep] for name, x in given.items()}
    rest = run(**shown)
    assert_within(hidden[0][:, :, keep], rest[0].double(), rest[0], torch.float32, what="o")
    assert_within(hidden[1], rest[1].double(), rest[1], torch.float32, what="state")
    for name, slope in zip(given, hidden[2:], strict=True):
        assert slope.isfinite().all(), name
        if name in ("k", "v", "log_decay"):
            assert not slope[:, :, ~keep].any(), name


@pytest.mark.parametrize("delta", (False, True), ids=("sum", "delta"))
@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_batch_do_not_move_a_bit(kind, delta):
    given = drawn((3, 4, 290, 32, 40), kind, delta)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = with_gradients(lambda x: run(**x), given)
        torch.set_num_threads(2)
        two = with_gradients(lambda x: run(**x), given)
        alone = run(**{name: x[1:2] for name, x in given.items()})
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
    assert all(torch.equal(x[1:2], y) for x, y in zip(one[:2], alone, strict=True))


@pytest.mark.parametrize("delta", (False, True), ids=("sum", "delta"))
def test_training_keeps_its_inputs_and_a_state_every_256_tokens(delta):
    given = {name: x.requires_grad_() for name, x in drawn((1, 2, 1024, 16, 8), "token", delta).items()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run(**given)
    lengths = 8 * 2 if delta else 0
    assert sum(kept.values()) <= sum(x.nbytes for x in given.values()) + 4 * given["state"].nbytes + lengths


@pytest.mark.parametrize("kind", ("token", "channel"))
@pytest.mark.parametrize("delta", (False, True), ids=("sum", "delta"))
def test_a_gate_that_closes_forgets_and_nothing_else(kind, delta):
    """What came before a decay of e^-10000, or of 0, has neither weight nor gradient after it."""
    given = drawn((1, 2, 100, 16, 8), kind, delta)
    given["log_decay"][:, :, 70] = -1e4
    o, state = run(**given)
    rest = run(**{name: x[:, :, 70:] for name, x in given.items() if name != "state"})
    assert_within(o[:, :, 70:], rest[0].double(), rest[0], torch.float32, what="o after the gate")
    given["log_decay"][:, :, 70] = -torch.inf
    closed = run(**given)
    assert torch.equal(o, closed[0])
    assert torch.equal(state, closed[1])
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    slopes = torch.autograd.grad(run(**leaves)[0][:, :, 70:].sum(), list(leaves.values()))
    for name, slope in zip(leaves, slopes, strict=True):
        assert slope.isfinite().all(), name
    assert not slopes[2][:, :, :70].any(), "values before the gate have a gradient"


def test_an_unlawful_token_spoils_what_follows_and_nothing_before():
    given = drawn((1, 2, 100, 16, 8), "token", True)
    whole, _ = run(**given)
    given["k"][:, 1, 80] *= 100.0
    o, state = run(**given)
    assert torch.equal(o[:, 0], whole[:, 0])
    assert torch.equal(o[:, 1, :80], whole[:, 1, :80])
    assert o[:, 1, 80:].isnan().all()
    assert state[:, 0].isfinite().all()
    assert state[:, 1].isnan().all()
