"""H-Transformer-1D: nested loops in both forms, block edges, its limits, its logarithmic state, memory, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnkit
from attnkit.mechanisms.h_transformer import (
    HTransformerConfig,
    cost,
    h_transformer_attention,
    h_transformer_attention_step,
)
from attnkit.positions import Rotary
from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.state import SummaryState

BACKENDS = ("chunk", "reference")
FORMS = (True, False)


def sampled(n: int, m: int | None = None, **sizes: int) -> dict[str, Any]:
    size = {"b": 1, "h": 4, "g": 2, "m": m or n, "n": n, "d": 5, "e": 3, **sizes}
    drawn = get("h_transformer").sample(n, Sizes(**size), torch.float64)
    return {name: drawn[name] for name in ("q", "k", "v")}


def meets(i: int, j: int, block: int) -> int:
    """The level on which two positions meet."""
    level = 0
    while i // (block * 2 ** (level + 1)) != j // (block * 2 ** (level + 1)):
        level += 1
    return level


def by_loops(q: Tensor, k: Tensor, v: Tensor, block: int, causal: bool, scale: float, length: int) -> Tensor:
    """One pair at a time, of the first ``length`` tokens of one sequence."""
    (_, h, m, _), (g, n) = q.shape, k.shape[1:3]
    o = q.new_zeros(1, h, m, v.shape[3])

    def mean(x: Tensor, at: int, level: int) -> Tensor:
        start = at // 2**level * 2**level
        return x[start : min(start + 2**level, length)].mean(0)

    for head in range(h):
        key, value = k[0, head // (h // g)], v[0, head // (h // g)]
        for row in range(m):
            i, total = n - m + row, 0.0
            for j in range(min(length, i + 1) if causal else length):
                level = meets(i, j, block)
                ask = q[0, head, row] if causal else mean(q[0, head], i, level)
                power = math.exp(scale * float(ask @ mean(key, j, level)))
                o[0, head, row] += power * value[j]
                total += power
            o[0, head, row] = o[0, head, row] / total if i < length else 0.0
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", FORMS)
@pytest.mark.parametrize(("n", "block"), [(1, 2), (7, 1), (13, 2), (13, 3), (16, 2)])
def test_equals_nested_loops(backend: str, causal: bool, n: int, block: int) -> None:
    inputs = sampled(n, h=2, g=1)
    found = h_transformer_attention(**inputs, block=block, causal=causal, scale=0.6, backend=backend)
    assert (found - by_loops(**inputs, block=block, causal=causal, scale=0.6, length=n)).abs().max() < 1e-12


@pytest.mark.parametrize("causal", FORMS)
@pytest.mark.parametrize("n", [1, 3, 6, 7, 12, 13, 24, 25, 51])
def test_levels_equal_the_definition_with_gradients(n: int, causal: bool) -> None:
    """Across the edges of blocks of three tokens, for all queries and, where there is a causal form, the last few."""
    for m in {n, (n + 1) // 2} if causal else {n}:
        inputs = {name: x.requires_grad_() for name, x in sampled(n, m).items()}
        found, true = (h_transformer_attention(**inputs, block=3, causal=causal, backend=name) for name in BACKENDS)
        assert (found - true).abs().max() < 1e-12
        direction = torch.randn_like(found)
        slopes, exact = (torch.autograd.grad(o, list(inputs.values()), direction) for o in (found, true))
        for name, one, two in zip(inputs, slopes, exact, strict=True):
            assert (one - two).abs().max() < 1e-10, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", FORMS)
def test_two_blocks_are_softmax_attention(backend: str, causal: bool) -> None:
    inputs = sampled(10)
    plain = attnkit.softmax_attention(**inputs, mask=attnkit.causal() if causal else None)
    found = h_transformer_attention(**inputs, block=5, causal=causal, backend=backend)
    assert (found - plain).abs().max() < 1e-12
    assert (h_transformer_attention(**inputs, block=4, causal=causal, backend=backend) - plain).abs().max() > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", FORMS)
def test_nothing_is_lost_where_groups_agree(backend: str, causal: bool) -> None:
    """Keys (and queries, where they are averaged) that are equal within their groups: softmax attention."""
    inputs = sampled(61)
    for name in ("k",) if causal else ("q", "k"):
        inputs[name] = inputs[name][:, :, ::8].repeat_interleave(8, 2)[:, :, :61].contiguous()
    found = h_transformer_attention(**inputs, block=4, causal=causal, backend=backend)
    plain = attnkit.softmax_attention(**inputs, mask=attnkit.causal() if causal else None)
    assert (found - plain).abs().max() < 1e-12


@pytest.mark.parametrize("causal", FORMS)
def test_weights_sum_to_one_at_any_range(causal: bool) -> None:
    """Where a level forgets how many tokens its sums have, or has a largest logit of its own, this is 1 to 5."""
    inputs = {name: x.float() for name, x in sampled(3001, d=8).items()}
    inputs["v"] = torch.ones_like(inputs["v"])
    assert (h_transformer_attention(**inputs, causal=causal) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_in_no_mean(backend: str) -> None:
    """Padded sequences with NaN for padding are the sequences alone, and nothing in nothing."""
    lengths = torch.tensor([23, 14, 1, 0])
    inputs = {name: x.requires_grad_() for name, x in sampled(23, b=4).items()}
    behind = (torch.arange(23) >= lengths[:, None])[:, None, :, None]
    spoiled = {name: x.masked_fill(behind, torch.nan) for name, x in inputs.items()}
    found = h_transformer_attention(**spoiled, block=2, causal=False, lengths=lengths, backend=backend)
    for row, length in enumerate(lengths.tolist()):
        alone = {name: x[row : row + 1, :, :length] for name, x in inputs.items()}
        expected = h_transformer_attention(**alone, block=2, causal=False, backend=backend)
        assert (found[row : row + 1, :, :length] - expected).abs().sum() < 1e-11
        assert not found[row, :, length:].any()
    for slope in torch.autograd.grad(found.sum(), list(inputs.values())):
        assert slope.isfinite().all() and not slope[behind.expand_as(slope)].any()


@pytest.mark.parametrize("pieces", [[1] * 53, [2, 1, 11, 20, 19], [53]])
def test_steps_equal_one_pass_at_every_position(pieces: list[int]) -> None:
    inputs, start = sampled(53), 0
    whole = h_transformer_attention(**inputs, block=3)
    state = SummaryState(1, 2, 60, 5, 3, block=3, dtype=torch.float64)
    for piece in pieces:
        for size in state.pieces(piece):
            q, k, v = (x[:, :, start : start + size] for x in inputs.values())
            seen, counts = state.append(k, v)
            state.check()
            assert counts.sum() == start + size == seen.length, "every token before is in exactly one key"
            o = h_transformer_attention_step(q, seen.k, seen.v, counts)
            assert (o - whole[:, :, start : start + size]).abs().max() < 1e-12, f"tokens from {start} on"
            start += size


def test_a_state_grows_with_the_logarithm() -> None:
    token = 2 * (5 + 3) * 4
    for capacity, slots in ((1, 1), (5, 5), (6, 6), (7, 6 + 3), (12, 6 + 3), (13, 6 + 6), (3 << 20, 6 + 3 * 19)):
        state = SummaryState(1, 2, capacity, 5, 3, block=3)
        assert state.nbytes == slots * token, capacity
        assert cost(Sizes(1, 4, 2, 1, capacity, 5, 3), block=3).state_bytes(capacity) == slots * token


@pytest.mark.parametrize("n", [1, 5, 6, 7, 20, 48, 53])
def test_cost_counts_the_pairs(n: int) -> None:
    causal = [len({(meets(i, j, 3), j >> meets(i, j, 3)) for j in range(i + 1)}) for i in range(n)]
    assert cost(Sizes(2, 4, 2, n, n, 5, 3), block=3).flops == 2 * 2 * 4 * sum(causal) * 8
    last = Sizes(2, 4, 2, (n + 1) // 2, n, 5, 3)
    assert cost(last, block=3).flops == 2 * 2 * 4 * sum(causal[n // 2 :]) * 8
    both = {(level, i >> level, j >> level) for i in range(n) for j in range(n) for level in [meets(i, j, 3)]}
    assert cost(Sizes(2, 4, 2, n, n, 5, 3), block=3, causal=False).flops == 2 * 2 * 4 * len(both) * 8


class Largest(TorchDispatchMode):
    """The most numbers that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            self.numbers = max(self.numbers, x.numel() if isinstance(x, Tensor) else 0)
        return out


@pytest.mark.parametrize("causal", FORMS)
def test_nothing_has_the_size_of_a_square(causal: bool) -> None:
    """Neither forward nor backward makes more than two numbers a channel and token: 1024 x 1024 pairs are eight."""
    inputs = {name: x.float().requires_grad_() for name, x in sampled(1024, h=2, d=64, e=64).items()}
    with Largest() as largest:
        h_transformer_attention(**inputs, causal=causal).sum().backward()
    assert largest.numbers <= 2 * 1024 * 2 * 64


def test_a_layer_with_every_option_decodes() -> None:
    torch.manual_seed(0)
    config = HTransformerConfig(16, 4, kv_heads=2, block=3, rotary=Rotary(4), qk_norm=True)
    layer = get("h_transformer").layer(config).double()
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    state, rows = layer.state(2, 40, dtype=torch.float64), []
    for part in x.split([5, 1, 1, 17, 16], 1):
        y, state = layer.step(part, state)
        rows.append(y)
    assert (torch.cat(rows, 1) - layer(x)).abs().max() < 1e-12


def test_what_a_state_cannot_do_it_says() -> None:
    state, x = SummaryState(1, 1, 8, 2, 2, block=2), torch.ones(1, 1, 9, 2)
    with pytest.raises(ValueError, match=r"got 5 tokens after 0, expected pieces that do not cross a multiple of 4"):
        state.append(x[:, :, :5], x[:, :, :5])
    for size in state.pieces(8):
        state.append(x[:, :, :size], x[:, :, :size])
    with pytest.raises(ValueError, match="holds 8 of 8 tokens and got 1 more"):
        state.append(x[:, :, :1], x[:, :, :1])
    with pytest.raises(NotImplementedError, match="cannot go back from 8 to 7 tokens, the later ones are in sums"):
        state.crop(7)
    with pytest.raises(ValueError, match="a bidirectional layer cannot decode"):
        get("h_transformer").layer(HTransformerConfig(16, 4, causal=False)).state(1, 4)


REFUSALS = [
    ({"block": 0}, ValueError, "block is 0, expected at least 1"),
    ({"q": torch.zeros(1, 4, 10, 5, dtype=torch.float64)}, ValueError, "got 10 queries and 9 keys, expected at most"),
    ({"q": torch.zeros(1, 4, 8, 5, dtype=torch.float64), "causal": False}, ValueError, "got 8 queries and 9 keys"),
    ({"lengths": torch.tensor([4])}, ValueError, "got lengths and causal True, expected one"),
    ({"lengths": torch.tensor([4.0]), "causal": False}, TypeError, "lengths has dtype torch.float32"),
    ({"lengths": torch.tensor([4, 4]), "causal": False}, ValueError, "batch is 2 in lengths"),
    ({"k": torch.zeros(1, 3, 9, 5, dtype=torch.float64), "v": torch.zeros(1, 3, 9, 3, dtype=torch.float64)},
     ValueError, "got 4 query heads and 3 KV heads"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        h_transformer_attention(**{**sampled(9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"block": 0}, "block is 0"), ({"rotary": Rotary(8)}, "rotary is made for head size 8, heads have 4")],
)
def test_configurations_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HTransformerConfig(16, 4, **wrong)
