"""The pyramid: nested loops, its limits, the index map beside interpolation's, its state, memory, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, rms_norm

import attnkit
from attnkit.mechanisms.hierarchical import (
    HierarchicalConfig,
    cost,
    hierarchical_attention,
    hierarchical_attention_step,
)
from attnkit.mechanisms.hierarchical.chunk import SHORT
from attnkit.positions import Rotary
from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.state import PyramidState

BACKENDS = ("chunk", "reference")
TWO, FIVE, NORMALISED = 0, 1, 2
"""Seeds whose samples have two levels, five, and two with gains."""


def sampled(n: int, seed: int = FIVE, **sizes: int) -> dict[str, Any]:
    size = {"b": 1, "h": 4, "g": 2, "m": n, "n": n, "d": 6, "e": 3, **sizes}
    return get("hierarchical").sample(seed, Sizes(**size), torch.float64)


def by_loops(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
    """One position at a time: of each level, the last token at or before it, attending to those before."""
    (b, h, n, d), (g, e) = q.shape, (k.shape[1], v.shape[3])
    o = q.new_zeros(b, h, n, e * (1 + len(weights[0])))
    for batch in range(b):
        tokens = {i: (q[batch, :, i], k[batch, :, i], v[batch, :, i]) for i in range(n)}  # by position
        for level in range(1 + len(weights[0])):
            found = {}
            for i, (query, _, _) in tokens.items():
                found[i] = q.new_zeros(h, e)
                for head in range(h):
                    seen = [
                        (key[head // (h // g)], value[head // (h // g)])
                        for j, (_, key, value) in tokens.items()
                        if j <= i
                    ]
                    powers = [math.exp(float(query[head] @ key) / math.sqrt(d)) for key, _ in seen]
                    for power, (_, value) in zip(powers, seen, strict=True):
                        found[i][head] += power / sum(powers) * value
            for i in range(n):
                o[batch, :, i, e * level : e * (level + 1)] = found[i // 2**level * 2**level]
            if level < len(weights[0]):
                down, *maps = (weight[level] for weight in weights)
                kept = {
                    i: sum(found[i][head] @ down[head] for head in range(h)) for i in found if i % 2 ** (level + 1) == 0
                }
                tokens = {i: tuple(torch.stack([x @ w for w in weight]) for weight in maps) for i, x in kept.items()}
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "seed"), [(1, FIVE), (5, TWO), (9, FIVE), (11, FIVE)])
def test_equals_nested_loops(backend: str, n: int, seed: int) -> None:
    inputs = sampled(n, seed)
    found = hierarchical_attention(**inputs, backend=backend)
    assert (found - by_loops(*inputs.values())).abs().max() < 1e-12


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, SHORT, SHORT + 1, 2 * SHORT + 3])
def test_chunk_equals_the_definition_with_gradients(n: int) -> None:
    inputs = {name: x.requires_grad_() for name, x in sampled(n).items()}
    found, true = (hierarchical_attention(**inputs, rotary=Rotary(6), backend=backend) for backend in BACKENDS)
    assert (found - true).abs().max() < 1e-12
    direction = torch.randn_like(found)
    slopes, exact = (torch.autograd.grad(o, list(inputs.values()), direction) for o in (found, true))
    for name, one, two in zip(inputs, slopes, exact, strict=True):
        assert (one - two).abs().max() < 1e-10, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_level_is_causal_softmax_attention(backend: str) -> None:
    inputs = {name: sampled(40)[name] for name in ("q", "k", "v")}
    plain = attnkit.softmax_attention(**inputs, mask=attnkit.causal())
    assert (hierarchical_attention(**inputs, backend=backend) - plain).abs().max() < 1e-12
    whole = hierarchical_attention(**sampled(40), backend=backend)
    assert (whole[..., :3] - plain).abs().max() < 1e-12, "and so is the finest level of any pyramid"


@pytest.mark.parametrize("backend", BACKENDS)
def test_gains_normalise_queries_and_keys_of_every_level(backend: str) -> None:
    """Longer queries and keys change nothing on any level, and one level is softmax attention over normalised ones."""
    inputs = sampled(20, NORMALISED)
    found = hierarchical_attention(**inputs, backend=backend)
    longer = {name: x * (3 if name in ("q", "k", "q_weight", "k_weight") else 1) for name, x in inputs.items()}
    assert (hierarchical_attention(**longer, backend=backend) - found).abs().max() < 1e-12
    q, k = (rms_norm(inputs[name], (6,), inputs[f"{name}_gain"][0]) for name in ("q", "k"))
    plain = attnkit.softmax_attention(q, k, inputs["v"], mask=attnkit.causal())
    assert (found[..., :3] - plain).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_sum_to_one_on_every_level(backend: str) -> None:
    """Equal values below are equal values above: each level's results are its value, at every position."""
    inputs = sampled(21, g=4)
    inputs["v"].fill_(1)
    value, expected = torch.ones(4, 3, dtype=torch.float64), []
    for down, weight in zip(inputs["down"], inputs["v_weight"], strict=True):
        expected.append(value)
        value = torch.einsum("he,hex,kxf->kf", value, down, weight)
    whole = torch.cat([*expected, value], -1)[None, :, None].expand(-1, -1, 21, -1)
    assert (hierarchical_attention(**inputs, backend=backend) - whole).abs().max() < 1e-12


@pytest.mark.parametrize(("n", "leaks"), [(5, {(2, 3)}), (8, set()), (9, {(2, 3), (2, 6), (2, 7)})])
def test_interpolation_would_leak_and_the_index_map_does_not(n: int, leaks: set[tuple[int, int]]) -> None:
    """Pairs (level, position) at which ``interpolate`` reads a token that stands after the position."""
    inputs = sampled(n)
    v = inputs["v"].requires_grad_()
    o = hierarchical_attention(**inputs)
    found = set()
    for level in (1, 2):
        stride = 2**level
        kept = torch.arange(0, n, stride, dtype=torch.float32)
        read = interpolate(kept[None, None], size=n, mode="nearest")[0, 0].long()
        found |= {(level, i) for i in range(n) if read[i] > i}
        for i in range(n):
            (slope,) = torch.autograd.grad(o[:, :, i, 3 * level : 3 * level + 3].sum(), v, retain_graph=True)
            assert not slope[:, :, i + 1 :].any() and slope[:, :, : i // stride * stride + 1].any()
            assert not slope[:, :, i // stride * stride + 1 :].any(), "what came after the last kept token"
    assert found == leaks


@pytest.mark.parametrize("pieces", [[1] * 37, [3, 1, 10, 16, 7], [1, 1, 32, 3], [37]])
@pytest.mark.parametrize("rotary", [None, Rotary(6)], ids=["order only", "rotary"])
def test_steps_equal_one_pass_at_every_position(pieces: list[int], rotary: Rotary | None) -> None:
    inputs = sampled(37)
    whole, start = hierarchical_attention(**inputs, rotary=rotary), 0
    weights = {name: inputs.pop(name) for name in ("down", "q_weight", "k_weight", "v_weight")}
    state = PyramidState(1, 2, 5, 40, 6, 3, results=4, dtype=torch.float64)
    for piece in pieces:
        new = {name: x[:, :, start : start + piece] for name, x in inputs.items()}
        o = hierarchical_attention_step(**new, state=state, **weights, rotary=rotary)
        state.check()
        assert (o - whole[:, :, start : start + piece]).abs().max() < 1e-12, f"tokens from {start} on"
        start += piece


def test_a_level_grows_every_2_to_the_l_tokens() -> None:
    state = PyramidState(1, 2, 3, 21, 4, 3, results=4)
    assert state.nbytes == 4 * ((21 + 11 + 6) * 2 * (4 + 3) + 2 * 4 * 3)
    exact = cost(Sizes(1, 4, 2, 1, 21, 4, 3), levels=3)
    assert exact.state_bytes(21) == state.nbytes
    long = cost(Sizes(1, 4, 2, 1, 1 << 20, 4, 3), levels=3)
    assert long.state_bytes_per_token == 4 * 2 * 7 * 7 // 4, "1 + 1/2 + 1/4 of a token"


def test_crops_keep_to_results_that_are_still_there() -> None:
    inputs = sampled(9, TWO)
    weights = {name: inputs.pop(name) for name in ("down", "q_weight", "k_weight", "v_weight")}
    state = PyramidState(1, 2, 2, 9, 6, 3, results=4, dtype=torch.float64)
    first = {name: x[:, :, :8] for name, x in inputs.items()}
    o = hierarchical_attention_step(**first, state=state, **weights)
    state.crop(7)  # token 7 has nothing on level 1
    last = {name: x[:, :, 7:8] for name, x in inputs.items()}
    assert (hierarchical_attention_step(**last, state=state, **weights) - o[:, :, 7:]).abs().max() < 1e-12
    with pytest.raises(ValueError, match="cannot go back from 8 to 6 tokens, level 1 has replaced the result that"):
        state.crop(6)
    with pytest.raises(ValueError, match="length is 9, expected 0 to 8"):
        state.crop(9)
    state.crop(0)
    assert (hierarchical_attention_step(**first, state=state, **weights) - o).abs().max() < 1e-12


def test_cost_counts_every_level() -> None:
    """13 tokens on three levels of 13, 7 and 4, and the last two of them: one on level 1, one on level 2."""
    s = Sizes(2, 4, 2, 13, 13, 6, 3)
    maps = 2 * 5 * (4 * 3 + 4 * 6 + 2 * 9)
    assert cost(s, levels=3, inner=5).flops == 2 * (2 * 4 * (91 + 28 + 10) * 9 + (7 + 4) * maps)
    last = Sizes(2, 4, 2, 2, 13, 6, 3)
    assert cost(last, levels=3, inner=5).flops == 2 * (2 * 4 * (12 + 13 + 7 + 4) * 9 + 2 * maps)


def test_training_memory_grows_with_the_length() -> None:
    sizes = []
    for n in (512, 1024):
        inputs = {name: x.float().requires_grad_() for name, x in sampled(n, TWO, d=8, e=8).items()}
        seen: dict[int, int] = {}

        def kept(x: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
            hierarchical_attention(**inputs)
        sizes.append(sum(seen.values()))
    assert sizes[1] < 2.2 * sizes[0]


REFUSALS = [
    ({"down": None}, ValueError, "got q_weight, k_weight, v_weight, expected all of down, q_weight"),
    ({"down": torch.zeros(4, 2, 3, 4)}, ValueError, "query heads is 2 in down"),
    ({"v_weight": torch.zeros(3, 2, 4, 3)}, ValueError, "levels is 3 in v_weight (3, 2, 4, 3) but 4 in down"),
    ({"k_weight": torch.zeros(4, 2, 4, 6, dtype=torch.int64)}, TypeError, "k_weight has dtype torch.int64"),
    ({"q": torch.zeros(1, 4, 8, 6, dtype=torch.float64)}, ValueError, "keys is 9 in k (1, 2, 9, 6) but 8 in q"),
    ({"rotary": Rotary(8)}, ValueError, "rotary is made for head size 8, keys have 6"),
    ({"k_gain": torch.ones(4, 6)}, ValueError, "k_gain has shape (4, 6), expected (5, 6), a row a level"),
]


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        hierarchical_attention(**{**sampled(9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"levels": 0}, "got 0 levels and inner 16, expected at least 1 each"),
        ({"kv_heads": 3}, "4 query heads and 3 KV heads"),
        ({"rotary": Rotary(8)}, "rotary is made for head size 8, heads have 4"),
    ],
)
def test_configurations_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HierarchicalConfig(16, 4, **wrong)


def test_a_state_of_other_levels_is_refused() -> None:
    inputs = {name: sampled(3)[name] for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match="the state has 3 levels and the weights make 1, expected one number"):
        hierarchical_attention_step(**inputs, state=PyramidState(1, 2, 3, 9, 6, 3, results=4, dtype=torch.float64))


def test_a_layer_of_one_level_has_no_maps_between_levels() -> None:
    layer = get("hierarchical").layer(HierarchicalConfig(16, 4, levels=1))
    assert sum(p.numel() for p in layer.parameters()) == 4 * 16 * 16
    assert layer(torch.randn(1, 3, 16)).shape == (1, 3, 16)
