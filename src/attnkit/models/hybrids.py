"""Hybrids: decoders whose layers alternate between mixers, by the presets that they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from attnkit import registry
from attnkit.models.decoder import DecoderConfig, Mixer
from attnkit.spec import LayerPlace, Mechanism, Preset


@dataclass(frozen=True)
class Hybrid:
    """A pattern of presets, ``mechanism/preset`` each, repeated over the layers of a model."""

    name: str
    title: str
    paper: str
    pattern: tuple[str, ...]

    @property
    def layers(self) -> str:
        """What it is made of: ``5 window : 1 mha``."""
        names = [name.partition("/")[2] for name in self.pattern]
        return " : ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))

    @property
    def installed(self) -> bool:
        """Whether every mechanism that it is made of is there."""
        return all(registry.presets(name) for name in self.pattern)


HYBRIDS = (
    Hybrid("window_5_1", "Window 5 : 1 full", "arXiv 2503.19786", ("softmax/window",) * 5 + ("softmax/mha",)),
    Hybrid(
        "gated_deltanet_3_1",
        "Gated DeltaNet 3 : 1 gated softmax",
        "Qwen3-Next, 2025",
        ("delta/gated_deltanet",) * 3 + ("gated/gate_channels",),
    ),
    Hybrid("kda_3_1", "Kimi Delta 3 : 1 MLA", "arXiv 2510.26692", ("delta/kda",) * 3 + ("mla/mla_nope",)),
    Hybrid("lightning_7_1", "Lightning 7 : 1 GQA", "arXiv 2501.08313", ("retention/lightning",) * 7 + ("softmax/gqa",)),
    Hybrid("csa_hca", "CSA and HCA in turn", "DeepSeek-V4, 2026", ("compressed/csa", "compressed/hca")),
)


def at(pattern: Sequence[str], place: LayerPlace) -> tuple[Mechanism, Preset]:
    """The mechanism and the preset of the layer at ``place``.

    A model with fewer layers than the pattern gets the pattern's end, so that it is a hybrid too: two layers of "seven
    lightning, one softmax" are one of each.

    Raises ``ValueError`` for a name that no preset has, or that several have.
    """
    name = pattern[(place.layer - min(0, place.layers - len(pattern))) % len(pattern)]
    found = registry.presets(name)
    if len(found) != 1:
        are = " and ".join(f"{spec.name}/{preset.name}" for spec, preset in found) or "none"
        raise ValueError(f"{name!r} in a pattern names {are}, expected one preset: see attnkit list")
    return found[0]


def layer(pattern: Sequence[str], place: LayerPlace) -> nn.Module:
    """The mixer that stands at ``place`` of a model with this pattern of presets."""
    spec, preset = at(pattern, place)
    made: nn.Module = spec.layer(preset.configure(place))
    return made


def mixer(config: DecoderConfig, *names: str, heads: int, window: int = 128, qk_norm: bool = False) -> Mixer:
    """What ``Decoder(config, ...)`` takes, from presets: ``mixer(config, "window", "mha", heads=4)``.

    ``names`` are a pattern of presets, or one hybrid such as ``"window_5_1"``. Presets are told which layer of how many
    each is, for slopes and schedules that depend on it; ``window`` is what local ones see.
    """
    pattern = next((known.pattern for known in HYBRIDS if names == (known.name,)), names)
    return lambda index: layer(pattern, LayerPlace(config.width, heads, window, index, config.layers, qk_norm))
