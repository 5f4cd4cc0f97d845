"""What Transformers calls things, which changed between its versions."""

from __future__ import annotations

import inspect
from typing import Any


def arguments(model: Any) -> Any:
    """The parameters of a model's ``forward`` by name."""
    return inspect.signature(model.forward).parameters


def as_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword that gives ``model`` its ``cache``: ``past_key_values`` before Transformers 5.24."""
    return {"cache" if "cache" in arguments(model) else "past_key_values": cache}
