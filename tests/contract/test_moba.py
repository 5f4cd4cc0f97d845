"""MoBA: nested loops, its limit, ties, block edges with gradients, chosen blocks, few keys read, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.mechanisms.moba import (
    MobaConfig,
    moba_attention,
    moba_attention_step,
    selected,
    selected_attention,
    selected_pairs,
)
from attnkit.positions import Rotary
from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.state import PooledState

BACKENDS = ("chunk", "reference")


def sampled(n: int, m: int | None = None, seed: int = 0, **sizes: int) -> dict[str, Any]:
    size = {"b": 2, "h": 4, "g": 2, "m": m or n, "n": n, "d": 5, "e": 3, **sizes}
    return get("moba").sample(seed, Sizes(**size), torch.float64)


def by_loops(q: Tensor, k: Tensor, v: Tensor, block: int, top: int, scale: float) -> Tensor:
    """One query at a time: its past blocks sorted by gate and then by place, softmax over the tokens of the first."""
    (b, h, m, _), (g, n, e) = q.shape, v.shape[1:]
    o = q.new_zeros(b, h, m, e)
    for batch, head, i in ((x, y, z) for x in range(b) for y in range(h) for z in range(m)):
        t, keys, values = n - m + i, k[batch, head // (h // g)], v[batch, head // (h // g)]
        own = t // block
        gate = {j: sum(float(q[batch, head, i] @ keys[j * block + s]) for s in range(block)) for j in range(own)}
        blocks = [own, *sorted(gate, key=lambda j: (-round(gate[j], 9), j))[: top - 1]]
        seen = [s for j in blocks for s in range(j * block, min((j + 1) * block, t + 1))]
        weight = {s: math.exp(scale * float(q[batch, head, i] @ keys[s])) for s in seen}
        for s in seen:
            o[batch, head, i] += weight[s] / sum(weight.values()) * values[s]
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "m", "block", "top"), [(11, 11, 3, 2), (12, 5, 2, 3), (9, 1, 4, 1), (10, 10, 1, 4)])
def test_equals_nested_loops(backend: str, n: int, m: int, block: int, top: int) -> None:
    torch.manual_seed(n)
    q, k, v = (torch.randn(2, heads, length, 5, dtype=torch.float64) for heads, length in ((4, m), (2, n), (2, n)))
    found = moba_attention(q, k, v, block=block, top=top, scale=0.6, backend=backend)
    assert (found - by_loops(q, k, v, block, top, 0.6)).abs().max() < 1e-12


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 70])
@pytest.mark.parametrize("top", [1, 2, 3])
def test_blocks_equal_the_definition_with_gradients(monkeypatch: pytest.MonkeyPatch, n: int, top: int) -> None:
    """Across edges of blocks, tiles and spans of queries, for all queries and for the last few, in float64."""
    monkeypatch.setattr(selected, "ROWS", 4)
    monkeypatch.setattr(selected, "SPAN", 2 * 4 * 3 * top * 9)
    monkeypatch.setattr(selected, "PIECE", 3 * 4 * 16)
    for m in {n, (n + 1) // 2}:
        inputs = {name: sampled(n, m)[name].requires_grad_() for name in "qkv"}
        found, true = (moba_attention(**inputs, block=16, top=top, backend=backend) for backend in BACKENDS)
        assert (found - true).abs().max() < 1e-12
        direction = torch.randn_like(found)
        slopes, exact = (torch.autograd.grad(o, list(inputs.values()), direction) for o in (found, true))
        assert all((one - two).abs().max() < 1e-10 for one, two in zip(slopes, exact, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("block", "top"), [(7, 5), (16, 2), (40, 1)])
def test_all_blocks_are_softmax_attention(backend: str, block: int, top: int) -> None:
    q, k, v = (sampled(32)[name] for name in "qkv")
    plain = attnkit.softmax_attention(q, k, v, mask=attnkit.causal())
    assert (moba_attention(q, k, v, block=block, top=top, backend=backend) - plain).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_gates_the_earlier_blocks_are_chosen(backend: str) -> None:
    q, v = torch.ones(1, 1, 12, 1), torch.eye(12).view(1, 1, 12, 12)
    o = moba_attention(q, torch.ones(1, 1, 12, 1), v, block=2, top=3, backend=backend)
    assert o[0, 0, 9].nonzero().flatten().tolist() == [0, 1, 2, 3, 8, 9]
    assert o[0, 0, 10].nonzero().flatten().tolist() == [0, 1, 2, 3, 10]


def test_a_query_head_chooses_for_itself() -> None:
    """Two heads of one KV head that point in opposite directions see opposite blocks."""
    k = torch.tensor([2.0, 2.0, -2.0, -2.0, 0.0]).view(1, 1, 5, 1)
    q = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    o = moba_attention(q, k, torch.eye(5).view(1, 1, 5, 5), block=2, top=2)
    assert [row.nonzero().flatten().tolist() for row in o[0, :, 0]] == [[0, 1, 4], [2, 3, 4]]


def test_lists_of_blocks_shared_by_a_group() -> None:
    """``selected_attention`` with one list a KV head, places left over, all heads on one block; and its gradient."""
    torch.manual_seed(0)
    q = torch.randn(2, 6, 20, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, 30, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    places = torch.arange(10, 30)
    chosen = torch.stack([torch.zeros(20).long(), torch.where(places // 4 > 3, 2, -1)], -1).expand(2, 2, 20, 2)
    found = selected_attention(q, k, v, chosen, block=4)
    keys = torch.arange(30) // 4
    seen = (keys == 0) | ((keys == 2) & (places[:, None] // 4 > 3)) | (keys == places[:, None] // 4)
    true = attnkit.softmax_attention(q, k, v, mask=seen & attnkit.causal().dense(20, 30)[0, 0], backend="reference")
    assert (found - true).abs().max() < 1e-12
    slopes, exact = (torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (found, true))
    assert all((one - two).abs().max() < 1e-10 for one, two in zip(slopes, exact, strict=True))


def test_keys_that_are_not_chosen_get_no_gradient() -> None:
    q, k, v = (sampled(64, 1, b=1, h=1, g=1)[name].requires_grad_() for name in "qkv")
    for slope in torch.autograd.grad(moba_attention(q, k, v, block=4, top=3).sum(), (k, v)):
        assert int(slope.abs().sum((0, 1, 3)).count_nonzero()) <= 12


@pytest.mark.parametrize("backend", [x.name for x in get("moba").backends])
@pytest.mark.parametrize(("b", "m"), [(0, 1), (0, 40), (2, 0)])
def test_no_queries_have_gradients_of_zero(backend: str, b: int, m: int) -> None:
    q, k, v = (torch.randn(b, heads, length, 8, requires_grad=True) for heads, length in ((4, m), (2, 40), (2, 40)))
    if reasons := get("moba").backend(backend).rejects(get("moba").call(q, k, v, block=2, top=4)):
        pytest.skip("; ".join(reasons))
    found = torch.autograd.grad(moba_attention(q, k, v, block=2, top=4, backend=backend).sum(), (q, k, v))
    assert all(x.shape == y.shape and not x.any() for x, y in zip(found, (q, k, v), strict=True))


def test_long_input_builds_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are no more than a piece's, and a span's pairs fill their tiles but for one a head and block."""
    seen, slots = [], []
    pieces, tiled = selected._pieces, selected._tiled

    def watched(*of: Any) -> Any:
        for piece in pieces(*of):
            seen.append(piece.logits.numel())
            yield piece

    monkeypatch.setattr(selected, "_pieces", watched)
    monkeypatch.setattr(selected, "_tiled", lambda *of: slots.append(tiled(*of).pairs.numel()) or tiled(*of))
    monkeypatch.setattr(selected, "SPAN", 2 * 3 * 4 * 512)
    inputs = {name: sampled(2048, b=1, h=2)[name].float().requires_grad_() for name in "qkv"}
    moba_attention(**inputs, block=32, top=4, backend="chunk").sum().backward()
    assert selected.PIECE / 2 < max(seen) <= selected.PIECE
    assert len(slots) == 2 * 2 * 4, "four spans of 512 queries, in the backward as well"
    assert max(slots) <= 3 * (2 * 3 * 512), "tiles are of twice the average"


def test_a_step_reads_the_chosen_blocks_alone() -> None:
    """NaN everywhere else does not show, and neither do the means of blocks that lose."""
    inputs = sampled(70, 1, b=1, h=1, g=1)
    q, k, v = (inputs[name] for name in "qkv")
    means = k[:, :, :64].unflatten(2, (8, 8)).mean(3)
    found = moba_attention_step(q, k, v, means, block=8, top=3)
    assert (found - moba_attention(q, k, v, block=8, top=3)).abs().max() < 1e-12
    used = (q @ means.mT).flatten().topk(2).indices.tolist()
    for j in set(range(8)) - set(used):
        k[:, :, 8 * j : 8 * j + 8] = v[:, :, 8 * j : 8 * j + 8] = torch.nan
    assert torch.equal(moba_attention_step(q, k, v, means, block=8, top=3), found)


def test_layer_with_every_option_decodes_across_block_edges_and_back() -> None:
    torch.manual_seed(0)
    layer = get("moba").layer(MobaConfig(16, 4, kv_heads=2, block=5, top=2, rotary=Rotary(4), qk_norm=True)).double()
    x = torch.randn(2, 43, 16, dtype=torch.float64)
    state = layer.state(2, 43, dtype=torch.float64)
    rows = []
    for part in x.split([3, 12, 1, 1, 1, 1, 1, 23], 1):
        y, state = layer.step(part, state)
        rows.append(y)
    assert (torch.cat(rows, 1) - layer(x)).abs().max() < 1e-12
    assert isinstance(state, PooledState) and state.pooled.length == 8
    state.crop(24)
    state.check()
    assert (layer.step(x[:, 24:], state)[0] - layer(x)[:, 24:]).abs().max() < 1e-12


@pytest.mark.parametrize(("block", "top"), [(1, 1), (3, 2), (4, 5)])
def test_cost_counts_the_pairs_of_every_query(block: int, top: int) -> None:
    for n in range(30):
        counted = sum(t % block + 1 + block * min(top - 1, t // block) for t in range(n))
        assert selected_pairs(n, block, top) == counted


Q, K = torch.zeros(1, 4, 9, 5), torch.zeros(1, 2, 9, 5)
REFUSALS = [
    (lambda: moba_attention(Q, K, K, block=0), ValueError, "block is 0, expected at least 1"),
    (lambda: moba_attention(Q, K, K, top=0), ValueError, "top is 0, expected at least 1"),
    (lambda: moba_attention(Q, K, K, top=1.5), TypeError, "top is a float (1.5), expected an integer"),  # type: ignore[arg-type]
    (lambda: moba_attention(Q, K[:, :, 1:], K[:, :, 1:]), ValueError, "got 9 queries and 8 keys, expected at most"),
    (lambda: moba_attention_step(Q, K, K, K[:, :, :3], block=4), ValueError, "means has shape (1, 2, 3, 5), expected"),
    (lambda: selected_attention(Q, K, K, torch.zeros(1, 3, 9, 1).long(), block=2), ValueError, "chosen has 3 lists"),
    (lambda: selected_attention(Q, K, K, torch.zeros(1, 2, 9, 1), block=2), TypeError, "chosen has dtype torch.float3"),
    (lambda: MobaConfig(16, 4, block=0), ValueError, "MobaConfig: block is 0"),
    (lambda: MobaConfig(16, 4, rotary=Rotary(8)), ValueError, "rotary is made for head size 8, heads have 4"),
    (lambda: PooledState(1, 9, {}, {"k": (1, 1)}, size=2), ValueError, "got 0 parts, size 2 and stride 2"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "error", "said"), REFUSALS)
def test_refusals(act: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        act()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
