"""Luong attention: nested loops for every score and window, Keras, limits, block edges, refusals."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.mechanisms.additive import additive_attention
from attnkit.mechanisms.luong import LuongAttention, LuongConfig, chunk, luong_attention
from attnkit.registry import get
from attnkit.spec import Sizes

BACKENDS = ("chunk", "reference")
KINDS = range(10)
"""Seeds whose samples have each score with each window it may have."""


def sampled(seed: int, m: int, n: int, **sizes: int) -> dict[str, Any]:
    size = {"b": 2, "h": 4, "g": 2, "m": m, "n": n, "d": 5, "e": 3, **sizes}
    return get("luong").sample(seed, Sizes(**size), torch.float64)


def dot(one: Any, two: Any) -> float:
    return sum(float(x) * float(y) for x, y in zip(one, two, strict=True))


def weights_by_loops(call: dict[str, Any], batch: int, head: int, i: int) -> list[float]:
    """Weight of every position, one number at a time."""
    q, k = call["q"], call["k"]
    (h, g), n = (q.shape[1], k.shape[1]), k.shape[2]
    query, length = q[batch, head, i], int(call["lengths"][batch])
    own = {name: None if call[name] is None else call[name][head] for name in ("weight", "vector")}
    place = {None: None, "m": float(call["start"] + i)}.get(call["local"])
    if call["local"] == "p":
        hidden = [math.tanh(dot(row, query)) for row in call["place_weight"][head]]
        place = length / (1 + math.exp(-dot(call["place_vector"][head], hidden)))
    powers = [0.0] * n
    for s in range(length):
        key = k[batch, head // (h // g), s]
        if place is not None and abs(s - place) > call["radius"]:
            continue
        if call["score"] == "dot":
            score = dot(query, key)
        elif call["score"] == "general":
            score = dot([dot(query, own["weight"][:, c]) for c in range(len(key))], key)
        elif call["score"] == "concat":
            joined = [*query.tolist(), *key.tolist()]
            score = dot(own["vector"], [math.tanh(dot(row, joined)) for row in own["weight"]])
        else:
            score = dot(own["weight"][s], query)
        powers[s] = math.exp(score)
    total = sum(powers) or 1.0
    fade = 1.0 if call["local"] != "p" else call["radius"] / 2
    return [
        power / total * (math.exp(-((s - place) ** 2) / (2 * fade**2)) if call["local"] == "p" else 1.0)
        for s, power in enumerate(powers)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", KINDS)
def test_equals_nested_loops(seed: int, backend: str) -> None:
    call = sampled(seed, 4, 9)
    found = luong_attention(**call, backend=backend)
    for batch in range(2):
        for head in range(4):
            for i in range(4):
                weights = torch.tensor(weights_by_loops(call, batch, head, i), dtype=torch.float64)
                expected = weights @ call["v"][batch, head // 2]
                assert (found[batch, head, i] - expected).abs().max() < 1e-12, (call["score"], call["local"])


def test_samples_have_every_kind() -> None:
    kinds = {(call["score"], call["local"]) for call in (sampled(seed, 2, 5) for seed in KINDS)}
    assert len(kinds) == 10


@pytest.mark.parametrize("seed", KINDS)
def test_chunk_equals_the_definition_with_gradients(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered windows in uneven blocks, in float64."""
    monkeypatch.setattr(chunk, "ELEMENTS", 2000)
    call = sampled(seed, 23, 31)
    leaves = {name: x.requires_grad_() for name, x in call.items() if isinstance(x, Tensor) and x.is_floating_point()}
    found, true = (luong_attention(**call, backend=backend) for backend in BACKENDS)
    assert (found - true).abs().max() < 1e-12
    direction = torch.randn_like(found)
    one, two = (torch.autograd.grad(o, list(leaves.values()), direction, allow_unused=True) for o in (found, true))
    for name, left, right in zip(leaves, one, two, strict=True):
        zero = torch.zeros_like(leaves[name])  # location scores do not read the keys
        assert ((zero if left is None else left) - (zero if right is None else right)).abs().max() < 1e-10, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_dot_equals_keras(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="keras, the oracle of dot scores, is not installed")
    if keras.backend.backend() != "torch":
        pytest.skip(f"keras runs on {keras.backend.backend()}: set KERAS_BACKEND=torch before it is imported")
    call = sampled(0, 7, 9, h=1, g=1)
    oracle = keras.layers.Attention(use_scale=False, score_mode="dot", dtype="float64")
    inputs = [call[name][:, 0].float() for name in ("q", "v", "k")]
    keep = torch.arange(9) < call["lengths"][:, None]
    with torch.no_grad():
        expected = oracle(inputs, mask=[None, keep]).cpu()
    single = {name: call[name].float() for name in ("q", "k", "v")}
    found = luong_attention(**single, score="dot", lengths=call["lengths"], backend=backend)[:, 0]
    true = luong_attention(**{n: x.double() for n, x in single.items()}, score="dot", lengths=call["lengths"])[:, 0]
    # Keras multiplies in float32 whatever the dtype: what it is off by is float32's rounding, and ours no more.
    assert (found - true).abs().max() <= 4 * (expected - true).abs().max() + 1e-6
    assert (expected - true).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits(backend: str) -> None:
    """Dot is softmax attention of scale 1; general with the unit matrix is dot; concat is additive attention."""
    call = sampled(0, 4, 9)
    plain = {name: call[name] for name in ("q", "k", "v")}
    softmax = attnkit.softmax_attention(**plain, scale=1.0)
    assert (luong_attention(**plain, score="dot", backend=backend) - softmax).abs().max() < 1e-12
    eye = torch.eye(5, dtype=torch.float64).expand(4, -1, -1)
    assert (luong_attention(**plain, weight=eye, backend=backend) - softmax).abs().max() < 1e-12
    weight, vector = torch.randn(4, 6, 10).double(), torch.randn(4, 6).double()
    k, v = (plain[name].repeat_interleave(2, 1) for name in ("k", "v"))
    additive = additive_attention(plain["q"] @ weight[..., :5].mT, k @ weight[..., 5:].mT, v, vector)
    found = luong_attention(**plain, weight=weight, vector=vector, score="concat", backend=backend)
    assert (found - additive).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_may_have_a_size_of_their_own(backend: str) -> None:
    q, k = torch.randn(1, 1, 3, 4).double(), torch.randn(1, 1, 5, 7).double()
    weight = torch.randn(1, 4, 7).double()
    expected = (q[0, 0] @ weight[0] @ k[0, 0].T).softmax(-1) @ k[0, 0]
    assert (luong_attention(q, k, k, weight, backend=backend)[0, 0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", KINDS)
def test_padding_never_reaches_a_result(seed: int, backend: str) -> None:
    """A padded source with garbage behind its length is the source alone."""
    call = sampled(seed, 4, 9)
    call["lengths"] = torch.tensor([9, 6])
    spoiled = {name: call[name].clone() for name in ("k", "v")}
    for x in spoiled.values():
        x[1, :, 6:] = torch.nan
    found = luong_attention(**{**call, **spoiled}, backend=backend)[1:]
    alone = {name: call[name][1:, :, :6] for name in ("k", "v")}
    expected = luong_attention(**{**call, **alone, "q": call["q"][1:], "lengths": torch.tensor([6])}, backend=backend)
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_outside_the_source_gives_zero(backend: str) -> None:
    call = {name: sampled(0, 4, 9)[name] for name in ("q", "k", "v")}
    found = luong_attention(**call, score="dot", local="m", radius=2, start=9, backend=backend)
    assert found[:, :, 0].abs().min() > 0 and found[:, :, 1].abs().min() > 0
    assert not found[:, :, 2:].any()
    found = luong_attention(**call, score="dot", lengths=torch.tensor([9, 0]), backend=backend)
    assert found[0].any() and not found[1].any()


def test_weights_of_predictive_windows_add_up_to_less_than_one() -> None:
    call = sampled(2, 4, 30)
    assert call["local"] == "p"
    total = luong_attention(**{**call, "v": torch.ones_like(call["v"])})
    assert (total < 1).all() and (total > 0).all()


def test_windows_cost_the_same_in_a_longer_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax attention gets the keys of the windows and nothing more."""
    seen = []

    def watched(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
        seen.append(k.shape[2])
        return attnkit.softmax_attention(q, k, v, **settings)

    monkeypatch.setattr(chunk, "softmax_attention", watched)
    luong_attention(**sampled(1, 5, 200))
    assert seen == [7]


@pytest.mark.parametrize(
    ("score", "local"), [(s, w) for s in ("dot", "general", "concat", "location") for w in (None, "m", "p")][:10]
)
def test_a_stepping_decoder_gets_the_rows_of_one_call(score: str, local: str | None) -> None:
    torch.manual_seed(0)
    config = LuongConfig(6, score=score, local=local, radius=2, max_length=9 if score == "location" else None)
    layer = LuongAttention(config).double()
    x, context = torch.randn(2, 5, 6).double(), torch.randn(2, 8, 6).double()
    lengths = torch.tensor([8, 5])
    whole = layer(x, context, lengths=lengths)
    steps = [layer(x[:, i : i + 1], context, lengths=lengths, start=i) for i in range(5)]
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-12
    weights = layer.weights(x, context, lengths=lengths)
    found = torch.tanh(layer.o(torch.cat([weights @ context, x], -1)))
    assert (found - whole).abs().max() < 1e-12
    assert not weights[1, :, 5:].any()


REFUSALS = [
    (2, {"lengths": None}, ValueError, "local 'p' predicts a place in the true source, expected lengths="),
    (9, {"local": "m"}, ValueError, "got location scores and local 'm', expected global"),
    (9, {"weight": torch.zeros(4, 8, 5)}, ValueError, "the source has 9 positions and weight 8"),
    (3, {"weight": None}, ValueError, "got none for weight, expected one with score 'general'"),
    (0, {"weight": torch.zeros(4, 5, 5)}, ValueError, "got one for weight, expected none with score 'dot'"),
    (0, {"k": torch.zeros(2, 2, 9, 7, dtype=torch.float64)}, ValueError, "queries have size 5 and keys 7"),
    (6, {"weight": torch.zeros(4, 6, 9)}, ValueError, "weight takes 9 channels, expected 5 of q and 5 of k"),
    (2, {"place_vector": None}, ValueError, "got none for place_vector, expected one with"),
    (0, {"score": "cosine"}, ValueError, "score is 'cosine', expected one of dot, general, concat, location"),
    (0, {"local": "x"}, ValueError, "local is 'x', expected None, 'm' (monotonic) or 'p'"),
    (0, {"radius": 0}, ValueError, "radius is 0 and start 0, expected at least 1"),
    (0, {"lengths": torch.ones(2)}, TypeError, "lengths has dtype torch.float32, expected integers"),
    (0, {"lengths": torch.ones(3, dtype=torch.int64)}, ValueError, "batch is 3 in lengths"),
]


@pytest.mark.parametrize(("seed", "wrong", "error", "said"), REFUSALS)
def test_refusals(seed: int, wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        luong_attention(**{**sampled(seed, 9, 9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layers_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one for dot: take general"):
        LuongConfig(6, context=8, score="dot")
    with pytest.raises(ValueError, match="expected max_length with location scores and only with them"):
        LuongConfig(6, score="location")
