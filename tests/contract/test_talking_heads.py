"""Talking-heads attention: nested loops, its limits, other numbers of heads, masks of each head, blocks, refusals."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.mechanisms.multi_token import multi_token_attention
from attnkit.mechanisms.talking_heads import TalkingHeadsAttention, TalkingHeadsConfig, talking_heads_attention
from attnkit.mechanisms.talking_heads.chunk import BLOCK
from attnkit.positions import Rotary
from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.testing.rules import Rule, any_rule

BACKENDS = ("chunk", "reference")


def sampled(n: int, m: int | None = None, **sizes: int) -> dict[str, Any]:
    size = {"b": 2, "h": 4, "g": 2, "m": m or n, "n": n, "d": 3, "e": 5, **sizes}
    return get("talking_heads").sample(n, Sizes(**size), torch.float64)


def other_heads(n: int, m: int | None = None) -> dict[str, Any]:
    """Four query heads, six in the softmax, three of values, which share one KV head; mixtures of both signs."""
    inputs = sampled(n, m) | {"mix_logits": torch.randn(6, 4).double(), "mix_weights": torch.randn(3, 6).double()}
    return {**inputs, "v": inputs["v"][:, :1]}


def by_loops(
    q: Tensor, k: Tensor, v: Tensor, mix_logits: Tensor, mix_weights: Tensor, rule: Rule, scale: float
) -> Tensor:
    """One number at a time, straight from the definition."""
    (b, h, m, _), (g, n), (groups, e) = q.shape, k.shape[1:3], v.shape[1::2]
    (inside, _), after = mix_logits.shape, len(mix_weights)
    o = q.new_zeros(b, after, m, e)
    for batch in range(b):
        for i in range(m):

            def sees(head: int, j: int, batch: int = batch, i: int = i) -> bool:
                return rule.sees(batch, head, n - m + i, j)

            logits = [[float(scale * q[batch, a, i] @ k[batch, a // (h // g), j]) for j in range(n)] for a in range(h)]
            weights: list[dict[int, float]] = []
            for head in range(inside):
                spoken = {
                    j: sum(float(mix_logits[head, a]) * logits[a][j] for a in range(h) if sees(a, j))
                    for j in range(n)
                    if sees(head, j)
                }
                total = sum(map(math.exp, spoken.values()))
                weights.append({j: math.exp(x) / total for j, x in spoken.items()})
            for head in range(after):
                for j in (j for j in range(n) if sees(head, j)):
                    weight = sum(float(mix_weights[head, c]) * weights[c].get(j, 0.0) for c in range(inside))
                    o[batch, head, i] += weight * v[batch, head // (after // groups), j]
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(8))
def test_equals_nested_loops(backend: str, seed: int) -> None:
    """Odd seeds: other numbers of heads and one mask for all; even ones: any mask, also one of each head."""
    n, m = 7, (1, 4, 7)[seed % 3]
    torch.manual_seed(seed)
    inputs = other_heads(n, m) if seed % 2 else sampled(n, m)
    rule = any_rule(random.Random(seed), 2, 1 if seed % 2 else 4, m, n)
    found = talking_heads_attention(**{**inputs, "mask": rule.mask}, scale=0.6, backend=backend)
    del inputs["mask"]
    assert (found - by_loops(**inputs, rule=rule, scale=0.6)).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_hears_nothing_of_keys_it_may_not_see(backend: str) -> None:
    """Two heads that each see one of two keys: the result is that key's value, whatever the mixtures."""
    inputs = sampled(2, h=2, g=2, b=1)
    keep = torch.eye(2, dtype=torch.bool)[None, :, None].expand(1, 2, 2, 2)
    found = talking_heads_attention(**{**inputs, "mask": keep}, backend=backend)
    own = torch.stack([inputs["v"][:, i, i] * inputs["mix_weights"][i, i] for i in range(2)], 1)
    assert (found - own[:, :, None]).abs().max() < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixtures_that_mix_nothing_are_softmax_attention(backend: str) -> None:
    inputs = sampled(BLOCK + 9)
    eye = torch.eye(4, dtype=torch.float64)
    plain = attnkit.softmax_attention(inputs["q"], inputs["k"], inputs["v"], mask=inputs["mask"])
    for shares in (eye, None):
        found = talking_heads_attention(**{**inputs, "mix_logits": shares, "mix_weights": shares}, backend=backend)
        assert (found - plain).abs().max() < 1e-12


def test_equals_multi_token_attention_without_its_kernel() -> None:
    """Which mixes results and not weights: a way of its own to the same."""
    inputs = sampled(BLOCK + 3)
    found = talking_heads_attention(**inputs)
    names = ("q", "k", "v", "mix_logits", "mix_weights")
    assert (found - multi_token_attention(**{name: inputs[name] for name in names})).abs().max() < 1e-12


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1])
@pytest.mark.parametrize("mask", ["causal", "window", "each head", None])
def test_blocks_equal_the_definition_with_gradients(n: int, mask: str | None) -> None:
    inputs = other_heads(n, (n + 1) // 2) if mask == "causal" else sampled(n)
    seen = {"causal": attnkit.causal(), "window": attnkit.window(5), "each head": torch.rand(2, 4, n, n) < 0.4}
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if isinstance(x, Tensor)}
    call = {**inputs, "mask": mask and seen[mask]}
    found, true = (talking_heads_attention(**call, backend=backend) for backend in BACKENDS)
    assert (found - true).abs().max() < 1e-11
    direction = torch.randn_like(found)
    slopes, exact = (torch.autograd.grad(o, list(leaves.values()), direction) for o in (found, true))
    for name, one, two in zip(leaves, slopes, exact, strict=True):
        assert (one - two).abs().max() <= 1e-10 * max(1.0, float(two.abs().max())), name


def test_training_keeps_no_block_of_logits() -> None:
    n, kept = 4 * BLOCK, []
    inputs = sampled(n, h=2, g=1)
    inputs |= {name: x.float().requires_grad_() for name, x in inputs.items() if isinstance(x, Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.untyped_storage().nbytes()), lambda x: x):
        talking_heads_attention(**inputs, backend="chunk")
    assert sum(kept) < BLOCK * n * 4, "one head's logits of one block"


def test_a_fresh_layer_is_softmax_attention() -> None:
    torch.manual_seed(0)
    layer = TalkingHeadsAttention(TalkingHeadsConfig(16, 4, kv_heads=2, mask=attnkit.window(4))).double()
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    q, k, v = (y(x).unflatten(-1, (-1, 4)).transpose(1, 2) for y in (layer.q, layer.k, layer.v))
    plain = attnkit.softmax_attention(q, k, v, mask=attnkit.window(4))
    assert (layer(x) - layer.o(plain.transpose(1, 2).flatten(2))).abs().max() < 1e-12


@pytest.mark.parametrize("heads", [(4, 2, 8), (2, 8, 4), (4, 3, 2)])
def test_a_layer_with_other_numbers_of_heads_decodes(heads: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    h, inside, after = heads
    settings = {"softmax_heads": inside, "value_heads": after, "rotary": Rotary(16 // h), "qk_norm": True}
    layer = TalkingHeadsAttention(TalkingHeadsConfig(16, h, **settings)).double()
    assert [tuple(x.shape) for x in (layer.mix_logits, layer.mix_weights)] == [(inside, h), (after, inside)]
    for shares in (layer.mix_logits, layer.mix_weights):
        assert (shares.sum(1) - 1).abs().max() < 1e-7 and bool((shares.sum(0) > 0).all())
    with torch.no_grad():
        layer.mix_logits.add_(0.3 * torch.randn_like(layer.mix_logits))
        layer.mix_weights.add_(0.3 * torch.randn_like(layer.mix_weights))
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    state, rows = layer.state(2, 30, dtype=torch.float64), []
    for part in x.split([1, 1, 7, 1, 20], 1):
        y, state = layer.step(part, state)
        rows.append(y)
    assert (torch.cat(rows, 1) - layer(x)).abs().max() < 1e-12
    assert layer.cost(1, 30, dtype=torch.float64).state_bytes(30) * 2 == state.nbytes


REFUSALS = [
    ({"mix_logits": torch.zeros(4, 3)}, ValueError, "query heads is 3 in mix_logits (4, 3) but 4 in q"),
    ({"mix_weights": torch.zeros(4, 3)}, ValueError, "softmax_heads is 3 in mix_weights (4, 3) but 4 in mix_logits"),
    ({"mix_weights": torch.zeros(3, 4)}, ValueError, "v has 2 heads, expected a number that divides the 3 value heads"),
    ({"mix_logits": torch.zeros(4, 4, dtype=torch.int64)}, TypeError, "mix_logits has dtype torch.int64, expected a"),
    ({"mix_weights": torch.zeros(2, 4), "mask": torch.ones(1, 4, 9, 9, dtype=torch.bool)}, ValueError,
     "the mask has 4 heads and there are 4 query, 4 softmax and 2 value heads, expected one mask for all heads or one"),
    ({"k": torch.zeros(2, 3, 9, 3, dtype=torch.float64)}, ValueError, "got 4 query heads and 3 KV heads"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        talking_heads_attention(**{**sampled(9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"value_heads": 3}, r"got width 16 and \(4, 4, 3\) heads for queries, softmax and values"),
        ({"kv_heads": 2, "value_heads": 1}, "got 1 query heads and 2 KV heads"),
        ({"rotary": Rotary(8)}, "rotary is made for head size 8, heads have 4"),
    ],
)
def test_configurations_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TalkingHeadsConfig(16, 4, **wrong)


def test_a_bidirectional_layer_has_no_state() -> None:
    with pytest.raises(ValueError, match="a bidirectional layer cannot decode: give it a causal mask"):
        TalkingHeadsAttention(TalkingHeadsConfig(16, 2, mask=None)).state(1, 4)
