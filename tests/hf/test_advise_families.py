"""The advisor reads every family right: weights and caches have the bytes that Transformers and attnkit allocate."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from attnkit.advise import from_config, read_config
from attnkit.advise.allocate import allocated_bytes
from attnkit.advise.families import TABLE, configs
from attnkit.advise.model import Mixer

# Past a window of 8 and in the middle of a group of four: nothing is full by chance.
TOKENS = 27
IDS = torch.randint(3, 99, (1, TOKENS), generator=torch.Generator().manual_seed(2))
# Keys that the tests give to every family with experts or a linear layer, and that some of them do not have.
OTHERS = {
    *("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_shared_experts", "n_group"),
    *("first_k_dense_replace", "topk_group", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("num_experts_per_tok", "intermediate_size", "linear_num_key_heads", "linear_num_value_heads"),
    *("linear_key_head_dim", "linear_value_head_dim", "attention_bias"),
}
# Transformers makes room for the gate of experts that compute nothing, which no checkpoint has.
EMPTY_EXPERTS = {"longcat_flash": 2 * 256 * 64 * 64}
UNREAD = {"rwkv": "is 'rwkv'"}
# Their caches are attributes of the layers, and no object that could be asked.
HIDDEN_CACHE = {"recurrent_gemma"}


def configured(model: Any) -> dict[str, Any]:
    return json.loads(model.config.to_json_string(use_diff=False)) | {"dtype": "float32"}


def stored(thing: Any, seen: set[int]) -> int:
    """Bytes of all floating tensors in a cache, whatever it is made of."""
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return thing.nbytes if thing.is_floating_point() else 0
    if isinstance(thing, dict):
        return sum(stored(value, seen) for value in thing.values())
    if isinstance(thing, list | tuple):
        return sum(stored(value, seen) for value in thing)
    if "ache" in type(thing).__name__ or "Layer" in type(thing).__name__:
        return stored(vars(thing), seen)
    return 0


def theirs(mixer: Mixer, bytes_of_ours: int) -> int:
    """What Transformers keeps: of a window not the token that is next, of a convolution one input more."""
    tail = dict(mixer.options).get("tail")
    if mixer.window is not None and mixer.window < TOKENS:
        return bytes_of_ours // mixer.window * (mixer.window - 1)
    return bytes_of_ours + 4 * channels(mixer) if tail else bytes_of_ours


def channels(mixer: Mixer) -> int:
    taps = {"convolution": 3}.get(mixer.mechanism, 4)
    return int(dict(mixer.options)["tail"]) // (taps - 1)


@torch.no_grad()
def test_weights_and_caches_are_those_of_transformers(each_family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(each_family)
    if each_family in UNREAD:
        with pytest.raises(ValueError, match=UNREAD[each_family]):
            from_config(configured(model))
        return
    ours = from_config(configured(model))
    weights = sum(weight.numel() for weight in model.parameters())
    assert ours.weights == weights - EMPTY_EXPERTS.get(each_family, 0)
    assert set(ours.unknown) <= OTHERS, f"nothing reads {set(ours.unknown) - OTHERS}"
    assert ours.state_bytes(TOKENS) == allocated_bytes(ours, TOKENS)
    if each_family in HIDDEN_CACHE:
        return
    out = model(IDS, use_cache=True)
    cache = getattr(out, "past_key_values", None) or getattr(out, "cache_params", None)
    expected = sum(
        count * theirs(mixer, mixer.cost(1, TOKENS, 4).state_bytes(TOKENS)) for mixer, count in ours.mixers.items()
    )
    assert stored(cache, set()) == expected


def test_a_family_that_is_read_wrong_is_seen(tiny: Callable[..., Any]) -> None:
    model = tiny("gemma2")
    wrong = configured(model) | {"sliding_window": 9}
    assert from_config(wrong).state_bytes(TOKENS) != from_config(configured(model)).state_bytes(TOKENS)


# Bytes of a token, and of a sequence of 8,192, as worked out by hand from the sizes in the papers.
FULL = {
    "llama-2-7b": (524_288, 4 << 30),
    "llama-3-8b": (131_072, 1 << 30),
    "llama-3-70b": (327_680, 5 << 29),
    "mistral-7b": (0, 1 << 29),
    "deepseek-v3": (70_272, 70_272 * 8192),
    "deepseek-v3.2": (61 * (512 + 64 + 128) * 2, 61 * 704 * 2 * 8192),
    "qwen3-next-80b-a3b": (12 * 2 * 2 * 256 * 2, 12 * 2048 * 8192 + 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)),
    "minimax-01": (10 * 8 * 2 * 128 * 2, 10 * 4096 * 8192 + 70 * 64 * 128 * 128 * 4),
    "gpt-oss-20b": (12 * 8 * 2 * 64 * 2, 12 * 2048 * (8192 + 128)),
    "gpt-oss-120b": (18 * 8 * 2 * 64 * 2, 18 * 2048 * (8192 + 128)),
    "gemma-2-9b": (21 * 8 * 2 * 256 * 4, 21 * 8 * 2 * 256 * 4 * (8192 + 4096)),
}


@pytest.mark.parametrize("name", FULL)
def test_full_sizes_have_their_published_bytes(name: str) -> None:
    token, whole = FULL[name]
    model = read_config(name)
    assert model.token_bytes() == token
    assert model.state_bytes(8192) == whole == allocated_bytes(model, 8192)


@pytest.mark.parametrize(("name", "gib"), [("deepseek-v4-pro", 9.6), ("deepseek-v4-flash", 6.7)])
def test_v4_at_a_million_tokens(name: str, gib: float) -> None:
    """The technical report gives 9.6 GiB for Pro; CSA keeps (512 + 128) / 4 numbers a token, HCA 512 / 128."""
    model, rows = read_config(name), 1 << 20
    assert model.state_bytes(rows) == allocated_bytes(model, rows)
    assert model.state_bytes(rows) / 2**30 == pytest.approx(gib, abs=0.06)


# In billions: all weights and those that a token is multiplied with, as their makers give them.
PUBLISHED = {
    "llama-3-8b": (8.03, 7.5),
    "llama-3-70b": (70.6, 69.5),
    "deepseek-v3": (671, 36.6),
    "deepseek-v4-flash": (284, 13.3),
    "deepseek-v4-pro": (1573, 48.9),
    "gpt-oss-20b": (20.9, 3.61),
    "gpt-oss-120b": (116.8, 5.13),
    "kimi-linear-48b-a3b": (49.1, 3.1),
    "minimax-01": (456, 47.2),
    "smollm2-135m": (0.135, 0.135),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_sizes_have_their_published_weights(name: str) -> None:
    total, active = PUBLISHED[name]
    model = read_config(name)
    assert model.weights / 1e9 == pytest.approx(total, rel=4e-3)
    assert model.active / 1e9 == pytest.approx(active, rel=4e-3)


MADE = ("llama-3-8b", "mistral-7b", "gemma-2-9b", "gpt-oss-20b", "qwen3-next-80b-a3b", "opus-mt-en-de")


@pytest.mark.parametrize("name", MADE)
def test_full_sizes_have_the_weights_that_are_allocated(name: str) -> None:
    config = json.loads(configs()[name].read_text())
    config.pop("quantization_config", None)
    kind = str(config.pop("model_type"))
    with torch.device("meta"):
        made = AutoModelForSeq2SeqLM if kind == "marian" else AutoModelForCausalLM
        model = made.from_config(CONFIG_MAPPING[kind](**config))
    assert read_config(name).weights == sum(weight.numel() for weight in model.parameters())


def test_at_least_sixty_families_are_read() -> None:
    assert len(TABLE) >= 60


def test_real_configurations_leave_nothing_unread() -> None:
    assert {name: read_config(name).unknown for name in configs() if read_config(name).unknown} == {}
