"""Compressed attention against Hugging Face's DeepSeek-V4: its three kinds of layers, in one pass and step by step."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit.mechanisms.compressed import CompressedAttention, CompressedConfig
from attnkit.positions import Rotary, YaRN
from attnkit.testing.budgets import assert_within

KINDS = {"sliding": "sliding_attention", "csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}
LENGTH, PREFILL = 61, 22
"""Several windows of every kind; the prefill ends within one of each."""
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}


def huggingface(yarn: bool) -> Any:
    """A tiny random model with one layer of each kind; norms, sinks and biases are moved off their constant start.

    Eight index heads: with few, most scores are exactly 0, and torch.topk then picks by the shape of the call.
    """
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle of V4, is not installed")
    config = transformers.DeepseekV4Config(
        vocab_size=50, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
        head_dim=16, partial_rotary_factor=0.5, q_lora_rank=24, o_groups=2, o_lora_rank=12, sliding_window=6,
        layer_types=list(KINDS.values()), compress_rates={KINDS["csa"]: 4, KINDS["hca"]: 8}, index_n_heads=8,
        index_head_dim=12, index_topk=3, n_routed_experts=4, num_experts_per_tok=2, hc_mult=2, initializer_range=0.3,
        mlp_layer_types=["moe"] * 3, rope_parameters=dict(YARN) if yarn else None, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DeepseekV4Model(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "self_attn" in name and (weight.dim() == 1 or "position_bias" in name):
                weight.add_(0.5 * torch.randn_like(weight))
    return model


def ours(theirs: Any, kind: Any, yarn: bool) -> CompressedAttention:
    plain = Rotary(8, style="interleaved")
    scaling = YaRN(16.0, 32, mscale_all=1.0) if yarn else None
    config = CompressedConfig(
        32, 4, kind=kind, head_size=16, window=6, rate={"sliding": None, "csa": 4, "hca": 8}[kind], top=3,
        rotary=plain if kind == "sliding" else replace(plain, base=160000.0, scaling=scaling), query_rank=24, groups=2,
        output_rank=12, index_heads=8, index_size=12,
    )  # fmt: skip
    layer = CompressedAttention(config).eval()
    layer.load(theirs.state_dict())
    return layer


def seen(model: Any, pieces: list[int]) -> list[tuple[Tensor, Tensor]]:
    """What entered and left the attention of each layer, for the same tokens in pieces through a cache."""
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.layers]
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda _, args, kwargs, y, into=into: into.append((args[0] if args else kwargs["hidden_states"], y[0])),
            with_kwargs=True,
        )
        for layer, into in zip(model.layers, found, strict=True)
    ]
    tokens = torch.randint(2, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    cache = None
    with torch.no_grad():
        for part in tokens.split(pieces, 1):
            cache = model(input_ids=part, past_key_values=cache, use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    return [(torch.cat([x for x, _ in pairs], 1), torch.cat([y for _, y in pairs], 1)) for pairs in found]


@pytest.mark.parametrize("yarn", [False, True], ids=["plain", "yarn"])
def test_layers_give_what_hugging_face_gives(yarn: bool) -> None:
    model = huggingface(yarn)
    for pieces in ([LENGTH], [PREFILL] + [1] * (LENGTH - PREFILL)):
        for (x, wanted), block, kind in zip(seen(model, pieces), model.layers, KINDS, strict=True):
            layer = ours(block.self_attn, kind, yarn)
            exact = copy.deepcopy(layer).double()
            exact.config = replace(exact.config, backend="reference")
            state, rows = layer.state(2, LENGTH), []
            with torch.no_grad():
                gold, naive = exact(x.double()), layer(x)
                for part in x.split(pieces, 1):
                    y, state = layer.step(part, state)
                    rows.append(y)
            # Theirs is judged by our definition, so that what differs in kind cannot widen the budget.
            assert_within(wanted.clone(), gold, naive, torch.float32, what=f"theirs, {kind}, {len(pieces)} pieces")
            assert_within(torch.cat(rows, 1), gold, naive, torch.float32, what=f"steps, {kind}")
