"""Hard attention: nested loops, torch's Gumbel softmax, estimates against exact gradients, replayed noise, blocks."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn.functional import gumbel_softmax, softmax

import attnkit
from attnkit.masks import Mask
from attnkit.mechanisms.hard import HardAttention, HardConfig, ReinforceLoss, chunk, hard_attention
from attnkit.noise import gumbel
from attnkit.positions import Rotary
from attnkit.registry import get
from attnkit.spec import Sizes

BACKENDS = ("chunk", "reference")
KINDS: dict[str, dict[str, Any]] = {
    "argmax": {"kind": "argmax", "temperature": 0.7},
    "gumbel": {"kind": "gumbel", "temperature": 0.7, "seed": 11},
    "sample": {"kind": "sample", "temperature": 1.0, "seed": 11, "return_log_prob": True},
}
MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal": attnkit.causal(),
    "window": attnkit.window(7),
    "strided": attnkit.strided(4),
    "padding": attnkit.padding(torch.arange(40)[None] % 5 != torch.tensor([[1], [3]])) & attnkit.causal(),
    "nothing": attnkit.padding(torch.zeros(1, 40, dtype=torch.bool)),
}
# One wrong rejection in 3,000 seeds for a handful of numbers, and the seeds are fixed.
STANDARD_ERRORS = 4.5


def sampled(seed: int, m: int, n: int, **sizes: int) -> dict[str, Any]:
    size = {"b": 2, "h": 4, "g": 2, "m": m, "n": n, "d": 5, "e": 3, **sizes}
    return get("hard").sample(seed, Sizes(**size), torch.float64)


def positions(m: int, n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n - m, n), torch.arange(n)


def by_loops(call: dict[str, Any], sees: Any, slope: Tensor) -> tuple[Tensor, ...]:
    """Result and straight-through gradients of q, k and v for the result's gradient ``slope``, a number at a time."""
    q, k, v, tau = call["q"], call["k"], call["v"], call["temperature"]
    (b, h, m, _), (g, n, _) = q.shape, v.shape[1:]
    noise = gumbel(call["seed"], b, h, *positions(m, n)) if call["kind"] == "gumbel" else torch.zeros(b, h, m, n)
    o, of_q, of_k, of_v = (torch.zeros_like(x) for x in (slope, q, k, v))
    for batch in range(b):
        for head in range(h):
            for i in range(m):
                query, group = q[batch, head, i], head // (h // g)
                seen = [j for j in range(n) if sees(n - m + i, j)]
                logits = {j: float(query @ k[batch, group, j]) * 0.6 + float(noise[batch, head, i, j]) for j in seen}
                if not seen:
                    continue
                best = max(seen, key=lambda j: (logits[j], -j))
                o[batch, head, i] = v[batch, group, best]
                of_v[batch, group, best] += slope[batch, head, i]
                total = sum(math.exp(logits[j] / tau) for j in seen)
                y = {j: math.exp(logits[j] / tau) / total for j in seen}
                gain = {j: float(v[batch, group, j] @ slope[batch, head, i]) for j in seen}
                mean = sum(y[j] * gain[j] for j in seen)
                for j in seen:
                    share = y[j] * (gain[j] - mean) / tau * 0.6
                    of_q[batch, head, i] += share * k[batch, group, j]
                    of_k[batch, group, j] += share * query
    return o, of_q, of_k, of_v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["argmax", "gumbel"])
@pytest.mark.parametrize("m", [1, 6])
def test_equals_nested_loops_with_straight_through_gradients(backend: str, kind: str, m: int) -> None:
    call = {**sampled(m, m, 6), **KINDS[kind], "scale": 0.6}
    slope = torch.randn(2, 4, m, 3, dtype=torch.float64)
    for mask, sees in ((attnkit.window(3), lambda i, j: i - 3 < j <= i), (~attnkit.full(), lambda i, j: False)):
        leaves = [call[name].detach().requires_grad_() for name in ("q", "k", "v")]
        arguments = {**call, **dict(zip(("q", "k", "v"), leaves, strict=True)), "mask": mask}
        o = hard_attention(**arguments, backend=backend)
        found = (o, *torch.autograd.grad(o, leaves, slope))
        with torch.no_grad():
            wanted = by_loops(arguments, sees, slope)
        for what, one, two in zip(("o", "q", "k", "v"), found, wanted, strict=True):
            assert (one - two).abs().max() < 1e-12, what


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_equal_the_definition_with_gradients(mask: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one query, of uneven sizes, for all queries and for the last few; noise does not notice the blocks."""
    for m, elements in ((9, 1), (40, 5000)):
        monkeypatch.setattr(chunk, "ELEMENTS", elements)
        call = {**sampled(m, m, 40), **KINDS[kind], "mask": MASKS[mask]}
        leaves = [call[name].requires_grad_() for name in ("q", "k", "v")]
        found, true = (hard_attention(**call, backend=backend) for backend in BACKENDS)
        found, true = (x if isinstance(x, tuple) else (x,) for x in (found, true))
        directions = [torch.randn_like(x) for x in true]
        one, two = (torch.autograd.grad(x, leaves, directions) for x in (found, true))
        for i, (got, wanted) in enumerate(zip(found + one, true + two, strict=True)):
            assert (got - wanted).abs().max() < 1e-11, f"result or gradient {i}"
        if mask == "nothing":
            assert not any(x.any() for x in found + one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_visible_of_equal_keys_wins(backend: str) -> None:
    v = torch.arange(7.0).reshape(1, 1, 7, 1)
    q, k = torch.ones(1, 2, 7, 4), torch.ones(1, 1, 7, 4)
    found = hard_attention(q, k, v, mask=attnkit.window(3), backend=backend)
    assert found[0, :, :, 0].tolist() == [[0, 0, 0, 1, 2, 3, 4]] * 2
    k[:, :, [2, 5]] = 2.0
    assert hard_attention(q, k, v, backend=backend)[0, 0, :, 0].tolist() == [2] * 7


@pytest.mark.parametrize("backend", BACKENDS)
def test_gumbel_straight_through_with_given_noise(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise (0.1, -0.3, 0.5) on logits (1, 2, 0.5): key 1 forward, the Jacobian of softmax(1.1, 1.7, 1.0) backward."""
    given = torch.tensor([0.1, -0.3, 0.5], dtype=torch.float64)
    for name in BACKENDS:
        module = import_module(f"attnkit.mechanisms.hard.{name}")
        monkeypatch.setattr(module, "gumbel", lambda *_: given.reshape(1, 1, 1, 3))
    s = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([[0.3, -1.0], [2.0, 0.7], [-0.4, 1.5]], dtype=torch.float64)
    o = hard_attention(
        s.reshape(1, 1, 1, 3), torch.eye(3, dtype=torch.float64)[None, None], v[None, None], scale=1.0, kind="gumbel",
        backend=backend,
    )[0, 0, 0]  # fmt: skip
    assert o.tolist() == v[1].tolist()
    slope = torch.tensor([0.9, -0.2], dtype=torch.float64)
    y = softmax(torch.tensor([1.1, 1.7, 1.0], dtype=torch.float64), -1)
    jacobian = torch.diag(y) - y[:, None] * y
    (found,) = torch.autograd.grad(o, s, slope)
    assert (found - jacobian @ (v @ slope)).abs().max() < 1e-15


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_equals_torch_gumbel_softmax(backend: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    eye, v = torch.eye(7, dtype=torch.float64).expand(2, 3, 7, 7), torch.randn(2, 3, 7, 4, dtype=torch.float64)
    noise = gumbel(8, 2, 3, *positions(5, 7))
    # torch makes its noise as -log of exponential numbers.
    monkeypatch.setattr(Tensor, "exponential_", lambda x: x.copy_(torch.exp(-noise)))
    theirs = gumbel_softmax(logits, tau=temperature, hard=True) @ v
    ours = hard_attention(logits, eye, v, scale=1.0, kind="gumbel", temperature=temperature, seed=8, backend=backend)
    assert (ours - theirs).abs().max() < 1e-12
    direction = torch.randn_like(theirs)
    found, wanted = (torch.autograd.grad(o, logits, direction)[0] for o in (ours, theirs))
    assert (found - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_prob_and_entropy_are_those_of_the_softmax(backend: str) -> None:
    """Values and gradients; hidden keys and a key whose weight underflows do not make NaN of the entropy."""
    call = {**sampled(0, 9, 9, e=9), **KINDS["sample"]}
    call["v"] = torch.eye(9, dtype=torch.float64).expand(2, 2, 9, 9)
    call["k"][:, :, 3] *= 1000
    leaves = [call[name].requires_grad_() for name in ("q", "k")]
    o, *found = hard_attention(**call, backend=backend)
    scores = call["q"] @ call["k"].repeat_interleave(2, 1).mT * 5**-0.5
    theirs = Categorical(logits=scores.masked_fill(~attnkit.causal().dense(9, 9), -1e300))
    for mine, other in zip(found, (theirs.log_prob(o.argmax(-1)), theirs.entropy()), strict=True):
        assert (mine - other).abs().max() < 1e-11
        direction = torch.randn_like(mine)
        one, two = (torch.autograd.grad(x, leaves, direction, retain_graph=True) for x in (mine, other))
        assert all((x - y).abs().max() < 1e-10 * (1 + y.abs().max()) for x, y in zip(one, two, strict=True))


def rows_of(logits: list[float], count: int) -> dict[str, Any]:
    """As many queries as draws, each with a leaf of its own: its gradient is one draw of the estimate."""
    size = len(logits)
    q = torch.tensor(logits, dtype=torch.float64).repeat(1, 1, count, 1).requires_grad_()
    return {"q": q, "k": torch.eye(size, dtype=torch.float64)[None, None], "scale": 1.0}


def assert_mean(draws: Tensor, exact: Tensor) -> None:
    """The mean of ``draws`` ``(count, size)`` is ``exact`` as far as so many draws can tell."""
    error = (draws.mean(0) - exact).abs()
    assert bool((error <= STANDARD_ERRORS * draws.std(0) * len(draws) ** -0.5 + 1e-12).all()), (draws.mean(0), exact)


def test_keys_are_drawn_from_the_softmax() -> None:
    call, eye = rows_of([0.2, -1.0, 1.1], 20000), torch.eye(3, dtype=torch.float64)[None, None]
    drawn = hard_attention(**call, v=eye, kind="sample", seed=3)[0, 0]
    assert_mean(drawn, softmax(call["q"][0, 0, 0].detach(), -1))


@pytest.mark.parametrize("baseline", [0.0, 2.5])
def test_reinforce_is_the_gradient_of_the_mean_reward(baseline: float) -> None:
    call = rows_of([0.2, -1.0, 1.1], 20000)
    rewards = torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64)
    o, log_prob, entropy = hard_attention(
        **call, v=rewards.reshape(1, 1, 3, 1), kind="sample", seed=4, return_log_prob=True
    )
    loss = ReinforceLoss(entropy_weight=0.0)
    loss.baseline.fill_(baseline)
    (slope,) = torch.autograd.grad(loss(o[:, 0, :, 0], log_prob, entropy), call["q"])
    p = softmax(call["q"][0, 0, 0].detach(), -1)
    assert_mean(-slope[0, 0], p * (rewards - p @ rewards))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.05])
def test_gumbel_straight_through_is_the_gradient_of_the_mean_of_soft_weights(temperature: float) -> None:
    """Of two keys: the difference of two noises is logistic, so that the exact mean is an integral over one number.

    At a low temperature it is the gradient of the mean reward itself.
    """
    call = rows_of([0.3, 1.0], 20000)
    v = torch.tensor([2.0, -1.0], dtype=torch.float64).reshape(1, 1, 2, 1)
    o = hard_attention(**call, v=v, kind="gumbel", temperature=temperature, seed=5)
    (slope,) = torch.autograd.grad(o.sum(), call["q"])
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    bell = torch.sigmoid(x) * torch.sigmoid(-x)
    y = torch.sigmoid((x - 0.7) / temperature)
    exact = torch.trapezoid(y * (1 - y) / temperature * bell, x) * 3
    assert_mean(slope[0, 0], torch.stack([exact, -exact]))
    p = torch.sigmoid(torch.tensor(-0.7, dtype=torch.float64))
    bias = (exact / (3 * p * (1 - p)) - 1).abs()
    assert bias < 0.002 if temperature == 0.05 else bias > 0.02


def test_reinforce_loss() -> None:
    log_prob, entropy = (torch.rand(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = ReinforceLoss(weight=2.0, entropy_weight=0.1)
    reward = torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64, requires_grad=True)
    expected, baseline = [], 0.0
    for _ in range(3):
        earned = reward.tolist()
        gains = [2 * (r - baseline) * log_prob[i].sum() + 0.1 * entropy[i].sum() for i, r in enumerate(earned)]
        expected.append(-sum(gains) / 3)
        baseline = 0.9 * baseline + 0.1 * 1.0
    found = [loss(reward, log_prob, entropy) for _ in range(3)]
    assert torch.stack(found).tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-6)
    assert loss.baseline.item() == pytest.approx(1 - 0.9**3)
    assert torch.autograd.grad(found[0], reward, allow_unused=True) == (None,)
    loss.eval()
    by_step = loss(reward.detach()[:, None].expand(3, 4), log_prob, entropy)
    assert by_step.item() == pytest.approx(loss(reward, log_prob, entropy).item())
    assert loss.baseline.item() == pytest.approx(1 - 0.9**3)
    with pytest.raises(ValueError, match=r"queries is 5 in reward \(3, 5\) but 4 in log_prob"):
        loss(torch.zeros(3, 5), log_prob, entropy)
    with pytest.raises(ValueError, match=r"decay is 1.0, expected 0 <= decay < 1"):
        ReinforceLoss(decay=1.0)


def test_long_input_builds_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks hold no more scores than said, and the backward computes each again."""
    seen, block = [], chunk._block
    monkeypatch.setattr(chunk, "ELEMENTS", 1 << 14)

    def watched(q: Tensor, k: Tensor, *rest: Any) -> Any:
        seen.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return block(q, k, *rest)

    monkeypatch.setattr(chunk, "_block", watched)
    call = sampled(0, 300, 300, b=1)
    leaves = [call[name].requires_grad_() for name in ("q", "k", "v")]
    o = hard_attention(**call, kind="gumbel")
    assert max(seen) <= 1 << 14
    assert sum(seen) < 0.6 * 4 * 300**2, "keys that no query of a block may see are scored"
    forward = len(seen)
    torch.autograd.grad(o.sum(), leaves)
    assert len(seen) == 2 * forward


def layer(**settings: Any) -> HardAttention:
    torch.manual_seed(0)
    return HardAttention(HardConfig(16, 4, kv_heads=2, rotary=Rotary(4), **settings)).double()


def test_training_draws_and_evaluation_does_not() -> None:
    made, x = layer(kind="gumbel", qk_norm=True), torch.randn(2, 9, 16, dtype=torch.float64)
    assert not torch.equal(made(x), made(x))
    y = made(x)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in made.parameters())
    made.eval()
    assert torch.equal(made(x), made(x))
    assert torch.equal(made(x), layer(kind="argmax", qk_norm=True)(x))


def test_evaluation_with_a_seed_draws_the_same_in_any_split() -> None:
    made, x = layer(kind="gumbel", seed=7).eval(), torch.randn(2, 20, 16, dtype=torch.float64)
    whole = made(x)
    assert not torch.equal(whole, layer().eval()(x))
    assert not torch.equal(whole, layer(seed=8).eval()(x))
    state, rows = made.state(2, 20, dtype=torch.float64), []
    for part in x.split([3, 9, *[1] * 8], 1):
        y, state = made.step(part, state)
        rows.append(y)
    assert (torch.cat(rows, 1) - whole).abs().max() < 1e-12


def test_the_temperature_of_a_layer_may_be_lowered() -> None:
    made, x = layer(), torch.randn(2, 9, 16, dtype=torch.float64)
    slopes = []
    for made.temperature in (1.0, 0.1):
        y = made(x)
        slopes.append(torch.autograd.grad(y.square().sum(), made.q.weight)[0])
    assert not torch.allclose(*slopes)


def test_draw_is_a_forward_for_reinforce() -> None:
    made, x = layer(), torch.randn(2, 9, 16, dtype=torch.float64)
    y, log_prob, entropy = made.draw(x, seed=3)
    assert y.shape == x.shape and log_prob.shape == entropy.shape == (2, 4, 9)
    assert torch.equal(made.draw(x, seed=3)[0], y)
    loss = ReinforceLoss()(-y.square().mean((1, 2)), log_prob, entropy) + y.square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())
    context = torch.randn(2, 5, 16, dtype=torch.float64)
    keep = torch.tensor([[True] * 5, [False] * 5])
    assert not made.eval()(x, context, mask=attnkit.padding(keep))[1].any()


REFUSALS = [
    ({"kind": "softmax"}, ValueError, "kind is 'softmax', expected 'argmax', 'gumbel' or 'sample'"),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0, expected a positive number"),
    ({"kind": "sample", "temperature": 0.5}, ValueError, "temperature is 0.5 and kind 'sample'"),
    ({"seed": 3}, ValueError, "seed is 3 and kind 'argmax', which draws nothing"),
    ({"return_log_prob": True}, ValueError, "return_log_prob is True and kind 'argmax', expected kind 'sample'"),
    ({"mask": 5}, TypeError, "mask is a int, expected a mask"),
    ({"k": torch.zeros(2, 3, 9, 5, dtype=torch.float64), "v": torch.zeros(2, 3, 9, 3, dtype=torch.float64)},
     ValueError, "got 4 query heads and 3 KV heads"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        hard_attention(**{**sampled(0, 9, 9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layers_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="kind is 'sample', expected 'argmax' or 'gumbel': call draw to sample"):
        HardConfig(16, 4, kind="sample")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rotary is made for head size 8, heads have 4"):
        HardConfig(16, 4, rotary=Rotary(8))
    with pytest.raises(ValueError, match="a bidirectional layer cannot decode"):
        layer(mask=None).state(1, 4)
