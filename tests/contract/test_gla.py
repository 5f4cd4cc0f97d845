"""Gated linear attention: nested loops, golden row, limits, steps, the published layer, padding, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu

from attnkit.mechanisms.gla import GatedLinearConfig, gla_attention, gla_attention_step
from attnkit.mechanisms.gla.layer import FLA
from attnkit.mechanisms.retention import retention_attention
from attnkit.recurrence import CHUNK, TILE, parallel
from attnkit.registry import get
from attnkit.spec import Sizes

BACKENDS = ("chunk", "reference")
BY_CHANNEL, BY_TOKEN = 3, 2


def sampled(n: int, m: int | None = None, seed: int = BY_CHANNEL) -> dict[str, Any]:
    return get("gla").sample(seed, Sizes(b=1, h=4, g=2, m=m or n, n=n, d=5, e=3), torch.float64)


def by_loops(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    """One pair and one channel at a time, with the gates of the tokens between multiplied."""
    (b, h, m, d), (g, n, e) = q.shape, v.shape[1:]
    gates = log_decay.exp() if log_decay.dim() == 4 else log_decay.exp()[..., None].expand(b, g, n, d)
    o = q.new_zeros(b, h, m, e)
    for batch in range(b):
        for head in range(h):
            at = head // (h // g)
            for i in range(n - m, n):
                for j in range(i + 1):
                    weight = 0.0
                    for c in range(d):
                        kept = math.prod(float(gates[batch, at, t, c]) for t in range(j + 1, i + 1))
                        weight += float(q[batch, head, i - n + m, c] * k[batch, at, j, c]) * kept
                    o[batch, head, i - n + m] += scale * weight * v[batch, at, j]
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [BY_CHANNEL, BY_TOKEN], ids=["channel", "token"])
@pytest.mark.parametrize("m", [1, 4, 9])
def test_equals_nested_loops(backend: str, seed: int, m: int) -> None:
    inputs = sampled(9, m, seed)
    found = gla_attention(**inputs, scale=0.6, backend=backend)
    assert (found - by_loops(**inputs, scale=0.6)).abs().max() < 1e-12


@pytest.mark.parametrize("n", [1, TILE - 1, TILE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1])
@pytest.mark.parametrize("seed", [BY_CHANNEL, BY_TOKEN], ids=["channel", "token"])
def test_all_forms_agree_with_gradients(n: int, seed: int) -> None:
    """Across edges of tiles and chunks in float64: both backends, the parallel form, and steps through a state."""
    inputs = {name: x.requires_grad_() for name, x in sampled(n, seed=seed).items()}
    found = [gla_attention(**inputs, backend=backend) for backend in BACKENDS]
    found.append(parallel(**inputs, scale=5**-0.5)[0])
    state, rows = inputs["q"].new_zeros(1, 2, 5, 3), []
    for part in zip(*(x.split([n // 2, n - n // 2], 2) for x in inputs.values()), strict=True):
        o, state = gla_attention_step(*part, state)
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
def test_golden_row(backend: str) -> None:
    q, k, v, gates = (generated(seed, 1, 1, 8, 4) for seed in (1, 2, 3, 25))
    o = gla_attention(q, k, v, logsigmoid(gates), backend=backend)
    assert abs(o.sum() - -2.408541292) < 1e-8
    assert abs(o.abs().sum() - 11.114400208) < 1e-8
    assert (o[0, 0, -1] - torch.tensor([-0.168676, 0.425734, -0.754375, -0.039796])).abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [BY_CHANNEL, BY_TOKEN], ids=["channel", "token"])
def test_constant_gates_are_retention_and_open_ones_never_fade(backend: str, seed: int) -> None:
    for rate in (0.0, 0.1):
        inputs = sampled(CHUNK + 9, seed=seed)
        inputs["log_decay"].fill_(-rate)
        found = gla_attention(**inputs, backend=backend)
        fixed = torch.full((4,), -rate, dtype=torch.float64)
        assert (found - retention_attention(**{**inputs, "log_decay": fixed})).abs().max() < 1e-12


def test_the_layer_is_the_published_one() -> None:
    """Written out from its weights by their names in flash-linear-attention, token by token."""
    torch.manual_seed(0)
    layer = get("gla").layer(GatedLinearConfig(16, 2)).double()
    sizes = {"q_proj.weight": (8, 16), "k_proj.weight": (8, 16), "v_proj.weight": (16, 16), "g_proj.weight": (16, 16),
             "gk_proj.0.weight": (16, 16), "gk_proj.1.weight": (8, 16), "gk_proj.1.bias": (8,),
             "g_norm_swish_gate.weight": (8,), "o_proj.weight": (16, 16)}  # fmt: skip
    w = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    layer.load_fla(w)
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    state, rows = torch.zeros(2, 4, 8, dtype=torch.float64), []
    for t in range(7):
        q, k, v = (w[f"{name}_proj.weight"] @ x[0, t] for name in "qkv")
        gates = torch.sigmoid(w["gk_proj.1.weight"] @ (w["gk_proj.0.weight"] @ x[0, t]) + w["gk_proj.1.bias"]) ** (
            1 / 16
        )
        state = gates.view(2, 4, 1) * state + k.view(2, 4, 1) * v.view(2, 1, 8)
        o = (q.view(2, 1, 4) @ state)[:, 0] * 4**-0.5
        o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w["g_norm_swish_gate.weight"]
        rows.append(w["o_proj.weight"] @ (o.flatten() * silu(w["g_proj.weight"] @ x[0, t])))
    assert (layer(x)[0] - torch.stack(rows)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="load_fla: got weights"):
        layer.load_fla({name: x for name, x in w.items() if name != "q_proj.weight"})
    assert set(FLA.values()) == set(layer.state_dict())


def test_padding_never_advances_a_state() -> None:
    """Left, right and between: rows of tokens and what is held afterwards are those without padding."""
    torch.manual_seed(0)
    layer = get("gla").layer(GatedLinearConfig(16, 4, kv_heads=2)).double()
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
    assert (other.view()["state"] - state.view()["state"]).abs().max() < 1e-12


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"log_decay": torch.zeros(1, 2, 9, 4)}, ValueError, "key size is 4 in log_decay"),
    ({"log_decay": torch.zeros(1, 4, 9)}, ValueError, "KV heads is 4 in log_decay"),
    ({"log_decay": torch.zeros(1, 2, 9, dtype=torch.int64)}, TypeError, "log_decay has dtype torch.int64, expected a"),
    ({"keep": torch.ones(1, 9)}, TypeError, "keep has dtype torch.float32, expected bool"),
    ({"q": torch.zeros(1, 4, 10, 5, dtype=torch.float64)}, ValueError, "got 10 queries and 9 keys"),
]


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        gla_attention(**{**sampled(9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"width": 20}, "got width 20 and 4 heads, expected a width that twice the heads divide"),
    ({"kv_heads": 3}, "got 4 query heads and 3 KV heads"),
    ({"rank": 0}, "rank is 0"),
]


@pytest.mark.parametrize(("wrong", "said"), SETTINGS)
def test_settings_that_do_not_fit_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        GatedLinearConfig(**{"width": 16, "heads": 4, **wrong})
    assert said in str(caught.value)
