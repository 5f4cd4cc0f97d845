"""Prompts of many lengths, batched as they come and go, get the text that each has alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnkit.hf
from attnkit.dispatch import watch
from attnkit.hf import batching

PROMPTS = [
    torch.randint(3, 99, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 71, 1, 20, 9, 64, 3)
]


def alone(model: Any, prompt: list[int], **options: Any) -> list[int]:
    text = model.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=0, **options)
    return text[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_oss", "llama", "mistral"])
def test_text_is_that_of_each_alone(family: str, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    want = [alone(model, prompt, max_new_tokens=12, eos_token_id=None) for prompt in PROMPTS]
    end = want[3][4]  # some stop early, and others take their places
    want = [text[: text.index(end) + 1] if end in text else text for text in want]
    model.set_attn_implementation("attnkit")
    states: list[Any] = []
    admit = batching._RaggedLayer.admit
    monkeypatch.setattr(batching._RaggedLayer, "admit", lambda self: (admit(self), states.append(self)))
    for max_batch in (3, 16):
        with watch() as ran:
            got = attnkit.hf.generate_batch(model, PROMPTS, max_new_tokens=12, eos_token_id=end, max_batch=max_batch)
        assert got == want
        assert set(ran) == {("softmax", "cpu"), ("softmax_step", "cpu")}
    for layer in states:
        layer.state.check()
        assert layer.state.lengths == [] and layer.state.pool.free == layer.pages


def test_ends_are_those_of_the_model(tiny: Callable[..., Any]) -> None:
    model = tiny("llama", "attnkit")
    text = alone(model, PROMPTS[0], max_new_tokens=12, eos_token_id=None)
    model.generation_config.eos_token_id = [98, text[2]]
    assert attnkit.hf.generate_batch(model, PROMPTS[:1], max_new_tokens=12)[0] == text[: text.index(text[2]) + 1]
    assert attnkit.hf.generate_batch(model, [], max_new_tokens=12) == []


def test_what_cannot_be_batched_is_refused(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="runs 'eager'"):
        attnkit.hf.generate_batch(model, PROMPTS, max_new_tokens=3)
    model.set_attn_implementation("attnkit")
    with pytest.raises(ValueError, match=r"prompts of \[5, 0\] tokens, expected at least 1"):
        attnkit.hf.generate_batch(model, [PROMPTS[0], []], max_new_tokens=3)
    for family, kind in (("deepseek_v3", "latent attention"), ("qwen3_next", "linear_attention")):
        with pytest.raises(NotImplementedError, match=f"layers of {kind}"):
            attnkit.hf.generate_batch(tiny(family, "attnkit"), PROMPTS, max_new_tokens=3)
