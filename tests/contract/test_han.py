"""HAN pooling: nested loops, additive attention, what padding and empty sentences give, both levels, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnkit
from attnkit.mechanisms.additive import additive_attention
from attnkit.mechanisms.han import HanAttention, HanConfig, HanDocument, han_attention
from attnkit.registry import get
from attnkit.spec import Sizes

BACKENDS = ("chunk", "reference")


def sampled(n: int, seed: int = 0, b: int = 2) -> dict[str, Any]:
    return get("han").sample(seed, Sizes(b=b, m=n, n=n, d=5, e=3), torch.float64)


def by_loops(x: Tensor, weight: Tensor, offset: Tensor, vector: Tensor, ids: Tensor, sentences: int) -> Tensor:
    """One number at a time."""
    (b, n, width), o = x.shape, x.new_zeros(len(x), sentences, x.shape[2])
    for batch in range(b):
        for s in range(sentences):
            powers = {}
            for j in range(n):
                if int(ids[batch, j]) == s:
                    hidden = [math.tanh(float(w @ x[batch, j]) + float(c)) for w, c in zip(weight, offset, strict=True)]
                    powers[j] = math.exp(sum(h * float(u) for h, u in zip(hidden, vector, strict=True)))
            for j, power in powers.items():
                for c in range(width):
                    o[batch, s, c] += power / sum(powers.values()) * float(x[batch, j, c])
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 9, 30])
def test_equals_nested_loops(backend: str, n: int) -> None:
    inputs = sampled(n, n)
    assert (han_attention(**inputs, backend=backend) - by_loops(**inputs)).abs().max() < 1e-12


def test_samples_have_words_of_no_sentence_and_sentences_of_no_word() -> None:
    inputs = sampled(30, 3)
    assert (inputs["ids"] < 0).any()
    assert not han_attention(**inputs).any(-1).all()


@pytest.mark.parametrize("n", [1, 2, 33, 130])
def test_segments_equal_the_definition_with_gradients(n: int) -> None:
    inputs = sampled(n)
    leaves = {name: inputs[name].requires_grad_() for name in ("x", "weight", "offset", "vector")}
    found, true = (han_attention(**inputs, backend=backend) for backend in BACKENDS)
    assert (found - true).abs().max() < 1e-12
    direction = torch.randn_like(found)
    slopes, exact = (torch.autograd.grad(o, list(leaves.values()), direction) for o in (found, true))
    for name, one, two in zip(leaves, slopes, exact, strict=True):
        assert (one - two).abs().max() < 1e-11, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_additive_attention_of_one_learned_query(backend: str) -> None:
    inputs = sampled(30)
    query = inputs["offset"][None, None, None].expand(2, 1, inputs["sentences"], -1)
    member = inputs["ids"][:, None] == torch.arange(inputs["sentences"])[:, None]
    keys, values = (inputs["x"] @ inputs["weight"].T)[:, None], inputs["x"][:, None]
    expected = additive_attention(query, keys, values, inputs["vector"][None], mask=attnkit.explicit(member[:, None]))
    assert (han_attention(**inputs, backend=backend) - expected[:, 0]).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_never_read_and_empty_sentences_are_zero(backend: str) -> None:
    inputs = sampled(30)
    inputs["ids"] = torch.where(inputs["ids"] == 3, -1, inputs["ids"])
    inputs["ids"][1] = 99  # a document of no sentence at all
    clean = han_attention(**inputs, backend=backend)
    assert not clean[0, 3].any() and not clean[1].any() and clean[0].any(-1).sum() > 4
    outside = (inputs["ids"] < 0) | (inputs["ids"] >= inputs["sentences"])
    for garbage in (torch.nan, torch.inf, 1e300):
        spoiled = {**inputs, "x": inputs["x"].masked_fill(outside[..., None], garbage).requires_grad_()}
        found = han_attention(**spoiled, backend=backend)
        assert torch.equal(found, clean)
        (slope,) = torch.autograd.grad(found.sum(), spoiled["x"])
        assert slope.isfinite().all() and not slope[outside].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_words_and_other_sentences_do_not_matter(backend: str) -> None:
    inputs = sampled(30, b=1)
    clean = han_attention(**inputs, backend=backend)
    order = torch.randperm(30)
    mixed = {**inputs, "x": inputs["x"][:, order], "ids": inputs["ids"][:, order]}
    assert (han_attention(**mixed, backend=backend) - clean).abs().max() < 1e-12
    other = inputs["x"] + (inputs["ids"] != 2)[..., None] * torch.randn(1, 30, 5)
    found = han_attention(**{**inputs, "x": other}, backend=backend)
    assert (found[:, 2] - clean[:, 2]).abs().max() < 1e-12
    alone = inputs["ids"][0] == 2
    part = {**inputs, "x": inputs["x"][:, alone], "ids": inputs["ids"][:, alone] - 2, "sentences": 1}
    assert (han_attention(**part, backend=backend)[:, 0] - clean[:, 2]).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_words_give_themselves_at_any_score(backend: str) -> None:
    """Weights of a sentence sum to 1, also where exp of a score overflows."""
    inputs = sampled(30)
    inputs["vector"] = inputs["vector"] * 1e4
    inputs["x"] = torch.ones_like(inputs["x"])
    there = (inputs["ids"][:, None] == torch.arange(inputs["sentences"])[:, None]).any(-1)
    assert (han_attention(**inputs, backend=backend) - there[..., None].double()).abs().max() < 1e-12


def test_a_document_is_pooled_twice_and_ignores_empty_sentences() -> None:
    model = HanDocument(HanConfig(5, hidden=3)).double()
    x, ids = torch.randn(2, 7, 5).double(), torch.tensor([[0, 0, 0, 2, 2, 3, -1], [-1] * 7])
    first = model.words(x[:1, :3], ids[:1, :3], sentences=1)
    second = model.words(x[:1, 3:5], ids[:1, :2], sentences=1)
    third = x[:1, 5:6]
    expected = model.sentences(torch.cat([first, second, third], 1), torch.zeros(1, 3, dtype=torch.int64), sentences=1)
    found = model(x, ids, sentences=5)
    assert (found[:1] - expected[:, 0]).abs().max() < 1e-12
    assert not found[1].any(), "a document without words is 0"
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_a_module_between_the_levels_sees_the_sentences() -> None:
    between = nn.Linear(5, 5, dtype=torch.float64)
    model = HanDocument(HanConfig(5), between).double()
    x, ids = torch.randn(1, 6, 5).double(), torch.tensor([[0, 0, 1, 1, 1, 2]])
    sentences = between(model.words(x, ids, sentences=3))
    expected = model.sentences(sentences, torch.zeros(1, 3, dtype=torch.int64), sentences=1)[:, 0]
    assert (model(x, ids, sentences=3) - expected).abs().max() < 1e-12


def test_the_layer_tells_its_weights() -> None:
    layer = HanAttention(HanConfig(5)).double()
    inputs = sampled(30)
    x, ids, sentences = (inputs[name] for name in ("x", "ids", "sentences"))
    weights = layer.weights(x.masked_fill((ids < 0)[..., None], torch.nan), ids, sentences=sentences)
    member = (ids[:, None] == torch.arange(sentences)[:, None]).double()
    found = (weights[:, None] * member) @ x
    assert (found - layer(x, ids, sentences=sentences)).abs().max() < 1e-12
    assert not weights[ids < 0].any()


REFUSALS = [
    ({"weight": torch.zeros(3, 6, dtype=torch.float64)}, ValueError, "model width is 6 in weight (3, 6) but 5 in x"),
    ({"offset": torch.zeros(2, dtype=torch.float64)}, ValueError, "key size is 2 in offset (2,) but 3 in weight"),
    ({"vector": torch.zeros(3)}, TypeError, "vector has dtype torch.float32 but x torch.float64"),
    ({"ids": torch.zeros(2, 8, dtype=torch.int64)}, ValueError, "keys is 8 in ids (2, 8) but 9 in x"),
    ({"ids": torch.zeros(2, 9)}, TypeError, "ids has dtype torch.float32, expected integers"),
    ({"sentences": -1}, ValueError, "sentences is -1, expected at least 0"),
]


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        han_attention(**{**sampled(9), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_layer_without_size_is_refused() -> None:
    with pytest.raises(ValueError, match="width is 5 and hidden 0, expected at least 1 each"):
        HanConfig(5, hidden=0)
