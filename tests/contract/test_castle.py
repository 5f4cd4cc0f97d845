"""CASTLE: the recurrent definition, explicit loops, block edges, limits, the published code, its state, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import attnkit
from attnkit.mechanisms.castle import CastleConfig, castle_attention, castle_attention_step
from attnkit.mechanisms.castle.chunk import BLOCK
from attnkit.positions import Rotary
from attnkit.registry import get
from attnkit.spec import LayerPlace, Sizes
from attnkit.state import RewrittenState

BACKENDS = ("chunk", "reference")
EDGES = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1)
WINDOWS = (None, 1, 5, BLOCK - 1, BLOCK, BLOCK + 1)


def sampled(n: int, m: int | None = None, window: int | None = None, **sizes: int) -> dict[str, Any]:
    size = {"b": 1, "h": 2, "g": 2, "m": m or n, "n": n, "d": 5, "e": 3, **sizes}
    return {**get("castle").sample(n, Sizes(**size), torch.float64), "window": window}


def by_loops(
    q: Tensor, k: Tensor, v: Tensor, lq: Tensor, lk: Tensor, lv: Tensor, window: int | None, scale: float
) -> Tensor:
    """One number at a time: whole lookahead keys for every query."""
    (b, h, m, _), (n, e) = q.shape, v.shape[2:]
    o = q.new_zeros(b, h, m, e)
    for batch in range(b):
        for head in range(h):
            at = (batch, head)
            for i in range(m):
                t, logits = n - m + i, []
                for s in range(t + 1):
                    u = torch.zeros_like(q[at][i])
                    for j in range(s + 1, min(t, n if window is None else s + window) + 1):
                        u = u + lv[at][j] / (1 + math.exp(-scale * float(lq[at][s] @ lk[at][j])))
                    met = scale * float(q[at][i] @ u)
                    logits.append(scale * float(q[at][i] @ k[at][s]) - met / (1 + math.exp(-met)))
                powers = [math.exp(x) for x in logits]
                o[batch, head, i] = sum(p * x for p, x in zip(powers, v[at], strict=False)) / sum(powers)
    return o


def by_recurrence(
    q: Tensor, k: Tensor, v: Tensor, lq: Tensor, lk: Tensor, lv: Tensor, window: int | None, scale: float
) -> Tensor:
    """Token by token: every lookahead key takes up the new token, then the token attends."""
    m, n = q.shape[2], k.shape[2]
    u, rows = lq[:, :, :0], []
    for t in range(n):
        gate = torch.sigmoid((lq[:, :, :t] * lk[:, :, t : t + 1]).sum(-1, keepdim=True) * scale)
        if window is not None:
            gate[:, :, : max(0, t - window)] = 0
        u = torch.cat([u + gate * lv[:, :, t : t + 1], torch.zeros_like(lv[:, :, :1])], 2)
        if t >= n - m:
            new = q[:, :, t - (n - m), None]
            met = new @ u.mT * scale
            logits = new @ k[:, :, : t + 1].mT * scale - met * torch.sigmoid(met)
            rows.append(logits.softmax(-1) @ v[:, :, : t + 1])
    return torch.cat(rows, 2)


def definition(form: Any, inputs: dict[str, Any], scale: float) -> Tensor:
    tensors = [inputs[name] for name in ("q", "k", "v", "lookahead_q", "lookahead_k", "lookahead_v")]
    o: Tensor = form(*tensors, inputs["window"], scale)
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("m", "window"), [(7, None), (3, None), (7, 1), (4, 3)])
def test_equals_explicit_loops(backend: str, m: int, window: int | None) -> None:
    inputs = sampled(7, m, window, b=2)
    found = castle_attention(**inputs, scale=0.6, backend=backend)
    assert (found - definition(by_loops, inputs, 0.6)).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", EDGES)
def test_equals_the_recurrence(backend: str, n: int) -> None:
    """Across block edges, for windows of any part of a block, for all queries and for the last few."""
    for m in {n, (n + 1) // 2}:
        for window in WINDOWS:
            inputs = sampled(n, m, window)
            found = castle_attention(**inputs, scale=1.1, backend=backend)
            assert (found - definition(by_recurrence, inputs, 1.1)).abs().max() < 1e-10


@pytest.mark.parametrize("n", [*EDGES, 3 * BLOCK + 5])
@pytest.mark.parametrize("window", WINDOWS)
def test_written_gradients_are_those_of_the_definition(n: int, window: int | None) -> None:
    inputs = sampled(n, (2 * n + 2) // 3, window)
    leaves = [x.requires_grad_() for x in inputs.values() if isinstance(x, Tensor)]
    found, true = (castle_attention(**inputs, lookahead_scale=0.8, backend=backend) for backend in BACKENDS)
    direction = torch.randn_like(found)
    slopes, exact = (torch.autograd.grad(o, leaves, direction) for o in (found, true))
    for name, one, two in zip(inputs, slopes, exact, strict=False):
        assert (one - two).abs().max() < 1e-10, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits(backend: str) -> None:
    """The first token returns its value; no lookahead values, or a scale of 0, leave softmax attention."""
    inputs = sampled(BLOCK + 9)
    assert (castle_attention(**inputs, backend=backend)[:, :, 0] - inputs["v"][:, :, 0]).abs().max() < 1e-12
    plain = attnkit.softmax_attention(inputs["q"], inputs["k"], inputs["v"], mask=attnkit.causal())
    without = castle_attention(**{**inputs, "lookahead_v": torch.zeros_like(inputs["k"])}, backend=backend)
    assert (without - plain).abs().max() < 1e-12
    assert (castle_attention(**inputs, lookahead_scale=0.0, backend=backend) - plain).abs().max() < 1e-12
    wide = castle_attention(**{**inputs, "window": BLOCK + 8}, backend=backend)  # the last token is 72 after the first
    assert (wide - castle_attention(**inputs)).abs().max() < 1e-12
    near = castle_attention(**{**inputs, "window": BLOCK + 7}, backend=backend)
    assert (near - wide)[:, :, -1].abs().max() > 1e-6


@pytest.mark.parametrize("rotary", [False, True])
def test_equals_the_published_code(rotary: bool) -> None:
    """lookahead_keys_attention, a whole sequence and step by step; it has no window."""
    published = pytest.importorskip("lookahead_keys_attention", reason="the published code of CASTLE is not installed")
    torch.manual_seed(0)
    theirs = published.Castle(16, 3, 8, use_triton=False, rotary_emb=rotary).double()
    ours = (
        get("castle").layer(CastleConfig(16, 3, 8, rotary=Rotary(8, style="interleaved") if rotary else None)).double()
    )
    names = ("lookahead_q", "lookahead_k", "lookahead_v", "q", "k", "v")
    with torch.no_grad():
        for name, weight in zip(names, theirs.to_all_qkv.weight.chunk(6), strict=True):
            getattr(ours, name).weight.copy_(weight)
        ours.o.weight.copy_(theirs.combine_heads.weight)
        if rotary:
            theirs.rotary_emb.freqs.copy_(ours.config.rotary.frequencies())  # theirs were made in float32
        x = torch.randn(2, BLOCK + 6, 16, dtype=torch.float64)
        split = BLOCK - 2
        head, cache = theirs(x[:, :split], return_next_cache=True)
        rows = [head]
        for t in range(split, x.shape[1]):
            y, cache = theirs(x[:, t : t + 1], cache=cache)
            rows.append(y)
        assert (ours(x) - theirs(x)).abs().max() < 1e-12
        assert (ours(x) - torch.cat(rows, 1)).abs().max() < 1e-12
        state = ours.state(2, x.shape[1], dtype=torch.float64)
        ours.step(x[:, : split + 4], state)
        ours.step(x[:, split + 4 :], state)
        assert (state.view()["u"] - cache.U).abs().max() < 1e-12


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("pieces", [[1] * (BLOCK + 3), [BLOCK - 1, 3, BLOCK], [1, 2 * BLOCK + 1]])
def test_steps_equal_one_pass_at_every_position(window: int | None, pieces: list[int]) -> None:
    n = sum(pieces)
    inputs = sampled(n, window=window)
    whole = castle_attention(**inputs)
    u, start = inputs["k"][:, :, :0], 0
    for piece in pieces:
        end = start + piece
        reach = min(end, piece + (n if window is None else window))
        q, lk, lv = (inputs[name][:, :, start:end] for name in ("q", "lookahead_k", "lookahead_v"))
        k, v, lq = (inputs[name][:, :, :end] for name in ("k", "v", "lookahead_q"))
        u = torch.cat([u, torch.zeros_like(lv)], 2)
        o, moved = castle_attention_step(q, k, v, lq[:, :, end - reach :], lk, lv, u, window=window)
        u = torch.cat([u[:, :, : end - reach], moved], 2)
        assert (o - whole[:, :, start:end]).abs().max() < 1e-10, f"tokens {start} to {end}"
        start = end


@pytest.mark.parametrize("window", [None, 7, 500])
def test_a_snapshot_goes_on_as_a_new_prefill_would(window: int | None) -> None:
    torch.manual_seed(0)
    layer = get("castle").layer(CastleConfig(16, 2, window=window, rotary=Rotary(8), qk_norm=True)).double()
    x, draft = torch.randn(2, 2, BLOCK + 9, 16, dtype=torch.float64)
    state = layer.state(2, 2 * BLOCK, dtype=torch.float64)
    layer.step(x[:, : BLOCK - 2], state)
    snapshot = state.fork()
    layer.step(draft[:, :5], state)
    with pytest.raises(NotImplementedError, match=f"cannot go back from {BLOCK + 3} to {BLOCK - 2} tokens"):
        state.crop(BLOCK - 2)
    y, _ = layer.step(x[:, BLOCK - 2 :], snapshot)
    assert (y - layer(x)[:, BLOCK - 2 :]).abs().max() < 1e-10


def test_bytes_of_the_state() -> None:
    """Four numbers a channel and token; a window keeps its last lookahead queries only; sums are float32."""
    for window, elements in ((None, 4 * 100), (7, 3 * 100 + 7), (500, 4 * 100)):
        layer = get("castle").layer(CastleConfig(16, 2, window=window))
        assert layer.state(3, 100).nbytes == 3 * elements * 16 * 4
        assert layer.cost(1, 100).state_bytes(100) == elements * 16 * 4
        half = layer.state(3, 100, dtype=torch.bfloat16)
        assert half.view()["u"].dtype == torch.float32
        assert half.nbytes == 3 * layer.cost(1, 100, dtype=torch.bfloat16).state_bytes(100)


def test_a_rewrite_of_a_few_tokens_is_one_of_the_last() -> None:
    state = RewrittenState(1, 9, {"u": (1, 2)}, (0, 1))
    state.append(u=torch.zeros(1, 1, 5, 2))
    state.rewrite(u=torch.ones(1, 1, 3, 2))
    assert state.view()["u"][0, 0, :, 0].tolist() == [0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match=r"u has shape \(1, 1, 6, 2\), expected \(1, 1, 5, 2\) or fewer tokens"):
        state.rewrite(u=torch.ones(1, 1, 6, 2))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("window", [None, 70])
def test_long_input_builds_no_square(window: int | None) -> None:
    """No tensor of a forward or a backward grows faster than the input, so none holds a number for every pair."""
    largest = []
    for n in (4 * BLOCK, 8 * BLOCK):
        inputs = sampled(n, window=window, h=1, g=1)
        for x in inputs.values():
            if isinstance(x, Tensor):
                x.requires_grad_()
        with Largest() as seen:
            castle_attention(**inputs, backend="chunk").sum().backward()
        largest.append(seen.elements)
    assert largest[1] <= 2 * largest[0] <= 8 * BLOCK * BLOCK * 1.2


def test_a_window_spares_the_blocks_beyond_it() -> None:
    """Of four products over all pairs a window leaves one: of queries with keys that no longer move."""
    counts = []
    for window in (None, 8):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            castle_attention(**sampled(16 * BLOCK, window=window, h=1, g=1, d=64), backend="chunk")
        counts.append(counter.get_total_flops())
    assert counts[1] < counts[0] / 2


def test_presets_have_the_parameters_of_softmax_attention() -> None:
    """Four sevenths of the heads, each with seven maps."""
    layer = get("castle").layer(get("castle").preset("castle_full").configure(LayerPlace(112, 7)))
    assert sum(weight.numel() for weight in layer.parameters()) == 4 * 112 * 112
    assert get("castle").preset("castle_window").configure(LayerPlace(112, 7, window=9)).window == 9


REFUSALS = [
    ({"k": torch.zeros(1, 2, 8, 5, dtype=torch.float64)}, ValueError, "keys is 9 in v"),
    ({"lookahead_q": torch.zeros(1, 2, 9, 5)}, TypeError, "lookahead_q has dtype torch.float32 but q torch.float64"),
    ({"lookahead_v": torch.zeros(1, 2, 9, 3, dtype=torch.float64)}, ValueError, "key size is 3 in lookahead_v"),
    ({"q": torch.zeros(1, 4, 9, 5, dtype=torch.float64)}, ValueError, "got 4 query heads and 2 KV heads, expected one"),
    ({"q": torch.zeros(1, 2, 10, 5, dtype=torch.float64)}, ValueError, "got 10 queries and 9 keys, expected at most"),
    ({"window": 0}, ValueError, "window is 0, expected at least 1"),
    ({"window": 2.5}, TypeError, "window is 2.5, expected a number of later tokens"),
]


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        castle_attention(**{**sampled(9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refusals_of_a_step_and_a_layer() -> None:
    x = torch.zeros(1, 2, 9, 4)
    new = x[:, :, :2]
    with pytest.raises(ValueError, match="got lookahead_q of 9 tokens, expected the last 5 of 9"):
        castle_attention_step(new, x, x, x, new, new, x, window=3)
    with pytest.raises(TypeError, match="u is torch.float64 on cpu, expected torch.float32"):
        castle_attention_step(new, x, x, x, new, new, x.double())
    for settings, said in (
        ({"heads": 3}, "got width 16 and 3 heads"),
        ({"heads": 2, "head_size": 0}, "head size is 0"),
        ({"heads": 2, "window": 0}, "window is 0"),
        ({"heads": 2, "rotary": Rotary(4)}, "made for head size 4, heads have 8"),
    ):
        with pytest.raises(ValueError, match=said):
            CastleConfig(16, **settings)
