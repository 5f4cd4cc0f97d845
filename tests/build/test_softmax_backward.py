"""Gradients of the native softmax kernels: every level against the definition, and what may not change their bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit import native
from attnkit.registry import get
from attnkit.testing.budgets import assert_within
from attnkit.testing.runs import assert_gradients_match, drawn

pytestmark = pytest.mark.skipif(not native.STATUS.available, reason=native.STATUS.reason)
SPEC = get("softmax")
LEVELS = native.STATUS.levels


def gradients(direction: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items() if isinstance(x, Tensor)}
    o = attnkit.softmax_attention(**{**arguments, **leaves}, backend="cpu")
    return torch.autograd.grad(o, list(leaves.values()), direction)


# Several tiles of 192 keys and panels of 96 queries, ragged, with chunks of their own.
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize(
    "mask",
    [None, attnkit.causal(), attnkit.window(100), attnkit.dilated_window(9, 40)],
    ids=["full", "causal", "window", "blocks"],
)
def test_levels_keep_to_the_definition(level: str, dtype: torch.dtype, mask: Any) -> None:
    arguments = drawn(1, 4, 2, 230, 610, 59, 40, dtype) | {"mask": mask, "return_lse": True}
    with native.use_level(level):
        assert_gradients_match(SPEC, "cpu", arguments)


@pytest.mark.parametrize("shape", [(2, 4, 230, 610), (1, 4, 230, 610), (2, 1, 1, 610), (4, 230, 1), (1, 1)], ids=str)
def test_every_feature_and_a_shared_bias(shape: tuple[int, ...]) -> None:
    arguments = drawn(2, 4, 2, 230, 610, 16, 24) | {"bias": torch.randn(shape), "sink": torch.randn(4), "softcap": 2.0}
    assert_gradients_match(SPEC, "cpu", arguments | {"mask": attnkit.causal(), "return_lse": True})


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize(
    "mask", [None, attnkit.window(100), attnkit.dilated_window(9, 40)], ids=["full", "window", "blocks"]
)
def test_slopes_of_alibi(level: str, dtype: torch.dtype, mask: Any) -> None:
    features = {"alibi": torch.tensor([0.5, 0.0, -0.1, 0.02]), "mask": mask, "return_lse": True}
    with native.use_level(level):
        assert_gradients_match(SPEC, "cpu", drawn(2, 4, 2, 130, 410, 24, 40, dtype) | features)


@pytest.mark.parametrize("shape", [(3, 4, 90, 200), (1, 1, 90, 200), (1, 4, 1, 200), (3, 1, 90, 1)], ids=str)
def test_sums_that_nearly_cancel(shape: tuple[int, ...]) -> None:
    """All values nearly alike: slopes are the little that they differ by, beside a sink, soft-cap and dropout."""
    arguments = drawn(3, 4, 2, 90, 200, 16, 24)
    arguments["v"].mul_(1e-3).add_(30)
    arguments |= {"bias": torch.randn(shape), "alibi": torch.rand(4), "return_lse": True}
    assert_gradients_match(SPEC, "cpu", arguments | {"mask": attnkit.causal()})
    arguments |= {"sink": torch.randn(4), "softcap": 2.0, "dropout": 0.1, "seed": 1}
    assert_gradients_match(SPEC, "cpu", arguments)


def test_float32_biases_train_natively() -> None:
    q, bias = torch.randn(1, 2, 5, 8), torch.randn(5, 5, requires_grad=True)
    assert attnkit.explain(attnkit.softmax_attention, q, q, q, bias=bias).chosen == "cpu"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_bits_depend_on_neither_threads_nor_batch(level: str, dtype: torch.dtype) -> None:
    arguments = drawn(3, 4, 2, 300, 900, 32, 16, dtype)
    bias, direction = torch.randn(1, 4, 300, 900), torch.randn(3, 4, 300, 16).to(dtype)
    of_heads = {"sink": torch.ones(4), "alibi": torch.ones(4)}
    threads = torch.get_num_threads()
    try:
        with native.use_level(level):
            runs = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                runs.append(gradients(direction, **arguments, bias=bias, **of_heads, mask=attnkit.causal()))
            whole = gradients(direction, **arguments, mask=attnkit.causal())
            alone = {name: x[1:2] for name, x in arguments.items()}
            part = gradients(direction[1:2], **alone, mask=attnkit.causal())
    finally:
        torch.set_num_threads(threads)
    assert all(x.equal(y) for other in runs[1:] for x, y in zip(runs[0], other, strict=True))
    assert all(x[1:2].equal(y) for x, y in zip(whole, part, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_hidden_keys_reach_no_gradient(level: str, dtype: torch.dtype, value: float) -> None:
    arguments = drawn(1, 2, 1, 250, 250, 16, 16, dtype)
    keep = torch.ones(1, 250, dtype=torch.bool)
    keep[:, 200:] = False
    spoiled = {name: x.clone() for name, x in arguments.items()}
    spoiled["k"][:, :, 200:] = value
    spoiled["v"][:, :, 200:] = value
    direction = torch.randn(1, 2, 250, 16).to(dtype)
    with native.use_level(level):
        found = gradients(direction, **spoiled, mask=attnkit.padding(keep) & attnkit.causal())
        clean = gradients(direction, **arguments, mask=attnkit.padding(keep) & attnkit.causal())
    for got, wanted in zip(found, clean, strict=True):
        assert got.isfinite().all()
        # Not the same bits: the careful path adds one pair at a time where a dot product adds two.
        assert_within(got, wanted.double(), wanted, dtype, gradient=True)
    assert not found[1][:, :, 200:].any()
    assert not found[2][:, :, 200:].any()


def test_a_spoiled_query_reaches_no_key_it_does_not_see() -> None:
    arguments = drawn(1, 1, 1, 120, 120, 16, 16)
    arguments["q"][:, :, 30] = torch.nan
    found = gradients(torch.randn(1, 1, 120, 16), **arguments, mask=attnkit.causal())
    assert found[1][:, :, 31:].isfinite().all()
    assert found[1][:, :, :31].isnan().all()


def test_only_what_is_wanted_is_computed() -> None:
    arguments = drawn(1, 2, 2, 50, 70, 8, 8)
    every = gradients(torch.ones(1, 2, 50, 8), **arguments)
    for i, name in enumerate(arguments):
        leaf = arguments[name].clone().requires_grad_()
        o = attnkit.softmax_attention(**{**arguments, name: leaf}, backend="cpu")
        assert torch.autograd.grad(o.sum(), leaf)[0].equal(every[i])


@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0)])
def test_nothing_gives_no_gradient(m: int, n: int) -> None:
    for slope in gradients(torch.ones(1, 2, m, 8), **drawn(1, 2, 2, m, n, 8, 8)):
        assert not slope.any()


def test_compiled_gradients_have_the_bits_of_eager_ones() -> None:
    arguments = drawn(2, 4, 2, 60, 90, 16, 8)
    leaves = [x.requires_grad_() for x in arguments.values()]
    for mask in (attnkit.causal(), attnkit.dilated_window(5, 3)):

        def loss(q: Tensor, k: Tensor, v: Tensor, mask: Any = mask) -> Tensor:
            return attnkit.softmax_attention(q, k, v, mask=mask, backend="cpu").square().sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found, wanted = (torch.autograd.grad(function(*leaves), leaves) for function in (compiled, loss))
        assert all(one.equal(two) for one, two in zip(found, wanted, strict=True))
