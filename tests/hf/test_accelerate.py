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
from attnkit.hf import recurrent
from attnkit.hf.attention import attention
from attnkit.hf.latent import CarriedHeads, joined
from attnkit.hf.layers import LatentLayer
from attnkit.state import LatentState
from attnkit.testing.budgets import assert_within

IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(1))
KEPT = torch.ones_like(IDS)
KEPT[0, :5] = 0
OPTIONS = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
# What runs besides softmax attention, with Transformers' own cache and with ours.
MLA, DELTA = {("mla", "absorbed"), ("mla", "cpu")}, {("delta", "cpu")}
FAMILIES: dict[str, set[tuple[str, str]]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"), MLA),
    **dict.fromkeys(("olmo_hybrid", "qwen3_5_text", "qwen3_next"), DELTA),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), MLA | DELTA),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), {("mla", "absorbed")}),  # the indexer's choice is a mask
    "hy_v4": set(),  # has sinks
    "minimax": set(),  # steps of retention have no backends
}
ONLY_THEIR_CACHE = {"minimax"}  # see test_families


def texts(model: Any, cache: Callable[[], Any]) -> list[Tensor]:
    """Of a padded batch, of one without padding and of beams."""
    ways: list[dict[str, Any]] = [{"attention_mask": KEPT}, {}, {"num_beams": 3}]
    return [model.generate(IDS, cache=cache(), **OPTIONS, **way) for way in ways]


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_layers_write_the_same_text(
    family: str, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    want = texts(model, lambda: None)
    model.set_attn_implementation("attnkit")
    before = {name: set(vars(layer)) for name, layer in model.named_modules()}
    names = attnkit.hf.accelerate(model)
    assert names and attnkit.hf.accelerate(model) == names
    retained = []
    plain = recurrent.retention_attention_step
    monkeypatch.setattr(recurrent, "retention_attention_step", lambda *a, **k: retained.append(1) or plain(*a, **k))
    for cache in (lambda: None, lambda: attnkit.hf.Cache(model.config))[: 1 if family in ONLY_THEIR_CACHE else 2]:
        with watch() as ran:
            got = texts(model, cache)
        assert all(torch.equal(text, other) for text, other in zip(got, want, strict=True))
        assert set(ran) - {("softmax", "cpu")} == FAMILIES[family]
    assert bool(retained) == (family == "minimax")
    attnkit.hf.restore(model)
    assert before == {name: set(vars(layer)) for name, layer in model.named_modules()}
    with watch() as ran:
        model.generate(IDS, **OPTIONS)
    assert {mechanism for mechanism, _ in ran} == {"softmax"}


@torch.no_grad()
@pytest.mark.parametrize("family", ["kimi_linear", "minimax", "olmo_hybrid", "qwen3_next"])
def test_linear_layers_stay_within_the_budget(
    family: str, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt, single tokens and several at once, longer than the chunks of either side."""
    ids = torch.randint(3, 99, (2, 100), generator=torch.Generator().manual_seed(2))
    kept = torch.ones_like(ids)
    kept[0, :7] = 0

    def logits(model: Any) -> Tensor:
        out = model(ids[:, :90], attention_mask=kept[:, :90], use_cache=True)
        parts, cache = [out.logits], out.get("cache") or out.past_key_values  # before Transformers 5.24
        for start, end in ((90, 91), (91, 92), (92, 100)):
            parts.append(model(ids[:, start:end], attention_mask=kept[:, :end], cache=cache).logits)
        return torch.cat(parts, 1)[kept.bool()]

    model = tiny(family)
    naive = logits(model)
    monkeypatch.setattr(torch, "float32", torch.float64)  # their chunks are computed in float32 whatever comes in
    gold = logits(model.double())
    monkeypatch.undo()
    model = tiny(family, "attnkit")
    attnkit.hf.accelerate(model)
    assert_within(logits(model), gold, naive, torch.float32, what=family)


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
    with pytest.raises(NotImplementedError, match="GPT2LMHeadModel, which has no latent or linear attention"):
        attnkit.hf.accelerate(tiny("gpt2", "attnkit"))
    model = tiny("deepseek_v3", "attnkit")
    model.model.layers[2].self_attn.kv_b_proj = torch.nn.Linear(32, 128, bias=True)
    with pytest.raises(NotImplementedError, match="cannot change model.layers.2.self_attn: its kv_b_proj is Linear"):
        attnkit.hf.accelerate(model)
    assert "expand_kv" not in vars(model.model.layers[0].self_attn)


@torch.no_grad()
def test_latents_keep_to_the_budget_of_bfloat16(tiny: Callable[..., Any]) -> None:
    model = tiny("deepseek_v3", "attnkit", torch.bfloat16)
    module = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    q, latent, rotary = (
        torch.randn(shape, generator=generator, dtype=torch.bfloat16)
        for shape in ((2, 4, 3, 24), (2, 1, 200, 32), (2, 1, 200, 8))
    )

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2) * module.scaling).softmax(-1)
        return (scores @ v).transpose(1, 2)

    naive = plain(q, *module.expand_kv(latent, rotary))
    attnkit.hf.accelerate(model)
    with watch() as ran:
        got, _ = attention(module, q, *module.expand_kv(latent, rotary), None, scaling=module.scaling, is_causal=False)
    assert set(ran) == {("mla", "cpu")}
    attnkit.hf.restore(model)
    gold = plain(q.double(), *module.double().expand_kv(latent.double(), rotary.double()))
    assert_within(got, gold, naive, torch.bfloat16)
