"""Interleaved heads: nested loops, when it is multi-head attention and when not, windows, steps, memory, refusals."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.masks.lowering import grid
from attnkit.mechanisms.iha import (
    InterleavedHeadAttention,
    InterleavedHeadConfig,
    chunk,
    iha_attention,
    iha_attention_step,
    pseudo_tokens,
)
from attnkit.mechanisms.iha.virtual import visibility
from attnkit.positions import Rotary
from attnkit.registry import get
from attnkit.spec import LayerPlace, Sizes
from attnkit.state import KVState, WindowState
from attnkit.testing import assert_within

BACKENDS = ("chunk", "reference")
P = 3
ORDERS: list[tuple[Any, int | None]] = [
    *itertools.product(("flat", "token"), (None, 1, 3)),
    (None, None),
]  # fmt: skip


def sampled(n: int, m: int | None = None, separate: bool = False, **sizes: int) -> dict[str, Any]:
    size = {"b": 1, "h": 2, "g": 2, "m": m or n, "n": n, "d": 4, "e": 3, **sizes}
    drawn = get("iha").sample(n, Sizes(**size), torch.float64) | {"window": None}
    return drawn | {"collapse": drawn["collapse"][:, :P].clone()} if separate else drawn


def turned(x: list[float], position: int, base: float) -> list[float]:
    """Rotary of style "half", written with complex numbers."""
    half = len(x) // 2
    pairs = [
        complex(x[i], x[i + half]) * complex(math.cos(a), math.sin(a))
        for i in range(half)
        for a in [position * base ** (-i / half)]
    ]
    return [z.real for z in pairs] + [z.imag for z in pairs]


def by_loops(
    q: Tensor, k: Tensor, v: Tensor, mix_q: Tensor, mix_k: Tensor, mix_v: Tensor, collapse: Tensor,
    rotary: Rotary, causal: str | None, window: int | None,
) -> Tensor:  # fmt: skip
    """One pseudo token at a time, straight from the definition."""
    (b, h, m, d), n, e, p = q.shape, k.shape[2], v.shape[3], mix_q.shape[2]

    def pseudo(x: Tensor, mix: Tensor, batch: int, head: int, row: int, number: int) -> list[float]:
        given = [float(mix[other, head, number]) * x[batch, other, row] for other in range(h)]
        mixed: list[float] = sum(given).tolist()  # type: ignore[union-attr]
        return mixed

    def sees(i: int, a: int, j: int, c: int) -> bool:
        near = window is None or i - j < window
        if causal is None:
            return near
        return near and (j <= i if causal == "token" else j * p + c <= i * p + a)

    results = torch.zeros(b, h, m, p, e, dtype=q.dtype)
    for batch, head, row, a in itertools.product(range(b), range(h), range(m), range(p)):
        i = n - m + row
        one = turned(pseudo(q, mix_q, batch, head, row, a), i * p + a, rotary.base)
        total = 0.0
        for j, c in itertools.product(range(n), range(p)):
            if sees(i, a, j, c):
                key = turned(pseudo(k, mix_k, batch, head, j, c), j * p + c, rotary.base)
                weight = math.exp(sum(x * y for x, y in zip(one, key, strict=True)) / math.sqrt(d))
                total += weight
                results[batch, head, row, a] += weight * v.new_tensor(pseudo(v, mix_v, batch, head, j, c))
        results[batch, head, row, a] /= total
    o = torch.zeros(b, h, m, e, dtype=q.dtype)
    for head, number in itertools.product(range(h), range(p)):
        if collapse.shape[1] == p:
            o[:, head] += collapse[head, number] * results[:, head, :, number]
        else:
            for other in range(h):
                o[:, head] += collapse[head, other * p + number] * results[:, other, :, number]
    return o


@pytest.mark.parametrize("separate", [False, True], ids=["mixed", "separate"])
@pytest.mark.parametrize(("causal", "window"), ORDERS)
def test_equals_nested_loops(causal: Any, window: int | None, separate: bool) -> None:
    for m in (5, 2):
        inputs = sampled(5, m, separate) | {"causal": causal, "window": window}
        true = by_loops(**inputs)
        for backend in BACKENDS:
            assert (iha_attention(**inputs, backend=backend) - true).abs().max() < 1e-12


@pytest.mark.parametrize(("causal", "window"), [("flat", None), ("flat", 7), ("token", None), ("token", 7)])
def test_blocks_equal_the_definition_with_gradients(
    monkeypatch: pytest.MonkeyPatch, causal: Any, window: int | None
) -> None:
    """Across the edges of blocks of 30 pseudo queries, ten tokens, for all queries and for the last few."""
    monkeypatch.setattr(chunk, "BLOCK", 32)
    for n, m in ((9, 9), (11, 11), (31, 31), (31, 12)):
        inputs = sampled(n, m) | {"causal": causal, "window": window}
        leaves = {name: x.requires_grad_() for name, x in inputs.items() if isinstance(x, Tensor)}
        found, true = (iha_attention(**inputs, backend=backend) for backend in BACKENDS)
        assert (found - true).abs().max() < 1e-12
        direction = torch.randn_like(found)
        slopes, exact = (torch.autograd.grad(o, list(leaves.values()), direction) for o in (found, true))
        for name, one, two in zip(leaves, slopes, exact, strict=True):
            assert (one - two).abs().max() < 1e-10, name


def identity(n: int, collapse: str) -> dict[str, Any]:
    """Every pseudo token its own head; of the results the first, the mean, or the mean of the separate form."""
    inputs = sampled(n, h=4)
    del inputs["rotary"], inputs["window"]
    own = torch.eye(4, dtype=torch.float64)[..., None].expand(4, 4, P)
    inputs |= {"mix_q": own, "mix_k": own, "mix_v": own}
    first = torch.tensor([1.0] + [0.0] * (P - 1), dtype=torch.float64)
    chosen = {"first": own * first, "mean": own / P}
    inputs["collapse"] = chosen[collapse].flatten(1) if collapse in chosen else torch.full_like(own[0], 1 / P)
    return inputs


@pytest.mark.parametrize("collapse", ["first", "mean", "separate mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_identity_mixtures_are_multi_head_attention_by_token_and_not_flat(backend: str, collapse: str) -> None:
    inputs = identity(20, collapse)
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    plain = attnkit.softmax_attention(q, k, v, mask=attnkit.causal())
    assert (iha_attention(**inputs, causal="token", backend=backend) - plain).abs().max() < 1e-12
    assert (iha_attention(**inputs, causal="flat", backend=backend) - plain).abs().max() > 0.1
    # Rotary by tokens passes through the mixture; rotary by pseudo tokens does not come from it.
    rotary = Rotary(4)
    q, k = (rotary.rotate(x, torch.arange(20)) for x in (q, k))
    inputs |= {"q": q, "k": k}
    plain = attnkit.softmax_attention(q, k, v, mask=attnkit.window(6))
    assert (iha_attention(**inputs, causal="token", window=6, backend=backend) - plain).abs().max() < 1e-12
    inputs = identity(20, collapse) | {"rotary": rotary}
    assert (iha_attention(**inputs, causal="token", window=6, backend=backend) - plain).abs().max() > 0.01


def test_one_pseudo_token_is_attention_of_mixed_heads() -> None:
    inputs = sampled(12)
    for name in ("mix_q", "mix_k", "mix_v"):
        inputs[name] = inputs[name][..., :1]
    inputs["collapse"] = inputs["collapse"][:, :2]
    q, k = (pseudo_tokens(inputs[x], inputs[f"mix_{x}"], rotary=inputs["rotary"]) for x in "qk")
    o = attnkit.softmax_attention(q, k, pseudo_tokens(inputs["v"], inputs["mix_v"]), mask=attnkit.window(5))
    true = torch.einsum("bjme,hj->bhme", o, inputs["collapse"])
    for causal in ("flat", "token"):
        assert (iha_attention(**inputs | {"causal": causal, "window": 5}) - true).abs().max() < 1e-12


@pytest.mark.parametrize(("causal", "window"), [("flat", 40), ("token", None), ("token", 40)])
def test_masks_of_tokens_judge_their_tiles(causal: Any, window: int | None) -> None:
    """What a tile says of itself is what its pairs say, and most tiles of a window need no look at their pairs."""
    mask = visibility(causal, window, P)
    assert mask is not None
    m, n = 200 * P, 300 * P
    some, every = mask.tiles(grid(m, n, 48, 64))
    dense = torch.nn.functional.pad(mask.dense(m, n)[0, 0].double(), (0, -n % 64, 0, -m % 48), value=torch.nan)
    each = dense.unflatten(0, (-1, 48)).unflatten(2, (-1, 64)).transpose(1, 2).flatten(2)
    assert torch.equal(some[0, 0], each.nansum(-1) > 0)
    assert bool((each.nan_to_num(1.0).all(-1) | ~every[0, 0]).all())
    assert int((some & ~every).sum()) < 0.25 * some.numel()


@pytest.mark.parametrize("separate", [False, True], ids=["mixed", "separate"])
@pytest.mark.parametrize(("causal", "window"), [("flat", None), ("flat", 4), ("token", 4)])
def test_layers_off_their_start_decode_several_windows_long(causal: Any, window: int | None, separate: bool) -> None:
    torch.manual_seed(0)
    config = InterleavedHeadConfig(
        16, 2, pseudo=P, causal=causal, window=window, separate=separate, rotary=Rotary(8), qk_norm=True
    )
    layer = InterleavedHeadAttention(config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 23, 16, dtype=torch.float64)
    state, rows = layer.state(2, 23, dtype=torch.float64), []
    assert isinstance(state, KVState if window is None else WindowState)
    for part in x.split([1, 1, 1, 1, 1, 1, 7, 1, 2, 1, 1, 5], 1):
        y, state = layer.step(part, state)
        rows.append(y)
    assert (torch.cat(rows, 1) - layer(x)).abs().max() < 1e-12
    assert state.nbytes == layer.cost(1, 23, batch=2, dtype=torch.float64).state_bytes(23) * 2
    assert state.nbytes == 2 * (23 if window is None else window) * 2 * (2 * P * 8) * 8


def test_a_layer_in_half_precision_keeps_half_precision() -> None:
    layer = InterleavedHeadAttention(InterleavedHeadConfig(16, 2, rotary=Rotary(8))).bfloat16()
    x, state = torch.randn(1, 9, 16, dtype=torch.bfloat16), layer.state(1, 9, dtype=torch.bfloat16)
    y, state = layer.step(x, state)
    assert layer(x).dtype == y.dtype == torch.bfloat16
    assert state.nbytes == 9 * 2 * (2 * 2 * 8) * 2
    gold = copy.deepcopy(layer).double()(x.double()).detach()
    assert_within(y, gold, layer(x).detach(), torch.bfloat16)


def test_the_layer_starts_as_multi_head_attention_by_token() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 11, 16)
    for separate in (False, True):
        layer = InterleavedHeadAttention(InterleavedHeadConfig(16, 4, causal="token", separate=separate))
        plain = get("softmax").preset("nope").configure(LayerPlace(16, 4))
        heads = get("softmax").layer(plain)
        heads.load_state_dict({name: x for name, x in layer.state_dict().items() if "." in name})
        torch.testing.assert_close(layer(x), heads(x))


def test_every_parameter_learns_from_the_start() -> None:
    layer = InterleavedHeadAttention(InterleavedHeadConfig(16, 4, rotary=Rotary(4)))
    layer(torch.randn(2, 11, 16)).square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.flatten(1).any(1).all(), name


def test_flops_are_those_of_visible_pairs() -> None:
    sizes = Sizes(b=1, h=2, g=2, m=5, n=9, d=4, e=3)
    for causal, window in ORDERS:
        mask = visibility(causal, window, P)
        pairs = 5 * 9 * P * P if mask is None else mask.visible_pairs(5 * P, 9 * P)
        cost = get("iha").cost
        found = (
            cost(sizes, causal=causal, window=window).flops
            - cost(sizes, causal=causal, window=window, separate=True).flops
        )
        assert found == 2 * 5 * 2 * P * (2 - 1) * 3
        mixtures = 2 * 5 * 2 * P * (2 * (4 + 4 + 3) + 2 * 3)
        assert cost(sizes, causal=causal, window=window).flops == 2 * 2 * pairs * (4 + 3) + mixtures


def test_training_in_a_window_keeps_no_square() -> None:
    sizes = []
    for n in (600, 1200):
        inputs = {name: x.float() if isinstance(x, Tensor) else x for name, x in sampled(n).items()}
        inputs["q"].requires_grad_()
        seen: dict[int, int] = {}

        def kept(x: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
            iha_attention(**inputs | {"window": 16}, backend="chunk")
        sizes.append(sum(seen.values()))
    assert sizes[1] < 2.2 * sizes[0]


REFUSALS = [
    ({"k": torch.zeros(1, 1, 9, 4, dtype=torch.float64)}, ValueError,
     "got 2 query heads and 1 heads in k, expected as many: each head is mixed of all, and the paper has no shared"),
    ({"mix_k": torch.zeros(2, 2, 4)}, ValueError, "pseudo_tokens is 4 in mix_k (2, 2, 4) but 3 in mix_q"),
    ({name: torch.zeros(2, 3, P) for name in ("mix_q", "mix_k", "mix_v")}, ValueError,
     "mix_q has shape (2, 3, 3), expected (2, 2, p) with p at least 1"),
    ({"collapse": torch.zeros(2, 4)}, ValueError, "collapse has shape (2, 4), expected (2, 6) to mix the heads again"),
    ({"rotary": Rotary(8)}, ValueError, "rotary is made for head size 8, heads have 4"),
    ({"causal": "flatt"}, ValueError, "causal is 'flatt', expected 'flat', 'token' or None (bidirectional)"),
    ({"causal": None, "window": 4}, ValueError, "window is 4 and causal None, but a window ends at the query's token"),
    ({"window": 0}, ValueError, "window is 0, expected at least 1"),
    ({"q": torch.zeros(1, 2, 10, 4, dtype=torch.float64)}, ValueError, "got 10 queries and 9 keys, expected at most"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        iha_attention(**{**sampled(9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_steps_and_layers_refuse_what_cannot_be() -> None:
    q, mix, collapse = torch.zeros(1, 2, 1, 4), torch.zeros(2, 2, P), torch.zeros(2, P)
    with pytest.raises(ValueError, match="got 10 pseudo keys, expected 3 for each token of the state"):
        iha_attention_step(q, torch.zeros(1, 2, 10, 4), torch.zeros(1, 2, 10, 4), mix, collapse)
    for settings, said in (
        ({"pseudo": 0}, "pseudo is 0, expected at least 1"),
        ({"rotary": Rotary(4)}, "rotary is made for head size 4, heads have 8"),
        ({"causal": None, "window": 3}, "window is 3 and causal None"),
    ):
        with pytest.raises(ValueError, match=said):
            InterleavedHeadConfig(16, 2, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a bidirectional layer cannot decode"):
        InterleavedHeadAttention(InterleavedHeadConfig(16, 2, causal=None)).state(1, 5)
