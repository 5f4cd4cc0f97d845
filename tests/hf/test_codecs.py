"""Quantised caches against Transformers' own cache and eager attention over the numbers that the codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import attnkit.hf
from attnkit.dispatch import watch
from attnkit.hf.attention import attention
from attnkit.hf.carried import CarriedRows
from attnkit.hf.layers import CodedLayer
from attnkit.state import KVState

IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(1))
KEPT = torch.ones_like(IDS)
KEPT[0, :5] = 0
OPTIONS = {"attention_mask": KEPT, "max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
CODECS = ["int8", "fp8", "int4"]


class Rounded(DynamicLayer):
    """Theirs, which keeps all numbers as they came, encodes them anew at each call and hands on what the codes mean."""

    codec: Any = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        first = not self.get_seq_length()
        k, v = super().update(key_states, value_states)
        if first and self.codec == "int4":
            return k, v
        return numbers(self.codec, k, v)


class RoundedWindow(DynamicSlidingWindowLayer):
    """Theirs, which hands on the newest of what a layer that keeps all would."""

    def __init__(self, whole: Rounded, window: int) -> None:
        super().__init__(window)
        self.whole = whole

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen = super().update(key_states, value_states)[0].shape[2]
        k, v = self.whole.update(key_states, value_states)
        return k[:, :, -seen:], v[:, :, -seen:]

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.whole.reorder_cache(beam_idx)


def numbers(codec: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state = KVState(*k.shape[:3], k.shape[3], v.shape[3], dtype=k.dtype, codec=codec)
    state.store(k, v)
    return state.numbers()


def rounded(config: Any, codec: str) -> DynamicCache:
    cache = DynamicCache(config=config)
    layer = type("Layer", (Rounded,), {"codec": codec})
    for i, one in enumerate(cache.layers):
        if isinstance(one, DynamicSlidingWindowLayer):
            cache.layers[i] = RoundedWindow(layer(), one.sliding_window)
        elif type(one) is DynamicLayer:
            cache.layers[i] = layer()
    return cache


@pytest.mark.parametrize(
    ("family", "codec"),
    [
        *(("llama", codec) for codec in CODECS),
        ("gemma2", "int8"),
        ("mistral", "fp8"),
        ("mistral", "int4"),
        ("gpt_oss", "int4"),
        ("qwen3_next", "fp8"),
    ],
)
def test_generated_text_is_that_of_the_codes(family: str, codec: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    for beams in (1, 3):
        model.set_attn_implementation("eager")
        want = model.generate(IDS, num_beams=beams, cache=rounded(model.config, codec), **OPTIONS)
        model.set_attn_implementation("attnkit")
        for made in ({}, {"paged": True, "max_length": 42}):
            cache = attnkit.hf.Cache(model.config, dtype=codec, **made)
            with watch() as ran:
                assert torch.equal(model.generate(IDS, num_beams=beams, cache=cache, **OPTIONS), want)
            # The codes were read where they lie, those of windows as well; a prompt of int4 is attended to as it came.
            prompts = sum(hasattr(layer, "codec") for layer in cache.layers) if codec == "int4" else 0
            assert ran["softmax", "cpu"] == prompts
            assert ran["softmax_step", "cpu"] > 0


@pytest.mark.parametrize("codec", CODECS)
def test_any_implementation_reads_the_codes(codec: str, tiny: Callable[..., Any]) -> None:
    model = tiny("llama", "sdpa")
    want = model.generate(IDS, cache=rounded(model.config, codec), **OPTIONS)
    assert torch.equal(model.generate(IDS, cache=attnkit.hf.Cache(model.config, dtype=codec), **OPTIONS), want)


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_prompt_lookup_writes_the_same_text(codec: str, tiny: Callable[..., Any]) -> None:
    model = tiny("llama", "attnkit")
    ids = IDS[:1, :4].repeat(1, 5)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    want = model.generate(ids, cache=attnkit.hf.Cache(model.config, dtype=codec), **options)
    cache = attnkit.hf.Cache(model.config, dtype=codec)
    with watch() as ran:
        assert torch.equal(model.generate(ids, cache=cache, prompt_lookup_num_tokens=3, **options), want)
    assert cache.get_seq_length() >= 59 and set(ran) == {("softmax_step", "cpu")}
    with pytest.raises(NotImplementedError, match="a guess would complete too early"):
        model.generate(ids, cache=attnkit.hf.Cache(model.config, dtype="int4"), prompt_lookup_num_tokens=3, **options)


@pytest.mark.parametrize("codec", CODECS)
def test_a_layer_grows_and_moves_its_codes_as_they_are(codec: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 3, 700, 40, generator=generator), torch.randn(2, 3, 700, 48, generator=generator)
    layer = CodedLayer(codec)
    for start in range(0, 600, 3):
        got = layer.update(k[:, :, start : start + 3], v[:, :, start : start + 3])
    assert layer.state is not None and layer.state.capacity == 1024

    def check(k: Tensor, v: Tensor, got: tuple[Tensor, Tensor]) -> None:
        assert all(isinstance(x, CarriedRows) for x in got)
        for one, want in zip(got, numbers(codec, k, v), strict=True):
            assert torch.equal(one + 0, want)

    check(k[:, :, :600], v[:, :, :600], got)
    if codec == "int4":
        with pytest.raises(ValueError, match="kept as numbers from token 544 on"):
            layer.state.grown(2048).crop(500)
    layer.crop(-20)
    with pytest.raises(RuntimeError, match="handed on 600 tokens and holds 580"):
        got[0] + 0
    k, v = (torch.cat([x[:, :, :580], x[:, :, 600:640]], 2) for x in (k, v))
    got = layer.update(k[:, :, 580:], v[:, :, 580:])
    check(k, v, got)
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.batch_repeat_interleave(2)
    k, v = (x[[1, 1, 1, 1]] for x in (k, v))
    got = layer.update(k[:, :, :1], v[:, :, :1])
    check(torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2), got)
    layer.reset()
    assert layer.get_seq_length() == 0


def test_a_mask_that_shows_later_keys_is_kept() -> None:
    """Several queries that see each other: the step's own order would hide some of them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 20, 16, generator=generator) for heads in (4, 2, 2))
    layer, module = CodedLayer("int8"), torch.nn.Module()
    layer.update(k[:, :, :16], v[:, :, :16])
    key, value = layer.update(k[:, :, 16:], v[:, :, 16:])
    all_seen = torch.ones(2, 1, 4, 20, dtype=torch.bool)
    some_hidden = torch.zeros(2, 1, 4, 20).index_fill(3, torch.tensor([3, 18]), -torch.inf)
    for mask in (all_seen, some_hidden):
        with watch() as ran:
            o, _ = attention(module, q[:, :, 16:], key, value, mask)
        want, _ = attention(module, q[:, :, 16:], key + 0, value + 0, mask)
        assert torch.equal(o, want) and set(ran) == {("softmax", "cpu")}
