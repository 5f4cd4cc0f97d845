"""Additive attention: nested loops, Keras, the golden vector, blocks, bounded memory, refusals."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.masks import Mask
from attnkit.mechanisms.additive import AdditiveAttention, AdditiveConfig, additive_attention, chunk
from attnkit.registry import get
from attnkit.spec import Sizes

BACKENDS = ("chunk", "reference")


def sampled(seed: int, m: int, n: int, **sizes: int) -> dict[str, Any]:
    size = {"b": 2, "h": 4, "g": 2, "m": m, "n": n, "d": 5, "e": 3, **sizes}
    return get("additive").sample(seed, Sizes(**size), torch.float64)


def generated(seed: int, *shape: int) -> Tensor:
    """``sin(0.37 k^2 + 1.1 k + seed)`` in row-major order."""
    k = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.37 * k**2 + 1.1 * k + seed).reshape(shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend: str) -> None:
    """Computed once in float64 by a program that is not in this repository."""
    s, h, v = (generated(seed, 1, 1, 8, 4) for seed in (1, 2, 3))
    q, k = s @ generated(34, 4, 5), h @ generated(35, 4, 5)
    found = additive_attention(q, k, v, generated(36, 1, 5), backend=backend)
    assert found.sum().item() == pytest.approx(-4.694667310, abs=1e-8)
    assert found.abs().sum().item() == pytest.approx(6.708894307, abs=1e-8)
    assert found[0, 0, -1].tolist() == pytest.approx([0.167414, -0.339693, -0.381587, 0.113205], abs=1e-6)


def by_loops(call: dict[str, Any], sees: Any) -> Tensor:
    """One number at a time."""
    q, k, v, weight = (call[name] for name in ("q", "k", "v", "weight"))
    (b, h, m, d), (g, n, e) = q.shape, v.shape[1:]
    o = q.new_zeros(b, h, m, e)
    for batch in range(b):
        for head in range(h):
            own = [float(w) for w in weight[head]]
            if "gain" in call:
                size = math.sqrt(sum(w * w for w in own))
                own = [float(call["gain"][head]) * w / size for w in own]
            for i in range(m):
                group, query = head // (h // g), q[batch, head, i]
                powers = {
                    j: math.exp(sum(own[c] * math.tanh(float(query[c] + k[batch, group, j, c])) for c in range(d)))
                    for j in range(n)
                    if sees(n - m + i, j)
                }
                for j, power in powers.items():
                    o[batch, head, i] += power / sum(powers.values()) * v[batch, group, j]
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1], ids=["plain", "normalised"])
@pytest.mark.parametrize("m", [1, 6])
def test_equals_nested_loops(backend: str, seed: int, m: int) -> None:
    call = sampled(seed, m, 6)
    found = additive_attention(**call, backend=backend)
    assert (found - by_loops(call, lambda i, j: j <= i)).abs().max() < 1e-12
    found = additive_attention(**{**call, "mask": None}, backend=backend)
    assert (found - by_loops(call, lambda i, j: True)).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_keras(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="keras, the oracle of additive attention, is not installed")
    if keras.backend.backend() != "torch":
        pytest.skip(f"keras runs on {keras.backend.backend()}: set KERAS_BACKEND=torch before it is imported")
    call = {name: x for name, x in sampled(0, 7, 9, h=1, g=1).items() if name != "mask"}
    keep = torch.rand(2, 9) < 0.6
    keep[:, 0] = True
    oracle = keras.layers.AdditiveAttention(use_scale=True, dtype="float64")
    inputs = [call[name][:, 0] for name in ("q", "v", "k")]
    oracle.build([x.shape for x in inputs])
    oracle.scale.assign(call["weight"][0])
    with torch.no_grad():
        _, weights = oracle(inputs, mask=[None, keep], return_attention_scores=True)
    # Keras rounds the product with the values to float32 whatever the dtype, so its weights are what is compared.
    expected = weights.cpu() @ call["v"][:, 0]
    found = additive_attention(**call, mask=attnkit.padding(keep), backend=backend)[:, 0]
    assert (found - expected).abs().max() < 1e-12


MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal": attnkit.causal(),
    "window": attnkit.window(7),
    "symmetric": attnkit.symmetric_window(2),
    "strided": attnkit.strided(4),
    "padding": attnkit.padding(torch.arange(40)[None] % 5 != torch.tensor([[1], [3]])) & attnkit.causal(),
    "nothing": attnkit.padding(torch.zeros(1, 40, dtype=torch.bool)),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("elements", [1, 5000], ids=["one query a block", "uneven blocks"])
def test_blocks_equal_the_definition_with_gradients(mask: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "ELEMENTS", elements)
    for m in (40, 9):
        call = {**sampled(1, m, 40), "mask": MASKS[mask], "return_lse": True}
        leaves = {name: call[name].requires_grad_() for name in ("q", "k", "v", "weight", "gain")}
        (found, lse), (true, exact) = (additive_attention(**call, backend=backend) for backend in BACKENDS)
        assert (found - true).abs().max() < 1e-12
        assert torch.equal(lse.isinf(), exact.isinf()) and (lse - exact).nan_to_num().abs().max() < 1e-12
        direction = torch.randn_like(found)
        one, two = (torch.autograd.grad(o, list(leaves.values()), direction) for o in (found, true))
        for name, left, right in zip(leaves, one, two, strict=True):
            assert (left - right).abs().max() < 1e-10, name


def test_long_input_builds_no_hidden_layer_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor made on the way, forward or backward, is much larger than a block's; softmax has scratch memory."""
    monkeypatch.setattr(chunk, "ELEMENTS", 1 << 16)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.append(out.untyped_storage().nbytes() // 4 if isinstance(out, Tensor) else 0)
            return out

    call = get("additive").sample(1, Sizes(b=1, h=2, g=2, m=512, n=512, d=16, e=16), torch.float32)
    leaves = [call[name].requires_grad_() for name in ("q", "k", "v", "weight", "gain")]
    with Watch():
        torch.autograd.grad(additive_attention(**call).sum(), leaves)
    assert max(sizes) <= 1 << 17 < 512 * 512 * 2 < 512 * 512 * 2 * 16


def test_keys_far_apart_are_softmax_over_their_weights() -> None:
    """Where tanh is flat, at large keys, the score is the sum of the weights with the keys' signs."""
    call = sampled(0, 1, 6)
    call["k"] = 1e3 * call["k"].sign()
    grouped = call["k"].sign().repeat_interleave(2, 1)
    scores = torch.einsum("bhnd,hd->bhn", grouped, call["weight"])
    expected = torch.einsum("bhn,bhne->bhe", scores.softmax(-1), call["v"].repeat_interleave(2, 1))
    assert (additive_attention(**call)[:, :, 0] - expected).abs().max() < 1e-12


def test_a_zero_weight_is_the_mean_of_what_is_seen() -> None:
    """The paper's start: every alignment uniform."""
    call = sampled(0, 6, 6)
    call["weight"].zero_()
    total = call["v"].cumsum(2) / torch.arange(1, 7)[:, None]
    assert (additive_attention(**call) - total.repeat_interleave(2, 1)).abs().max() < 1e-12


def test_layer_reads_another_sequence_with_padding() -> None:
    torch.manual_seed(0)
    layer = AdditiveAttention(AdditiveConfig(8, 2, hidden=6)).double()
    x, context = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double()
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = layer(x, context, mask=attnkit.padding(keep))
    assert (found[1:] - layer(x[1:], context[1:, :3])).abs().max() < 1e-12


def test_a_bidirectional_layer_has_no_state() -> None:
    with pytest.raises(ValueError, match="a bidirectional layer cannot decode"):
        AdditiveAttention(AdditiveConfig(8, 2, mask=None)).state(1, 4)


REFUSALS = [
    ({"weight": torch.zeros(3, 5)}, ValueError, "query heads is 3 in weight (3, 5) but 4 in q"),
    ({"weight": torch.zeros(4, 6)}, ValueError, "key size is 6 in weight"),
    ({"gain": torch.zeros(2)}, ValueError, "query heads is 2 in gain"),
    ({"mask": 5}, TypeError, "mask is a int, expected a mask"),
    ({"k": torch.zeros(2, 3, 9, 5, dtype=torch.float64), "v": torch.zeros(2, 3, 9, 3, dtype=torch.float64)},
     ValueError, "got 4 query heads and 3 KV heads"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        additive_attention(**{**sampled(0, 9, 9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
