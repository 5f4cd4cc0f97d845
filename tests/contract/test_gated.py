"""Gated attention: the gate of the weights, nested loops, its limit, Qwen3-Next's layer, refusals."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.mechanisms.gated import GatedAttention, GatedConfig, gated_attention
from attnkit.positions import Rotary
from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.testing import assert_within
from attnkit.testing.rules import any_rule

BACKENDS = ("chunk", "reference")


def sampled(n: int, m: int | None = None, *, seed: int = 0, **sizes: int) -> dict[str, Any]:
    size = {"b": 2, "h": 4, "g": 2, "m": m or n, "n": n, "d": 3, "e": 5, **sizes}
    return get("gated").sample(seed, Sizes(**size), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(6))
def test_equals_nested_loops(backend: str, seed: int) -> None:
    n, m = 7, (1, 4, 7)[seed % 3]
    inputs, rule = sampled(n, m, seed=seed), any_rule(random.Random(seed), 2, 4, m, n)
    found = gated_attention(**{**inputs, "mask": rule.mask}, scale=0.6, backend=backend)
    q, k, v, gate = (inputs[name] for name in ("q", "k", "v", "gate"))
    true = torch.zeros_like(found)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(4) for i in range(m)):
        keys = [j for j in range(n) if rule.sees(b, h, n - m + i, j)]
        powers = [math.exp(0.6 * float(q[b, h, i] @ k[b, h // 2, j])) for j in keys]
        for channel in range(5):
            opened = 1 / (1 + math.exp(-gate[b, h, i, channel % gate.shape[3]]))
            for j, power in zip(keys, powers, strict=True):
                true[b, h, i, channel] += opened * power / sum(powers) * v[b, h // 2, j, channel]
    assert (found - true).abs().max() < 1e-12


def test_a_gate_of_the_weights_is_a_gate_of_the_head() -> None:
    """With as many tokens as heads, where the wrong axes would go unnoticed."""
    inputs = sampled(4, g=4)
    weights = (inputs["q"] @ inputs["k"].mT * 3**-0.5).masked_fill(~torch.ones(4, 4).tril().bool(), -torch.inf)
    gated = weights.softmax(-1) * inputs["gate"].sigmoid()
    assert (gated_attention(**inputs) - gated @ inputs["v"]).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_open_gate_is_softmax_attention_and_a_shut_one_nothing(backend: str) -> None:
    inputs = sampled(20, 9)
    gate = inputs.pop("gate")
    plain = attnkit.softmax_attention(**inputs)
    assert (gated_attention(**inputs, gate=gate * 0 + 60, backend=backend) - plain).abs().max() < 1e-12
    assert not gated_attention(**inputs, gate=gate * 0 - 1000, backend=backend).any()


def qwen(kv_heads: int) -> tuple[Any, Any, GatedAttention]:
    """Hugging Face's layer with norms off their start, its configuration, and ours with its weights."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention

    config = Qwen3NextConfig(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=16, attn_implementation="eager"
    )
    theirs = Qwen3NextAttention(config, 0).eval()
    rotary = Rotary(16, base=config.rope_parameters["rope_theta"], rotary_size=4)
    ours = GatedAttention(GatedConfig(48, 4, kv_heads, 16, rotary=rotary, qk_norm=True)).eval()
    with torch.no_grad():
        for norm in (theirs.q_norm, theirs.k_norm):
            norm.weight.normal_(std=0.3)
        query, gate = theirs.q_proj.weight.unflatten(0, (4, 2, 16)).unbind(1)
        ours.q.weight.copy_(query.flatten(0, 1))
        ours.gate.weight.copy_(gate.flatten(0, 1))
        for name in ("k", "v", "o"):
            getattr(ours, name).weight.copy_(getattr(theirs, f"{name}_proj").weight)
        ours.q_norm.weight.copy_(1 + theirs.q_norm.weight)
        ours.k_norm.weight.copy_(1 + theirs.k_norm.weight)
    return theirs, config, ours


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_qwen3_next(kv_heads: int) -> None:
    """All tokens at once, and token by token."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding

    torch.manual_seed(kv_heads)
    theirs, config, ours = qwen(kv_heads)
    n = 19
    x, hidden = torch.randn(2, n, 48), torch.zeros(1, 1, n, n).masked_fill(~attnkit.causal().dense(n, n), -torch.inf)
    turned = Qwen3NextRotaryEmbedding(config)(x, torch.arange(n)[None])

    def run(layer: Any, x: Tensor) -> Tensor:
        return layer(x, tuple(table.to(x.dtype) for table in turned), hidden.to(x.dtype))[0].detach()

    gold, naive = run(copy.deepcopy(theirs).double(), x.double()), run(theirs, x)
    with torch.no_grad():
        assert_within(ours(x), gold, naive, torch.float32)
        state, rows = ours.state(2, n), []
        for part in x.split(1, 1):
            y, state = ours.step(part, state)
            rows.append(y)
    assert_within(torch.cat(rows, 1), gold, naive, torch.float32)


REFUSALS = [
    (
        {"gate": torch.zeros(2, 4, 9, 2)},
        ValueError,
        "gate has 2 numbers a head, expected 1, or 5: one",
    ),
    ({"gate": torch.zeros(2, 9, 4, 1)}, ValueError, "query heads is 9 in gate (2, 9, 4, 1) but 4 in q"),
    (
        {"gate": torch.zeros(2, 4, 9, 1, dtype=torch.int64)},
        TypeError,
        "gate has dtype torch.int64, expected a",
    ),
    ({"mask": 3}, TypeError, "mask is a int, expected a mask such as attnkit.causal()"),
]


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        gated_attention(**{**sampled(9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"width": 30}, "got width 30 and 4 heads, expected a width that heads divide, or a head_size"),
        ({"kv_heads": 3}, "got 4 query heads and 3 KV heads"),
        ({"rotary": Rotary(4)}, "rotary is made for head size 4, heads have 8"),
    ],
)
def test_configurations_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GatedConfig(**{"width": 32, "heads": 4, **wrong})
