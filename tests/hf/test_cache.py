"""The cache against Transformers' own: the same keys, the same text, and no copy of what is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import attnkit.hf
from attnkit.dispatch import watch
from attnkit.hf.layers import FullLayer, HybridLayer, IndexedLayer, PagedLayer
from attnkit.hf.windows import CodedWindowLayer, WindowLayer

IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(1))
KEPT = torch.ones_like(IDS)
KEPT[0, :5] = 0


def tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, count, 4), torch.randn(2, 3, count, 5)


@pytest.mark.parametrize("window", [1, 2, 5, 300])
def test_a_window_layer_hands_out_what_theirs_does(window: int) -> None:
    ours, theirs = WindowLayer(window), DynamicSlidingWindowLayer(window)
    for count in (3, 1, 1, 4, 1, 30, 1, 1, 1, 2, 1, 1, 400, 1, 700, 1, 1):
        assert ours.get_mask_sizes(count) == theirs.get_mask_sizes(count)
        k, v = tokens(count)
        for got, want in zip(ours.update(k, v), theirs.update(k, v), strict=True):
            # Theirs keeps everything for a window of 1 (a slice from -0); the last keys are what counts.
            assert torch.equal(got, want[:, :, want.shape[2] - got.shape[2] :])
            assert got.shape[2] == min(window - 1 + count, want.shape[2])
        assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.nbytes <= 2 * 2 * 3 * 9 * 4 * max(window, 256)


@pytest.mark.parametrize("form", [None, "int8", "fp8"])
def test_a_window_layer_goes_back_to_what_it_recorded(form: Any) -> None:
    def made() -> Any:
        return WindowLayer(4) if form is None else CodedWindowLayer(form, 4)

    def seen(layer: Any, k: torch.Tensor, v: torch.Tensor) -> Any:
        """What the last of the new tokens sees."""
        return ((x + 0)[:, :, -4:] for x in layer.update(k, v))

    layer, other = made(), made()
    k, v = tokens(230)
    layer.update(k[:, :, :220], v[:, :, :220])
    layer.activate_past_recording()
    for start in (220, 223, 226):
        layer.update(k[:, :, start : start + 3], v[:, :, start : start + 3])
    layer.crop(-8)
    other.update(k[:, :, :221], v[:, :, :221])
    assert layer.get_seq_length() == 221
    for got, want in zip(
        seen(layer, k[:, :, 229:], v[:, :, 229:]), seen(other, k[:, :, 229:], v[:, :, 229:]), strict=True
    ):
        assert torch.equal(got, want)
    for _ in range(20):  # long enough to fill the buffer and move
        for start in range(222, 230):
            layer.update(k[:, :, start : start + 1], v[:, :, start : start + 1])
    layer.crop(-160)  # back to where the first crop left off and one more
    last = k[:, :, 222:223], v[:, :, 222:223]
    for got, want in zip(seen(layer, *last), seen(other, *last), strict=True):
        assert torch.equal(got, want)
    fresh = made()
    fresh.update(k[:, :, :220], v[:, :, :220])
    fresh.update(k[:, :, :1], v[:, :, :1])
    with pytest.raises(ValueError, match="activate_past_recording"):
        fresh.crop(-200)


def test_a_full_layer_writes_in_place_and_doubles() -> None:
    layer = FullLayer()
    k, v = tokens(600)
    places = set()
    for start in range(0, 600, 3):
        got = layer.update(k[:, :, start : start + 3], v[:, :, start : start + 3])
        places.add(got[0].data_ptr())
    assert len(places) == 3  # 256, 512 and 1024 tokens
    assert torch.equal(got[0], k) and torch.equal(got[1], v)
    layer.crop(-100)
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.get_seq_length() == 500
    assert torch.equal(layer.keys, k[[1, 1], :, :500])
    layer.batch_repeat_interleave(2)
    assert layer.keys.shape[0] == 4
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.keys.shape[2] == 0


def test_an_indexer_keeps_its_keys_as_theirs_does() -> None:
    layer, index = IndexedLayer(), torch.randn(2, 600, 6)
    latent, rotary = torch.randn(2, 1, 600, 8), torch.randn(2, 1, 600, 4)
    for start in range(0, 600, 100):
        layer.update(latent[:, :, start : start + 100], rotary[:, :, start : start + 100])
        got = layer.update_indexer(index[:, start : start + 100])
        assert torch.equal(got, index[:, : start + 100])
    layer.crop(-200)
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.batch_repeat_interleave(2)
    assert layer.nbytes == 4 * 1024 * (12 + 6) * 4
    assert torch.equal(
        layer.update_indexer(index[[0, 1, 0, 1], 400:401]),
        torch.cat([index[[1, 1, 1, 1], :400], index[[0, 1, 0, 1], 400:401]], 1),
    )
    layer.reset()
    assert torch.equal(layer.update_indexer(index[:, :3]), index[:, :3])


@pytest.mark.parametrize("family", ["deepseek_v32", "falcon_h1", "gemma2", "gpt_oss", "llama", "qwen3_next"])
def test_generated_text_is_the_same(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    options = {"attention_mask": KEPT, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    want = [model.generate(IDS, num_beams=beams, **options) for beams in (1, 3)]
    model.set_attn_implementation("attnkit")
    for beams, text in zip((1, 3), want, strict=True):
        paged = [] if family in ("deepseek_v32", "falcon_h1") else [{"max_length": 24, "paged": True}]
        for made in ({}, {"max_length": 24}, *paged, None):
            cache = None if made is None else attnkit.hf.Cache(model.config, **made)
            assert torch.equal(model.generate(IDS, num_beams=beams, cache=cache, **options), text)


def test_beams_share_pages_and_read_them_in_place(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    ids = torch.randint(3, 99, (1, 100), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "num_beams": 3}
    want = model.generate(ids, **options)
    model.set_attn_implementation("attnkit")
    cache = attnkit.hf.Cache(model.config, paged=True, max_length=140)
    with watch() as ran:
        assert torch.equal(model.generate(ids, cache=cache, **options), want)
    assert set(ran) == {("softmax", "cpu"), ("softmax_step", "cpu")}
    state = cache.layers[0].state
    state.check()
    assert len({table[0] for table in state._tables}) == 1  # once a beam has won, all have its first page
    assert cache.nbytes == 4 * 2 * 3 * 3 * 64 * 2 * 16 * 4


def test_pages_are_cropped_repeated_and_given_back() -> None:
    layer = PagedLayer(None, 200)
    k, v = tokens(150)
    layer.update(k[:, :, :100], v[:, :, :100])
    layer.crop(-30)
    got = layer.update(k[:, :, 70:130], v[:, :, 70:130])
    assert torch.equal(got[0] + 0, k[:, :, :130]) and torch.equal(got[1] + 0, v[:, :, :130])
    layer.reorder_cache(torch.tensor([1, 1]))
    got = layer.update(k[:, :, 130:], v[:, :, 130:])
    assert torch.equal(got[0] + 0, torch.cat([k[[1, 1], :, :130], k[:, :, 130:]], 2))
    assert layer.state is not None
    layer.state.check()
    with pytest.raises(ValueError, match="made for 200 tokens and the sequence has reached 230"):
        layer.update(k[:, :, :80], v[:, :, :80])
    layer.batch_select_indices(torch.tensor([1]))
    assert layer.get_seq_length() == 150
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.state.pool.free == 8
    layer.update(k[:, :, :3], v[:, :, :3])  # two sequences again


@pytest.mark.parametrize(
    ("family", "made"), [("llama", {}), ("llama", {"paged": True, "max_length": 40}), ("mistral", {})]
)
def test_prompt_lookup_writes_the_same_text(
    family: str, made: dict[str, Any], tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    ids = IDS[:1, :4].repeat(1, 5)  # something to look up, and past the window of 8
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    want = model.generate(ids, **options)
    model.set_attn_implementation("attnkit")
    removed = []
    crop = attnkit.hf.Cache.crop
    monkeypatch.setattr(attnkit.hf.Cache, "crop", lambda self, count: (removed.append(count), crop(self, count)))
    cache = attnkit.hf.Cache(model.config, **made)
    assert torch.equal(model.generate(ids, cache=cache, prompt_lookup_num_tokens=3, **options), want)
    assert min(removed) < 0  # some guess was wrong and taken back


def test_a_sequence_past_its_bound_is_refused_and_kept(tiny: Callable[..., Any]) -> None:
    model = tiny("llama", "attnkit")
    cache = attnkit.hf.Cache(model.config, max_length=13)
    with torch.no_grad():
        model(IDS, cache=cache)
        with pytest.raises(ValueError, match="made for 13 tokens and the sequence has reached 14"):
            model(IDS[:, :2], cache=cache)
    assert cache.get_seq_length() == 12 and cache.get_max_length() == 13


def test_what_the_cache_cannot_do_is_refused(tiny: Callable[..., Any]) -> None:
    model = tiny("llama", "attnkit")
    with pytest.raises(ValueError, match="got dtype 'int3', expected .* int8, int4, fp8 or None"):
        attnkit.hf.Cache(model.config, dtype="int3")
    with pytest.raises(ValueError, match="paged=True and no max_length"):
        attnkit.hf.Cache(model.config, paged=True)
    for family, kind in (("deepseek_v32", "indexed_attention"), ("falcon_h1", "hybrid")):
        with pytest.raises(NotImplementedError, match=f"layer of type '{kind}' as int8"):
            attnkit.hf.Cache(tiny(family).config, "int8")
        with pytest.raises(NotImplementedError, match=f"layer of type '{kind}' on pages"):
            attnkit.hf.Cache(tiny(family).config, paged=True, max_length=9)
    with pytest.raises(NotImplementedError, match="cannot be chosen or repeated"):
        HybridLayer().batch_select_indices(torch.tensor([0]))
    with pytest.raises(NotImplementedError, match="no gradient"):
        model(IDS, cache=attnkit.hf.Cache(model.config))
    with pytest.raises(NotImplementedError, match="the model computes torch.float32"), torch.no_grad():
        model(IDS, cache=attnkit.hf.Cache(model.config, dtype="bf16"))
    assert not isinstance(attnkit.hf.Cache(model.config), DynamicCache)
