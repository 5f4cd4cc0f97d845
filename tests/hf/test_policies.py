"""A policy on the cache: the text of attention to what a policy's own state keeps, or a refusal with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import attnkit
import attnkit.hf
from attnkit.hf.chosen import PolicyLayer
from attnkit.hf.layers import FullLayer
from attnkit.hf.masks import attention_mask
from attnkit.hf.windows import WindowLayer
from attnkit.parity.families import FAMILIES
from attnkit.parity.record import DoesNotApplyError
from attnkit.parity.subject import implementation
from attnkit.state.policies import (
    H2O,
    TOVA,
    AShape,
    BlockSparse,
    KeptState,
    Policy,
    PyramidKV,
    Quest,
    SnapKV,
    StreamingLLM,
    VerticalSlash,
    XAttention,
)

IDS = torch.randint(3, 99, (2, 40), generator=torch.Generator().manual_seed(1))
OPTIONS = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
SOME: list[Policy] = [
    StreamingLLM(24),
    H2O(24),
    TOVA(24),
    SnapKV(24, observed=8, every=4),
    PyramidKV(24, observed=8, every=4, beta=4),
    Quest(24, page=4),
    AShape(2, 8),
    VerticalSlash(6, 6, last=8, forced=2),
    BlockSparse(2, block=4),
    XAttention(0.6, stride=2, block=4),
]
WHOLE: list[Policy] = [
    *(StreamingLLM(80), H2O(80), TOVA(80), SnapKV(80), PyramidKV(80, beta=1), Quest(80)),
    *(AShape(80, 80), VerticalSlash(80, 80), BlockSparse(100), XAttention(1.0)),
]


def named(policy: Policy) -> str:
    return type(policy).__name__


class Beside:
    """Attention over all keys, which a ``DynamicCache`` kept, of those that the policy's own state says."""

    def __init__(self, policy: Policy, layers: int) -> None:
        self.states: dict[int, Any] = {}
        self.policies = [policy.for_layer(layer, layers) for layer in range(layers)]

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
    ) -> tuple[Tensor, None]:
        m, index = query.shape[2], module.layer_idx
        policy = self.policies[index]
        if policy is None:
            o = attnkit.softmax_attention(query, key, value, mask=attnkit.causal(), scale=given["scaling"])
            return o.transpose(1, 2).contiguous(), None
        if index not in self.states:
            sizes = (*key.shape[:2], 100, key.shape[3], value.shape[3])
            self.states[index] = policy.state(*sizes, dtype=key.dtype)
        view = self.states[index].append(key[:, :, -m:], value[:, :, -m:], query, scale=given["scaling"])
        view, mask = view.for_queries(attnkit.causal(), m)
        o = attnkit.softmax_attention(query, view.k, view.v, mask=mask, scale=given["scaling"], backend="reference")
        return o.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("policy", SOME, ids=named)
def test_generated_text_is_that_of_what_the_policy_keeps(policy: Policy, tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    full = model.generate(IDS, **OPTIONS)
    beside = Beside(policy, 4)
    AttentionInterface.register("beside", beside)
    AttentionMaskInterface.register("beside", attention_mask)
    try:
        model.set_attn_implementation("beside")
        want = model.generate(IDS, cache=DynamicCache(config=model.config), **OPTIONS)
    finally:
        del AttentionInterface._global_mapping["beside"], AttentionMaskInterface._global_mapping["beside"]
    assert not torch.equal(want, full)  # it leaves something out that matters here
    model.set_attn_implementation("attnkit")
    cache = attnkit.hf.Cache(model.config, policy=policy)
    assert torch.equal(model.generate(IDS, cache=cache, **OPTIONS), want)
    assert cache.get_seq_length() == 69
    for layer, one in zip(cache.layers, beside.policies, strict=True):
        if one is None:
            assert type(layer) is FullLayer
        elif isinstance(layer.state, KeptState):
            assert layer.state.held <= one.budget < 69 and layer.state.batch == 2


@pytest.mark.parametrize("policy", WHOLE, ids=named)
def test_a_budget_for_all_changes_nothing(policy: Policy, tiny: Callable[..., Any]) -> None:
    model = tiny("qwen3")
    want = model.generate(IDS, num_beams=3, **OPTIONS)
    model.set_attn_implementation("attnkit")
    for length in (None, 70):
        cache = attnkit.hf.Cache(model.config, policy=policy, max_length=length)
        assert torch.equal(model.generate(IDS, num_beams=3, cache=cache, **OPTIONS), want)


def test_a_layer_is_forgotten_moved_and_grown() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(2, heads, 700, 8, generator=generator) for heads in (2, 2, 4))
    layer, other = PolicyLayer(Quest(32, page=8)), PolicyLayer(Quest(32, page=8), max_length=2000)
    for start, end in ((0, 600), (600, 650), (650, 651)):
        parts = [x[:, :, start:end] for x in (k, v, q)]
        got = [one.update(parts[0], parts[1])[0].waiting.taken(parts[2], None)[0] for one in (layer, other)]
        assert torch.equal(got[0].k, got[1].k)
        assert layer.state is not None and layer.get_seq_length() == end
        layer.state.check()
    assert layer.state.capacity == 1200 and layer.nbytes < other.nbytes
    assert got[0].k.shape[2] == 27  # four pages, of which the newest holds three
    layer.crop(-50)
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([1, 0, 3, 2]))
    assert layer.get_seq_length() == 601 and torch.equal(layer.state.view().k, k[[0, 0, 1, 1]][[1, 0, 3, 2], :, :601])
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.nbytes == 0


def test_what_waits_is_taken_once_and_before_the_next() -> None:
    layer = PolicyLayer(TOVA(8))
    k, v, q = (torch.randn(1, heads, 4, 8) for heads in (2, 2, 4))
    key, _ = layer.update(k, v)
    key.waiting.taken(q, None)
    with pytest.raises(NotImplementedError, match="follow 0 others and holds 4 now"):
        key.waiting.taken(q, None)
    late, _ = layer.update(k, v)
    assert layer.get_seq_length() == 4 and tuple(late.shape) == (1, 2, 8, 8)
    layer.update(k, v)[0].waiting.taken(q, None)
    with pytest.raises(NotImplementedError, match="follow 4 others and holds 8 now"):
        late.waiting.taken(q, None)


def test_layers_that_share_what_they_keep_are_refused(tiny: Callable[..., Any]) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = tiny("gemma4_text", num_kv_shared_layers=2, layer_types=kinds).config
    with pytest.raises(NotImplementedError, match="read what others keep"):
        attnkit.hf.Cache(config, policy=H2O(8))


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_call_that_no_policy_knows_is_refused_and_stores_nothing(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family, "attnkit")
    cache = attnkit.hf.Cache(model.config, policy=H2O(8))
    with torch.no_grad(), pytest.raises(NotImplementedError, match="has (softcap|s_aux), which a policy does not"):
        model(IDS, cache=cache)
    held = [layer for layer in cache.layers if not isinstance(layer, WindowLayer)]
    assert held and all(layer.get_seq_length() == 0 for layer in held)


def test_what_a_policy_cannot_do_is_refused(tiny: Callable[..., Any]) -> None:
    model, kept = tiny("llama", "attnkit"), torch.ones_like(IDS)
    kept[0, :5] = 0

    def made(**given: Any) -> Any:
        return attnkit.hf.Cache(model.config, **{"policy": H2O(8), **given})

    with pytest.raises(TypeError, match="got policy 'snapkv', expected one of attnkit.state.policies"):
        made(policy="snapkv")
    with pytest.raises(NotImplementedError, match="policy H2O, but the cache keeps its tokens as int8"):
        made(dtype="int8")
    with pytest.raises(NotImplementedError, match="policy H2O, but the cache keeps its tokens as pages"):
        made(paged=True, max_length=50)
    with pytest.raises(NotImplementedError, match="leave rotary out"):
        made(policy=StreamingLLM(8, rotary=attnkit.positions.Rotary(16)))
    with torch.no_grad():
        with pytest.raises(NotImplementedError, match="give prompts of one length"):
            model(IDS, attention_mask=kept, cache=made())
        with pytest.raises(NotImplementedError, match="H2O lets go of tokens, which a guess"):
            model.generate(IDS[:1], cache=made(), prompt_lookup_num_tokens=3, **OPTIONS)
        model.set_attn_implementation("sdpa")
        with pytest.raises(NotImplementedError, match="use attn_implementation='attnkit'"):
            model(IDS, cache=made())


def test_quest_takes_guesses_back(tiny: Callable[..., Any]) -> None:
    model = tiny("llama", "attnkit")
    ids = IDS[:1, :4].repeat(1, 10)
    want = model.generate(ids, cache=attnkit.hf.Cache(model.config, policy=Quest(60, page=4)), **OPTIONS)
    cache = attnkit.hf.Cache(model.config, policy=Quest(60, page=4))
    assert torch.equal(model.generate(ids, cache=cache, prompt_lookup_num_tokens=3, **OPTIONS), want)


REFUSING = {
    "keeps latents, which all heads share": {
        *("bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "hy_v4"),
        *("kimi_linear", "longcat_flash", "minicpm3", "youtu"),
    },
    "has no layer of full attention": {
        *("gemma3_text", "mamba2", "ministral", "mistral", "phi3", "recurrent_gemma", "starcoder2"),
    },
    "layers of type 'hybrid'": {"falcon_h1"},
    "has softcap, which a policy": {"gemma2"},
    "has s_aux, which a policy": {"gpt_oss"},
    "computes split with": {"diffllama"},
    "computes transpose with": {"doge"},
}


def test_every_family_takes_a_policy_or_says_why_not(tiny: Callable[..., Any]) -> None:
    """StreamingLLM with room for all writes what a plain cache does; families without a cache of ours are left out."""

    def said(model: Any, policy: Policy | None) -> Tensor:
        cache = attnkit.hf.Cache(model.config, policy=policy)
        with torch.no_grad():
            return torch.cat([model(ids, cache=cache).logits.argmax(-1) for ids in IDS[:, :21].split(20, 1)], 1)

    refused: dict[str, set[str]] = {}
    for family in FAMILIES:
        model = tiny(family)
        try:
            with implementation(model, "attnkit"):
                want = said(model, None)
        except (DoesNotApplyError, NotImplementedError, ValueError):
            continue
        with implementation(model, "attnkit"):
            try:
                assert torch.equal(said(model, StreamingLLM(60)), want), family
            except NotImplementedError as error:
                (reason,) = (why for why in REFUSING if why in str(error))
                refused.setdefault(reason, set()).add(family)
    assert refused == REFUSING
