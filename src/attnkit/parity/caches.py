"""The caches that a model can be checked with."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, StaticCache

import attnkit.hf
from attnkit.parity.rounded import rounded
from attnkit.testing.budgets import PROMISED

CACHES = {
    "dynamic": "Transformers' DynamicCache",
    "static": "Transformers' StaticCache",
    "attnkit": "attnkit.hf.Cache of what the model computes",
    "bf16": "attnkit.hf.Cache of bfloat16",
    "fp16": "attnkit.hf.Cache of float16",
    "int8": "attnkit.hf.Cache of int8",
    "int4": "attnkit.hf.Cache of int4",
    "fp8": "attnkit.hf.Cache of fp8",
    "paged": "attnkit.hf.Cache on pages",
}
PLAIN = {codec: f"plain {codec}" for codec in PROMISED}
"""Beside each quantised cache the one that says what it may change."""


def cache(name: str, config: Any, length: int) -> Any:
    """A new cache with room for ``length`` tokens; one of ``CACHES`` or ``PLAIN``."""
    ours: Any = attnkit.hf.Cache
    match name:
        case "dynamic":
            return DynamicCache(config=config)
        case "static":
            return StaticCache(config=config, max_cache_len=length)
        case "attnkit":
            return ours(config)
        case "paged":
            return ours(config, paged=True, max_length=length)
    if name in PLAIN.values():
        return rounded(config, name.removeprefix("plain "))
    return ours(config, dtype=name)
