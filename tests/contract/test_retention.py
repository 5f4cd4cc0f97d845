"""Retention: nested loops, golden row, its limit, published decays, Hugging Face's MiniMax, padding, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit.mechanisms.retention import (
    RetentionAttention,
    RetentionConfig,
    minimax_decays,
    retention_attention,
    retention_attention_step,
    retnet_decays,
)
from attnkit.positions import Rotary
from attnkit.recurrence import CHUNK, parallel
from attnkit.registry import get
from attnkit.spec import LayerPlace, Sizes
from attnkit.testing.budgets import assert_within

BACKENDS = ("chunk", "reference")


def sampled(n: int, m: int | None = None) -> dict[str, Any]:
    return get("retention").sample(n, Sizes(b=1, h=4, g=2, m=m or n, n=n, d=5, e=3), torch.float64)


def by_loops(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    (b, h, m, _), (g, n, e) = q.shape, v.shape[1:]
    o = q.new_zeros(b, h, m, e)
    for batch in range(b):
        for head in range(h):
            gamma, at = math.exp(log_decay[head]), head // (h // g)
            for i in range(m):
                for j in range(n - m + i + 1):
                    weight = scale * float(q[batch, head, i] @ k[batch, at, j]) * gamma ** (n - m + i - j)
                    o[batch, head, i] += weight * v[batch, at, j]
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [1, 4, 9])
def test_equals_nested_loops(backend: str, m: int) -> None:
    inputs = sampled(9, m)
    found = retention_attention(**inputs, scale=0.6, backend=backend)
    assert (found - by_loops(**inputs, scale=0.6)).abs().max() < 1e-12


@pytest.mark.parametrize("n", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1])
def test_all_forms_agree_with_gradients(n: int) -> None:
    """Across chunk edges in float64: both backends, the parallel form, and steps through a state."""
    inputs = {name: x.requires_grad_() for name, x in sampled(n).items()}
    q, k, v, log_decay = inputs.values()
    found = [retention_attention(**inputs, backend=backend) for backend in BACKENDS]
    found.append(parallel(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), log_decay, scale=5**-0.5)[0])
    state, rows = q.new_zeros(1, 4, 5, 3), []
    for part in zip(*(x.split([n // 2, n - n // 2], 2) for x in (q, k, v)), strict=True):
        o, state = retention_attention_step(*part, log_decay, state)
        rows.append(o)
    found.append(torch.cat(rows, 2))
    direction = torch.randn_like(found[0])
    slopes = [torch.autograd.grad(o, list(inputs.values()), direction) for o in found]
    for o, slope in zip(found[1:], slopes[1:], strict=True):
        assert (o - found[0]).abs().max() < 1e-10
        for one, two in zip(slope, slopes[0], strict=True):
            assert (one - two).abs().max() < 1e-10 * (1 + two.abs().max())


def generated(seed: int, *shape: int) -> Tensor:
    at = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.37 * at.square() + 1.1 * at + seed).sin().view(shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_row_of_retnet(backend: str) -> None:
    q, k, v = (generated(seed, 1, 1, 8, 4) for seed in (1, 2, 3))
    o = retention_attention(q, k, v, torch.tensor(retnet_decays(1), dtype=torch.float64), backend=backend)
    assert abs(o.sum() - -3.206488306) < 1e-8
    assert abs(o.abs().sum() - 20.530847018) < 1e-8
    assert (o[0, 0, -1] - torch.tensor([-0.403478, -1.377782, -0.226717, -0.469802])).abs().max() < 1e-6


def test_published_decays() -> None:
    assert [math.exp(x) for x in retnet_decays(3)] == pytest.approx([31 / 32, 63 / 64, 127 / 128], rel=1e-12)
    first, last = minimax_decays(64, 0, 80), minimax_decays(64, 79, 80)
    assert (-first[0], -first[63], -last[0]) == pytest.approx((0.917013213, 0.003906289, 9.2861e-06), rel=1e-4)
    with pytest.raises(ValueError, match="layer is 80 of 80, expected one from 0 to 79"):
        minimax_decays(64, 80, 80)


def test_without_decay_it_is_linear_attention_without_normaliser() -> None:
    inputs = sampled(CHUNK + 9)
    inputs["log_decay"].zero_()
    q, k, v = (inputs[name] for name in "qkv")
    weights = (q @ k.repeat_interleave(2, 1).mT).tril() * 5**-0.5
    assert (retention_attention(**inputs) - weights @ v.repeat_interleave(2, 1)).abs().max() < 1e-12


@pytest.mark.parametrize("preset", ["retnet", "lightning"])
def test_padding_never_advances_a_state(preset: str) -> None:
    """Left, right and between: rows of tokens and what is held afterwards are those without padding."""
    torch.manual_seed(0)
    spec = get("retention")
    layer = spec.layer(spec.preset(preset).configure(LayerPlace(16, 2))).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    state = layer.state(1, 9, dtype=torch.float64)
    rows, _ = layer.step(x, state)
    keep = torch.tensor([[False] * 3 + [True] * 4 + [False] * 2 + [True] * 5 + [False]])
    padded = torch.full((1, 15, 16), 7.0, dtype=torch.float64)
    padded[keep] = x[0]
    assert (layer(padded, keep=keep)[keep] - rows[0]).abs().max() < 1e-12
    other, parts = layer.state(1, 15, dtype=torch.float64), []
    for part, kept in zip(padded.split([2, 1, 5, 7], 1), keep.split([2, 1, 5, 7], 1), strict=True):
        y, other = layer.step(part, other, keep=kept)
        parts.append(y)
    assert (torch.cat(parts, 1)[keep] - rows[0]).abs().max() < 1e-12
    for name, held in state.view().items():
        assert (other.view()[name] - held).abs().max() < 1e-12, name


@pytest.fixture(scope="module")
def minimax() -> Any:
    """Hugging Face's own model with random weights: two lightning layers, one of softmax attention."""
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle of MiniMax, is not installed")
    config = transformers.MiniMaxConfig(
        vocab_size=99, hidden_size=48, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, block_size=8, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["linear_attention", "full_attention", "linear_attention"], bos_token_id=1, eos_token_id=2,
        pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MiniMaxForCausalLM(config).eval().float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn_like(weight))
            else:
                weight.mul_(5)
    return model


def heard(model: Any, *calls: dict[str, Any]) -> tuple[dict[int, list[tuple[Tensor, Tensor]]], Any]:
    """What went into each lightning layer and what came out, call by call, and the cache after the last."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {0: [], 2: []}
    hooks = [
        model.model.layers[at].self_attn.register_forward_hook(
            lambda module, args, kwargs, out, at=at: found[at].append((kwargs["hidden_states"], out[0])),
            with_kwargs=True,
        )
        for at in found
    ]
    cache = None
    with torch.no_grad():
        for call in calls:
            cache = model(**call, past_key_values=cache, use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    return found, cache


def assert_same_layer(layer: RetentionAttention, x: Tensor, found: Tensor, theirs: Tensor) -> None:
    """Theirs is a float32 program as well: ours keeps to the budget that it sets, and both to float64."""
    with torch.no_grad():
        exact = RetentionAttention(layer.config).double()
        exact.load_state_dict(layer.state_dict())
        gold = exact(x.double())
    assert_within(found.clone(), gold, theirs.clone(), torch.float32)
    assert_within(theirs.clone(), gold, found.clone(), torch.float32)


@pytest.mark.parametrize("at", [0, 2])
def test_weights_of_minimax_give_its_outputs(minimax: Any, at: int) -> None:
    """In one pass over blocks of 8, and with 5 tokens first and then one by one."""
    weights = minimax.model.layers[at].self_attn.state_dict()
    layer = RetentionAttention.from_minimax(weights, heads=4, layer=at, layers=3)
    tokens = torch.randint(3, 99, (2, 21), generator=torch.Generator().manual_seed(1))
    ((x, theirs),) = heard(minimax, {"input_ids": tokens})[0][at]
    with torch.no_grad():
        assert_same_layer(layer, x, layer(x), theirs)
    found, cache = heard(minimax, *({"input_ids": part} for part in tokens.split([5, *[1] * 16], 1)))
    parts = found[at]
    state, rows = layer.state(2, 21), []
    with torch.no_grad():
        for part, _ in parts:
            y, state = layer.step(part, state)
            rows.append(y)
    inputs, theirs = (torch.cat(side, 1) for side in zip(*parts, strict=True))
    assert_same_layer(layer, inputs, torch.cat(rows, 1), theirs)
    held, kept = state.view()["state"], cache.get_linear_cache(at)
    assert (held - kept).abs().max() < 1e-6 * kept.abs().max()


def test_padding_on_the_left_is_that_of_minimax(minimax: Any) -> None:
    layer = RetentionAttention.from_minimax(minimax.model.layers[0].self_attn.state_dict(), heads=4, layer=0, layers=3)
    tokens = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(2))
    keep = torch.arange(11) >= torch.tensor([[4], [0]])
    ((x, theirs),) = heard(minimax, {"input_ids": tokens, "attention_mask": keep.long()})[0][0]
    with torch.no_grad():
        found = layer(x, keep=keep)
    assert (found - theirs)[keep].abs().max() < 1e-5 * theirs[keep].abs().max()


def test_other_weights_are_refused(minimax: Any) -> None:
    weights = dict(minimax.model.layers[0].self_attn.state_dict())
    with pytest.raises(ValueError, match=r"slope_rate starts with 0.25\d*, expected .* for layer 1 of 3 with 4 heads"):
        RetentionAttention.from_minimax(weights, heads=4, layer=1, layers=3)
    with pytest.raises(ValueError, match="qkv_proj has 192 rows, expected a multiple of 3 times 5 heads"):
        RetentionAttention.from_minimax(weights, heads=5, layer=0, layers=3)
    del weights["norm.weight"]
    with pytest.raises(ValueError, match="got weights .*, expected .*norm.weight"):
        RetentionAttention.from_minimax(weights, heads=4, layer=0, layers=3)


def test_a_state_of_minimax_01_is_as_large_as_predicted() -> None:
    """64 heads of 128 in float32, at any capacity; built without memory."""
    with torch.device("meta"):
        config = RetentionConfig(6144, 64, minimax_decays(64, 0, 80), head_size=128, norm="all", gate="sigmoid")
        layer = RetentionAttention(config)
    predicted = layer.cost(1, 1_000_000, dtype=torch.bfloat16).state_bytes(1_000_000)
    assert predicted == layer.state(1, 1_000_000, dtype=torch.bfloat16, device="meta").nbytes == 4 << 20


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"log_decay": torch.zeros(2)}, ValueError, "query heads is 2 in log_decay (2,) but 4 in q"),
    (
        {"log_decay": torch.zeros(4, dtype=torch.int64)},
        TypeError,
        "log_decay has dtype torch.int64, expected a floating",
    ),
    ({"keep": torch.ones(1, 9)}, TypeError, "keep has dtype torch.float32, expected bool"),
    ({"q": torch.zeros(1, 4, 10, 5, dtype=torch.float64)}, ValueError, "got 10 queries and 9 keys"),
]


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        retention_attention(**{**sampled(9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"width": 30}, "got width 30 and 4 heads"),
    ({"log_decay": (-1.0,)}, "expected a number of at most 0 for each of 4 heads"),
    ({"log_decay": (0.1, 0.0, 0.0, 0.0)}, "expected a number of at most 0"),
    ({"rotary": Rotary(8)}, "rotary is made for head size 8, heads have 4"),
    ({"activation": "relu"}, "activation is 'relu', expected 'silu' or None"),
    ({"gate": "relu"}, "gate 'relu', expected 'head' or 'all'"),
]


@pytest.mark.parametrize(("wrong", "said"), SETTINGS)
def test_settings_that_do_not_fit_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        RetentionConfig(**{"width": 16, "heads": 4, "log_decay": retnet_decays(4), **wrong})
    assert said in str(caught.value)
