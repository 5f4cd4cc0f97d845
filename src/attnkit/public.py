"""The public names of attnkit, gathered from where they are defined."""

from __future__ import annotations

from attnkit import state
from attnkit.dispatch import explain
from attnkit.masks import (
    Mask,
    bigbird,
    block_sparse,
    causal,
    chunked,
    dilated_window,
    documents,
    explicit,
    fixed,
    full,
    global_tokens,
    padding,
    predicate,
    prefix,
    strided,
    symmetric_window,
    window,
)
from attnkit.mechanisms.softmax import (
    merge,
    softmax_attention,
    softmax_attention_step,
    softmax_attention_varlen,
)
from attnkit.registry import get

__all__ = [
    "Mask",
    "bigbird",
    "block_sparse",
    "causal",
    "chunked",
    "dilated_window",
    "documents",
    "explain",
    "explicit",
    "fixed",
    "full",
    "get",
    "global_tokens",
    "merge",
    "padding",
    "predicate",
    "prefix",
    "softmax_attention",
    "softmax_attention_step",
    "softmax_attention_varlen",
    "state",
    "strided",
    "symmetric_window",
    "window",
]
