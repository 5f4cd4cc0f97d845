"""Finds mechanisms: every folder of ``attnkit.mechanisms``, and what other packages offer by entry point."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

import attnkit.mechanisms
from attnkit.spec import Mechanism, Preset

ENTRY_POINTS = "attnkit.mechanisms"


@cache
def mechanisms() -> dict[str, Mechanism]:
    """All mechanisms by name; another package adds one by an entry point ``attnkit.mechanisms`` naming its record."""
    found: dict[str, Mechanism] = {}
    for module in iter_modules(attnkit.mechanisms.__path__):
        _add(found, module.name, import_module(f"attnkit.mechanisms.{module.name}").SPEC)
    for entry in entry_points(group=ENTRY_POINTS):
        _add(found, entry.name, entry.load())
    return found


def _add(found: dict[str, Mechanism], name: str, spec: object) -> None:
    if not isinstance(spec, Mechanism) or spec.name != name:
        got = f"a mechanism named {spec.name!r}" if isinstance(spec, Mechanism) else f"a {type(spec).__name__}"
        raise RuntimeError(f"{name!r} holds {got}, expected a Mechanism of that name")
    if name in found:
        raise RuntimeError(f"two mechanisms are named {name!r}: rename the one outside attnkit")
    found[name] = spec


def get(name: str) -> Mechanism:
    """The mechanism called ``name``: ``attnkit.get("softmax").papers``."""
    if name not in mechanisms():
        raise ValueError(f"there is no mechanism {name!r}: name one of {', '.join(mechanisms())}")
    return mechanisms()[name]


def presets(name: str) -> list[tuple[Mechanism, Preset]]:
    """Every preset called ``gqa``, or the one called ``softmax/gqa``, with its mechanism; none where there is none."""
    mechanism, _, preset = name.rpartition("/")
    specs = (spec for spec in mechanisms().values() if mechanism in ("", spec.name))
    return [(spec, found) for spec in specs for found in spec.presets if found.name == preset]
