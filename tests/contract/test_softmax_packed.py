"""``softmax_attention_varlen``: packed documents equal the documents one by one, the empty ones included."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit import native
from attnkit.mechanisms import softmax
from attnkit.registry import get
from attnkit.testing import Lane, lanes, runs
from attnkit.testing.budgets import assert_within

SPEC = get("softmax")
CAUSAL = attnkit.causal()
NATIVE = pytest.mark.skipif(not native.STATUS.available, reason=native.STATUS.reason)


def packed(rng: random.Random, heads: int = 4, groups: int = 2) -> dict[str, Any]:
    lengths = [rng.choice((0, 0, 1, 2, 7, 33, 64)) for _ in range(rng.randint(1, 6))]
    if rng.random() < 0.5:
        lengths = [0, *lengths, 0]
    torch.manual_seed(rng.randrange(1 << 30))
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = (torch.randn(count, total, size) for count, size in ((heads, 16), (groups, 16), (groups, 8)))
    return {"q": q, "k": k, "v": v, "q_offsets": offsets}


def assert_documents_apart(o: Tensor, call: dict[str, Any]) -> None:
    edges = call["q_offsets"].tolist()
    for start, end in zip(edges, edges[1:], strict=False):
        if start < end:
            alone = {name: call[name][None, :, start:end].clone() for name in "qkv"} | {"mask": CAUSAL}
            gold, naive = runs.gold(SPEC, alone)[0], runs.naive(SPEC, alone)[0]
            assert_within(o[None, :, start:end].clone(), gold, naive, torch.float32, what=f"document {start}:{end}")


@pytest.mark.parametrize("lane", [lane for lane in lanes(SPEC) if lane.backend != "flex"], ids=str)
def test_softmax_packed_equals_apart(lane: Lane) -> None:
    with lane.entered():
        for seed in range(20):
            call = packed(random.Random(seed))
            try:
                o = attnkit.softmax_attention_varlen(**call, mask=CAUSAL, backend=lane.backend)
            except NotImplementedError as refusal:
                assert "keys" in str(refusal)  # torch SDPA needs at least one
                continue
            assert o.shape == (4, call["q"].shape[1], 8)
            assert_documents_apart(o, call)


def test_softmax_packed_keys_of_other_lengths() -> None:
    """Cross-attention and decoding: each document has its own number of keys, none among them."""
    q, k = torch.randn(2, 6, 8), torch.randn(1, 9, 8)
    q_offsets, k_offsets = torch.tensor([0, 2, 5, 6]), torch.tensor([0, 4, 4, 9])
    o = attnkit.softmax_attention_varlen(q, k, k, q_offsets=q_offsets, k_offsets=k_offsets, backend="reference")
    assert not o[:, 2:5].any()
    alone = {"q": q[None, :, :2].clone(), "k": k[None, :, :4].clone(), "v": k[None, :, :4].clone()}
    gold, naive = runs.gold(SPEC, alone)[0], runs.naive(SPEC, alone)[0]
    assert_within(o[None, :, :2].clone(), gold, naive, torch.float32)


def test_softmax_packed_leak_is_noticed() -> None:
    """The inverse: a kernel that lets a document see the ones before it is caught."""
    right = softmax.softmax_attention
    call = packed(random.Random(3))
    q, k, v = (call[name][None] for name in "qkv")

    def leaky(part_q: Tensor, part_k: Tensor, part_v: Tensor, **settings: Any) -> Tensor:
        end = part_k.storage_offset() // 16 + part_k.shape[2]
        o: Tensor = right(q[:, :, :end], k[:, :, :end], v[:, :, :end], **settings)
        return o[:, :, end - part_q.shape[2] :]

    with mock.patch.object(softmax, "softmax_attention", leaky):
        o = attnkit.softmax_attention_varlen(**call, mask=CAUSAL, backend="reference")
    with pytest.raises(AssertionError, match="document"):
        assert_documents_apart(o, call)


def trained(call: dict[str, Any], direction: Tensor, apart: bool) -> list[Tensor]:
    """Result and gradients of q, k, v and sink, of all documents at once or of one call after the other."""
    leaves = {name: call[name].detach().clone().requires_grad_() for name in (*"qkv", "sink")}
    settings = {name: call[name] for name in ("mask", "softcap", "alibi")}
    if not apart:
        offsets = {name: call[name] for name in ("q_offsets", "k_offsets")}
        o = attnkit.softmax_attention_varlen(**leaves, **settings, **offsets, backend="cpu")
    else:
        q_edges, k_edges = call["q_offsets"].tolist(), call["k_offsets"].tolist()
        parts = []
        for i in range(len(q_edges) - 1):
            rows, keys = slice(q_edges[i], q_edges[i + 1]), slice(k_edges[i], k_edges[i + 1])
            given = {"q": leaves["q"][None, :, rows]} | {name: leaves[name][None, :, keys] for name in "kv"}
            parts.append(attnkit.softmax_attention(**given, **settings, sink=leaves["sink"], backend="cpu"))
        o = torch.cat(parts, 2)[0]
    return [o.detach(), *torch.autograd.grad(o, list(leaves.values()), direction)]


@NATIVE
@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_softmax_packed_natively_has_the_bits_of_apart(level: str, dtype: torch.dtype) -> None:
    """Results and gradients; none of it through a loop in Python."""
    masks = (None, CAUSAL, attnkit.window(20), attnkit.symmetric_window(145))
    for seed, mask in enumerate(masks):
        rng = random.Random(seed)
        q_lengths, k_lengths = ([rng.choice((0, 1, 5, 33, 150, 300)) for _ in range(7)] for _ in range(2))
        if seed < 2:
            k_lengths = q_lengths
        torch.manual_seed(seed)
        call = {
            "q": torch.randn(4, sum(q_lengths), 16).to(dtype),
            "k": torch.randn(2, sum(k_lengths), 16).to(dtype),
            "v": torch.randn(2, sum(k_lengths), 8).to(dtype),
            "sink": torch.randn(4),
            "alibi": torch.rand(4) if seed % 2 else None,
            "softcap": 3.0 if seed % 3 else None,
            "mask": mask,
            "q_offsets": torch.tensor([0, *q_lengths]).cumsum(0).to(torch.int32),
            "k_offsets": torch.tensor([0, *k_lengths]).cumsum(0),
        }
        direction = torch.randn(4, sum(q_lengths), 8).to(dtype)
        with native.use_level(level):
            apart = trained(call, direction, apart=True)
            with mock.patch.object(softmax, "softmax_attention", side_effect=AssertionError("a loop")):
                together = trained(call, direction, apart=False)
                o = attnkit.softmax_attention_varlen(**call)
            alone = [
                attnkit.softmax_attention(
                    *(
                        call[name][None, :, call[f"{at}_offsets"][i] : call[f"{at}_offsets"][i + 1]]
                        for name, at in zip("qkv", "qkk", strict=True)
                    ),
                    **{name: call[name] for name in ("mask", "softcap", "alibi", "sink")},
                    backend="cpu",
                )
                for i in range(7)
            ]
        assert o.equal(torch.cat(alone, 2)[0])
        for name, x, y in zip(("o", *"qkv"), together, apart, strict=False):
            assert x.equal(y), name
        # One sum over documents beside one that autograd adds up in an order of its own.
        assert_within(together[4], apart[4].double(), apart[4], torch.float32, gradient=True)


@NATIVE
def test_softmax_packed_one_by_one_where_one_call_cannot() -> None:
    """A mask of blocks, and a gradient of slopes, whose documents do without the one call and lose nothing."""
    call = packed(random.Random(1))
    settings = {"mask": attnkit.causal() & attnkit.dilated_window(4, 2)}
    with mock.patch.object(softmax.varlen, "forward", side_effect=AssertionError("one call")):
        found, true = (
            attnkit.softmax_attention_varlen(**call, **settings, backend=name) for name in ("cpu", "reference")
        )
        assert_within(found, true.double(), true, torch.float32)
        slopes = torch.rand(4, requires_grad=True)
        attnkit.softmax_attention_varlen(**call, alibi=slopes).sum().backward()
    assert slopes.grad is not None


@pytest.mark.parametrize(
    ("offsets", "said"),
    [([0, 3, 9], "expected rising from 0 to 6"), ([1, 6], "from 0"), ([0, 4, 2, 6], "rising"), ([0], "rising")],
)
def test_softmax_packed_refuses_wrong_offsets(offsets: list[int], said: str) -> None:
    x = torch.randn(2, 6, 4)
    with pytest.raises(ValueError, match=said):
        attnkit.softmax_attention_varlen(x, x, x, q_offsets=torch.tensor(offsets))


def test_slopes_that_are_no_tensor_are_refused_in_a_sentence() -> None:
    q = torch.randn(2, 5, 4)
    with pytest.raises(TypeError, match="alibi is a list, expected a tensor"):
        softmax.softmax_attention_varlen(q, q, q, q_offsets=torch.tensor([0, 2, 5]), alibi=[0.5, 0.25])  # type: ignore[arg-type]
