"""Processors by what they can do at most: published figures with their source, or those measured on this machine."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

GIB = 1 << 30
KINDS = ("gpu", "cpu")


@dataclass(frozen=True)
class Hardware:
    """One kind of processor, or several of them as one.

    ``memory`` in bytes, of which ``usable`` is given to a model; ``bandwidth`` in bytes and ``rates`` in operations a
    second, by the type of what is multiplied; ``source`` says where the figures are from.
    """

    name: str
    title: str
    kind: str
    memory: float
    bandwidth: float
    rates: Mapping[str, float]
    source: str
    usable: float = 0.9
    count: int = 1
    measured: bool = False

    def rate(self, dtype: str) -> float:
        """Operations a second on numbers of ``dtype``; what lacks it computes in the nearest type it has."""
        for name in (dtype, "bfloat16", "float16", "float32"):
            if name in self.rates:
                return self.rates[name]
        return max(self.rates.values())

    def times(self, count: int) -> Hardware:
        """``count`` of them, as if nothing had to be said between them: a bound that no real system reaches."""
        return replace(
            self,
            name=f"{count}x{self.name}",
            title=f"{count} x {self.title}",
            memory=self.memory * count,
            bandwidth=self.bandwidth * count,
            rates={name: rate * count for name, rate in self.rates.items()},
            count=self.count * count,
        )


@cache
def table() -> dict[str, Hardware]:
    """The processors that attnkit knows, by name."""
    text = (files("attnkit.advise") / "hardware.toml").read_text("utf-8")
    data = tomllib.loads(text)
    usable = data.pop("defaults")["usable"]
    return {name: _entry(name, entry, usable, "hardware.toml") for name, entry in data.items()}


def find(text: str) -> Hardware:
    """The hardware that ``text`` names: ``h100-sxm``, ``8xh200``, or a TOML file with one table or more."""
    if text == "here":
        return here()
    path = Path(text)
    if path.suffix == ".toml" or path.is_file():
        return _from_file(path)
    match = re.fullmatch(r"(?:(\d+)x)?([a-z0-9][a-z0-9.-]*)", text.lower())
    count, name = (int(match[1] or 1), match[2]) if match else (1, text)
    known = table()
    if name not in known or not 1 <= count <= 4096:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f" (did you mean {near[0]}?)" if near and name not in known else ""
        raise ValueError(
            f"hardware is {text!r}{hint}, expected one of {', '.join(known)}, several as 8xh200, a .toml file, or here"
        )
    return known[name] if count == 1 else known[name].times(count)


def here() -> Hardware:
    """This machine, as ``attnkit bench --limits`` measures it now with all of torch's threads; a fifth of a second."""
    import os

    import torch

    from attnkit import bench

    threads = torch.get_num_threads()
    found = bench.limits([threads])
    rates = {"float32": found.fma_gflops[threads] * 1e9}
    if found.dot_gflops:
        rates["bfloat16"] = found.dot_gflops[threads] * 1e9
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    title = f"{bench.cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"
    source = "measured here by attnkit bench --limits"
    return Hardware("here", title, "cpu", memory, found.read_gbs[threads] * 1e9, rates, source, measured=True)


def as_toml(found: Hardware) -> str:
    """A table that ``find`` reads from a file."""
    rates = ", ".join(f"{name} = {rate / 1e12:.4g}" for name, rate in found.rates.items())
    return "\n".join(
        (
            f"[{found.name}]",
            f"title = {json.dumps(found.title)}",
            f'kind = "{found.kind}"',
            f"memory = {found.memory / GIB:.4g}",
            f"bandwidth = {found.bandwidth / 1e9:.4g}",
            f"rates = {{ {rates} }}",
            f"source = {json.dumps(found.source)}",
            f"measured = {str(found.measured).lower()}",
        )
    )


def _from_file(path: Path) -> Hardware:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML ({error}), expected a table like those of hardware.toml") from None
    usable = data.pop("defaults", {}).get("usable", 0.9)
    tables = {name: entry for name, entry in data.items() if isinstance(entry, dict) and name != "rates"}
    if "bandwidth" in data:
        tables = {path.stem: data}
    if len(tables) != 1:
        raise ValueError(f"{path} has {len(tables)} tables, expected one processor")
    ((name, entry),) = tables.items()
    return _entry(name, entry, usable, str(path))


def _entry(name: str, entry: Mapping[str, Any], usable: float, file: str) -> Hardware:
    def figure(key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise ValueError(f"{file}: {name}.{key} is {value!r}, expected a number above 0")
        return float(value)

    expected = {"title", "kind", "memory", "bandwidth", "rates", "source", "usable", "count", "measured"}
    if strange := sorted(set(entry) - expected):
        raise ValueError(f"{file}: {name}.{strange[0]} is not known, expected some of {', '.join(sorted(expected))}")
    for key in ("memory", "bandwidth", "rates", "source"):
        if key not in entry:
            raise ValueError(f"{file}: {name}.{key} is missing, expected title, kind, memory, bandwidth, rates, source")
    if entry.get("kind", "gpu") not in KINDS:
        raise ValueError(f"{file}: {name}.kind is {entry['kind']!r}, expected gpu or cpu")
    if not isinstance(entry["rates"], dict) or not entry["rates"]:
        raise ValueError(f"{file}: {name}.rates is {entry['rates']!r}, expected rates by type, such as bfloat16 = 312")
    part = figure("usable", entry.get("usable", usable))
    if part > 1:
        raise ValueError(f"{file}: {name}.usable is {part}, expected at most 1")
    found = Hardware(
        name=name,
        title=str(entry.get("title", name)),
        kind=str(entry.get("kind", "gpu")),
        memory=figure("memory", entry["memory"]) * GIB,
        bandwidth=figure("bandwidth", entry["bandwidth"]) * 1e9,
        rates={key: figure(f"rates.{key}", value) * 1e12 for key, value in entry["rates"].items()},
        source=str(entry["source"]),
        usable=part,
        measured=bool(entry.get("measured", False)),
    )
    count = entry.get("count", 1)
    return found if count == 1 else found.times(int(figure("count", count)))
