"""Differential attention: nested loops, golden vector, its limits, Hugging Face's DiffLlama, fast kernels, refusals."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit import native
from attnkit.dispatch import watch
from attnkit.mechanisms.differential import (
    DifferentialAttention,
    DifferentialConfig,
    differential_attention,
    initial_share,
)
from attnkit.positions import Rotary
from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.testing import assert_within
from attnkit.testing.rules import Rule, any_rule

BACKENDS = ("chunk", "reference")


def sampled(n: int, m: int | None = None, **sizes: int) -> dict[str, Any]:
    size = {"b": 2, "h": 4, "g": 2, "m": m or n, "n": n, "d": 3, "e": 5, **sizes}
    return get("differential").sample(n, Sizes(**size), torch.float64)


def by_loops(q: Tensor, k: Tensor, v: Tensor, share: Tensor, rule: Rule, scale: float) -> Tensor:
    """One pair at a time: the difference of two weights, times a value."""
    (b, h, m, _), (g, n, e) = q.shape, v.shape[1:]
    d = q.shape[3] // 2
    o = q.new_zeros(b, h, m, e)
    for batch in range(b):
        for head in range(h):
            group = head // (h // g)
            for i in range(m):
                keys = [j for j in range(n) if rule.sees(batch, head, n - m + i, j)]
                parts = []
                for half in (slice(0, d), slice(d, 2 * d)):
                    powers = [math.exp(scale * float(q[batch, head, i, half] @ k[batch, group, j, half])) for j in keys]
                    parts.append([x / sum(powers) for x in powers])
                for j, one, two in zip(keys, *parts, strict=True):
                    o[batch, head, i] += (one - float(share[head]) * two) * v[batch, group, j]
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(6))
def test_equals_nested_loops(backend: str, seed: int) -> None:
    n, m = 7, (1, 4, 7)[seed % 3]
    inputs, rule = sampled(n, m), any_rule(random.Random(seed), 2, 4, m, n)
    found = differential_attention(**{**inputs, "mask": rule.mask}, scale=0.6, backend=backend)
    del inputs["mask"]
    assert (found - by_loops(**inputs, rule=rule, scale=0.6)).abs().max() < 1e-12


def generated(seed: int, *shape: int) -> Tensor:
    k = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.37 * k**2 + 1.1 * k + seed).reshape(shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend: str) -> None:
    """Computed once in float64 by a program that is not in this repository: share 0.3, initial share 0.2, eps 1e-5."""
    q, k = (torch.cat([generated(one, 1, 1, 8, 4), generated(two, 1, 1, 8, 4)], -1) for one, two in ((1, 5), (2, 6)))
    share = torch.tensor([0.3], dtype=torch.float64)
    o = differential_attention(q, k, generated(7, 1, 1, 8, 8), share, mask=attnkit.causal(), backend=backend)
    o = (1 - 0.2) * torch.nn.functional.rms_norm(o, (8,), eps=1e-5)
    assert o.sum().item() == pytest.approx(24.426962662, abs=1e-8)
    assert o.abs().sum().item() == pytest.approx(46.272624960, abs=1e-8)
    assert o[0, 0, -1, :4].tolist() == pytest.approx([0.811590, 1.452492, 0.351077, 0.232631], abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits(backend: str) -> None:
    """No share is softmax attention with the first halves; equal halves are a scaled softmax attention."""
    inputs = sampled(20)
    first = {name: inputs[name][..., :3] for name in ("q", "k")}
    plain = attnkit.softmax_attention(**first, v=inputs["v"], mask=inputs["mask"])
    found = differential_attention(**{**inputs, "share": torch.zeros(4).double()}, backend=backend)
    assert (found - plain).abs().max() < 1e-12
    twins = {name: torch.cat([x, x], -1) for name, x in first.items()}
    found = differential_attention(**{**inputs, **twins}, backend=backend)
    assert (found - (1 - inputs["share"][:, None, None]) * plain).abs().max() < 1e-12


def test_a_layer_whose_share_is_0_is_a_normed_softmax_head() -> None:
    torch.manual_seed(0)
    layer = DifferentialAttention(DifferentialConfig(24, 2, initial_share=0.2)).double()
    with torch.no_grad():
        for vector in (layer.share_q1, layer.share_k1, layer.share_q2, layer.share_k2):
            vector.zero_()
        layer.share_q2[0], layer.share_k2[0] = math.log(1.2), 1.0  # 1 - 1.2 + 0.2
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    q, k, v = (y(x).unflatten(-1, (2, 12)).transpose(1, 2) for y in (layer.q, layer.k, layer.v))
    o = attnkit.softmax_attention(q[..., :6], k[..., :6], v, mask=attnkit.causal())
    normed = 0.8 * o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert (layer(x) - layer.o(normed.transpose(1, 2).flatten(2))).abs().max() < 1e-12


def test_the_initial_share_grows_with_the_layer() -> None:
    assert initial_share(0) == pytest.approx(0.2)
    assert initial_share(1) == pytest.approx(0.8 - 0.6 * math.exp(-0.3))
    assert 0.799 < initial_share(40) < 0.8


def halves_together(weight: Tensor, half: int) -> Tensor:
    """Rows of DiffLlama's maps, whose heads ``i`` and ``i + heads / 2`` are a pair, with each pair side by side."""
    return weight.detach().unflatten(0, (2, -1, half)).transpose(0, 1).flatten(0, 2)


@pytest.mark.parametrize("kv_heads", [8, 4, 2])
def test_equals_diffllama(kv_heads: int) -> None:
    """The weights of Hugging Face's layer in ours: all tokens at once, and token by token."""
    from transformers import DiffLlamaConfig, DynamicCache
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, DiffLlamaRotaryEmbedding

    torch.manual_seed(kv_heads)
    place, width, n = 1, 64, 19
    config = DiffLlamaConfig(
        hidden_size=width, num_attention_heads=8, num_key_value_heads=kv_heads, attn_implementation="eager"
    )
    theirs = DiffLlamaAttention(config, place).eval()
    settings = {"initial_share": initial_share(place), "eps": config.rms_norm_eps}
    ours = DifferentialAttention(DifferentialConfig(width, 4, kv_heads // 2, rotary=Rotary(8), **settings)).eval()
    with torch.no_grad():
        for mine, name in ((ours.q, "q"), (ours.k, "k"), (ours.v, "v")):
            mine.weight.copy_(halves_together(getattr(theirs, f"{name}_proj").weight, 8))
        ours.o.weight.copy_(theirs.o_proj.weight)
        for name in ("q1", "k1", "q2", "k2"):
            getattr(theirs, f"lambda_{name}").add_(0.1)
            getattr(ours, f"share_{name}").copy_(getattr(theirs, f"lambda_{name}"))
    x, positions = torch.randn(2, n, width), torch.arange(n)[None]
    hidden = torch.zeros(1, 1, n, n).masked_fill(~attnkit.causal().dense(n, n), -torch.inf)

    def run(layer: Any, x: Tensor) -> Tensor:
        turned = DiffLlamaRotaryEmbedding(config)(x, positions)
        return layer(x, turned, hidden.to(x.dtype))[0].detach()

    gold, naive = run(copy.deepcopy(theirs).double(), x.double()), run(theirs, x)
    with torch.no_grad():
        assert_within(ours(x), gold, naive, torch.float32)
        state, cache, rows, their_rows = ours.state(2, n), DynamicCache(), [], []
        for t in range(n):
            y, state = ours.step(x[:, t : t + 1], state)
            turned = DiffLlamaRotaryEmbedding(config)(x, positions[:, t : t + 1])
            their_rows.append(theirs(x[:, t : t + 1], turned, None, past_key_values=cache)[0])
            rows.append(y)
    assert_within(torch.cat(rows, 1), gold, torch.cat(their_rows, 1), torch.float32)


@pytest.mark.skipif(not native.STATUS.available, reason=f"no native library: {native.STATUS.reason}")
def test_it_runs_on_the_kernels_of_softmax_attention() -> None:
    inputs = {name: x.float() if isinstance(x, Tensor) else x for name, x in sampled(20).items()}
    with watch() as ran:
        differential_attention(**inputs)
    assert ran == {("differential", "chunk"): 1, ("softmax", "cpu"): 2}


def test_half_precision_is_subtracted_before_it_is_rounded() -> None:
    """Nearly equal halves: a difference of two rounded results would keep one digit."""
    inputs = sampled(64)
    for name in ("q", "k"):
        half = inputs[name][..., :3]
        inputs[name] = torch.cat([half, half + 0.01], -1)
    inputs["share"] = torch.full((4,), 0.99)
    given = {name: x.bfloat16() if name in ("q", "k", "v") else x for name, x in inputs.items()}
    exact = {name: x.double() if name in ("q", "k", "v") else x for name, x in given.items()}
    gold = differential_attention(**exact, backend="reference")
    error = (differential_attention(**given).double() - gold).abs().max()
    assert error <= torch.finfo(torch.bfloat16).eps * gold.abs().max()


def test_a_layer_with_every_option_decodes() -> None:
    torch.manual_seed(0)
    settings = {"kv_heads": 2, "rotary": Rotary(4), "qk_norm": True, "weighted_norm": True}
    layer = DifferentialAttention(DifferentialConfig(32, 4, mask=attnkit.window(5), **settings)).double()
    with torch.no_grad():
        layer.o_norm.weight.add_(torch.randn(8))
    x = torch.randn(2, 23, 32, dtype=torch.float64)
    state, rows = layer.state(2, 23, dtype=torch.float64), []
    for part in x.split([1, 6, 1, 15], 1):
        y, state = layer.step(part, state)
        rows.append(y)
    assert (torch.cat(rows, 1) - layer(x)).abs().max() < 1e-12
    alone = layer(x[:, 3:], mask=attnkit.padding(torch.arange(20)[None] < 20))
    padded = layer(torch.cat([x[:, 3:], x[:, :3]], 1), mask=attnkit.padding(torch.arange(23)[None] < 20))
    assert (padded[:, :20] - alone).abs().max() < 1e-12


REFUSALS = [
    ({"q": torch.zeros(2, 4, 9, 5).double(), "k": torch.zeros(2, 2, 9, 5).double()}, ValueError,
     "q has 5 channels a head, expected an even number: two halves"),
    ({"share": torch.zeros(3)}, ValueError, "query heads is 3 in share (3,) but 4 in q"),
    ({"share": torch.zeros(4, dtype=torch.int64)}, TypeError, "share has dtype torch.int64, expected a floating one"),
    ({"mask": "causal"}, TypeError, "mask is a str, expected a mask such as attnkit.causal()"),
    ({"k": torch.zeros(2, 3, 9, 6).double(), "v": torch.zeros(2, 3, 9, 5).double()}, ValueError,
     "got 4 query heads and 3 KV heads"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        differential_attention(**{**sampled(9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"width": 20, "heads": 4}, "got width 20 and 4 heads, expected a width that twice the heads divide"),
        ({"rotary": Rotary(8)}, "rotary is made for head size 8, halves have 4"),
        ({"initial_share": 1.0}, "initial_share is 1.0, expected 0 <= share < 1"),
    ],
)
def test_configurations_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DifferentialConfig(**{"width": 32, "heads": 4, **wrong})


def test_a_bidirectional_layer_has_no_state() -> None:
    with pytest.raises(ValueError, match="a bidirectional layer cannot decode: give it a causal mask"):
        DifferentialAttention(DifferentialConfig(16, 2, mask=None)).state(1, 4)
