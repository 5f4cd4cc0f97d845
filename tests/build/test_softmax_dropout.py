"""Dropout of the native softmax kernels: which weights are kept, to the bit, and that gradients replay it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit import native
from attnkit.mechanisms.softmax.reference import dropout_keep
from attnkit.registry import get
from attnkit.testing.budgets import assert_within
from attnkit.testing.runs import assert_gradients_match, assert_matches, drawn

pytestmark = pytest.mark.skipif(not native.STATUS.available, reason=native.STATUS.reason)
SPEC = get("softmax")
LEVELS = native.STATUS.levels


def attend(**arguments: Any) -> Any:
    return attnkit.softmax_attention(**arguments, backend="cpu")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_what_is_kept_is_what_the_definition_keeps(level: str, dtype: torch.dtype) -> None:
    """Values are unit vectors, which shows every weight: of several tiles, few queries, more queries than keys."""
    for m, n, seed, p in ((230, 300, 5, 0.3), (1, 300, 1 << 61, 0.9), (7, 5, -1, 0.5), (100, 60, -(1 << 63), 0.1)):
        q, k = torch.zeros(2, 4, m, 4, dtype=dtype), torch.zeros(2, 2, n, 4, dtype=dtype)
        v = torch.eye(n, dtype=dtype).expand(2, 2, n, n)
        with native.use_level(level):
            o = attend(q=q, k=k, v=v, dropout=p, seed=seed)
        assert torch.equal(o != 0, dropout_keep(seed, 2, 4, m, n, p, q.device))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize(
    "mask", [None, attnkit.window(100), attnkit.dilated_window(9, 40)], ids=["full", "window", "blocks"]
)
def test_levels_keep_to_the_definition(level: str, dtype: torch.dtype, mask: Any) -> None:
    arguments = drawn(2, 4, 2, 130, 410, 24, 40, dtype) | {"mask": mask, "dropout": 0.2, "seed": 3, "return_lse": True}
    with native.use_level(level):
        assert_matches(SPEC, "cpu", arguments)
        assert_gradients_match(SPEC, "cpu", arguments)


def test_every_feature() -> None:
    features = {"bias": torch.randn(1, 4, 130, 410), "sink": torch.randn(4), "softcap": 2.0}
    arguments = drawn(2, 4, 2, 130, 410, 16, 24) | features | {"mask": attnkit.causal(), "dropout": 0.4, "seed": 9}
    assert_gradients_match(SPEC, "cpu", arguments | {"return_lse": True})


@pytest.mark.parametrize("level", LEVELS)
def test_bits_depend_on_neither_threads_nor_what_else_is_asked(level: str) -> None:
    arguments = drawn(2, 4, 2, 300, 700, 32, 16)
    direction = torch.randn(2, 4, 300, 16)

    def run(part: Any = slice(None), rows: Any = slice(None)) -> tuple[Tensor, ...]:
        leaves = {name: x[part].detach().requires_grad_() for name, x in arguments.items()}
        o = attend(**{**leaves, "q": leaves["q"][:, :, rows]}, mask=attnkit.causal(), dropout=0.3, seed=4)
        return (o.detach(), *torch.autograd.grad(o, list(leaves.values()), direction[part][:, :, rows]))

    threads = torch.get_num_threads()
    try:
        with native.use_level(level):
            torch.set_num_threads(1)
            alone = run()
            torch.set_num_threads(3)
            together = run()
            first, last = run(part=slice(0, 1)), run(rows=slice(200, None))
    finally:
        torch.set_num_threads(threads)
    assert all(x.equal(y) for x, y in zip(alone, together, strict=True))
    # Batch and head are numbers of the hash: the first sequence of a batch is what it is alone.
    assert all(x[:1].equal(y) for x, y in zip(alone, first, strict=True))
    assert alone[0][:, :, 200:].equal(last[0])


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_an_only_key_has_no_slope(dtype: torch.dtype) -> None:
    """Its weight is 1 whatever it is, kept or dropped: 0 exactly, as the definition has it."""
    leaves = {name: x.requires_grad_() for name, x in drawn(2, 4, 2, 60, 1, 16, 24, dtype).items()}
    o = attend(**leaves, dropout=0.3, seed=2)
    d_q, d_k, d_v = torch.autograd.grad(o, list(leaves.values()), torch.randn_like(o))
    assert not d_q.any() and not d_k.any() and d_v.any()


def test_compiled_is_eager() -> None:
    arguments = drawn(2, 4, 2, 60, 90, 16, 8)
    leaves = [x.requires_grad_() for x in arguments.values()]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o: Tensor = attend(q=q, k=k, v=v, mask=attnkit.causal(), dropout=0.25, seed=6)
        return o.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, wanted = (torch.autograd.grad(function(*leaves), leaves) for function in (compiled, loss))
    assert all(one.equal(two) for one, two in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_compiled_call_draws_a_seed_each_time(backend: str) -> None:
    """The one that the eager call draws from torch's generator, and gradients replay it."""
    arguments = drawn(1, 2, 2, 20, 30, 8, 8)
    leaves = [x.requires_grad_() for x in arguments.values()]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o: Tensor = attnkit.softmax_attention(q, k, v, dropout=0.25, backend=backend)
        return o.square().sum()

    def runs(function: Any) -> list[Tensor]:
        torch.manual_seed(3)
        return [slope for _ in range(2) for slope in torch.autograd.grad(function(*leaves), leaves)]

    found, wanted = runs(torch.compile(loss, fullgraph=True, backend="aot_eager")), runs(loss)
    assert not wanted[0].equal(wanted[3])
    for one, two in zip(found, wanted, strict=True):
        assert_within(one, two.double(), two, one.dtype, gradient=True)


def test_a_seed_has_64_bits() -> None:
    q = torch.zeros(1, 1, 2, 4)
    assert attnkit.explain(attnkit.softmax_attention, q, q, q, dropout=0.5, seed=1).chosen == "cpu"
    with pytest.raises(ValueError, match="seed is 9223372036854775808, expected a whole number of 64 bits"):
        attnkit.softmax_attention(q, q, q, dropout=0.5, seed=1 << 63)
