"""What is compared: each preset of each mechanism can be a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from torch import nn

from attnkit import registry
from attnkit.spec import LayerPlace, Mechanism, Preset

QUICK = ("mha", "mqa", "gqa", "window", "window_sinks", "dilated", "strided", "global_local")


@dataclass(frozen=True)
class Row:
    """One attention layer to compare, under a name that means it alone: ``gqa``, or ``mechanism/gqa`` if need be."""

    name: str
    mechanism: Mechanism
    preset: Preset

    def layer(self, place: LayerPlace) -> nn.Module:
        """The attention layer that stands at ``place``."""
        made: nn.Module = self.mechanism.layer(self.preset.configure(place))
        return made


@cache
def known() -> tuple[Row, ...]:
    """Every row there is, in the order of the registry."""
    pairs = [(spec, preset) for spec in registry.mechanisms().values() for preset in spec.presets]
    # A mechanism's name stands for all its rows, so it counts as taken.
    times = Counter([preset.name for _, preset in pairs] + list(registry.mechanisms()))
    return tuple(
        Row(preset.name if times[preset.name] == 1 else f"{spec.name}/{preset.name}", spec, preset)
        for spec, preset in pairs
    )


def select(names: Sequence[str]) -> tuple[Row, ...]:
    """Rows by name: ``gqa``, ``softmax/gqa``, or ``softmax`` for all that this mechanism has; each once."""
    found = [row for name in names for row in _find(name)]
    return tuple({row.name: row for row in found}.values())


def _find(name: str) -> list[Row]:
    mechanism, _, preset = name.rpartition("/")
    if not mechanism and name in registry.mechanisms():
        return [row for row in known() if row.mechanism.name == name]
    found = [row for row in known() if row.preset.name == preset and mechanism in ("", row.mechanism.name)]
    if len(found) > 1:
        raise ValueError(f"{name!r} names {' and '.join(row.name for row in found)}: say which one")
    if not found:
        names = ", ".join(row.name for row in known())
        raise ValueError(f"there is no row {name!r} to compare: name some of {names}, or a mechanism for all it has")
    return found
