"""Layers of DeepSeek-V4 at the size of a small decoder."""

from __future__ import annotations

from typing import Any

from attnkit.mechanisms.compressed.layer import CompressedConfig
from attnkit.positions import Rotary
from attnkit.spec import LayerPlace, Preset


def _config(place: LayerPlace, **settings: Any) -> CompressedConfig:
    size = place.width // place.heads
    return CompressedConfig(
        place.width,
        place.heads,
        window=place.window,
        rotary=Rotary(2 * max(1, size // 4), style="interleaved"),
        groups=2 if place.heads % 2 == 0 else 1,
        index_size=max(size, 2),
        **settings,
    )


def _csa(place: LayerPlace) -> CompressedConfig:
    return _config(place, kind="csa", rate=min(4, place.window), top=max(1, place.window // 2))


def _hca(place: LayerPlace) -> CompressedConfig:
    # A window as long as an entry's: every token is seen by itself until it is part of an entry.
    return _config(place, kind="hca", rate=place.window)


PRESETS = (
    Preset("csa", "Compressed sparse (CSA)", "DeepSeek-V4, 2026", _csa),
    Preset("hca", "Heavily compressed (HCA)", "DeepSeek-V4, 2026", _hca),
)
