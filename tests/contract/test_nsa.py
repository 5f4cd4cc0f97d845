"""NSA: nested loops, overlaps of blocks, its limit, block edges with gradients, early tokens, the state, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.mechanisms.moba import selected_pairs
from attnkit.mechanisms.nsa import NsaConfig, chunk, nsa_attention, nsa_attention_step, windows
from attnkit.mechanisms.nsa.blocks import Blocks
from attnkit.positions import Rotary
from attnkit.registry import get
from attnkit.spec import Sizes

BACKENDS = ("chunk", "reference")
SIZES = {"length": 4, "stride": 2, "block": 4, "selected": 4, "window": 3}


def sampled(n: int, m: int | None = None, seed: int = 0, c: int | None = None, **sizes: int) -> dict[str, Any]:
    """Tensors of a call, with the compressed blocks of ``SIZES`` unless there shall be ``c``."""
    size = {"b": 1, "h": 4, "g": 2, "m": m or n, "n": n, "d": 5, "e": 3, **sizes}
    made = {name: x for name, x in get("nsa").sample(seed, Sizes(**size), torch.float64).items() if name not in SIZES}
    blocks = max(0, (n - 4) // 2 + 1) if c is None else c
    for name, width in (("compressed_k", size["d"]), ("compressed_v", size["e"])):
        made[name] = torch.randn(size["b"], size["g"], blocks, width, dtype=torch.float64)
    return made


def attended(q: Tensor, keys: Tensor, values: Tensor, seen: list[int], scale: float) -> tuple[Tensor, dict[int, float]]:
    """One query's softmax attention to the keys ``seen``, and its weights."""
    weight = {s: math.exp(scale * float(q @ keys[s])) for s in seen}
    total = sum(weight.values())
    weight = {s: w / total for s, w in weight.items()}
    return sum((w * values[s] for s, w in weight.items()), torch.zeros_like(values[:1].sum(0))), weight


def by_loops(
    x: dict[str, Any], length: int, stride: int, block: int, selected: int, window: int, scale: float, causal: bool
) -> Tensor:
    """One query at a time; a block's importance is the weight of a compressed block for each stride they share."""
    (b, h, m, _), (g, n, e) = x["q"].shape, x["v"].shape[1:]
    o, r = x["q"].new_zeros(b, h, m, e), h // g
    for batch, group, i in ((u, w, z) for u in range(b) for w in range(g) for z in range(m)):
        t = n - m + i
        end = t + 1 if causal else n
        importance = dict.fromkeys(range((end - 1) // block + 1), 0.0)
        heads = range(group * r, group * r + r)
        ended = [c for c in range(x["compressed_k"].shape[2]) if c * stride + length <= end]
        coarse = {}
        for head in heads:
            keys = (x[name][batch, group] for name in ("compressed_k", "compressed_v"))
            coarse[head], weight = attended(x["q"][batch, head, i], *keys, ended, scale)
            for j in importance:
                for c, w in weight.items():
                    shared = set(range(c * stride, c * stride + length, stride)) & set(
                        range(j * block, j * block + block)
                    )
                    importance[j] += w * len(shared)
        own = t // block
        forced = {j for j in (0, own - 1, own, own + 1) if j in importance}
        others = sorted(set(importance) - forced, key=lambda j: (-importance[j], j))
        blocks = forced | set(others[: selected - len(forced)])
        near = [s for s in range(end) if abs(t - s) < window]
        for head in heads:
            q, gate = x["q"][batch, head, i], x["gates"][batch, head, i]
            seen = [s for s in range(end) if s // block in blocks]
            fine, _ = attended(q, x["k"][batch, group], x["v"][batch, group], seen, scale)
            last, _ = attended(q, x["window_k"][batch, group], x["window_v"][batch, group], near, scale)
            o[batch, head, i] = gate[0] * coarse[head] + gate[1] * fine + gate[2] * last
    return o


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("n", "m", "sizes"),
    [
        (23, 23, (4, 2, 4, 4, 3)),
        (26, 5, (3, 1, 2, 5, 9)),
        (19, 19, (2, 2, 2, 4, 1)),
        (18, 1, (2, 1, 3, 4, 40)),
        (5, 5, (6, 2, 2, 4, 2)),
    ],
)
def test_equals_nested_loops(causal: bool, backend: str, n: int, m: int, sizes: tuple[int, ...]) -> None:
    length, stride, block, selected, window = sizes
    inputs = sampled(n, m, c=max(0, (n - length) // stride + 1) + n % 2)
    named = {"length": length, "stride": stride, "block": block, "selected": selected, "window": window}
    found = nsa_attention(**inputs, **named, causal=causal, scale=0.7, backend=backend)  # type: ignore[arg-type]
    assert (found - by_loops(inputs, *sizes, 0.7, causal)).abs().max() < 1e-12


def test_which_compressed_blocks_a_selection_block_collects() -> None:
    """Golden indices of block 2 with the paper's sizes, counted from 0."""
    collected = chunk._importance(torch.eye(20), 5, Blocks(32, 16, 64, 16))[:, 2].long()
    assert torch.arange(20).repeat_interleave(collected).tolist() == [7, 8, 8, 9, 9, 10, 10, 11]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [3, 16, 33])
def test_everything_selected_and_that_gate_alone_is_softmax_attention(backend: str, n: int) -> None:
    inputs = sampled(n)
    inputs["gates"] = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand(inputs["gates"].shape)
    found = nsa_attention(**inputs, **{**SIZES, "selected": 9}, backend=backend)
    q, k, v = (inputs[name] for name in "qkv")
    assert (found - attnkit.softmax_attention(q, k, v, mask=attnkit.causal())).abs().max() < 1e-12


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 3, 4, 15, 16, 17, 50])
def test_spans_equal_the_definition_with_gradients(monkeypatch: pytest.MonkeyPatch, n: int, causal: bool) -> None:
    """Across edges of spans, blocks and windows, for all queries and for the last few, in float64."""
    monkeypatch.setattr(chunk, "SPAN", 7)
    for m in {n, (n + 1) // 2}:
        inputs = {name: x.requires_grad_() for name, x in sampled(n, m).items()}
        found, true = (nsa_attention(**inputs, **SIZES, causal=causal, backend=backend) for backend in BACKENDS)
        assert (found - true).abs().max() < 1e-12
        direction = torch.randn_like(found)
        slopes, exact = (torch.autograd.grad(o, list(inputs.values()), direction) for o in (found, true))
        for name, one, two in zip(inputs, slopes, exact, strict=True):
            assert one.numel() == 0 or (one - two).abs().max() < 1e-10, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equally_important_blocks_the_earlier_are_selected(backend: str) -> None:
    inputs = sampled(32, 1, b=1, h=2, g=1, e=32)
    inputs["compressed_k"].zero_()
    inputs["v"].copy_(torch.eye(32))
    inputs["gates"].copy_(torch.tensor([0.0, 1.0, 0.0]))
    o = nsa_attention(**inputs, **{**SIZES, "selected": 5}, backend=backend)
    assert o[0, 0, 0].nonzero().flatten().tolist() == [*range(12), *range(24, 32)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_before_the_first_compressed_block_there_is_nothing_coarse(backend: str) -> None:
    inputs = {name: x.requires_grad_() for name, x in sampled(9).items()}
    only = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    inputs["gates"] = only.expand(inputs["gates"].shape)
    o = nsa_attention(**inputs, **SIZES, backend=backend)
    assert not o[:, :, :3].any() and o[:, :, 3:].all()
    names = ("q", "compressed_k", "compressed_v")
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(o.sum(), [inputs[name] for name in names]))


def test_a_group_selects_together() -> None:
    """The heads of a group see the same keys, and another head's query changes which."""
    inputs = sampled(40, 1, seed=3, h=2, g=1, e=40)
    inputs["v"].copy_(torch.eye(40))
    inputs["gates"].copy_(torch.tensor([0.0, 1.0, 0.0]))

    def seen() -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for row in nsa_attention(**inputs, **SIZES)[0, :, 0]]

    one, two = seen()
    inputs["q"][:, 1] *= -30
    other = seen()
    assert one == two and other[0] == other[1] != one


def test_long_input_builds_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax attention within a long call has the keys of one span's windows."""
    seen = []

    def watched(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
        seen.append((q.shape[2], k.shape[2]))
        return attnkit.softmax_attention(q, k, v, **settings)

    monkeypatch.setattr(chunk, "softmax_attention", watched)
    inputs = {name: x.float().requires_grad_() for name, x in sampled(2048).items()}
    nsa_attention(**inputs, **{**SIZES, "window": 50}, backend="chunk").sum().backward()
    assert max(rows for rows, _ in seen) == chunk.SPAN and max(keys for _, keys in seen) == chunk.SPAN + 49
    assert len(seen) == 16, "the backward computes each span again and keeps none"


def test_layer_with_every_option_decodes_across_all_edges_and_back() -> None:
    torch.manual_seed(0)
    sizes = {"length": 6, "stride": 2, "block": 4, "selected": 4, "window": 5, "hidden": 7}
    layer = get("nsa").layer(NsaConfig(16, 4, kv_heads=2, rotary=Rotary(4), qk_norm=True, **sizes)).double()
    x = torch.randn(2, 45, 16, dtype=torch.float64)
    state, rows, whole = layer.state(2, 45, dtype=torch.float64), [], layer(x)
    for part in x.split([2, 3, *[1] * 14, 7, 1, 1, 1, 16], 1):
        y, state = layer.step(part, state)
        state.check()
        rows.append(y)
    assert (torch.cat(rows, 1) - whole).abs().max() < 1e-12
    assert state.pooled.length == 20
    state.crop(44)
    assert (layer.step(x[:, 44:], state)[0] - whole[:, 44:]).abs().max() < 1e-12
    with pytest.raises(ValueError, match="has overwritten token"):
        state.crop(30)
    state.check()
    assert state.length == 45, "a refused crop leaves every part as it was"


def test_every_parameter_of_the_layer_learns() -> None:
    torch.manual_seed(0)
    layer = get("nsa").layer(NsaConfig(16, 4, kv_heads=1, **SIZES))
    layer(torch.randn(2, 30, 16)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


def test_windows_are_the_tokens_of_each_block() -> None:
    x = torch.arange(11.0).view(1, 1, 11, 1)
    assert windows(x, 4, 3)[0, 0, ..., 0].tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert windows(x[:, :, :3], 4, 3).shape == (1, 1, 0, 4, 1)


@pytest.mark.parametrize(("length", "stride"), [(2, 2), (6, 2), (3, 1)])
def test_cost_counts_the_pairs_of_every_query(length: int, stride: int) -> None:
    blocks = Blocks(length, stride, 2 * stride, 4)
    for n in range(40):
        ended = sum(i * stride + length <= t + 1 for t in range(n) for i in range(n))
        assert blocks.pairs(n) == ended + selected_pairs(n, 2 * stride, 4)


X = sampled(9)
REFUSALS = [
    ({"length": 5}, ValueError, "length is 5 and stride 2, expected a multiple of the stride"),
    ({"block": 7}, ValueError, "block is 7 and stride 2, expected a multiple of the stride"),
    ({"selected": 2}, ValueError, "selected is 2, expected at least 3: the first block, the own one and its"),
    ({"selected": 3, "causal": False}, ValueError, "selected is 3, expected at least 4: the first block, the own one"),
    ({"window": 0}, ValueError, "window is 0, expected at least 1"),
    ({"window": 2.5}, TypeError, "window is a float (2.5), expected an integer"),
    ({"gates": X["gates"][..., :2]}, ValueError, "of shape (1, 4, 9, 2), expected 3 floating numbers a query"),
    ({name: X[name][:, :, 1:] for name in ("compressed_k", "compressed_v")}, ValueError,
     "compressed_k has 2 blocks, expected at least 3"),
    ({"window_k": X["window_k"][:, :, 1:]}, ValueError, "keys is 8 in window_k"),
    ({"q": torch.zeros(1, 3, 9, 5, dtype=torch.float64), "gates": torch.zeros(1, 3, 9, 3)}, ValueError,
     "got 3 query heads and 2 KV heads"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        nsa_attention(**{**X, **SIZES, **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_step_without_the_tokens_of_its_windows_is_refused() -> None:
    short = {name: X[name][:, :, 7:] for name in ("window_k", "window_v")}
    with pytest.raises(ValueError, match="window_k has 2 tokens, expected at least the last 9"):
        nsa_attention_step(**{**X, **short}, **SIZES)


def test_wrong_configurations_are_refused() -> None:
    layer = get("nsa").layer(NsaConfig(16, 4, **SIZES, causal=False))  # type: ignore[arg-type]
    assert layer(torch.randn(1, 9, 16)).shape == (1, 9, 16)
    with pytest.raises(ValueError, match="a bidirectional layer cannot decode"):
        layer.state(1, 9)
    for settings, said in (
        ({"selected": 1}, "selected is 1"),
        ({"hidden": 0}, "hidden is 0"),
        ({"stride": 3}, "length is"),
    ):
        with pytest.raises(ValueError, match=said):
            NsaConfig(16, 4, **settings)  # type: ignore[arg-type]
