"""Well-known layers that are softmax attention with a setting: each is a row of ``attnkit compare``."""

from __future__ import annotations

from typing import Any

from attnkit.masks import causal, chunked, dilated_window, fixed, global_tokens, strided, window
from attnkit.mechanisms.softmax.layer import SoftmaxConfig
from attnkit.positions import Rotary, T5Buckets
from attnkit.spec import LayerPlace, Preset


def _config(place: LayerPlace, **settings: Any) -> SoftmaxConfig:
    return SoftmaxConfig(place.width, place.heads, **{"qk_norm": place.qk_norm} | settings)


def _rotary(place: LayerPlace, **settings: Any) -> SoftmaxConfig:
    return _config(place, rotary=Rotary(place.width // place.heads), **settings)


def _groups(place: LayerPlace) -> int:
    """A quarter of the heads, as Llama 3 has; two where there are only four."""
    return place.heads // 4 if place.heads >= 8 else max(1, place.heads // 2)


PRESETS = (
    Preset("mha", "Multi-head (MHA)", "arXiv 1706.03762", _rotary),
    Preset("mqa", "Multi-query (MQA)", "arXiv 1911.02150", lambda p: _rotary(p, kv_heads=1)),
    Preset("gqa", "Grouped-query (GQA)", "arXiv 2305.13245", lambda p: _rotary(p, kv_heads=_groups(p))),
    Preset("window", "Sliding window", "arXiv 2004.05150", lambda p: _rotary(p, mask=window(p.window))),
    Preset(
        "window_sinks",
        "Window + 4 first tokens",
        "arXiv 2309.17453",
        lambda p: _rotary(p, mask=(window(p.window) | global_tokens(4)) & causal()),
    ),
    Preset(
        "streaming",
        "StreamingLLM",
        "arXiv 2309.17453",
        lambda p: _rotary(p, mask=(window(p.window) | global_tokens(4)) & causal(), positions="cache"),
    ),
    Preset(
        "dilated",
        "Dilated window",
        "arXiv 2004.05150",
        # Not in every layer: with the same dilation throughout, positions of odd distance would never meet.
        lambda p: _rotary(p, mask=window(p.window) if p.layer % 2 else dilated_window(p.window, 2)),
    ),
    Preset(
        "strided",
        "Strided (Sparse Transformer)",
        "arXiv 1904.10509",
        lambda p: _rotary(p, mask=strided(max(1, p.window // 2))),
    ),
    Preset(
        "fixed",
        "Fixed (Sparse Transformer)",
        "arXiv 1904.10509",
        lambda p: _rotary(p, mask=fixed(p.window, max(1, p.window // 8))),
    ),
    Preset("chunked", "Chunked-local", "Llama 4, 2025", lambda p: _rotary(p, mask=chunked(p.window) & causal())),
    Preset(
        "global_local",
        "Global + local layers",
        "arXiv 2408.00118",
        lambda p: _rotary(p, mask=causal() if p.layer % 2 else window(p.window)),
    ),
    Preset("nope", "No positions (NoPE)", "arXiv 2305.19466", _config),
    Preset("alibi", "ALiBi", "arXiv 2108.12409", lambda p: _config(p, alibi=True)),
    Preset("t5", "T5 relative bias", "arXiv 1910.10683", lambda p: _config(p, t5=T5Buckets(), scale=1.0)),
    Preset("sink", "Learned sink logit", "gpt-oss, 2025", lambda p: _rotary(p, sink=True)),
    Preset("softcap", "Soft-capped logits", "arXiv 2408.00118", lambda p: _rotary(p, softcap=50.0)),
    Preset("qk_norm", "QK-norm", "arXiv 2302.05442", lambda p: _rotary(p, qk_norm=True)),
)
