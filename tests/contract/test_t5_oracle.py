"""The preset ``t5`` against Hugging Face's T5: encoder with padding, decoder in one pass and token by token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.mechanisms.softmax import SoftmaxAttention, SoftmaxConfig
from attnkit.positions import T5Buckets
from attnkit.testing.budgets import assert_within

LENGTH = 150
"""Past distance 128, from where on all keys share a bucket."""
KEEP = torch.arange(LENGTH) < torch.tensor([[LENGTH], [131]])


def huggingface() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle of T5's bias, is not installed")
    config = transformers.T5Config(
        vocab_size=50, d_model=24, d_kv=8, d_ff=8, num_layers=1, num_heads=4, dropout_rate=0.0, initializer_factor=1.0,
        pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.T5Model(config).eval()


def seen_by(model: Any, side: str) -> tuple[Any, Tensor, Tensor]:
    """The self-attention of the model's encoder or decoder, what entered it and what left it."""
    attention = getattr(model, side).block[0].layer[0].SelfAttention
    torch.nn.init.normal_(attention.relative_attention_bias.weight)
    seen: list[tuple[Tensor, Tensor]] = []
    attention.register_forward_hook(lambda _, x, y: seen.append((x[0], y[0])))
    tokens = torch.randint(1, 50, (2, LENGTH))
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=KEEP.long(), decoder_input_ids=tokens)
    ((x, y),) = seen
    return attention, x, y


def ours(attention: Any, **settings: Any) -> tuple[SoftmaxAttention, SoftmaxAttention]:
    """Our layer with their weights, and its twin in float64 on the definition."""
    config = SoftmaxConfig(24, 4, head_size=8, scale=1.0, **settings)
    layer = SoftmaxAttention(config)
    for name in ("q", "k", "v", "o"):
        getattr(layer, name).load_state_dict(getattr(attention, name).state_dict())
    assert layer.t5_table is not None
    layer.t5_table.data.copy_(attention.relative_attention_bias.weight)
    return layer, copy.deepcopy(layer).double()


def test_the_encoder() -> None:
    attention, x, theirs = seen_by(huggingface(), "encoder")
    layer, twin = ours(attention, mask=None, t5=T5Buckets(bidirectional=True))
    with torch.no_grad():
        gold, found = (made(y, mask=attnkit.padding(KEEP))[KEEP] for made, y in ((twin, x.double()), (layer, x)))
    assert_within(theirs[KEEP], gold, found.clone(), torch.float32, what="Hugging Face's encoder")
    assert_within(found, gold, theirs[KEEP].clone(), torch.float32, what="our encoder")


def test_the_decoder_in_one_pass_and_token_by_token() -> None:
    attention, x, theirs = seen_by(huggingface(), "decoder")
    layer, twin = ours(attention, t5=T5Buckets())
    state, rows = layer.state(2, LENGTH), []
    with torch.no_grad():
        gold, found = twin(x.double()), layer(x)
        for part in x.split(1, 1):
            row, state = layer.step(part, state)
            rows.append(row)
    assert_within(theirs, gold, found.clone(), torch.float32, what="Hugging Face's decoder")
    assert_within(found, gold, theirs.clone(), torch.float32, what="our decoder")
    assert_within(torch.cat(rows, 1), gold, theirs.clone(), torch.float32, what="our decoder's steps")
