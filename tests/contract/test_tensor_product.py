"""Tensor product attention: nested loops, the step from factors, its limits (MHA, shared keys), the paper's cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.mechanisms.tensor_product import (
    TensorProductConfig,
    tensor_product_attention,
    tensor_product_attention_step,
)
from attnkit.positions import Rotary
from attnkit.registry import get
from attnkit.spec import Sizes

BACKENDS = ("chunk", "reference")


def sampled(n: int, m: int | None = None, **sizes: int) -> dict[str, Any]:
    size = {"b": 2, "h": 3, "g": 3, "m": m or n, "n": n, "d": 4, "e": 5, **sizes}
    return get("tensor_product").sample(n, Sizes(**size), torch.float64)


def by_loops(
    a_q: Tensor, b_q: Tensor, a_k: Tensor, b_k: Tensor, a_v: Tensor, b_v: Tensor, scale: float, causal: bool
) -> Tensor:
    """One pair of tokens and one pair of vectors at a time: (A_q A_k) * (B_q B_k), summed over both ranks."""
    (b, h, m, r_q), (r_k, n), (r_v, e) = a_q.shape, b_k.shape[1:3], (b_v.shape[1], b_v.shape[3])
    o = a_q.new_zeros(b, h, m, e)
    for batch in range(b):
        for head in range(h):
            for i in range(m):
                weights = []
                for j in range(n - m + i + 1 if causal else n):
                    dot = sum(
                        float(a_q[batch, head, i, r] * a_k[batch, head, j, s] * (b_q[batch, r, i] @ b_k[batch, s, j]))
                        for r in range(r_q)
                        for s in range(r_k)
                    )
                    weights.append(math.exp(scale * dot / (r_q * r_k)))
                for j, weight in enumerate(weights):
                    value = sum((a_v[batch, head, j, s] * b_v[batch, s, j] for s in range(r_v)), torch.zeros(e))
                    o[batch, head, i] += weight / sum(weights) * value / r_v
    return o


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("m", [1, 4, 6])
def test_equals_nested_loops(causal: bool, m: int) -> None:
    inputs = sampled(6, m)
    true = by_loops(**inputs, scale=0.6, causal=causal)
    for backend in BACKENDS:
        found = tensor_product_attention(**inputs, scale=0.6, causal=causal, backend=backend)
        assert (found - true).abs().max() < 1e-12
    if causal:
        assert (tensor_product_attention_step(**inputs, scale=0.6) - true).abs().max() < 1e-12


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 70), (8, 65), (33, 33)])
def test_the_step_from_factors_equals_formed_heads(m: int, n: int) -> None:
    inputs = sampled(n, m)
    found = tensor_product_attention_step(**inputs)
    assert (found - tensor_product_attention(**inputs, backend="reference")).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_of_all_heads_with_unit_shares_is_mha(backend: str) -> None:
    """With R = h and A = h times the identity, head i's vector is B's row i."""
    h, n = 3, 20
    q, k, v = (torch.randn(2, h, n, 4, dtype=torch.float64) for _ in range(3))
    unit = (h * torch.eye(h, dtype=torch.float64))[None, :, None].expand(2, h, n, h)
    found = tensor_product_attention(unit, q, unit, k, unit, v, backend=backend)
    assert (found - attnkit.softmax_attention(q, k, v, mask=attnkit.causal())).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_rank_one_with_unit_shares_is_mqa(backend: str) -> None:
    """R = 1 and A = 1 for keys and values: one KV head for all."""
    h, n = 4, 20
    q = torch.randn(1, h, n, 4, dtype=torch.float64)
    k, v = (torch.randn(1, 1, n, 4, dtype=torch.float64) for _ in range(2))
    unit, one = (h * torch.eye(h, dtype=torch.float64))[None, :, None].expand(1, h, n, h), torch.ones_like(q[..., :1])
    found = tensor_product_attention(unit, q, one, k, one, v, backend=backend)
    assert (found - attnkit.softmax_attention(q, k, v, mask=attnkit.causal())).abs().max() < 1e-12


def test_rotary_of_the_vectors_is_rotary_of_the_heads() -> None:
    inputs, rotary, at = sampled(20), Rotary(4), torch.arange(20)
    turned = {**inputs, **{name: rotary.rotate(inputs[name], at) for name in ("b_q", "b_k")}}
    q, k, v = (
        torch.einsum("bhnr,brnd->bhnd", inputs[f"a_{x}"], inputs[f"b_{x}"]) / inputs[f"b_{x}"].shape[1] for x in "qkv"
    )
    true = attnkit.softmax_attention(rotary.rotate(q, at), rotary.rotate(k, at), v, mask=attnkit.causal())
    assert (tensor_product_attention(**turned) - true).abs().max() < 1e-12


def test_the_papers_cache() -> None:
    """32 heads of 128 and ranks 2: 640 numbers a token, where MHA keeps 8,192."""
    layer = get("tensor_product").layer(TensorProductConfig(128, 32, rotary=Rotary(4)))
    assert layer.cost(1, 10).state_bytes(10) == layer.state(1, 10).nbytes == 10 * (2 + 2) * (32 + 4) * 4
    assert get("tensor_product").cost(Sizes(h=32, d=128, e=128), itemsize=1).state_bytes_per_token == 640


REFUSALS = [
    ({"b_k": torch.zeros(2, 6, 9, 4, dtype=torch.float64)}, ValueError, "R_k is 6 in b_k"),
    ({"a_v": torch.zeros(2, 1, 9, 5, dtype=torch.float64)}, ValueError, "query heads is 1 in a_v"),
    ({"a_k": torch.zeros(2, 3, 9, 7)}, TypeError, "a_k has dtype torch.float32 but a_q torch.float64"),
    ({"a_q": torch.zeros(2, 3, 10, 5, dtype=torch.float64), "b_q": torch.zeros(2, 5, 10, 4, dtype=torch.float64)},
     ValueError, "got 10 queries and 9 keys"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        tensor_product_attention(**{**sampled(9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_configurations_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ranks are \(6, 0, 2\), expected at least 1 each"):
        TensorProductConfig(16, 4, key_rank=0)
    with pytest.raises(ValueError, match=r"rotary is made for head size 8, heads have 4"):
        TensorProductConfig(16, 4, rotary=Rotary(8))
