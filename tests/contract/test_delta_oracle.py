"""The delta rule against Hugging Face: the recurrence, and the layers of Qwen3-Next and Kimi Linear, also stepwise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit.mechanisms.delta import (
    DeltaAttention,
    DeltaConfig,
    delta_attention,
    kimi_linear_weights,
    qwen3_next_weights,
)
from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.testing.budgets import assert_within

LENGTH, WIDTH = 70, 24
"""Past the first block of 64, theirs and ours."""


def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers, the oracle, is not installed")


def test_the_recurrence() -> None:
    transformers()
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    inputs = get("delta").sample(1, Sizes(2, 4, 4, LENGTH, LENGTH, 8, 12), torch.float32)
    q, k, v, beta, log_decay = (inputs[name] for name in ("q", "k", "v", "beta", "log_decay"))
    turned = [x.transpose(1, 2) for x in (q, k, v, log_decay, beta)]
    wanted, last = theirs.torch_recurrent_gated_delta_rule(
        *turned, initial_state=inputs["state"], output_final_state=True
    )
    true = delta_attention(
        **{name: x.double() for name, x in inputs.items() if name != "return_state"}, return_state=True
    )
    for backend in ("chunk", "reference"):
        found = delta_attention(**inputs, backend=backend)
        for one, two, gold in zip(found, (wanted.transpose(1, 2).contiguous(), last), true, strict=True):
            assert_within(one, gold, two.clone(), torch.float32, what=backend)


def qwen() -> tuple[Any, Any, DeltaAttention]:
    """A tiny model, its first delta layer, and our layer with its weights."""
    config = transformers().Qwen3NextConfig(
        vocab_size=60, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=8,
        linear_value_head_dim=10, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, layer_types=["linear_attention", "full_attention"], pad_token_id=0, bos_token_id=1,
        eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    model = perturbed(transformers().Qwen3NextForCausalLM, config)
    theirs = model.model.layers[0].linear_attn
    ours = DeltaConfig(WIDTH, 6, key_heads=2, key_size=8, value_size=10, decay="head", gate="silu")
    layer = DeltaAttention(ours)
    layer.load_state_dict(qwen3_next_weights(theirs.state_dict(), ours))
    return model, theirs, layer


def kimi() -> tuple[Any, Any, DeltaAttention]:
    config = transformers().KimiLinearConfig(
        vocab_size=60, hidden_size=WIDTH, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, linear_head_dim=8, linear_num_heads=3,
        layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense", "dense"], pad_token_id=0,
        bos_token_id=1, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    model = perturbed(transformers().KimiLinearForCausalLM, config)
    theirs = model.model.layers[0].self_attn
    ours = DeltaConfig(WIDTH, 3, key_size=8, value_size=8, decay="channel", gate="sigmoid", rank=8, eps=1e-5)
    layer = DeltaAttention(ours)
    layer.load_state_dict(kimi_linear_weights(theirs.state_dict(), ours))
    return model, theirs, layer


def perturbed(kind: Any, config: Any) -> Any:
    """The model with weights that let every part show: norms off 1, maps large enough for gates to differ."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.dim() == 1 or "A_log" in name:
                x.add_(0.3 * torch.randn_like(x))
            elif x.dim() == 2:
                torch.nn.init.normal_(x, std=x.shape[1] ** -0.5)
    return model


@pytest.mark.parametrize("made", [qwen, kimi])
def test_a_layer_in_one_pass_and_token_by_token(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, theirs, layer = made()
    seen: list[tuple[Tensor, Tensor]] = []
    theirs.register_forward_hook(lambda _, given, named, y: seen.append((named["hidden_states"], y)), with_kwargs=True)
    tokens = torch.randint(3, 60, (2, LENGTH))
    twin, state = copy.deepcopy(layer).double(), layer.state(2, LENGTH)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
        ((x, wanted),) = seen
        gold, found = twin(x.double()), layer(x)
        assert_within(wanted, gold, found.clone(), torch.float32, what="Hugging Face's layer")
        assert_within(found, gold, wanted.clone(), torch.float32, what="our layer")
        cache, entered = None, x[:, :0].double()
        for part in tokens.split([66, 1, 1, 1, 1], 1):
            seen.clear()
            cache = model(input_ids=part, past_key_values=cache, use_cache=True).past_key_values
            ((x, wanted),) = seen
            row, state = layer.step(x, state)
            entered = torch.cat([entered, x.double()], 1)
            true = twin(entered)[:, -part.shape[1] :]
            assert_within(wanted, true, row.clone(), torch.float32, what="Hugging Face's step")
            assert_within(row, true, wanted.clone(), torch.float32, what="our step")


def test_other_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected decay 'head', gate 'silu' and rank 0"):
        qwen3_next_weights({}, DeltaConfig(16, 4))
    with pytest.raises(ValueError, match=r"expected decay 'channel', gate 'sigmoid' and a rank"):
        kimi_linear_weights({}, DeltaConfig(16, 4))
