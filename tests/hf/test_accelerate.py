"""Layers that run our mechanisms write the same text as before, and are as before when they are restored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit.hf
from attnkit.dispatch import watch
from attnkit.hf.attention import attention
from attnkit.hf.latent import CarriedHeads, joined
from attnkit.hf.layers import LatentLayer
from attnkit.state import LatentState

IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(1))
KEPT = torch.ones_like(IDS)
KEPT[0, :5] = 0
OPTIONS = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
LATENT = [
    *("bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "hy_v4"),
    *("kimi_linear", "longcat_flash", "minicpm3", "youtu"),
]
INDEXED = {"deepseek_v32", "glm_moe_dsa", "hy_v4"}  # our cache refuses them, see test_families
SINKS = {"hy_v4"}


def texts(model: Any, cache: Callable[[], Any]) -> list[Tensor]:
    """Of a padded batch, of one without padding and of beams."""
    ways: list[dict[str, Any]] = [{"attention_mask": KEPT}, {}, {"num_beams": 3}]
    return [model.generate(IDS, cache=cache(), **OPTIONS, **way) for way in ways]


@pytest.mark.parametrize("family", LATENT)
def test_latent_layers_write_the_same_text(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    want = texts(model, lambda: None)
    model.set_attn_implementation("attnkit")
    before = {name: set(vars(layer)) for name, layer in model.named_modules()}
    names = attnkit.hf.accelerate(model)
    assert names and attnkit.hf.accelerate(model) == names
    for cache in (lambda: None, lambda: attnkit.hf.Cache(model.config))[: 1 if family in INDEXED else 2]:
        with watch() as ran:
            got = texts(model, cache)
        assert all(torch.equal(text, other) for text, other in zip(got, want, strict=True))
        backends = {backend for mechanism, backend in ran if mechanism == "mla"}
        assert backends == (set() if family in SINKS else {"absorbed"} if family in INDEXED else {"absorbed", "cpu"})
    attnkit.hf.restore(model)
    assert before == {name: set(vars(layer)) for name, layer in model.named_modules()}
    with watch() as ran:
        model.generate(IDS, **OPTIONS)
    assert {mechanism for mechanism, _ in ran} == {"softmax"}


def test_latents_are_read_where_they_lie() -> None:
    layer = LatentLayer()
    latent, rotary = torch.randn(2, 1, 300, 6), torch.randn(2, 1, 300, 3)
    for start, end in ((0, 7), (7, 8), (8, 300)):  # grows on the way
        parts = layer.update(latent[:, :, start:end], rotary[:, :, start:end])
        row = joined(*parts)
        assert isinstance(layer.state, LatentState)
        assert row.data_ptr() == layer.state.buffers["latent"].data_ptr()
        assert torch.equal(row, torch.cat([latent, rotary], -1)[:, :, :end])
    assert torch.equal(joined(latent, rotary), torch.cat([latent, rotary], -1))
    assert torch.equal(joined(row[..., :6], row[..., 5:]), torch.cat([row[..., :6], row[..., 5:]], -1))


@torch.no_grad()
def test_what_the_kernel_cannot_do_is_done_as_before(tiny: Callable[..., Any]) -> None:
    model = tiny("deepseek_v3", "attnkit")
    module, q = model.model.layers[0].self_attn, torch.randn(2, 4, 1, 24)
    latent, rotary = torch.randn(2, 1, 9, 32), torch.randn(2, 1, 9, 8)
    want = module.expand_kv(latent, rotary)
    attnkit.hf.accelerate(model)
    key, value = module.expand_kv(latent, rotary)
    assert isinstance(key, CarriedHeads) and (key.shape, value.shape) == (want[0].shape, want[1].shape)
    assert torch.equal(key + 0, want[0]) and torch.equal(value.transpose(1, 2), want[1].transpose(1, 2))
    for extra in ({"softcap": 5.0}, {"s_aux": torch.ones(4)}, {"position_bias": torch.randn(2, 4, 1, 9)}):
        assert torch.equal(
            attention(module, q, key, value, None, **extra)[0], attention(module, q, *want, None, **extra)[0]
        )
    module.train(True)
    with torch.enable_grad():
        assert module.expand_kv(latent, rotary)[0].requires_grad  # of kv_b_proj
    model.set_attn_implementation("eager")
    assert type(module.expand_kv(latent, rotary)[0]) is Tensor


def test_a_copied_model_is_its_own(tiny: Callable[..., Any]) -> None:
    model = tiny("deepseek_v3", "attnkit")
    attnkit.hf.accelerate(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    attnkit.hf.restore(model)
    fresh = copy.deepcopy(other)
    attnkit.hf.restore(fresh)
    assert torch.equal(other.generate(IDS, **OPTIONS), fresh.generate(IDS, **OPTIONS))


def test_what_cannot_be_accelerated_is_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="runs 'eager': call attnkit.hf.register"):
        attnkit.hf.accelerate(tiny("deepseek_v3"))
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM, which has no latent attention"):
        attnkit.hf.accelerate(tiny("llama", "attnkit"))
    model = tiny("deepseek_v3", "attnkit")
    model.model.layers[2].self_attn.kv_b_proj = torch.nn.Linear(32, 128, bias=True)
    with pytest.raises(NotImplementedError, match="cannot change model.layers.2.self_attn: its kv_b_proj is Linear"):
        attnkit.hf.accelerate(model)
    assert "expand_kv" not in vars(model.model.layers[0].self_attn)
