"""PaTH attention: explicit Householder products, keys rewritten token by token, limits, block edges, its state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.mechanisms.forgetting import forgetting_attention
from attnkit.mechanisms.path import PathConfig, path_attention, path_attention_step
from attnkit.mechanisms.path.chunk import BLOCK
from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.state import RewrittenState

BACKENDS = ("chunk", "reference")
EDGES = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1)


def sampled(n: int, m: int | None = None, gates: bool = False, **sizes: int) -> dict[str, Any]:
    size = {"b": 1, "h": 4, "g": 2, "m": m or n, "n": n, "d": 5, "e": 3, **sizes}
    drawn = get("path").sample(n, Sizes(**size), torch.float64)
    return drawn if gates else {**drawn, "log_f": None}


def by_products(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, log_f: Tensor | None, scale: float) -> Tensor:
    """One pair at a time, with the d x d matrices multiplied out."""
    (b, h, m, d), (g, n, e) = q.shape, v.shape[1:]
    o = q.new_zeros(b, h, m, e)
    for batch in range(b):
        for head in range(h):
            kv = head // (h // g)
            for i in range(m):
                at, logits = n - m + i, []
                for j in range(at + 1):
                    product = torch.eye(d, dtype=q.dtype)
                    for t in range(j + 1, at + 1):
                        direction = w[batch, kv, t]
                        product = product @ (
                            torch.eye(d, dtype=q.dtype) - beta[batch, kv, t] * torch.outer(direction, direction)
                        )
                    gate = 0 if log_f is None else log_f[batch, head, j + 1 : at + 1].sum()
                    logits.append(scale * k[batch, kv, j] @ product @ q[batch, head, i] + gate)
                o[batch, head, i] = torch.stack(logits).softmax(0) @ v[batch, kv, : at + 1]
    return o


def by_rewriting(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, log_f: Tensor | None, scale: float
) -> Tensor:
    """Token by token: reflect every key so far, add the new one, attend as plain softmax attention does."""
    (h, m), (g, n) = q.shape[1:3], k.shape[1:3]
    keys, rows = k[:, :, :0], []
    for t in range(n):
        at, strength = w[:, :, t, None], beta[:, :, t, None, None]
        keys = torch.cat([keys - strength * (keys * at).sum(-1, keepdim=True) * at, k[:, :, t, None]], 2)
        if t < n - m:
            continue
        logits = q[:, :, t - (n - m), None] @ keys.repeat_interleave(h // g, 1).mT * scale
        if log_f is not None:
            later = log_f[:, :, : t + 1].flip(-1).cumsum(-1).flip(-1) - log_f[:, :, : t + 1]
            logits = logits + later[:, :, None]
        rows.append(logits.softmax(-1) @ v[:, :, : t + 1].repeat_interleave(h // g, 1))
    return torch.cat(rows, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("m", [1, 3, 7])
def test_equals_explicit_products(backend: str, gates: bool, m: int) -> None:
    inputs = sampled(7, m, gates)
    found = path_attention(**inputs, scale=0.6, backend=backend)
    assert (found - by_products(**inputs, scale=0.6)).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [*EDGES, 200])
def test_equals_keys_rewritten_token_by_token(backend: str, n: int) -> None:
    """Across block edges, for all queries and for the last few."""
    for m in {n, (n + 1) // 2}:
        inputs = sampled(n, m, gates=n % 2 == 0)
        found = path_attention(**inputs, scale=1.1, backend=backend)
        assert (found - by_rewriting(**inputs, scale=1.1)).abs().max() < 1e-10


@pytest.mark.parametrize("n", EDGES)
def test_gradients_of_blocks_are_those_of_the_definition(n: int) -> None:
    inputs = {name: x.requires_grad_() for name, x in sampled(n, (n + 1) // 2, gates=True).items()}
    found, true = (path_attention(**inputs, backend=backend) for backend in BACKENDS)
    direction = torch.randn_like(found)
    slopes, exact = (torch.autograd.grad(o, list(inputs.values()), direction) for o in (found, true))
    for name, one, two in zip(inputs, slopes, exact, strict=True):
        assert (one - two).abs().max() < 1e-10, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_reflections_are_softmax_attention_without_positions(backend: str) -> None:
    inputs = sampled(BLOCK + 9)
    inputs["beta"].zero_()
    found = path_attention(**inputs, backend=backend)
    plain = attnkit.softmax_attention(inputs["q"], inputs["k"], inputs["v"], mask=attnkit.causal())
    assert (found - plain).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_without_reflections_are_forgetting_attention(backend: str) -> None:
    inputs = sampled(BLOCK + 9, gates=True)
    inputs["beta"].zero_()
    found = path_attention(**inputs, backend=backend)
    names = ("q", "k", "v", "log_f")
    assert (found - forgetting_attention(**{name: inputs[name] for name in names})).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_open_gates_change_nothing(backend: str) -> None:
    inputs = sampled(BLOCK + 9, gates=True)
    inputs["log_f"].zero_()
    found = path_attention(**inputs, backend=backend)
    assert (found - path_attention(**{**inputs, "log_f": None})).abs().max() < 1e-12


@pytest.mark.parametrize("pieces", [[1] * (2 * BLOCK + 2), [BLOCK - 1, 3, BLOCK], [1, 2 * BLOCK + 1]])
def test_steps_equal_one_pass_at_every_position(pieces: list[int]) -> None:
    n = sum(pieces)
    inputs = sampled(n, gates=True)
    whole, total = path_attention(**inputs), inputs["log_f"].cumsum(-1)
    keys, start = inputs["k"][:, :, :0], 0
    for piece in pieces:
        end = start + piece
        q, w, beta = (inputs[name][:, :, start:end] for name in ("q", "w", "beta"))
        k = torch.cat([keys, inputs["k"][:, :, start:end]], 2)
        o, keys = path_attention_step(q, k, inputs["v"][:, :, :end], w, beta, total[:, :, :end])
        assert (o - whole[:, :, start:end]).abs().max() < 1e-10, f"tokens {start} to {end}"
        start = end


def test_a_snapshot_goes_on_as_a_new_prefill_would() -> None:
    torch.manual_seed(0)
    layer = get("path").layer(PathConfig(16, 4, kv_heads=2, gates=True, qk_norm=True)).double()
    x, draft = torch.randn(2, 2, BLOCK + 9, 16, dtype=torch.float64)
    state = layer.state(2, 2 * BLOCK, dtype=torch.float64)
    layer.step(x[:, : BLOCK - 2], state)
    snapshot = state.fork()
    layer.step(draft[:, :5], state)
    y, _ = layer.step(x[:, BLOCK - 2 :], snapshot)
    assert (y - layer(x)[:, BLOCK - 2 :]).abs().max() < 1e-10


def test_a_crop_is_refused() -> None:
    layer = get("path").layer(PathConfig(16, 4))
    state = layer.state(1, 8)
    assert isinstance(state, RewrittenState)
    with pytest.raises(ValueError, match=r"rewrite: k has shape \(1, 4, 1, 4\), expected \(1, 4, 0, 4\)"):
        state.rewrite(k=torch.zeros(1, 4, 1, 4))
    layer.step(torch.randn(1, 3, 16), state)
    state.crop(3)
    with pytest.raises(NotImplementedError, match="cannot go back from 3 to 2 tokens.*fork before drafting"):
        state.crop(2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoil", [-0.5, 2.5, 1e30, torch.nan, torch.inf])
def test_what_is_no_reflection_gives_nan_from_there_on(backend: str, spoil: float) -> None:
    inputs = sampled(BLOCK + 20)
    clean = path_attention(**inputs, backend=backend)
    at = BLOCK + 3
    inputs["beta"][0, 1, at] = spoil
    found = path_attention(**inputs, backend=backend)
    assert torch.equal(found[:, :, :at], clean[:, :, :at])
    assert found[:, 2:, at:].isnan().all()
    assert torch.equal(found[:, :2], clean[:, :2]), "another KV head"


def test_long_input_builds_no_square() -> None:
    """Nothing that autograd keeps for the backward grows faster than the input."""
    sizes = []
    for n in (4 * BLOCK, 8 * BLOCK):
        inputs = {name: x.float().requires_grad_() for name, x in sampled(n, gates=True, h=2, g=1, d=8).items()}
        seen: dict[int, int] = {}  # by memory, as blocks keep views of one tensor

        def kept(x: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
            path_attention(**inputs, backend="chunk")
        sizes.append(sum(seen.values()))
    assert sizes[1] < 2.2 * sizes[0]


REFUSALS = [
    ({"w": torch.zeros(1, 2, 8, 5, dtype=torch.float64)}, ValueError, "keys is 8 in w"),
    ({"w": torch.zeros(1, 2, 9, 5)}, TypeError, "w has dtype torch.float32 but q torch.float64"),
    ({"beta": torch.zeros(1, 4, 9)}, ValueError, "KV heads is 4 in beta"),
    ({"beta": torch.zeros(1, 2, 9, dtype=torch.int64)}, TypeError, "beta has dtype torch.int64, expected a floating"),
    ({"log_f": torch.zeros(1, 2, 9)}, ValueError, "query heads is 2 in log_f"),
    ({"q": torch.zeros(1, 4, 10, 5, dtype=torch.float64)}, ValueError, "got 10 queries and 9 keys, expected at most"),
]


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        path_attention(**{**sampled(9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
