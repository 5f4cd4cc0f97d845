"""Forgetting attention: nested loops, its limits (softmax, ALiBi), block edges, bounded memory, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit import native
from attnkit.mechanisms.forgetting import ForgettingConfig, forgetting_attention, forgetting_attention_step
from attnkit.mechanisms.forgetting.chunk import BLOCK
from attnkit.positions import Rotary
from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.testing.budgets import assert_within
from attnkit.testing.runs import Rounded

BACKENDS = ("chunk", "reference")
SPEC = get("forgetting")
NATIVE = pytest.mark.skipif(not native.STATUS.available, reason=native.STATUS.reason)
EDGES = (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1)


def sampled(n: int, m: int | None = None, **sizes: int) -> dict[str, Any]:
    size = {"b": 1, "h": 4, "g": 2, "m": m or n, "n": n, "d": 5, "e": 3, **sizes}
    return get("forgetting").sample(n, Sizes(**size), torch.float64)


def by_loops(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, scale: float) -> Tensor:
    """One pair at a time, with the gates of the tokens between multiplied and not their logarithms added."""
    (b, h, m, _), (g, n, e) = q.shape, v.shape[1:]
    o = q.new_zeros(b, h, m, e)
    for batch in range(b):
        for head in range(h):
            for i in range(m):
                weights = []
                for j in range(n - m + i + 1):
                    kept = math.prod(math.exp(log_f[batch, head, t]) for t in range(j + 1, n - m + i + 1))
                    dot = float(q[batch, head, i] @ k[batch, head // (h // g), j])
                    weights.append(math.exp(scale * dot) * kept)
                for j, weight in enumerate(weights):
                    o[batch, head, i] += weight / sum(weights) * v[batch, head // (h // g), j]
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [1, 4, 9])
def test_equals_nested_loops(backend: str, m: int) -> None:
    inputs = sampled(9, m)
    found = forgetting_attention(**inputs, scale=0.6, backend=backend)
    assert (found - by_loops(**inputs, scale=0.6)).abs().max() < 1e-12


@pytest.mark.parametrize("n", EDGES)
def test_blocks_equal_the_definition_with_gradients(n: int) -> None:
    """Across block edges, for all queries and for the last few, in float64."""
    for m in {n, (n + 1) // 2}:
        inputs = {name: x.requires_grad_() for name, x in sampled(n, m).items()}
        found, true = (forgetting_attention(**inputs, backend=backend) for backend in BACKENDS)
        assert (found - true).abs().max() < 1e-12
        direction = torch.randn_like(found)
        slopes, exact = (torch.autograd.grad(o, list(inputs.values()), direction) for o in (found, true))
        for name, one, two in zip(inputs, slopes, exact, strict=True):
            assert (one - two).abs().max() < 1e-10, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_open_gates_are_softmax_attention(backend: str) -> None:
    inputs = sampled(BLOCK + 9)
    inputs["log_f"].zero_()
    found = forgetting_attention(**inputs, backend=backend)
    del inputs["log_f"]
    assert (found - attnkit.softmax_attention(**inputs, mask=attnkit.causal())).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_gates_are_alibi(backend: str) -> None:
    inputs = sampled(BLOCK + 9)
    slopes = torch.tensor([0.5, 0.1, 0.02, 1.0], dtype=torch.float64)
    inputs["log_f"].copy_(-slopes[:, None].expand_as(inputs["log_f"][0]))
    found = forgetting_attention(**inputs, backend=backend)
    del inputs["log_f"]
    assert (found - attnkit.softmax_attention(**inputs, mask=attnkit.causal(), alibi=slopes)).abs().max() < 1e-12


def test_only_differences_of_sums_matter() -> None:
    inputs = sampled(20)
    total = inputs.pop("log_f").cumsum(-1)
    found, moved = (forgetting_attention_step(**inputs, total=total + by) for by in (0.0, -7.0))
    assert (found - moved).abs().max() < 1e-12


def test_far_into_a_sequence_near_keys_still_round_finely() -> None:
    """Sums of gates in the thousands: what float32 loses is what the sums themselves lost, not more."""
    inputs = sampled(3 * BLOCK)
    inputs["log_f"] = inputs["log_f"] - 10.0
    true = forgetting_attention(**inputs, backend="reference")
    single = {name: x.float() for name, x in inputs.items()}
    errors = [(forgetting_attention(**single, backend=name) - true).abs().max().item() for name in BACKENDS]
    assert errors[0] <= 2 * errors[1]


def test_long_input_builds_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest call of softmax attention within a long one has one block of queries and a bias of one row."""
    from attnkit.mechanisms.forgetting import chunk

    seen = []

    def watched(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
        seen.append((q.shape[2], settings["bias"].shape[2]))
        return attnkit.softmax_attention(q, k, v, **settings)

    monkeypatch.setattr(chunk, "softmax_attention", watched)
    inputs = {name: x.float().requires_grad_() for name, x in sampled(5 * BLOCK).items()}
    forgetting_attention(**inputs, backend="chunk").sum().backward()
    assert max(rows for rows, _ in seen) == BLOCK
    assert {rows for _, rows in seen} == {1}
    assert len(seen) == 10, "the backward computes each block again and keeps none"


def far(n: int, m: int, dtype: torch.dtype) -> dict[str, Any]:
    """The last ``m`` queries after gates that sum to thousands, of which a key 300 tokens back is worth e^-300."""
    inputs = {name: x.to(dtype) for name, x in sampled(n, m, h=2, g=1, d=16, e=8).items()}
    inputs["log_f"] = inputs["log_f"] - 1.0
    return inputs


@NATIVE
@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_native_gates_cancel_exactly_after_16384_tokens(level: str, dtype: torch.dtype) -> None:
    """A call far into a sequence, and its gradients, are within the rounding of a call of its last 512 tokens alone."""
    inputs = far(16384, 200, dtype)
    last = {name: x if name == "q" else x[:, :, -512:] for name, x in inputs.items()}
    direction = torch.randn(1, 2, 200, 8).to(dtype)

    def found(call: dict[str, Any], backend: str) -> list[Tensor]:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in call.items()}
        o = forgetting_attention(**leaves, backend=backend)
        slopes = torch.autograd.grad(o, list(leaves.values()), direction.to(o.dtype))
        return [o.detach(), *(x if i == 0 else x[:, :, -512:] for i, x in enumerate(slopes))]

    with native.use_level(level):
        got = found(inputs, "cpu")
    true = found({name: x.double() for name, x in last.items()}, "reference")
    with Rounded(dtype):
        plain = found(last, "reference")
    for i, (one, gold, naive) in enumerate(zip(got, true, plain, strict=True)):
        assert_within(one, gold, naive, dtype, gradient=i > 0, what=("o", *inputs)[i])


@NATIVE
def test_sums_of_gates_in_float32_are_noticed() -> None:
    """The inverse: what the kernel would make of sums that went through float32."""
    inputs = far(16384, 1, torch.float32)
    last = {name: x if name == "q" else x[:, :, -512:] for name, x in inputs.items()}
    true, plain = (
        forgetting_attention(**{name: x.to(to) for name, x in last.items()}, backend="reference")
        for to in (torch.float64, torch.float32)
    )
    total = inputs.pop("log_f").double().cumsum(-1)
    assert_within(forgetting_attention_step(**inputs, total=total), true, plain, torch.float32)
    with pytest.raises(AssertionError, match="error"):
        assert_within(forgetting_attention_step(**inputs, total=total.float()), true, plain, torch.float32)


@NATIVE
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_native_bits_depend_on_neither_threads_nor_batch(dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in sampled(500, b=3, d=32, e=16).items()}
    direction = torch.randn(3, 4, 500, 16).to(dtype)

    def found(call: dict[str, Any], direction: Tensor) -> list[Tensor]:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in call.items()}
        o = forgetting_attention(**leaves, backend="cpu")
        return [o.detach(), *torch.autograd.grad(o, list(leaves.values()), direction)]

    before = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runs.append(found(inputs, direction))
    finally:
        torch.set_num_threads(before)
    alone = found({name: x[1:2] for name, x in inputs.items()}, direction[1:2])
    assert all(x.equal(y) for other in runs[1:] for x, y in zip(runs[0], other, strict=True))
    assert all(x[1:2].equal(y) for x, y in zip(runs[0], alone, strict=True))


@NATIVE
def test_steps_are_native_where_calls_are() -> None:
    torch.manual_seed(0)
    layer = SPEC.layer(ForgettingConfig(32, 4, kv_heads=2))
    x, state = torch.randn(2, 70, 32), layer.state(2, 70)
    with torch.no_grad(), attnkit.dispatch.watch() as ran:
        for part in x.split([60, *[1] * 10], 1):
            layer.step(part, state)
    assert not ran, f"softmax attention was called block by block: {ran}"
    assert state.view()["total"].dtype == torch.float64


def test_layer_with_rotary_and_every_option_decodes_across_block_edges() -> None:
    torch.manual_seed(0)
    config = ForgettingConfig(16, 4, kv_heads=2, rotary=Rotary(4), qk_norm=True, output_norm=True, output_gate=True)
    layer = get("forgetting").layer(config).double()
    x = torch.randn(2, BLOCK + 5, 16, dtype=torch.float64)
    state = layer.state(2, BLOCK + 5, dtype=torch.float64)
    rows = []
    for part in x.split([3, BLOCK - 1, 1, 1, 1], 1):
        y, state = layer.step(part, state)
        rows.append(y)
    assert (torch.cat(rows, 1) - layer(x)).abs().max() < 1e-12


REFUSALS = [
    ({"log_f": torch.zeros(1, 2, 9)}, ValueError, "query heads is 2 in log_f (1, 2, 9) but 4 in q"),
    ({"log_f": torch.zeros(1, 4, 8)}, ValueError, "keys is 8 in log_f"),
    ({"log_f": torch.zeros(1, 4, 9, dtype=torch.int64)}, TypeError, "log_f has dtype torch.int64, expected a floating"),
    ({"q": torch.zeros(1, 4, 10, 5, dtype=torch.float64)}, ValueError, "got 10 queries and 9 keys, expected at most"),
    ({"k": torch.zeros(1, 3, 9, 5, dtype=torch.float64), "v": torch.zeros(1, 3, 9, 3, dtype=torch.float64)},
     ValueError, "got 4 query heads and 3 KV heads"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        forgetting_attention(**{**sampled(9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rotary_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rotary is made for head size 8, heads have 4"):
        ForgettingConfig(16, 4, rotary=Rotary(8))
