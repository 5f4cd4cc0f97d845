"""Top-k attention: loops, golden vector, ties, densities, its limit, block edges, torch.topk, refusals."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

import attnkit
from attnkit.mechanisms.topk import TopKConfig, chunk, topk_attention
from attnkit.mechanisms.topk.counts import most
from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.testing.rules import any_rule

BACKENDS = ("chunk", "reference")


def sampled(n: int, m: int | None = None, seed: int = 0, **sizes: int) -> dict[str, Any]:
    size = {"b": 2, "h": 4, "g": 2, "m": m or n, "n": n, "d": 5, "e": 3, **sizes}
    return get("topk").sample(seed, Sizes(**size), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(6))
def test_equals_loops(backend: str, seed: int) -> None:
    """Keys sorted by score and then by place, and softmax over the first of them."""
    n, m = 9, (1, 4, 9)[seed % 3]
    inputs, rule = sampled(n, m, seed), any_rule(random.Random(seed), 2, 4, m, n)
    inputs["mask"] = rule.mask
    found = topk_attention(**inputs, scale=0.6, backend=backend)
    true = torch.zeros_like(found)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(4) for i in range(m)):
        visible = [j for j in range(n) if rule.sees(b, h, n - m + i, j)]
        score = {j: 0.6 * float(inputs["q"][b, h, i] @ inputs["k"][b, h // 2, j]) for j in visible}
        count = inputs.get("top") or math.ceil(inputs["density"] * len(visible) - 1e-9)
        kept = sorted(visible, key=lambda j: (-score[j], j))[:count]
        total = sum(math.exp(score[j]) for j in kept)
        for j in kept:
            true[b, h, i] += math.exp(score[j]) / total * inputs["v"][b, h // 2, j]
    assert (found - true).abs().max() < 1e-12


def generated(seed: int) -> Tensor:
    k = torch.arange(32, dtype=torch.float64)
    return torch.sin(0.37 * k**2 + 1.1 * k + seed).reshape(1, 1, 8, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend: str) -> None:
    """Computed once in float64 by a program that is not in this repository: the best 3 keys, causal."""
    o = topk_attention(generated(1), generated(2), generated(3), top=3, mask=attnkit.causal(), backend=backend)
    assert o.sum().item() == pytest.approx(-5.381869675, abs=1e-8)
    assert o.abs().sum().item() == pytest.approx(12.131013659, abs=1e-8)
    assert o[0, 0, -1].tolist() == pytest.approx([-0.306708, -0.438898, -0.008553, -0.113989], abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_scores_the_earlier_keys_are_kept(backend: str) -> None:
    q, k = torch.ones(1, 1, 6, 1), torch.ones(1, 1, 6, 1)
    o = topk_attention(q, k, torch.eye(6).view(1, 1, 6, 6), top=2, mask=attnkit.causal(), backend=backend)
    assert torch.equal(o[0, 0, 0], torch.eye(6)[0])
    assert o[0, 0, 1:].tolist() == [[0.5, 0.5, 0, 0, 0, 0]] * 5


@pytest.mark.parametrize(
    ("n", "density", "count"), [(100, 0.29, 29), (100, 0.07, 7), (10, 0.31, 4), (3, 0.01, 1), (7, 1.0, 7)]
)
def test_a_density_is_the_kept_share_rounded_up(n: int, density: float, count: int) -> None:
    assert most(n, None, density) == count
    v = torch.eye(n).view(1, 1, n, n)
    for backend in BACKENDS:
        o = topk_attention(torch.randn(1, 1, 1, 4), torch.randn(1, 1, n, 4), v, density=density, backend=backend)
        assert int((o > 0).sum()) == count


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_visible_keys_kept_is_softmax_attention(backend: str) -> None:
    inputs = sampled(30, 20)
    q, k, v = (inputs[name] for name in "qkv")
    plain = attnkit.softmax_attention(q, k, v, mask=attnkit.window(7))
    for settings in ({"top": 7}, {"top": 400}, {"density": 1.0}):
        found = topk_attention(q, k, v, **settings, mask=attnkit.window(7), backend=backend)
        assert (found - plain).abs().max() < 1e-12


def test_equals_torch_topk() -> None:
    q, k, v = torch.randn(3, 2, 4, 50, 8, dtype=torch.float64)
    scores = q @ k.mT * 8**-0.5
    kept = torch.full_like(scores, -torch.inf).scatter(-1, scores.topk(6).indices, 0.0)
    assert (topk_attention(q, k, v, top=6) - (scores + kept).softmax(-1) @ v).abs().max() < 1e-12


@pytest.mark.parametrize("settings", [{"top": 3}, {"top": 6}, {"top": 30}, {"density": 0.02}, {"density": 0.5}])
def test_blocks_equal_the_definition_with_gradients(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """Many blocks of queries and of keys, with few keys fetched, more than a tile has, and with many hidden."""
    monkeypatch.setattr(chunk, "KEYS", 16)
    monkeypatch.setattr(chunk, "TILE", 4)
    monkeypatch.setattr(chunk, "ELEMENTS", 2 * 4 * 16 * 24)
    inputs = {name: x for name, x in sampled(100, 61).items() if name not in ("top", "density")} | settings
    leaves = {name: inputs[name].requires_grad_() for name in "qkv"}
    found, true = (topk_attention(**inputs, backend=backend) for backend in BACKENDS)
    assert (found - true).abs().max() < 1e-12
    direction = torch.randn_like(found)
    slopes, exact = (torch.autograd.grad(o, list(leaves.values()), direction) for o in (found, true))
    assert all((one - two).abs().max() < 1e-10 for one, two in zip(slopes, exact, strict=True))


def test_keys_that_are_not_kept_get_no_gradient() -> None:
    inputs = {name: x.requires_grad_() if isinstance(x, Tensor) else x for name, x in sampled(40, 1).items()}
    inputs |= {"top": 3}
    (slope,) = torch.autograd.grad(topk_attention(**inputs).sum(), inputs["v"])
    assert 3 <= int(slope.abs().sum((0, 1, 3)).count_nonzero()) <= 3 * 2 * 4


REFUSALS = [
    ({"top": None}, ValueError, "neither top nor density is given, expected one of them"),
    ({"density": 0.5}, ValueError, "and density is 0.5, both are given, expected one of them"),
    ({"top": 0}, ValueError, "top is 0, expected at least 1"),
    ({"top": 0.1}, TypeError, "top is a float (0.1), expected an integer (a share is a density=)"),
    ({"top": None, "density": 0.0}, ValueError, "density is 0.0, expected a share above 0 and at most 1"),
    ({"mask": "causal"}, TypeError, "mask is a str, expected a mask such as attnkit.causal()"),
]


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        topk_attention(**{**sampled(9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_needs_one_of_the_two() -> None:
    with pytest.raises(ValueError, match="TopKConfig: neither top nor density is given"):
        TopKConfig(16, 2)


@pytest.mark.parametrize(("n", "top"), [(11, 3), (40, 8), (5, 8)])
def test_equals_doge(n: int, top: int) -> None:
    """Hugging Face's Doge keeps the keys that a score of their values ranks first. Without queries that score is all.

    Its logits are then those of one-channel keys against queries of 1; an output map follows.
    """
    from transformers import DogeConfig
    from transformers.models.doge.modeling_doge import DogeAttention

    torch.manual_seed(n)
    # Its eager attention rounds weights to float32.
    config = DogeConfig(
        hidden_size=24, num_attention_heads=6, num_key_value_heads=2, keep_window_size=top, attn_implementation="sdpa"
    )
    layer = DogeAttention(config, 0).double().eval()
    x, turned = torch.randn(2, n, 24, dtype=torch.float64), (torch.ones(1, n, 4), torch.zeros(1, n, 4))
    with torch.no_grad():
        torch.nn.init.zeros_(layer.q_proj.weight)
        torch.nn.init.normal_(layer.A)
        theirs, _ = layer(x, turned, attnkit.causal().dense(n, n))
        values = layer.v_proj(x)
        score = (layer.A * softplus(layer.dt_proj(values))).exp().mT[..., None]
        v = values.unflatten(-1, (2, 4)).transpose(1, 2)
        for backend in BACKENDS:
            q = torch.ones(2, 6, n, 1, dtype=torch.float64)
            o = topk_attention(q, score, v, top=top, mask=attnkit.causal(), scale=1.0, backend=backend)
            assert (layer.o_proj(o.transpose(1, 2).flatten(2)) - theirs).abs().max() < 1e-12
