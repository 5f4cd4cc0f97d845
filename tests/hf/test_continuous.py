"""Transformers' own continuous batching, on its pages and with our kernels: the text that each prompt has alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig

import attnkit.hf
from attnkit.dispatch import watch
from attnkit.hf import continuous
from attnkit.hf.continuous import joined_attention

PROMPTS = [
    torch.randint(3, 99, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 71, 1, 20, 9, 64, 3)
]
NEW = 12
# Small pages and few tokens a batch: prompts are taken in pieces, beside sequences that go on.
SIZES = {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 32}


def alone(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    text = model.generate(ids, do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=NEW)
    return text[0, len(prompt) :].tolist()


def batched(model: Any, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[Any]:
    """The outputs of Transformers' own engine."""
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with attnkit.hf.continuous_batching(model):
        found = model.generate_batch(
            prompts, generation_config=settings, continuous_batching_config=ContinuousBatchingConfig(**SIZES, **options)
        )
    return list(found.values())


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama", "mistral"])
def test_text_is_that_of_each_alone(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    want = [alone(model, prompt) for prompt in PROMPTS]
    model.set_attn_implementation("attnkit")
    with watch() as ran:
        found = batched(model)
    assert [one.error for one in found] == [None] * len(PROMPTS)
    assert [one.generated_tokens for one in found] == want
    assert set(ran) == {("softmax", "cpu"), ("softmax_step", "cpu")}
    assert model.config._attn_implementation == "attnkit"
    assert alone(model, PROMPTS[0]) == want[0]


def test_what_goes_on_is_read_where_it_lies(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of sequences with a past reads Transformers' own tensor, and prompts that share pages share them."""
    model, states = tiny("llama", "attnkit"), []
    step = continuous.softmax_attention_step

    def noted(q: torch.Tensor, state: Any, **options: Any) -> torch.Tensor:
        states.append(state)
        return step(q, state, **options)

    monkeypatch.setattr(continuous, "softmax_attention_step", noted)
    same = [PROMPTS[1], PROMPTS[1][:40] + [7, 8]]
    want = [alone(model, prompt) for prompt in same]
    states.clear()
    found = batched(model, same, allow_block_sharing=True)
    assert [one.generated_tokens for one in found] == want
    assert len({state.pool.k.untyped_storage().data_ptr() for state in states}) == 1
    assert len(states) >= (NEW - 1) * model.config.num_hidden_layers


def test_a_wrong_page_would_be_seen(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", "attnkit")
    want = [alone(model, prompt) for prompt in PROMPTS]
    right = continuous._tables
    monkeypatch.setattr(
        continuous, "_tables", lambda *args, **kwargs: [[table[0]] * len(table) for table in right(*args, **kwargs)]
    )
    assert [one.generated_tokens for one in batched(model)] != want


def test_what_cannot_be_batched_is_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="runs 'eager'"), attnkit.hf.continuous_batching(tiny("llama")):
        pass
    model = tiny("llama", "attnkit")
    with (
        attnkit.hf.continuous_batching(model),
        pytest.raises(ValueError, match="inside another"),
        attnkit.hf.continuous_batching(model),
    ):
        pass
    assert model.config._attn_implementation == "attnkit" and not model._forward_pre_hooks
    for family, reason in (
        ("deepseek_v3", "layers of latent attention"),
        ("qwen3_next", "layers of linear_attention"),
        ("bloom", "whose attention is its own"),
    ):
        with pytest.raises(NotImplementedError, match=reason), attnkit.hf.continuous_batching(tiny(family, "attnkit")):
            pass


def test_transformers_refuses_our_name_outside(tiny: Callable[..., Any]) -> None:
    """When this fails, Transformers takes more names, and ``continuous_batching`` may need to do less."""
    with pytest.raises(ValueError, match="Implementation attnkit is not supported for continuous batching"):
        tiny("llama", "attnkit").generate_batch(PROMPTS, continuous_batching_config=ContinuousBatchingConfig(**SIZES))
    with pytest.raises(ValueError, match="Could not find the currently requested flash attention"):
        tiny("llama", "attnkit_flash")


Q = torch.randn(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"temperature": 2.0}, "temperature"),
        ({"dropout": 0.5}, "without dropout"),
        ({"attention_mask": Q}, "a mask of the caller's"),
        ({"position_bias": Q}, "position_bias"),
        ({}, "other keys than those it stored"),
    ],
)
def test_arguments_that_are_not_known_are_refused(kwargs: dict[str, Any], error: str) -> None:
    starts = torch.tensor([0, 1, 3])
    with pytest.raises(NotImplementedError, match=error):
        joined_attention(
            *(torch.nn.Module(), Q, Q, Q),
            **{"attention_mask": None, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, **kwargs},
        )


def test_names_are_taken_back_together() -> None:
    names = AttentionInterface._global_mapping
    assert names["attnkit_flash"] is joined_attention
    attnkit.hf.unregister()
    assert not {"attnkit", "attnkit_flash"} & set(names)
