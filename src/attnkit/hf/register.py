"""The switch: puts our attention and our masks into the registries of Transformers, and takes them out."""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from attnkit.hf.attention import attention
from attnkit.hf.continuous import SUFFIX, joined_attention
from attnkit.hf.masks import attention_mask

# A name without a mask function makes Transformers drop every mask in silence, so the two always go together.
_FILLED: tuple[tuple[Any, str, Any], ...] = (
    (AttentionInterface, "", attention),
    (AttentionMaskInterface, "", attention_mask),
    (AttentionInterface, SUFFIX, joined_attention),
    (AttentionMaskInterface, SUFFIX, attention_mask),
)


def register(name: str = "attnkit") -> None:
    """Let ``attn_implementation=name`` run our attention with our masks; calling it again changes nothing.

    Raises ``ValueError`` for a name that is taken by another implementation or means something to Transformers
    ("flash", "/", "|").
    """
    if not isinstance(name, str) or not name.isidentifier() or "flash" in name:
        raise ValueError(f"register got the name {name!r}, expected letters and digits without 'flash', as 'attnkit'")
    for interface, suffix, ours in _FILLED:
        held = interface._global_mapping.get(name + suffix)
        if name == "eager" or held not in (None, ours):
            raise ValueError(f"register got the name {name!r}, which is another implementation's: choose a free one")
    for interface, suffix, ours in _FILLED:
        interface.register(name + suffix, ours)
    for interface, suffix, ours in _FILLED:
        if interface().get(name + suffix) is not ours:
            unregister(name)
            raise RuntimeError(f"{interface.__name__} did not keep {name!r}: attnkit.hf works with Transformers 5.23")


def unregister(name: str = "attnkit") -> None:
    """Take ``name`` out of both registries; a model that still uses it raises at its next call."""
    for interface, suffix, ours in _FILLED:
        if interface._global_mapping.get(name + suffix) is ours:
            del interface._global_mapping[name + suffix]
