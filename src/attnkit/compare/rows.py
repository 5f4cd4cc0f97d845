"""What is compared: each preset of each mechanism can be a row, and so can each hybrid of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from torch import nn

from attnkit import registry
from attnkit.models import hybrids
from attnkit.spec import LayerPlace

QUICK = ("mha", "mqa", "gqa", "window", "window_sinks", "dilated", "strided", "global_local")
ALL_HYBRIDS = "hybrids"
"""Stands for every hybrid, as a mechanism's name stands for all its presets."""


@dataclass(frozen=True)
class Row:
    """The attention layers to compare, under a name that means them alone: ``gqa``, or ``mechanism/gqa`` if need be.

    ``pattern`` names the presets that the layers of a model take in turn, ``mechanism/preset``: one, but for hybrids.
    """

    name: str
    title: str
    pattern: tuple[str, ...]

    @property
    def hybrid(self) -> bool:
        return len(self.pattern) > 1

    def layer(self, place: LayerPlace) -> nn.Module:
        """The attention layer that stands at ``place``."""
        return hybrids.layer(self.pattern, place)

    def kinds(self, layers: int) -> list[str]:
        """The preset of each layer of a model with so many."""
        return [hybrids.at(self.pattern, LayerPlace(1, 1, 1, i, layers))[1].name for i in range(layers)]


@cache
def known() -> tuple[Row, ...]:
    """Every row there is: presets in the order of the registry, then the hybrids whose mechanisms are all there."""
    pairs = [(spec.name, preset) for spec in registry.mechanisms().values() for preset in spec.presets]
    mixed = [hybrid for hybrid in hybrids.HYBRIDS if hybrid.installed]
    # A mechanism's name stands for all its rows, so it counts as taken.
    times = Counter([preset.name for _, preset in pairs] + list(registry.mechanisms()) + [h.name for h in mixed])
    single = []
    for spec, preset in pairs:
        full = f"{spec}/{preset.name}"
        single.append(Row(preset.name if times[preset.name] == 1 else full, preset.title, (full,)))
    return (*single, *(Row(hybrid.name, hybrid.title, hybrid.pattern) for hybrid in mixed))


def select(names: Sequence[str]) -> tuple[Row, ...]:
    """Rows by name: ``gqa``, ``softmax/gqa``, ``softmax`` for all that this mechanism has, ``hybrids``; each once."""
    found = [row for name in names for row in _find(name)]
    return tuple({row.name: row for row in found}.values())


def _find(name: str) -> list[Row]:
    if name == ALL_HYBRIDS:
        return [row for row in known() if row.hybrid]
    if name in registry.mechanisms():
        return [row for row in known() if not row.hybrid and row.pattern[0].startswith(f"{name}/")]
    patterns = [(f"{spec.name}/{preset.name}",) for spec, preset in registry.presets(name)]
    found = [row for row in known() if row.pattern in patterns or (row.hybrid and row.name == name)]
    if len(found) > 1:
        raise ValueError(f"{name!r} names {' and '.join(row.name for row in found)}: say which one")
    if not found:
        names = ", ".join(row.name for row in known())
        raise ValueError(f"there is no row {name!r} to compare: name some of {names}, or a mechanism for all it has")
    return found
