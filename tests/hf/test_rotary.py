"""Rotary positions in one pass: the definition, what it leaves to Transformers, and whose layers it knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import attnkit.hf
from attnkit import native
from attnkit.hf import rotary
from attnkit.testing.budgets import assert_within

pytestmark = pytest.mark.skipif(not native.STATUS.available, reason=native.STATUS.reason)

# Some whose definition is a copy of Llama's, and some whose is another (pairs side by side, a part of a head).
LIKE_LLAMA = ("llama", "mistral", "gemma2")
OTHERS = ("cohere2", "gpt2", "phi3")


def inputs(dtype: torch.dtype, d: int = 34, m: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(d)
    q, k = (torch.randn(2, m, heads, d, generator=generator).to(dtype).transpose(1, 2) for heads in (6, 2))
    angles = torch.rand(1, m, d, generator=generator) * 100
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_rows_are_turned_as_defined(level: str, dtype: torch.dtype) -> None:
    for d, m in ((2, 1), (34, 7), (128, 300)):
        q, k, cos, sin = inputs(dtype, d, m)
        with native.use_level(level):
            got = rotary.rotated(q, k, cos, sin)
            alone = rotary.rotated(q[1:, 2:3, -1:], k[1:, :1, -1:], cos[:, -1:], sin[:, -1:])
        gold = apply_rotary_pos_emb(*(x.double() for x in (q, k, cos, sin)))
        for mine, true, plain in zip(got, gold, apply_rotary_pos_emb(q, k, cos, sin), strict=True):
            assert_within(mine, true, plain, dtype)
        assert got[0][1:, 2:3, -1:].equal(alone[0]) and got[1][1:, :1, -1:].equal(alone[1])
        assert got[0].stride() == q.stride()


def test_what_the_kernel_does_not_know_goes_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "run_alone", lambda *call: pytest.fail("the kernel was called"))
    q, k, cos, sin = inputs(torch.float32)
    assert rotary.rotated(q.clone().requires_grad_(), k, cos, sin)[0].requires_grad
    assert rotary.rotated(q.double(), k.double(), cos.double(), sin.double())[0].dtype == torch.float64
    assert rotary.rotated(q.bfloat16(), k.bfloat16(), cos, sin)[0].dtype == torch.float32
    turned = rotary.rotated(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    assert turned[0].equal(apply_rotary_pos_emb(q, k, cos, sin)[0].transpose(1, 2))


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_layers_like_llamas_are_known(family: str, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(family, "attnkit"), torch.arange(3, 15)[None]
    with torch.no_grad():
        want = model(ids).logits
        names = attnkit.hf.accelerate(model)
        assert len(names) == model.config.num_hidden_layers
        calls = []
        plain = native.run_alone
        monkeypatch.setattr(native, "run_alone", lambda name, call: calls.append(name) or plain(name, call))
        got = model(ids).logits
        gold = model.double()(ids).logits
    assert calls == ["rotate"] * 2 * len(names)
    assert_within(got, gold, want, torch.float32)


@pytest.mark.parametrize("family", OTHERS)
def test_layers_of_another_definition_are_not_taken_for_it(family: str, tiny: Callable[..., Any]) -> None:
    assert not any(rotary.turns_like_llama(layer) for layer in tiny(family).modules())
