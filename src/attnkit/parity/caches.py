"""The caches that a model can be checked with."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, StaticCache

import attnkit.hf

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


def cache(name: str, config: Any, length: int) -> Any:
    """A new cache with room for ``length`` tokens; one of ``CACHES``."""
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
    return ours(config, dtype=name)
