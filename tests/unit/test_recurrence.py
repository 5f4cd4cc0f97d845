"""Sums that fade: three forms agree with gradients, any split, extreme decays, long runs, what training keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit import registry
from attnkit.recurrence import CHUNK, TILE, chunked, parallel, recurrent

FORMS = (recurrent, parallel, chunked)
KINDS = ("none", "head", "token", "channel")


def drawn(kind: str, n: int, m: int | None = None, b: int = 2, strength: float = 2.0) -> dict[str, Tensor]:
    """Queries, keys, values, decays and a state before them, in float64."""
    generator = torch.Generator().manual_seed(n)
    h, g, d, e = 4, 2, 5, 3
    shapes = {"q": (b, h, m or n, d), "k": (b, g, n, d), "v": (b, g, n, e), "state": (b, g, d, e)}
    made = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
    decays = {"none": (), "head": (g,), "token": (b, g, n), "channel": (b, g, n, d)}[kind]
    if decays:
        made["log_decay"] = -strength * torch.rand(decays, generator=generator, dtype=torch.float64)
    return {name: x.requires_grad_() for name, x in made.items()}


def slopes(found: tuple[Tensor, Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of every input for one direction of both results."""
    generator = torch.Generator().manual_seed(0)
    total = sum((x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in found)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, list(inputs.values())))


def assert_close(found: Any, wanted: Any, bound: float = 1e-10) -> None:
    for one, two in zip(found, wanted, strict=True):
        assert (one - two).abs().max() <= bound * (1 + two.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, TILE, TILE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1])
def test_three_forms_agree_with_gradients(kind: str, n: int) -> None:
    """For all queries and for the last few, with padding here and there, a state before and the state after."""
    for m in {n, (n + 2) // 3}:
        inputs = drawn(kind, n, m)
        keep = torch.rand(2, n, generator=torch.Generator().manual_seed(n)) < 0.8
        found = [form(**inputs, keep=keep, scale=0.7) for form in FORMS]
        assert_close(found[1], found[0])
        assert_close(found[2], found[0])
        gradients = [slopes(results, inputs) for results in found]
        assert_close(gradients[1], gradients[0])
        assert_close(gradients[2], gradients[0])


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_pass_gradcheck(kind: str) -> None:
    """Numerical gradients through a chunk edge and, for channels, the edges of tiles."""
    inputs = drawn(kind, CHUNK + 2, 3, b=1)
    names = list(inputs)

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return chunked(**dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("kind", ["none", "token", "channel"])
@pytest.mark.parametrize("cuts", [(1,), (CHUNK,), (5, TILE, 70), (69, 70, 71)])
def test_any_split_is_the_whole(kind: str, cuts: tuple[int, ...]) -> None:
    """State out, state in, with gradients through all of them."""
    n = CHUNK + 13
    inputs = drawn(kind, n)
    whole = chunked(**inputs)
    state, rows = inputs["state"], []
    for start, end in zip((0, *cuts), (*cuts, n), strict=True):
        part = {name: x[:, :, start:end] for name, x in inputs.items() if name != "state"}
        o, state = chunked(**part, state=state)
        rows.append(o)
    found = torch.cat(rows, 2), state
    assert_close(found, whole)
    assert_close(slopes(found, inputs), slopes(whole, inputs))


@pytest.mark.parametrize("kind", ["head", "token", "channel"])
@pytest.mark.parametrize("strength", [0.0, 50.0, 5000.0])
def test_extreme_decays_stay_finite_and_right_in_float32(kind: str, strength: float) -> None:
    """Rates from 0 to 5,000 a token beside gates that never close: no overflow, forward and backward."""
    exact = drawn(kind, 2 * CHUNK + 7, strength=strength)
    with torch.no_grad():
        exact["log_decay"][..., ::2] *= 1e-3
    single = {name: x.detach().float().requires_grad_() for name, x in exact.items()}
    for form in (recurrent, chunked):
        found, true = form(**single), recurrent(**exact)
        assert_close(found, true, 5e-6)
        assert_close(slopes(found, single), slopes(true, exact), 1e-5)


def test_a_closed_gate_costs_its_followers_no_digits() -> None:
    """One decay of e^-100,000 inside a chunk: differences of large sums are those of small ones."""
    exact = drawn("token", CHUNK, strength=0.1)
    with torch.no_grad():
        exact["log_decay"][:, :, 20] = -1e5
    single = {name: x.detach().float() for name, x in exact.items()}
    assert_close(chunked(**single), recurrent(**exact), 5e-7)


@pytest.mark.parametrize("kind", ["none", "channel"])
def test_64k_tokens_in_float32(kind: str) -> None:
    """A run whose sums go through a thousand chunks ends where float64 ends."""
    n = 1 << 16
    inputs = {name: x.detach().float() for name, x in drawn(kind, n, b=1, strength=0.01).items()}
    o, state = chunked(**inputs)
    exact, end = chunked(**{name: x.double() for name, x in inputs.items()})
    assert (o - exact).square().mean().sqrt() <= 5e-6 * exact.square().mean().sqrt()
    assert (state - end).abs().max() <= 5e-6 * end.abs().max()


def test_half_precision_sums_in_float32() -> None:
    inputs = {name: x.detach() for name, x in drawn("token", 3 * CHUNK, strength=0.01).items()}
    half = {name: x.bfloat16() for name, x in inputs.items()}
    true, _ = recurrent(**{name: x.double() for name, x in half.items()})
    for form in FORMS:
        o, state = form(**half)
        assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
        assert (o - true).square().mean().sqrt() <= 5e-3 * true.square().mean().sqrt()


@pytest.mark.parametrize("kind", KINDS)
def test_training_keeps_its_inputs_and_one_state_a_chunk(kind: str) -> None:
    inputs = drawn(kind, 8 * CHUNK)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        chunked(**inputs)
    allowed = sum(x.nbytes for x in inputs.values()) + 8 * inputs["state"].nbytes
    assert sum(kept.values()) <= allowed


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_leave_the_state(form: Any) -> None:
    inputs = {name: x[:, :, :0] if name != "state" else x for name, x in drawn("channel", 3).items()}
    o, state = form(**inputs)
    assert o.shape == (2, 4, 0, 3)
    assert torch.equal(state, inputs["state"])


def test_second_derivatives_are_refused() -> None:
    inputs = drawn("token", 5)
    (slope,) = torch.autograd.grad(chunked(**inputs)[0].square().sum(), [inputs["q"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("name", ["linear", "retention", "gla"])
def test_autocast_rounds_no_sums(name: str) -> None:
    spec = registry.get(name)
    for seed in range(3):
        inputs = spec.sample(seed, dtype=torch.bfloat16)
        exact = spec.function(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(spec.function(**inputs), exact)
